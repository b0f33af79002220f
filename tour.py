"""What README's tour says of the code, made from the code: shapes, line counts, where each equation is.

    python tour.py            # one training batch of stage 2 from pixels to loss, shape by shape
    python tour.py --write    # the same into README.md, with lengths of files and places of equations

The pictures of the batch are drawn and its cues are real; the networks run on the meta device, which knows shapes but no
numbers: the 5B model needs no memory. Equations are the paper's.
"""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import cues
import data
import toy
from data import OWN_PLACE, image_condition, pool_masks
from model import DIT_PRESETS, DiT, patchify
from train import same2x
from vae import VAE_PRESETS, CausalVAE
from video import Parser

HERE = Path(__file__).parent
MARKS = "<!-- shapes: python tour.py --write -->", "<!-- end of shapes -->"
SIZES = {  # frames, side in pixels, text tokens, vae, alignment depth
    "toy": (17, 96, 4, "toy", 1),
    "cogvideox1.5-5b": (49, 512, 226, "cogvideox1.5", 10),
}


def trace(preset: str) -> list[tuple[str, str, str]]:
    """(name, shape, note) of every step on the way."""
    rows = []
    show = lambda name, tensor, note="": rows.append((name, str(tuple(tensor.shape)), note))  # noqa: E731
    frames, side, length, vae_name, depth = SIZES[preset]
    config = DIT_PRESETS[preset]

    # pixels: A's clip, and B who moves like her
    still = toy.render(0, 0, frames=1, size=side), toy.render(1, 0, frames=1, size=side)
    own, other = (replace(clip, video=clip.video.repeat(frames, 0), body=clip.body.repeat(frames, 0),
                          face=clip.face.repeat(frames, 0)) for clip in still)  # fmt: skip
    show("A's clip", own.video, "one frame is the reference, a window the target")
    show("B's clip", other.video, "somebody else moves like her: the pseudo driver")

    # the Driving Cue Triplet (Sec. 3.1)
    track = lambda clip: cues.analyse(clip.video, clip.video[0], data.toy_finder(clip), OWN_PLACE)  # noqa: E731
    pairs = zip(cues.render(other.video, track(other)), cues.render(own.video, track(own)))
    pose, face, body, face_mask = (np.stack(part) for part in zip(*((*b[:2], *a[2:]) for b, a in pairs)))
    show("Pose Cue", pose, "gray, low-passed, on black")
    show("Face Cue", face, "cropped, enlarged, centred")
    show("Location Cue, body", body, "A's own, softened on a grid (sample.py: B's, moved by Eq. 9-12)")
    show("Location Cue, face", face_mask, "A's own, as it is")

    # latents: 8k+1 frames are 2k+1 latents
    with torch.device("meta"):
        vae, model = CausalVAE(VAE_PRESETS[vae_name]), DiT(config)
    encode = lambda video: vae.encode(torch.empty(1, *video.shape, device="meta"))[0]  # noqa: E731
    window = encode(own.video.transpose(0, 3, 1, 2))
    show("latents of the window", window, "of 8x8 pixels, and of 1 frame, then 4 at a time")
    reference = window[:, :1]
    latents = torch.cat([reference, window], dim=1)
    show("latents, slot 0 added", latents, "[reference, window]: what the model makes")
    condition = image_condition(torch.empty(reference.shape[0], *reference.shape[2:], device="meta"), latents.shape[1])
    show("image condition", condition, "the reference at slot 0, zeros elsewhere")
    masks = pool_masks(torch.from_numpy(body)).unsqueeze(0).to("meta")
    cue = torch.cat([encode(pose), masks], dim=2)
    cue = torch.cat([cue[:, :1], cue], dim=1)
    show("pose cue, face cue", cue, "16 latent channels and the mask; slot 0: the reference's own")

    # the network
    noisy = torch.cat([latents, condition], dim=2)  # noise does not change the shape (Eq. 6)
    show("noisy + condition", noisy, "Eq. 6, the image condition beside it")
    text, step = torch.empty(1, length, config.text_dim, device="meta"), torch.empty(1, device="meta")
    show("text states", text, "of T5; zeros in the drawn world")
    show("patches", patchify(noisy, config.patch), "2x2x2 latents are one token; in the drawn world 2x1x1")
    x, c, pose, face, t_emb, rope, _ = model.embed(noisy, step, text, cue, cue)
    show("x", x, "video tokens, ordered time, row, column")
    show("c", c, "text tokens")
    show("pose, face", pose, "cue streams")
    show("t_emb", t_emb, "time embedding")
    block = model.blocks[0]
    factors = block.cues.mlp(F.silu(t_emb))
    show("scale, shift, gate", factors, "Eq. 1, three for each cue")
    x, c, pose, face = block(x, c, pose, face, t_emb, rope)
    show("x after block 1", x, "Eq. 2-3, attention over [c, x], feed-forward")
    v, features = model(noisy, step, text, cue, cue, tap=depth)
    show("v", v, "after 4 blocks, 42 at full size")

    # the losses
    show("tokens of block D", features, "D = 1, 10 at full size; student and teacher")
    loss = F.mse_loss(v, latents, reduction="none").flatten(1).mean(1)
    show("v-MSE", loss, "Eq. 8 in v-prediction, one a sample")
    show("Same2X", same2x(features, features), "Eq. 4, one a sample")
    return rows


def table() -> str:
    small, full = trace("toy"), trace("cogvideox1.5-5b")
    lines = [f"{'':21s} {'drawn world':19s} {'CogVideoX1.5-5B':20s}"]
    lines += [f"{name:21s} {a:19s} {b:20s} {note}" for (name, a, note), (_, b, _) in zip(small, full)]
    return "\n".join(line.rstrip() for line in lines)


def place(name: str) -> str:
    """`module.Name` or `test_module.name` -> file.py:line of its definition."""
    module, name = name.split(".")
    path = Path("tests" if module.startswith("test_") else "") / f"{module}.py"
    start = re.compile(rf"(class|def) {name}\b")
    lines = enumerate((HERE / path).read_text().splitlines(), start=1)
    return f"{path}:{next(number for number, line in lines if start.match(line))}"


def refreshed(page: str) -> str:
    """The page with its generated parts made anew; everything else stays."""
    count = lambda files: sum(len((HERE / f).read_text().splitlines()) for f in re.findall(r"`(\w+\.py)`", files))  # noqa: E731
    page = re.sub(r"^(\| (`\w+\.py`[^|]*) \|) \d* \|", lambda m: f"{m[1]} {count(m[2])} |", page, flags=re.M)
    page = re.sub(r"`([\w.]+)` \([\w/]*\.py:\d+\)", lambda m: f"`{m[1]}` ({place(m[1])})", page)
    before, rest = page.split(MARKS[0])
    return f"{before}{MARKS[0]}\n```\n{table()}\n```\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--write", action="store_true", help="into README.md instead of the screen")
    if parser.parse_args().write:
        data.write_text(HERE / "README.md", refreshed((HERE / "README.md").read_text()))
    else:
        print(table())
