"""Animate the person of a picture with the motion of a driving video (paper Fig. 2a).

    python sample.py                                      # the drawn example, by the small model that comes with the code
    python sample.py photo.jpg dance.mp4 --backbone CogVideoX1.5-5B-I2V --checkpoint directanimator.safetensors

The steps, one network in memory at a time: find the person and the face in every driving frame (cues.py); text to T5
states; reference and cues to VAE latents; noise to latents with the DiT; latents to video. Every driving frame gives
one output frame, at the driving clip's own rate and with its sound.

Paper silent: size and rate of the output; the reference's aspect at about 512x512 pixels, and every driving frame.
"""

import argparse
import gc
import hashlib
import os
from contextlib import suppress
from functools import cache, partial
from itertools import islice
from pathlib import Path

# Before torch is imported: let idle OpenMP threads sleep early; spinning ones slow down a machine that is busy otherwise.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
ASSETS = Path(__file__).parent / "assets"
EXAMPLE = {  # what is animated when nothing is given
    "reference": ASSETS / "ref.png",
    "drive": ASSETS / "drive.mp4",
    "masks": ASSETS / "masks",
    "reference_mask": ASSETS / "ref_mask.png",
}


# fmt: off
def parse_args(argv=None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    import cues
    from video import Parser, area, rate, real, seed, whole

    parser = Parser(__doc__)
    add = parser.add_argument
    add("reference", type=Path, nargs="?", help="picture of the person to animate (default: a drawn one)")
    add("drive", type=Path, nargs="?", help="video, or folder of numbered frames, whose motion is followed")
    add("-o", "--output", type=Path, help="mp4, or gif without sound, to write (default: REFERENCE_DRIVE.mp4 in this folder)")
    add("--pose", dest="pose_video", type=Path, metavar="VIDEO", help="take the Pose Cue from this video, as long as DRIVE; DRIVE gives the place")
    add("--pose-masks", type=Path, metavar="PATH", help="its masks, as --masks are DRIVE's")
    add("--face", dest="face_video", type=Path, metavar="VIDEO", help="take the Face Cue from this video, as long as DRIVE")
    add("--face-masks", type=Path, metavar="PATH", help="its masks")
    add("--cache", type=Path, default=Path("~/.cache/directanimator"), metavar="DIR",
        help="remember masks and prompts here, so that a second run on the same files skips them")
    add("--every-step", action="store_true", help="also write OUTPUT_steps.png: the middle frame as each step predicts it")
    add("--compare", action="store_true", help="also write OUTPUT_compare: reference, driver, cues, output side by side")
    add = parser.add_argument_group("networks").add_argument
    add("--backbone", type=Path, metavar="DIR", help="local copy of the CogVideoX1.5-5B-I2V repository")
    add("--preset", choices=["toy", "tiny"], help="instead of a backbone: toy, the embedded model of the drawn world (the "
        "default); tiny, random weights that run every stage and paint noise")
    add("--checkpoint", type=Path, metavar="FILE", help="DiT weights that train.py wrote (toy: assets/toy.safetensors)")
    add("--device", help="cuda, mps or cpu (default: the best one present)")
    add("--dtype", choices=["bfloat16", "float32"], help="of the networks (default: bfloat16 where the hardware has it)")
    add("--tile", action=argparse.BooleanOptionalAction, help="run the VAE in tiles: less memory, more work (default: where it does not fit)")
    add("--offload", action=argparse.BooleanOptionalAction,
        help="send T5 and DiT to the device block by block: least memory, more time (default: where they do not fit)")
    add("--compile", action="store_true", help="torch.compile the DiT: minutes at first, faster steps")
    add = parser.add_argument_group("sampling").add_argument
    add("--prompt", help="describe the person and the background")
    add("--guidance", type=real(0), help="text guidance; 1 turns it off and halves the work (default: 3)")
    add("--sampler", choices=["dpm", "ddim"], default="dpm", help="DPM-Solver++(2M) SDE, or deterministic DDIM")
    add("--guidance-interval", type=real(0, 1), nargs=2, metavar=("FROM", "TO"),
        help="part of the steps that is guided; elsewhere the null branch is not run (default: 0 1)")
    add("--sequential", action=argparse.BooleanOptionalAction,
        help="run the two guidance branches one after the other: less memory (default: where both do not fit)")
    add("--steps", type=whole(1, 1000), help="denoising steps (default: 50)")
    add("--fast", action="store_true", help="20 steps")
    add("--seed", type=seed, default=0, help="of all noise; the same on every device")
    add("--area", type=area, help="pixels of the output, which has the reference's aspect (default: 512x512; toy: 96x96)")
    add("--fps", type=rate, help="pick driving frames at this rate (default: every frame)")
    cues.add_arguments(parser)
    parser.set_defaults(pose_place=None)
    args = parser.parse_args(argv)
    if args.backbone and args.preset:
        parser.error("--backbone and --preset exclude each other: give one")
    if args.reference and not args.drive:
        parser.error("give REFERENCE and DRIVE, or neither for the drawn example")
    if args.reference is None:
        for name, path in EXAMPLE.items():
            if getattr(args, name):
                parser.error(f"--{name.replace('_', '-')} is of clips of yours: give REFERENCE and DRIVE too")
            setattr(args, name, path)
    if args.fast and args.steps is not None:
        parser.error("--fast is --steps 20: give one of them")
    args.steps = (20 if args.fast else 50) if args.steps is None else args.steps
    for name in ("pose", "face"):
        if getattr(args, f"{name}_masks") and not getattr(args, f"{name}_video"):
            parser.error(f"--{name}-masks needs --{name}: the video whose masks they are")
    args.cache = args.cache.expanduser()
    args.preset = args.preset or (None if args.backbone else "toy")
    # Differs: the drawn world's model has seen a tenth of A.2's misalignment, and limbs dissolve beyond it
    args.pose_place = args.pose_place or ("aligned" if args.preset == "toy" else "kept")
    if args.preset == "toy":
        args.checkpoint = args.checkpoint or ASSETS / "toy.safetensors"
        for name in ("prompt", "guidance", "guidance_interval", "sequential"):
            if getattr(args, name) is not None:
                parser.error(f"--{name.replace('_', '-')} needs a --backbone: the drawn world knows no words to be guided by")
    if args.guidance == 1 and (args.guidance_interval or args.sequential is not None):
        parser.error("--guidance 1 turns guidance off: drop --guidance-interval and --sequential, or choose another value")
    args.prompt, args.guidance = args.prompt or "", 3.0 if args.guidance is None else args.guidance
    low, high = args.guidance_interval = args.guidance_interval or (0.0, 1.0)
    if low > high:
        parser.error(f"--guidance-interval {low} {high}: give FROM <= TO")
    args.area = args.area or (96 * 96 if args.preset == "toy" else 512 * 512)
    return parser, args
# fmt: on


if __name__ == "__main__":
    PARSER, ARGS = parse_args()  # before torch is imported: --help answers at once

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

import budget  # noqa: E402
import cues  # noqa: E402
import finder  # noqa: E402
from data import DAMAGED, encode_cues, encode_image, padded, save_cache, to_picture, to_tensor, toy_text, window_inputs  # noqa: E402
from diffusion import Schedule, ddim, dpm_solver, windows  # noqa: E402
from load_cogvideox import (  # noqa: E402
    check_dit,
    dit_config,
    load_text_encoder,
    load_tokenizer,
    load_transformer,
    load_vae,
    load_weights,
)
from machine import check_compiler, pick_device  # noqa: E402
from model import DIT_PRESETS, DiT  # noqa: E402
from text import T5_PRESETS, T5Encoder, empty_prompt  # noqa: E402
from vae import VAE_PRESETS, CausalVAE  # noqa: E402
from video import Video, check_output, cover, letterbox, output_size, read_image, write_gif, write_image, write_video  # noqa: E402

AI_GENERATED = "AI-generated with DirectAnimator; the person shown did not perform this motion"


# ---- networks: three functions, called one after another -----------------------------------------------------------


def open_text_encoder(args, dtype):
    """(tokenizer or None, T5 encoder): None where only the null text can be encoded."""
    if args.preset:
        return None, random_weights(T5Encoder, T5_PRESETS[args.preset], dtype)
    try:
        tokenizer = load_tokenizer(args.backbone)
    except FileNotFoundError as error:
        print(f"No tokenizer, so the text is null ({error})")
        tokenizer = None
    return tokenizer, load_text_encoder(args.backbone)


def open_vae(args, dtype, device, size) -> CausalVAE:
    """The VAE on its device, in tiles where a picture of this size (H, W) does not fit at once."""
    if args.preset == "toy":
        vae = load_weights(ASSETS / "toy-vae.safetensors", dtype)[0].eval()
    elif args.preset:
        vae = random_weights(CausalVAE, VAE_PRESETS[args.preset], dtype)
    else:
        vae = load_vae(args.backbone, dtype)
    height, width = size
    vae.tile(should_save_memory(args, "tile", f"decoding {width}x{height} at once", vae.memory(height, width), device))
    return vae.to(device)


def open_transformer(args, dtype) -> tuple[DiT, dict]:
    """The DiT, and how it was trained: how many latent frames it saw at once (the window of long clips), and what slot 0 held."""
    if args.checkpoint:
        dit, header = load_weights(args.checkpoint)
        print(f"{args.checkpoint}: stage {header.get('stage')}, step {header.get('step')}")
        return dit.eval(), {name: header[name] for name in ("window", "ref_slot") if name in header}
    if args.preset:
        print("Random weights: every stage is real, but the picture will be noise.")
        return random_weights(DiT, DIT_PRESETS[args.preset], dtype), {}
    print("No --checkpoint: CogVideoX1.5 with untrained cue layers, so the driving video has no effect on the motion.")
    return load_transformer(args.backbone).eval(), {}


def random_weights(network_class, config, dtype):
    torch.manual_seed(0)
    network = network_class(config)
    for p in network.parameters():  # also those that start at zero
        nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
    return network.to(dtype).eval()


def should_save_memory(args, flag: str, what: str, needed: int, device) -> bool:
    """Whether to save memory. The flag decides; without it True, with a printed line, if the `needed` bytes do not fit."""
    given, room = getattr(args, flag), budget.capacity(device, 1)
    too_large = room is not None and needed > room
    if given is None and too_large:
        print(f"--{flag}: {what} would take {needed / budget.GIB:.1f} of {room / budget.GIB:.1f} GiB")
    return too_large if given is None else given


def move(args, network: nn.Module, device, dtype) -> nn.Module:
    """Move a network to the device in this dtype. With --offload all but its blocks: each of them is fetched when it runs
    and otherwise stays memory-mapped in its file."""
    needed = sum(p.numel() for p in network.parameters()) * dtype.itemsize
    needed = needed if device.type != "cpu" else 0  # there they wait in their file anyway
    if not should_save_memory(args, "offload", f"{type(network).__name__}'s weights", needed, device):
        return network.to(device, dtype)
    for child in network.children():
        if child is not network.blocks:
            child.to(device, dtype)
    homes = {p: p.data for p in network.blocks.parameters()}

    def fetch(block, inputs):
        for p in block.parameters():
            p.data = p.data.to(device, dtype, non_blocking=True)

    def release(block, inputs, output):
        for p in block.parameters():
            p.data = homes[p]

    for block in network.blocks:
        block.register_forward_pre_hook(fetch)
        block.register_forward_hook(release)
    return network


# ---- what a second run need not do again ---------------------------------------------------------------------------


def digest(*things) -> str:
    """A name for what depends on these files (by path, size and time) and values."""
    total = hashlib.sha256()
    for thing in things:
        if isinstance(thing, Path):
            files = sorted(thing.rglob("*")) if thing.is_dir() else [thing]
            thing = (
                str(thing),
                [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.exists()],
            )
        total.update(thing if isinstance(thing, bytes) else repr(thing).encode())
    return total.hexdigest()[:32]


def analysed(args, video, reference, find, masks: str | None, options, progress=iter) -> cues.Track:
    """Pass 1 of `cues.py` over a clip (a Video, or the reference alone), remembered in --cache. find(): the finder."""
    files = [path and Path(path) for path in (masks, args.reference_mask, args.segmenter, args.sam, args.face_model)]
    # the code too: after a change it may find something else
    files += [Path(__file__).with_name(f"{name}.py") for name in ("align", "cues", "finder", "video")]
    source = video.path if isinstance(video, Video) else "reference"
    read = [getattr(options, name) for name in cues.READ_BY_ANALYSE]
    name = digest(source, *files, reference.tobytes(), reference.shape, args.person, args.fps, read)
    path = args.cache / "cues" / f"{name}.npz"
    with suppress(*DAMAGED):  # or missing
        return cues.Track.load(path)
    track = cues.analyse(video, reference, find(), options, progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    track.save(path)
    return track


# ---- the pipeline --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def encode_text(args, device, dtype) -> Tensor:
    """T5 states of [prompt, null text], (2, 226, D_text), or of the prompt alone without guidance. T5 is freed on return."""
    if args.preset == "toy":
        return toy_text()[None]  # one state: nothing to guide away from
    prompts = [args.prompt] + [""] * (args.guidance != 1)
    folder = args.backbone / "text_encoder" if args.backbone else args.preset
    path = args.cache / "text" / f"{digest(folder, prompts, dtype)}.safetensors"
    with suppress(*DAMAGED):  # or missing
        return load_file(path)["text"].to(device)
    tokenizer, t5 = open_text_encoder(args, dtype)
    if args.prompt and tokenizer is None:
        raise ValueError("--prompt needs the tokenizer: spiece.model in the backbone's tokenizer folder")
    t5 = move(args, t5, device, dtype)
    text = torch.cat([t5((tokenizer([p]) if p else empty_prompt()).to(device)) for p in prompts])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_cache({"text": text.cpu()}, path)
    return text


@torch.inference_mode()
def encode(args, vae: CausalVAE, device, reference, own, frames) -> tuple[Tensor, Tensor, Tensor]:
    """The reference's latent (1,16,h,w), and pose and face cues (1, 1+f, 17, h, w) whose slot 0 is the reference's own."""
    scale = vae.config.scaling_factor
    image = encode_image(vae, to_tensor(reference)[None].to(device))
    own = encode_cues(vae, own, device, scale)
    drive = encode_cues(vae, padded(frames), device, scale)
    pose, face = (torch.cat(pair, dim=1) for pair in zip(own, drive))
    return image.cpu(), pose, face


def sequential(args, config, pose: Tensor, text: Tensor, window: int, device, dtype) -> bool:
    """Whether guidance branches, if there are two, run one after the other."""
    video = budget.tokens(config, min(1 + window, pose.shape[1]), *pose.shape[-2:])
    needed = budget.sampling_bytes(config, video, text.shape[1], len(text), dtype.itemsize)
    return should_save_memory(args, "sequential", "both guidance branches", needed if len(text) > 1 else 0, device)


@torch.inference_mode()
def denoise(
    args, dit: DiT, device, text: Tensor, image: Tensor, pose: Tensor, face: Tensor, window=13, ref_slot="reference"
) -> tuple[Tensor, list[Tensor]]:
    """Sample clean latents (1, f, 16, h, w) for the driving frames; slot 0, the reference's, is dropped at the end.

    text is [prompt, null text], or the prompt alone; window and ref_slot are the training's. Beside the latents, with
    --every-step, each step's prediction of the middle one. Paper silent: sampler, steps, guidance, and the fusion of
    overlapping windows where a clip is longer than one.
    """
    slots = pose.shape[1]
    generator = torch.Generator().manual_seed(args.seed)  # on the CPU: one seed, one picture, on every device
    draw = lambda: torch.randn(1, slots, *image.shape[1:], generator=generator)  # noqa: E731
    image, pose, face, text = image.to(device), pose.to(device), face.to(device), text.to(device)

    low, high = (1000 * (1 - part) for part in args.guidance_interval[::-1])  # steps count down from 999

    def velocity(latents: Tensor, step: int, start: int) -> Tensor:
        x, *cue_streams = window_inputs(latents, start, image, pose, face, ref_slot)
        at = torch.tensor([step], device=device)
        states = text if low <= step <= high else text[:1]
        parts = states.split(1 if args.sequential else len(states))
        v = [dit(x.expand(len(t), -1, -1, -1, -1), at, t, *cue_streams) for t in parts]
        v = torch.cat(v).float()
        return v if len(v) == 1 else v[1:] + args.guidance * (v[:1] - v[1:])

    solver = {"dpm": dpm_solver, "ddim": ddim}[args.sampler]
    extra = {"noise": draw} if args.sampler == "dpm" else {}
    progress = lambda steps: tqdm(steps, desc="denoise", unit="step")  # noqa: E731
    fused = windows(velocity, slots - 1, window)
    schedule, predictions = Schedule(), []

    def watched(latents: Tensor, step: int) -> Tensor:
        v = fused(latents, step)
        if args.every_step:
            clean = schedule.predict_x0(latents, v, torch.tensor([step], device=device))
            predictions.append(clean[:, slots // 2 : slots // 2 + 1].cpu())
        return v

    latents = solver(watched, draw().to(device), schedule, args.steps, progress=progress, **extra)
    if not latents.isfinite().all():
        raise ValueError("the latents are not finite: try --dtype float32, other weights or less --guidance")
    return latents[:, 1:].cpu(), predictions


def pictures(vae: CausalVAE, latents: Tensor, frames: int, device):
    """Decode as a stream: `frames` pictures (H, W, 3) uint8; what `padded` added is dropped."""
    with torch.inference_mode():
        stream = vae.decode_stream((latents / vae.config.scaling_factor).to(device))
        for frame in tqdm(islice(stream, frames), desc="decode", total=frames, unit="frame", disable=frames == 1):
            yield to_picture(frame[0])


def driving_rows(args, source: Video, track, reference, options):
    """A function that streams `cues.render` rows; with --pose or --face those cues are another video's (as the paper evaluates)."""
    size = reference.shape[:2]
    others = {}
    for name in ("pose", "face"):
        if path := getattr(args, f"{name}_video"):
            video, masks = Video(path, fps=args.fps), getattr(args, f"{name}_masks")
            if video.frames != source.frames:
                raise ValueError(
                    f"--{name} {path} has {video.frames} frames, {source.path} {source.frames}: give as many"
                )
            given = argparse.Namespace(**vars(args) | {"masks": masks})  # and so networks where there are none
            found = analysed(args, video, reference, partial(finder.from_arguments, given), masks, options)
            others[name] = video, found
            print(f"--{name} {path}: {found.summary()}")

    def rows():
        streams = [cues.render(source, track, size, options)]
        streams += [cues.render(*others[name], size, options) for name in others]
        for row, *rest in zip(*streams):
            instead = dict(zip(others, rest))
            yield instead.get("pose", row)[0], instead.get("face", row)[1], *row[2:]

    return rows


def comparison(reference: np.ndarray, driver, cue_rows, output):
    """Frames of reference | driver | pose cue | face cue | Location Cue over the reference | output, one height."""
    height, width = reference.shape[:2]
    for frame, (pose, face, body, face_mask), made in zip(driver, cue_rows, output):
        pose, face = (((c.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8) for c in (pose, face))
        place = np.maximum(body, face_mask)[0, :, :, None]
        located = (reference * (0.25 + 0.75 * place)).astype(np.uint8)
        yield np.concatenate([reference, letterbox(frame, height, width), pose, face, located, made], axis=1)


def write_clip(path: Path, frames, source: Video) -> None:
    """With the driving clip's rate and sound, and the tag that says what it is."""
    if path.suffix.lower() == ".gif":
        write_gif(path, frames, source.fps, comment=AI_GENERATED)
    else:
        write_video(path, frames, source.fps, audio=source.path if source.has_audio else None, comment=AI_GENERATED)
    print(f"wrote {path}")


def animate(args) -> None:
    if args.preset == "toy" and args.reference != EXAMPLE["reference"]:
        print("No --backbone: the embedded toy model knows only drawn figures, and will make one of a photograph.")
    output = args.output or Path(f"{args.reference.stem}_{args.drive.stem}.mp4")
    check_output(output, suffixes=(".mp4", ".gif"))
    side, strip = (output.with_name(output.stem + end) for end in ("_compare" + output.suffix, "_steps.png"))
    given = [args.reference, args.drive, args.pose_video, args.face_video]
    given += [args.masks, args.reference_mask, args.pose_masks, args.face_masks]
    for path in (output, *[side] * args.compare, *[strip] * args.every_step):
        check_output(path, *filter(None, given), suffixes=(".png",) if path == strip else (".mp4", ".gif"))
    options = cues.options(args)
    config = dit_config(args.backbone / "transformer") if args.backbone else DIT_PRESETS[args.preset]
    header = check_dit(args.checkpoint, config.text_dim, options.location, options.face) if args.checkpoint else {}
    args.cache.mkdir(parents=True, exist_ok=True)
    if not os.access(args.cache, os.W_OK):
        raise ValueError(f"--cache {args.cache}: nothing can be written there; name another folder")
    device, dtype, reason = pick_device(args.device, args.dtype)
    print(f"{device}, {str(dtype).removeprefix('torch.')}: {reason}")
    if args.compile:
        check_compiler(device)

    picture = read_image(args.reference)
    source = Video(args.drive, fps=args.fps)
    reference = cover(picture, *output_size(*picture.shape[:2], args.area))
    height, width = reference.shape[:2]
    find = cache(lambda: finder.from_arguments(args))  # made when first needed: not at all if all is remembered
    try:  # the reference first: its mistakes should not wait for the driving video
        own = analysed(args, reference[None], reference, lambda: find().reference, None, options)
    except ValueError as error:
        raise ValueError(f"{args.reference}, the reference: {error}") from None
    progress = lambda frames: tqdm(frames, desc="cues", unit="frame", total=source.frames)  # noqa: E731
    track = analysed(args, source, reference, find, args.masks, options, progress)
    frames = len(track.accepted)
    picked = f", picked from {source.total}," if args.fps and source.total != frames else ""
    print(f"{frames} frames{picked} at {float(source.fps):g}/s, output {width}x{height}; {track.summary()}")
    if header.get("ref_slot") == "copy" and frames > (longest := 4 * header.get("window", 13) - 3):
        raise ValueError(f"{args.checkpoint} was trained with --ref-slot copy, where each window has a slot 0 of its own: at most "
                         f"{longest} frames, not {frames}")  # fmt: skip
    rows = driving_rows(args, source, track, reference, options)
    find.cache_clear()  # the finder's networks have done their work

    text = encode_text(args, device, dtype)
    vae = open_vae(args, dtype, device, reference.shape[:2])
    own_row = cues.render(reference[None], own, (height, width), options)
    drive = tqdm(rows(), desc="encode", unit="frame", total=frames)
    image, pose, face = encode(args, vae, device, reference, own_row, drive)
    del vae
    dit, trained = open_transformer(args, dtype)
    dit = move(args, dit, device, dtype)
    if args.compile:
        for block in dit.blocks:
            block.forward = torch.compile(block.forward)  # block.compile() would trace the hooks of --offload too
    args.sequential = sequential(args, dit.config, pose, text, trained.get("window", 13), device, dtype)
    latents, predictions = denoise(args, dit, device, text, image, pose, face, **trained)
    del dit
    gc.collect()  # compiled blocks refer to themselves
    vae = open_vae(args, dtype, device, reference.shape[:2])
    write_clip(output, pictures(vae, latents, frames, device), source)
    if predictions:
        frames = [next(pictures(vae, latent, 1, device)) for latent in predictions]
        write_image(strip, np.concatenate(frames, axis=1), comment=AI_GENERATED)
        print(f"wrote {strip}")
    if args.compare:
        write_clip(side, comparison(reference, source, rows(), Video(output)), source)


def main(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    try:
        animate(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        parser.exit(2, f"{parser.prog}: {reason} Use --offload, --tile, --sequential or a smaller --area\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: stopped; no half-written file is left\n")


if __name__ == "__main__":
    main(PARSER, ARGS)
