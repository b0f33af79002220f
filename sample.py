"""Animate the person of a picture with the motion of a driving video (paper Fig. 2a).

    python sample.py ref.png drive.mp4 --masks masks/ --reference-mask ref_mask.png
    python sample.py photo.jpg dance.mp4 --backbone CogVideoX1.5-5B-I2V --checkpoint directanimator.safetensors -o out.mp4

The steps, one network in memory at a time: find the person and the face in every driving frame (cues.py); text to T5 states;
reference and cues to VAE latents; noise to latents with the DiT; latents to video. Every driving frame gives one output frame,
at the driving clip's own rate and with its sound.
"""

import argparse
from pathlib import Path


def parse_args(argv=None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    import cues

    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message} (see --help)\n")
    parser.add_argument("reference", type=Path, help="picture of the person to animate")
    parser.add_argument(
        "drive", type=Path, help="video (or folder of numbered frames) whose motion is followed"
    )
    parser.add_argument(
        "-o", "--output", type=Path, help="mp4 to write (default: REFERENCE_DRIVE.mp4 in this folder)"
    )
    group = parser.add_argument_group("networks")
    group.add_argument(
        "--preset",
        choices=["tiny"],
        help="small networks with random weights: runs every stage, paints noise",
    )
    group.add_argument(
        "--backbone", type=Path, metavar="DIR", help="local copy of the CogVideoX1.5-5B-I2V repository"
    )
    group.add_argument("--checkpoint", type=Path, metavar="FILE", help="DiT weights that train.py wrote")
    group.add_argument("--device", help="cuda, mps or cpu (default: the best one present)")
    group.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        help="of the networks (default: bfloat16 where the hardware has it)",
    )
    group.add_argument("--tile", action="store_true", help="run the VAE in tiles: less memory, more work")
    group = parser.add_argument_group("sampling")
    group.add_argument("--prompt", default="", help="describe the person and the background")
    group.add_argument(
        "--guidance", type=float, default=3.0, help="text guidance; 1 turns it off and halves the work"
    )
    group.add_argument(
        "--sampler",
        choices=["dpm", "ddim"],
        default="dpm",
        help="DPM-Solver++(2M) SDE, or deterministic DDIM",
    )
    group.add_argument("--steps", type=int, default=50, help="denoising steps")
    group.add_argument("--seed", type=int, default=0, help="of all noise; the same on every device")
    group.add_argument(
        "--area", type=int, default=512 * 512, help="pixels of the output, which has the reference's aspect"
    )
    group.add_argument("--fps", type=float, help="pick driving frames at this rate (default: every frame)")
    cues.add_arguments(parser)
    return parser, parser.parse_args(argv)


if __name__ == "__main__":
    PARSER, ARGS = parse_args()  # before torch is imported: --help answers at once

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

import cues  # noqa: E402
from data import encode_cues, encode_image, image_condition, padded, to_tensor  # noqa: E402
from diffusion import Schedule, ddim, dpm_solver, windows  # noqa: E402
from load_cogvideox import (
    load_text_encoder,
    load_tokenizer,
    load_transformer,
    load_vae,
    load_weights,
    pick_device,
)  # noqa: E402
from model import DIT_PRESETS, DiT  # noqa: E402
from text import T5_PRESETS, T5Encoder, empty_prompt  # noqa: E402
from vae import VAE_PRESETS, CausalVAE  # noqa: E402
from video import Video, check_output, cover, output_size, read_image, write_video  # noqa: E402

AI_GENERATED = "AI-generated with DirectAnimator; the person shown did not perform this motion"


# ---- networks: three functions, called one after another ------------------------------------------------------------------


def text_encoder(args, dtype):
    """(tokenizer or None, T5 encoder): None where only the null text can be encoded."""
    if args.preset:
        return None, random_weights(T5Encoder, T5_PRESETS[args.preset], dtype)
    try:
        tokenizer = load_tokenizer(args.backbone)
    except FileNotFoundError as error:
        print(f"No tokenizer, so the text is null ({error})")
        tokenizer = None
    return tokenizer, load_text_encoder(args.backbone, dtype)


def vae(args, dtype) -> CausalVAE:
    network = (
        random_weights(CausalVAE, VAE_PRESETS[args.preset], dtype)
        if args.preset
        else load_vae(args.backbone, dtype)
    )
    network.tile(args.tile)
    return network


def transformer(args, dtype) -> DiT:
    if args.checkpoint:
        network, header = load_weights(args.checkpoint, dtype)
        print(f"{args.checkpoint}: stage {header.get('stage')}, step {header.get('step')}")
        return network.eval()
    if args.preset:
        print("Random weights: every stage is real, but the picture will be noise.")
        return random_weights(DiT, DIT_PRESETS[args.preset], dtype)
    print(
        "No --checkpoint: plain CogVideoX1.5 with untrained cue layers, so the driving video has no effect on the motion."
    )
    return load_transformer(args.backbone, dtype).eval()


def random_weights(network_class, config, dtype):
    torch.manual_seed(0)
    network = network_class(config)
    for p in network.parameters():  # also those that start at zero
        nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
    return network.to(dtype).eval()


# ---- the pipeline -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def encode_text(args, device, dtype) -> Tensor:
    """T5 states of [prompt, null text], (2, 226, D_text), or of the prompt alone without guidance. T5 is freed on return."""
    tokenizer, t5 = text_encoder(args, dtype)
    if args.prompt and tokenizer is None:
        raise ValueError("--prompt needs the tokenizer: spiece.model in the backbone's tokenizer folder")
    ids = [tokenizer([args.prompt]) if args.prompt else empty_prompt()] + [empty_prompt()] * (
        args.guidance != 1
    )
    t5.to(device)
    return torch.cat([t5(i.to(device)) for i in ids])


@torch.inference_mode()
def encode(args, vae: CausalVAE, device, reference, own: cues.Cues, frames) -> tuple[Tensor, Tensor, Tensor]:
    """The reference's latent (1,16,h,w), and pose and face cues (1, 1+f, 17, h, w) whose slot 0 is the reference's own."""
    scale = vae.config.scaling_factor
    image = encode_image(vae, to_tensor(reference)[None].to(device))
    own = encode_cues(vae, own.frames(), device, scale)
    drive = encode_cues(vae, padded(frames), device, scale)
    pose, face = (torch.cat(pair, dim=1) for pair in zip(own, drive))
    return image.cpu(), pose, face


@torch.inference_mode()
def denoise(args, dit: DiT, device, text: Tensor, image: Tensor, pose: Tensor, face: Tensor) -> Tensor:
    """Sample clean latents (1, f, 16, h, w) for the driving frames; slot 0, the reference's, is dropped at the end."""
    slots = pose.shape[1]
    generator = torch.Generator().manual_seed(args.seed)  # on the CPU: one seed, one picture, on every device
    draw = lambda: torch.randn(1, slots, *image.shape[1:], generator=generator)  # noqa: E731
    image, pose, face, text = image.to(device), pose.to(device), face.to(device), text.to(device)

    def velocity(latents: Tensor, step: int, start: int) -> Tensor:
        n = latents.shape[1]
        index = torch.tensor([0, *range(1 + start, start + n)], device=device)
        x = torch.cat([latents, image_condition(image, n)], dim=2).expand(len(text), -1, -1, -1, -1)
        v = dit(x, torch.tensor([step], device=device), text, pose[:, index], face[:, index]).float()
        if len(text) == 1:
            return v
        conditional, null = v.chunk(2)
        return null + args.guidance * (conditional - null)

    solver = {"dpm": dpm_solver, "ddim": ddim}[args.sampler]
    extra = {"noise": draw} if args.sampler == "dpm" else {}
    progress = lambda steps: tqdm(steps, desc="denoise", unit="step")  # noqa: E731
    latents = draw().to(device)
    latents = solver(
        windows(velocity, slots - 1), latents, Schedule(), args.steps, progress=progress, **extra
    )
    return latents[:, 1:].cpu()


def pictures(vae: CausalVAE, latents: Tensor, frames: int, device):
    """Decode as a stream: `frames` pictures (H, W, 3) uint8; what `padded` added is dropped."""
    with torch.inference_mode():
        stream = vae.decode_stream((latents / vae.config.scaling_factor).to(device))
        for frame, _ in zip(stream, tqdm(range(frames), desc="decode", unit="frame")):
            yield ((frame[0].float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()


def animate(args) -> None:
    if (args.preset is None) == (args.backbone is None):
        raise ValueError(
            "give --backbone DIR (a local copy of CogVideoX1.5-5B-I2V) or --preset tiny (random weights)"
        )
    output = args.output or Path(f"{args.reference.stem}_{args.drive.stem}.mp4")
    check_output(output, args.reference, args.drive, suffixes=(".mp4",))
    device, dtype, reason = pick_device(args.device, args.dtype)
    print(f"{device}, {str(dtype).removeprefix('torch.')}: {reason}")

    picture = read_image(args.reference)
    source = Video(args.drive, fps=args.fps)
    reference = cover(picture, *output_size(*picture.shape[:2], args.area))
    height, width = reference.shape[:2]
    find = cues.finders(args)
    options = cues.options(args)
    try:  # the reference first: its mistakes should not wait for the driving video
        own = cues.extract(reference[None], reference, find.reference, options)
    except ValueError as error:
        raise ValueError(f"{args.reference}: no person is found in the reference picture ({error})") from None
    progress = lambda frames: tqdm(frames, desc="cues", unit="frame", total=source.frames)  # noqa: E731
    track = cues.analyse(source, reference, find, options, progress)
    frames = len(track.accepted)
    print(f"{frames} frames at {float(source.fps):g}/s, output {width}x{height}; {track.summary()}")

    text = encode_text(args, device, dtype)
    network = vae(args, dtype).to(device)
    drive = cues.render(source, track, (height, width), options)
    image, pose, face = encode(
        args, network, device, reference, own, tqdm(drive, desc="encode", unit="frame", total=frames)
    )
    del network
    network = transformer(args, dtype).to(device)
    latents = denoise(args, network, device, text, image, pose, face)
    del network
    network = vae(args, dtype).to(device)
    write_video(
        output,
        pictures(network, latents, frames, device),
        source.fps,
        audio=args.drive if source.has_audio else None,
        comment=AI_GENERATED,
    )
    print(f"wrote {output}")


def main(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    try:
        animate(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: stopped; nothing was written\n")


if __name__ == "__main__":
    main(PARSER, ARGS)
