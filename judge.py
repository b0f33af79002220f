"""Judge a model of the drawn world against the truth: pose, identity, pixels, and what leaks from the driver.

    python judge.py runs/toy-stage2 --sheet sheet.png

A pair is a person A, a motion, and another person B who performs it. The model gets one picture of A (another moment
of the clip), Pose and Face Cue of B, and the Location Cue of A's own clip, as the paper evaluates (pose and face from
pseudo drivers, place from the clip). Truth is A performing the motion: a drawn world has it, real data never do.

    masked L1, masked PSNR   over A's silhouette, two pixels wider; gray levels, dB
    face L1                  over A's visible face; gray levels
    joint error              how far from its true place, in pixels, the patch around a visible joint is found in the
                             output; see `locate`
    identity                 of 16 people, A and B among them: are the silhouette's colours nearest to A's?
    leaks                    how much of B's colours, texture and outline is in the output: see `leaks`
    seam                     change between frames where two latent frames meet, divided by the change elsewhere. Windows of
                             long clips (--frames 497) meet at such places too: their joins are invisible if the number
                             equals that of 17 frames, which are one window
    drift                    of long clips: what masked L1 gains in 100 frames, and its standard error

The trivial answers they are compared with: A's picture standing still, and the driver's own frames.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import cues
import data
import finder
import toy
from align import transform, warp
from data import (
    ASSETS,
    TOY_SIZE,
    TOY_TEXT,
    encode_cues,
    encode_image,
    padded,
    to_picture,
    to_tensor,
    toy_text,
    window_inputs,
)
from diffusion import Schedule, ddim, dpm_solver, windows
from evaluate import masked_l1, masked_psnr, mean, save
from load_cogvideox import check_dit, load_weights
from machine import device_name, pick_device
from ranks import read_log
from vae import VAE_PRESETS
from video import Parser, check_output, natural, real, write_gif, write_image

FIRST = 2_000_000  # pairs from this number on; data.py draws none of them
FRAMES = 17  # of a window of 5 latents
REACH, PATCH = 16, 6  # pixels that `locate` searches to each side, and half a patch
PEOPLE = 16


class Pair(NamedTuple):
    still: toy.Clip  # one frame of A, the reference
    truth: toy.Clip  # A performs the motion
    driver: toy.Clip  # B performs it
    seen: toy.Clip  # the same as the model is shown it, degraded in the rows of A.6
    others: list[toy.Clip]  # 14 more who do, a few frames of each

    @property
    def reference(self) -> np.ndarray:
        """(H, W, 3) uint8"""
        return self.still.video[0]


def reference_moment(length: int) -> int:
    """The reference's frame: after a short clip; in the middle of a long one, equally far from its start and end."""
    return 32 if length == FRAMES else length // 2


def draw_pair(number: int, degrade: str = "none", strength: float = 0.0, length: int = FRAMES) -> Pair:
    """Pair `number`; A.6: the driver seen through motion blur (over 4 x strength frames), little light or few pixels."""
    seed = FIRST + number
    still = toy.render(seed, seed, frames=1, size=TOY_SIZE, start=reference_moment(length))
    frames = lambda k: length if k < 2 else 3  # noqa: E731
    people = [toy.render(FIRST + 10_000 * k + number, seed, frames=frames(k), size=TOY_SIZE) for k in range(PEOPLE)]
    truth, driver, *others = people
    seen = driver
    if degrade == "motion_blur":
        seen = toy.render(FIRST + 10_000 + number, seed, frames=length, size=TOY_SIZE, shutter=4 * strength)
    elif degrade != "none":
        seen = replace(driver, video=toy.degrade(driver.video, degrade, strength, seed))
    return Pair(still, truth, driver, seen, others)


# ---- measures ------------------------------------------------------------------------------------------------------


def locate(truth: np.ndarray, mask: np.ndarray, joint: np.ndarray, picture: np.ndarray) -> float:
    """Distance in pixels between a joint of the true picture and the place in `picture` that looks most like it.

    The 13 x 13 pixels around the joint, inside the person's mask, are moved up to 16 pixels each way over `picture`;
    the place with the least squared difference wins. Where every place looks alike, as in an empty picture, and unlike
    the truth, the error is 16. truth, picture (H, W, 3) uint8; mask (H, W) bool; joint (x, y), inside the mask's box.
    """
    x, y = np.rint(joint).astype(int) + PATCH + REACH
    pad = lambda p: cv2.copyMakeBorder(p, *[PATCH + REACH] * 4, cv2.BORDER_REPLICATE)  # noqa: E731
    around = lambda p, r: p[y - r : y + r + 1, x - r : x + r + 1]  # noqa: E731
    patch, search = around(pad(truth), PATCH), around(pad(picture), PATCH + REACH)
    inside = around(pad(mask.astype(np.uint8)), PATCH).astype(np.float32)
    cost = cv2.matchTemplate(
        np.float32(search), np.float32(patch), cv2.TM_SQDIFF, mask=np.repeat(inside[..., None], 3, 2)
    )
    one_level = max(inside.sum(), 1) * 3  # what a difference of one gray level costs
    if np.ptp(cost) < one_level < cost.min():
        return float(REACH)
    away = np.hypot(*np.mgrid[-REACH : REACH + 1, -REACH : REACH + 1])
    return float(away.flat[np.argmin(cost + 3e-4 * away * one_level)])  # of equal places the nearest


def joint_errors(truth: toy.Clip, video: np.ndarray) -> list[float]:
    """`locate` for every joint that can be seen, over all frames."""
    errors = []
    for frame in range(len(video)):
        for joint in truth.joints[frame][truth.visible[frame]]:
            errors.append(locate(truth.video[frame], truth.body[frame], joint, video[frame]))
    return errors


def clothes(video: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """(4, 3): the mean colour, in CIE Lab, of four bands of the silhouettes (T, H, W), from head to feet."""
    bands = [[] for _ in range(4)]
    for frame, mask in zip(video, masks):
        lab = cv2.cvtColor(np.float32(frame) / 255, cv2.COLOR_RGB2Lab)
        rows = np.nonzero(mask)[0]
        for band, part in zip(bands, np.array_split(np.sort(rows), 4)):  # a quarter of the silhouette's pixels each
            inside = mask.copy()
            inside[: part[0]], inside[part[-1] + 1 :] = False, False
            band.append(lab[inside].mean(0))
    return np.array([np.mean(band, axis=0) for band in bands])


def nearest_person(video: np.ndarray, pair: Pair) -> int:
    """Index, among A, B and the 14 others, of the one whose colours are nearest; 0 is right."""
    found = clothes(video, pair.truth.body)
    people = [pair.truth, pair.driver, *pair.others]
    return int(np.argmin([np.linalg.norm(found - clothes(c.video, c.body), axis=1).sum() for c in people]))


def leaks(pair: Pair, video: np.ndarray) -> dict[str, float]:
    """What of the driver B shows in a picture of A; 0 on the truth in all three, and in what is wrong but not B's.

    leak_color    how far the silhouette's colours went from A's towards B's (1: B's), beyond how far towards 14 others'
    leak_texture  where both bodies are, detail (what a blur of 1.5 px removes) fitted by A's and B's: the share of B's
    leak_outline  where only B stands, the picture but for its mean fitted by A's and B's: the share of B's
    """
    a, found = clothes(pair.truth.video, pair.truth.body), clothes(video, pair.truth.body)
    b, *others = (clothes(c.video, c.body) for c in (pair.driver, *pair.others))
    towards = lambda wrong, start, end: ((wrong - start) * (end - start)).sum() / np.square(end - start).sum()  # noqa: E731
    color = towards(found, a, b) - np.mean([towards(found, a, other) for other in others])

    def share(parts: list[np.ndarray]) -> float:
        """(n, 3) each of A, B and the picture: the picture's fit by A and B, of which B's part."""
        return np.linalg.lstsq(np.stack([p.ravel() for p in parts[:2]], 1), parts[2].ravel(), rcond=None)[0][1]

    videos = pair.truth.video, pair.driver.video, video
    detail = lambda v: np.stack([np.float32(f) - cv2.GaussianBlur(np.float32(f), (0, 0), 1.5) for f in v])  # noqa: E731
    both = pair.truth.body & pair.driver.body
    texture = share([detail(v)[both] for v in videos]) if both.any() else np.nan

    a_and_rim = np.stack([cv2.dilate(np.uint8(mask), np.ones((5, 5))) for mask in pair.truth.body]) > 0
    alone = pair.driver.body & ~a_and_rim
    centred = lambda v: np.float32(v)[alone] - np.float32(v)[alone].mean(0)  # noqa: E731
    outline = share([centred(v) for v in videos]) if alone.any() else np.nan
    return {"leak_color": float(color), "leak_texture": float(texture), "leak_outline": float(outline)}


def seam(video: np.ndarray) -> float:
    """Median change across the border of two latent frames, divided by the median change within latent frames.

    Windows start at even latent frames and end at odd ones, so two of them meet at every border. NaN where nothing moves.
    """
    change = [np.abs(np.float32(b) - a).mean() for a, b in zip(video, video[1:])]
    within = np.median([c for t, c in enumerate(change) if t % 4])
    return float(np.median(change[::4]) / within) if within else np.nan


def drift(errors: list[float]) -> float:
    """The slope of a frame's masked L1, in gray levels per 100 frames."""
    return float(np.polyfit(np.arange(len(errors)) / 100, errors, 1)[0])


def measure(pair: Pair, video: np.ndarray) -> dict:
    """One clip (T, H, W, 3) uint8 against the truth; NaN where nothing is to be seen (no face, no background)."""
    masks = [cv2.dilate(body.astype(np.uint8), np.ones((5, 5), np.uint8)) for body in pair.truth.body]
    frames = list(zip(video, pair.truth.video, masks))
    errors = [masked_l1(*frame) for frame in frames]
    # of fewer than 9 pixels no face is seen
    faces = [masked_l1(*frame) for frame in zip(video, pair.truth.video, pair.truth.face) if frame[2].sum() >= 9]
    return {
        "masked_l1": float(np.mean(errors)),
        "masked_psnr": float(np.mean([masked_psnr(*frame) for frame in frames])),
        "face_l1": mean(faces),
        "joint_error": joint_errors(pair.truth, video),
        "identity": float(nearest_person(video, pair) == 0),
        **leaks(pair, video),
        "seam": seam(video),
        **({"drift": drift(errors)} if len(video) > FRAMES else {}),
    }


def summary(rows: list[dict]) -> dict:
    """Means over clips; of the joint error the median over all joints of all clips; of the drift also its standard error."""
    means = {name: mean([row[name] for row in rows]) for name in rows[0] if name != "joint_error"}
    if "drift" in means and len(rows) > 1:
        means["drift_error"] = float(np.std([row["drift"] for row in rows], ddof=1) / len(rows) ** 0.5)
    return means | {"joint_error": float(np.median(np.concatenate([row["joint_error"] for row in rows])))}


# ---- sampling ------------------------------------------------------------------------------------------------------


def moved(clip: toy.Clip, scale: float, shift_xy: np.ndarray) -> toy.Clip:
    """The clip after Eq. 11, its borders repeated."""
    matrix, (height, width) = np.float64([[scale, 0, shift_xy[0]], [0, scale, shift_xy[1]]]), clip.body.shape[1:]
    draw = lambda frame: cv2.warpAffine(frame, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE)  # noqa: E731
    body, face = (warp(masks, scale, shift_xy) for masks in (clip.body, clip.face))
    joints = transform(clip.joints, scale, shift_xy)
    inside = ((joints > -0.5) & (joints < (width - 0.5, height - 0.5))).all(-1)
    shown = {"body_boxes": toy.mask_boxes(body), "face_boxes": toy.mask_boxes(face), "visible": clip.visible & inside}
    return replace(clip, video=np.stack([draw(f) for f in clip.video]), body=body, face=face, joints=joints, **shown)


def place_of(pair: Pair, args, generator: np.random.Generator) -> tuple:
    """(frames, Track) whose masks say where A stands: of A's own clip, or B's, aligned to A's picture as sample.py does."""
    if args.place == "clip":
        return data.toy_pair(pair.truth, args, generator)[1]
    reference_mask = finder.paint_mask(pair.still.body[0], pair.still.face[0])
    find = replace(data.toy_finder(pair.seen), reference_mask=reference_mask)
    return pair.seen.video, cues.analyse(pair.seen.video, pair.reference, find, cues.CueOptions())


def conditions(vae, pair: Pair, args, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """The reference's latent (1, 16, h, w), and pose and face cues (1, 1+f, 17, h, w) with the reference's own at slot 0."""
    looks = replace(data.toy_looks(args), location=args.location, cell=args.soften_cell)
    device = next(vae.parameters()).device
    generator = data.keyed(FIRST, number)
    streams = []
    for clip in (pair.still, pair.seen):
        body, face = data.toy_pair(clip, args, generator)
        place = face if clip is pair.still else place_of(pair, args, generator)
        along = (place[1].scale, place[1].shift_xy) if args.place == "aligned" else None  # the reference's own: 1, 0
        poses = cues.render(*body, options=looks, misalign=along)
        rows = zip(poses, *(cues.render(*source, options=looks) for source in (face, place)))
        mixed = ((pose[0], face[1], *place[2:]) for pose, face, place in rows)
        streams.append(encode_cues(vae, padded(mixed), device, vae.config.scaling_factor))
    pose, face = (torch.cat(two, 1) for two in zip(*streams))
    image = encode_image(vae, to_tensor(pair.reference)[None].to(device))
    return image, pose.to(device), face.to(device) * (args.face != "none")


@torch.inference_mode()
def generate(
    model, vae, pairs: list[Pair], numbers: list[int], args, seed: int, window=5, ref_slot="reference"
) -> list[np.ndarray]:
    """Videos (T, H, W, 3) uint8, one a pair; the noise of a pair depends on its number and the seed."""
    parts = zip(*(conditions(vae, p, args, n) for p, n in zip(pairs, numbers)))
    image, pose, face = (torch.cat(part) for part in parts)
    generators = [torch.Generator().manual_seed(1000 * seed + n) for n in numbers]
    draw = lambda: torch.stack([torch.randn(pose[0, :, :16].shape, generator=g) for g in generators]).to(pose)  # noqa: E731
    text = toy_text().expand(len(pairs), -1, -1).to(pose)

    def velocity(latents: Tensor, step: int, start: int) -> Tensor:
        x, *cue_streams = window_inputs(latents, start, image, pose, face, ref_slot)
        return model(x, torch.tensor([step], device=x.device), text, *cue_streams).float()

    fused = windows(velocity, pose.shape[1] - 1, window)
    solver, extra = (dpm_solver, {"noise": draw}) if args.sampler == "dpm" else (ddim, {})
    latents = solver(fused, draw(), Schedule(), args.steps, **extra)[:, 1:]
    video = torch.cat([vae.decode(z[None]).float() for z in latents / vae.config.scaling_factor])
    return list(to_picture(video)[:, : args.frames])


def score(args) -> dict:
    """Numbers of the model, for each sampling seed, and of the trivial answers: means over pairs."""
    if args.strength != 1 and args.degrade == "none":
        raise ValueError(f"--strength {args.strength:g} is of --degrade: name what is wrong with the driving clips")
    if args.joint_noise and args.pose_cue != "skeleton":
        raise ValueError(f"--joint-noise {args.joint_noise:g} is of skeletons: give --pose-cue skeleton")
    for path, suffixes in ((args.sheet, (".png", ".gif")), (args.output, (".json",))):
        if path:
            check_output(path, suffixes=suffixes)
    header = check_dit(args.checkpoint, TOY_TEXT[1], args.location, args.face)
    trained = {name: header[name] for name in ("window", "ref_slot") if name in header}
    check_looks(args)
    training = history(args.checkpoint)
    if args.frames > 4 * trained.get("window", 5) - 3 and trained.get("ref_slot") == "copy":
        raise ValueError(
            f"--frames {args.frames}: --ref-slot copy, as {args.checkpoint} was trained, knows one window only"
        )
    if args.frames < FRAMES:
        raise ValueError(f"--frames {args.frames}: a window has {FRAMES}, give that or more")
    device, dtype, _ = pick_device(args.device)
    model = load_weights(args.checkpoint, dtype)[0].to(device).eval()
    vae = load_weights(args.vae, dtype, VAE_PRESETS["toy"])[0].to(device).eval()
    seeds = [f"seed {s}" for s in range(args.seeds)]
    rows = {name: [] for name in ("truth", "still reference", "driver's frames", *seeds)}
    shown, together = [], max(8 * FRAMES // args.frames, 1)
    for first in tqdm(range(0, args.pairs, together), desc="score", unit="batch"):
        numbers = list(range(first, min(first + together, args.pairs)))
        pairs = [draw_pair(n, args.degrade, args.strength, args.frames) for n in numbers]
        if args.place == "aligned":  # the truth by its own similarity, as B by B's: A keeps her height
            tracks = [place_of(pair._replace(seen=pair.truth), args, None)[1] for pair in pairs]
            pairs = [p._replace(truth=moved(p.truth, t.scale, t.shift_xy)) for p, t in zip(pairs, tracks)]
        if args.frames > FRAMES:
            rows["truth"] += [measure(p, p.truth.video) for p in pairs]
        rows["still reference"] += [measure(p, np.stack([p.reference] * args.frames)) for p in pairs]
        rows["driver's frames"] += [measure(p, p.seen.video) for p in pairs]
        for seed in range(args.seeds):
            videos = generate(model, vae, pairs, numbers, args, seed, **trained)
            rows[seeds[seed]] += [measure(p, video) for p, video in zip(pairs, videos)]
            if seed == 0 and len(shown) < args.rows:
                shown += zip(pairs, videos)
    answers = {name: summary(values) for name, values in rows.items() if values}
    result = {name: header.get(name) for name in ("stage", "step")} | {"checkpoint": args.checkpoint.name}
    kept = "pairs", "frames", "sampler", "degrade", "strength", "place", "soften_cell"
    result |= {name: getattr(args, name) for name in kept}
    result |= {"sampling_steps": args.steps, "machine": device_name(device)}
    result |= {"answers": answers, "training": training}
    print(table(answers))
    if args.output:
        save(result, args.output)
    if args.sheet:
        write_sheet(args.sheet, shown[: args.rows])
        print(f"wrote {args.sheet}")
    return result


def check_looks(args) -> None:
    """ValueError if a run's data has other cues than the flags say: it would be judged by a task it never saw."""
    config = args.checkpoint / "config.json"
    looks = Path(json.loads(config.read_text())["data"]) / "toy.json" if config.is_file() else config
    if not looks.is_file():
        return
    trained = json.loads(looks.read_text())
    for name in ("pose_cue", "joint_noise", "face_cue"):
        if getattr(args, name) != trained[name]:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} {getattr(args, name)}: {args.checkpoint} was trained with {flag} {trained[name]}")


def history(checkpoint: Path) -> dict:
    """Of a run folder: settings, and the held-out loss by step. Of a file: nothing."""
    if not (checkpoint / "log.jsonl").is_file():
        return {}
    lines = read_log(checkpoint)
    held_out = [(line["step"], round(line["held_out"], 6)) for line in lines if "held_out" in line]
    kept = "steps", "batch", "lr", "seed", "cooldown", "s2x_weight", "align_depth", "init", "cue_injection"
    settings = json.loads((checkpoint / "config.json").read_text())
    rates = [line["steps_per_s"] for line in lines if "steps_per_s" in line]
    return {name: settings[name] for name in kept} | {"steps_per_s": rates[-1] if rates else None, "held_out": held_out}


def write_sheet(path: Path, shown: list[tuple[Pair, np.ndarray]]) -> None:
    """reference | driver, output, truth; a row a pair, twice its size. As PNG three moments, as GIF all frames."""

    frames = len(shown[0][1])

    def row(pair: Pair, video: np.ndarray, frames: tuple) -> np.ndarray:
        gap = np.full((TOY_SIZE, 4, 3), 255, np.uint8)
        moments = [(gap, pair.seen.video[f], video[f], pair.truth.video[f]) for f in frames]
        return np.concatenate([pair.reference, *(picture for moment in moments for picture in moment)], axis=1)

    def sheet(*frames: int) -> np.ndarray:
        return np.concatenate([row(*entry, frames) for entry in shown]).repeat(2, 0).repeat(2, 1)

    if path.suffix.lower() == ".gif":
        write_gif(path, [sheet(f) for f in range(frames)], toy.FPS, comment=toy.DRAWN)
    else:
        write_image(path, sheet(0, frames // 2, frames - 1), comment=toy.DRAWN)


def table(answers: dict[str, dict]) -> str:
    """Markdown, a line an answer."""
    names = list(next(iter(answers.values())))
    lines = ["| answer | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    cells = {a: " | ".join(f"{row[n]:.3f}" for n in names) for a, row in answers.items()}
    return "\n".join(lines + [f"| {answer} | {row} |" for answer, row in cells.items()])


# fmt: off
def parse_args(argv=None) -> tuple[Parser, argparse.Namespace]:
    parser = Parser(__doc__, prog="judge.py")
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="?", default=ASSETS / "toy.safetensors", help="run folder or weights file of stage 1 or 2")
    add("--vae", type=Path, default=ASSETS / "toy-vae.safetensors", help="weights of the drawn world's VAE")
    add("--pairs", type=natural, default=64, help="pairs of a person and a motion, none of them in any training data")
    add("--seeds", type=natural, default=3, help="sampling seeds")
    add("--steps", type=natural, default=20, help="denoising steps")
    add("--sampler", choices=["dpm", "ddim"], default="dpm", help="dpm adds noise at each step, ddim does not")
    add("--frames", type=int, default=FRAMES, help="of a clip; more than 17 are sampled in windows, and judged over time too")
    add("--pose-cue", choices=["lowpass", "gray", "rgb", "skeleton"], default="lowpass", help="as the model was trained")
    add("--joint-noise", type=real(0), default=0.0, help="as the model was trained")
    add("--face-cue", choices=["centered", "inplace"], default="centered", help="as the model was trained")
    add("--face", choices=["centered", "none"], default="centered", help="as the model was trained")
    add("--location", choices=["soft", "hard", "none"], default="soft", help="as the model was trained")
    add("--place", choices=["clip", "driver", "aligned"], default="clip", help="Location Cue of the person's own clip; or of the driver's, "
        "aligned; or that, with the Pose Cue moved too, as sample.py --preset toy does, and the truth aligned alike")
    add("--soften-cell", type=natural, default=16, help="side of the Location Cue's softening cells, pixels; training has 8, 16 and 32")
    add("--degrade", choices=["none", "motion_blur", "low_light", "low_resolution"], default="none", help="driving clips that A.6 says fail")
    add("--strength", type=real(0, 1), default=1.0, help="of --degrade, 0 to 1")
    add("--sheet", type=Path, metavar="FILE", help=".png or .gif: reference, driver, output and truth of the first pairs")
    add("--rows", type=natural, default=6, help="pairs on the sheet")
    add("--device", help="cuda, mps or cpu (default: the best one present)")
    add("-o", "--output", type=Path, metavar="JSON", help="write the numbers")
    return parser, parser.parse_args(argv)
# fmt: on


def main(argv=None) -> None:
    parser, args = parse_args(argv)
    try:
        score(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
