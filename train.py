"""Train DirectAnimator: both stages of Same2X in one loop (paper Sec. 3.2, Fig. 4, Eq. 4), and what must come before them.

    torchrun --nproc_per_node 4 train.py --stage 1 --data DATA --backbone DIR
    torchrun --nproc_per_node 4 train.py --stage 2 --data DATA --backbone DIR --teacher RUN
    python train.py --stage 1 --preset toy                                     # the same on a laptop, in a drawn world
    python train.py --stage 2 --preset toy --teacher runs/toy-stage1
    python train.py --export RUN -o model.safetensors                          # the newest weights of a run, in bfloat16

    stage vae   the drawn world's VAE (CogVideoX brings its own)
    stage 0     its backbone, image-to-video without cues (CogVideoX brings its own)
    stage 1     same identity: the clip's own cues                 loss = v-MSE
    stage 2     cross identity: another person's cues for the same motion, beside a frozen stage-1 model with the
                clip's own                                         loss = v-MSE + lambda * S2X

Every random draw is keyed by (seed, step, index in the global batch), so any step can be recomputed alone, on any
number of ranks.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

# Before torch is imported: let idle OpenMP threads sleep early, as in sample.py; even earlier would cost training a tenth.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
STAGES = ("vae", "0", "1", "2")
ASSETS = Path(__file__).parent / "assets"
TOY_DATA = Path("runs/toy-data")
# fmt: off
DEFAULTS = {  # a tuple has one value for each of STAGES
    # steps, lr and align_depth are the paper's (Sec. 4.1, Table 4). Paper silent: the rest
    "cogvideox1.5-5b": dict(
        steps=(0, 0, 10_000, 30_000), batch=(1,) * 4, lr=(2e-5,) * 4, cue_lr=1.0, cooldown=0.0, optimizer="adamw", ema=0.0,
        noise_shift=1.0, align_depth=10, window=13, checkpointing=True, vae_preset="cogvideox1.5"),
    "toy": dict(
        steps=(6000, 3000, 3000, 3000), batch=(1, 4, 4, 4), lr=(1e-3, 3e-3, 2e-3, 1.5e-3), cue_lr=8.0, cooldown=0.3,
        optimizer="muon", ema=0.998, noise_shift=4.0, align_depth=1, window=5, checkpointing=False, vae_preset="toy"),
    "tiny": dict(
        steps=(10,) * 4, batch=(2,) * 4, lr=(1e-3,) * 4, cue_lr=1.0, cooldown=0.3, optimizer="adamw", ema=0.9,
        noise_shift=1.0, align_depth=1, window=5, checkpointing=False, vae_preset="tiny"),
}
READ_BY = {  # stages: flags that no other stage reads
    "2": ("s2x_weight", "align_depth", "init"),
    "12": ("cue_injection", "cue_lr", "location", "face", "ref_slot"),
    "012": ("data", "vae", "shard", "compile", "checkpointing", "noise_shift", "window"),
}


def parse_args(argv=None):
    from video import Parser, natural, real, seed, whole  # no torch: --help answers at once

    first = Parser(add_help=False)
    first.add_argument("--preset", choices=list(DEFAULTS), default="cogvideox1.5-5b", help="sizes and defaults")
    first.add_argument("--stage", choices=STAGES, default="1", help="see above")
    known, _ = first.parse_known_args(argv)
    default, stage = DEFAULTS[known.preset], STAGES.index(known.stage)

    parser = Parser(__doc__, parents=[first])
    add = parser.add_argument
    add("-o", "--output", type=Path, help="run folder (default: runs/PRESET-stageN)")
    add("--data", type=Path, default=TOY_DATA, help="data folder made by data.py; the toy's is drawn when missing")
    add("--window", type=whole(3), default=default["window"], help="latent frames of a clip seen at once, odd: 13 are 49 frames")
    add("--backbone", type=Path, help="CogVideoX1.5-5B-I2V folder, or a stage-0 run or file (toy: assets); stage vae: a VAE")
    add("--teacher", type=Path, help="stage 2: a stage-1 run folder, .safetensors or .pt file")
    add("--init", default="teacher", metavar="{teacher,backbone,FILE}",
        help="stage 2: what the student starts from; FILE: weights or run folder of a student, to continue on other data")
    add("--decoder-only", action="store_true",
        help="stage vae, from --backbone FILE: the encoder, and so every cached latent, stays as it is")
    add("--vae", type=Path, help="VAE that decodes the sample strips (default: the backbone's; toy: assets)")
    add("--resume", action="store_true", help="go on from the run folder's newest checkpoint")
    add("--dry-run", action="store_true", help="print what would be trained, and stop")
    add("--export", type=Path, metavar="RUN", help="write the newest weights of a run to -o FILE, and stop")
    add("--steps", type=natural, default=default["steps"][stage], help="optimiser steps")
    add("--batch", type=natural, default=default["batch"][stage], help="samples per rank and forward pass")
    add("--accumulate", type=natural, default=1, help="forward passes per optimiser step")
    add("--optimizer", choices=["adamw", "muon"], default=default["optimizer"], help="muon: for the matrices, AdamW for the rest")
    add("--lr", type=real(1e-12, 100), default=default["lr"][stage], help="learning rate between warm-up and cool-down")
    add("--cue-lr", type=real(0, 1e6), default=default["cue_lr"], help="times --lr for the cue layers, which are new")
    add("--noise-shift", type=real(0.01, 100), default=default["noise_shift"],
        help="s > 1 trains more on strong noise, where poses are decided: a level u in [0, 1) becomes s u / (1 + (s - 1) u)")
    add("--warmup", type=whole(0), default=100, help="steps of linear warm-up")
    add("--cooldown", type=real(0, 1), default=default["cooldown"], help="last part of the steps, rate falling to 0")
    add("--weight-decay", type=real(0), default=1e-4, help="none on biases and norms")
    add("--clip", type=real(1e-12), default=1.0, help="largest gradient norm")
    add("--ema", type=real(0, 0.999999), default=default["ema"], help="decay of the weights' moving average; 0: none")
    add("--lambda", dest="s2x_weight", type=real(0), default=0.5, help="weight of the Same2X loss (Table 4); 0: row S8")
    add("--align-depth", type=natural, default=default["align_depth"],
        help="block whose tokens Same2X aligns, counted from 1 (Table 4: D)")
    add("--cue-injection", choices=["cuefusion", "concat", "cross"], default="cuefusion", help="Table 5")
    add("--location", choices=["soft", "hard", "none"], default="soft", help="Location Cue (Table 3: S7, S6)")
    add("--face", choices=["centered", "none"], default="centered", help="Face Cue (Table 3: S1)")
    add("--ref-slot", choices=["reference", "copy"], default="reference",
        help="what slot 0 holds; copy: CogVideoX's own padding")
    add("--shard", choices=["none", "optimizer", "full"],
        help="none: DDP; optimizer, full: FSDP2, gathering weights once a step or for each block anew (default: the "
             "first that fits)")
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=default["checkpointing"],
        help="recompute blocks in the backward pass")
    add("--compile", action="store_true",
        help="torch.compile each block: 18 s once, then a toy step takes 2/3 of the time; on a CPU it needs a C++ compiler")
    add("--dtype", choices=["bfloat16", "float32", "float64"],
        help="of the computation; weights stay float32 (default: bfloat16 where fast)")
    add("--device", help="default: cuda if present, else cpu")
    add("--workers", type=whole(0), default=0, help="processes that make batches ahead; 0: a thread, which is enough for large steps")
    add("--seed", type=seed, default=0, help="of every random draw")
    add("--log-every", type=natural, default=20, help="steps between log lines")
    add("--save-every", type=natural, default=500, help="steps between checkpoints")
    add("--async-save", action=argparse.BooleanOptionalAction,
        help="go on training while a checkpoint is written from a copy in host memory (default: on GPUs, if it has room)")
    add("--keep", type=whole(0), default=2, help="checkpoints to keep, the newest; 0: all")
    add("--eval-every", type=whole(0), default=500, help="steps between held-out losses, plots and sample strips; 0: never")
    args = parser.parse_args(argv)
    if args.export:
        if args.export.is_file() and not args.output:
            parser.error(f"--export {args.export}: a file needs -o FILE, the one to write")
        args.output = args.output or args.export / "model.safetensors"
        return parser, args
    args.output = args.output or Path("runs") / f"{args.preset}-stage{args.stage}"
    if (args.stage == "2") != (args.teacher is not None):
        parser.error("--stage 2 needs --teacher, a stage-1 run folder or weights file; the other stages take none")
    for stages, names in READ_BY.items():
        for name in names if args.stage not in stages else ():
            if getattr(args, name) != parser.get_default(name):
                flag = {"s2x_weight": "lambda"}.get(name, name.replace("_", "-"))
                parser.error(f"--{flag} is read by stage {' and '.join(stages)} only: drop it")
    if args.window % 2 == 0:
        parser.error(f"--window {args.window}: the reference and the window must make an even number of latents, 4 or more: "
                     f"use {args.window - 1} or {args.window + 1}")
    if (network := {"vae": "VAE", "0": "backbone"}.get(args.stage)) and args.preset == "cogvideox1.5-5b":
        parser.error(f"--stage {args.stage} trains a small {network}: give --preset toy (CogVideoX brings its own)")
    if args.stage == "0" and args.backbone:
        parser.error("--stage 0 makes a backbone from nothing: drop --backbone")
    if args.decoder_only and (args.stage != "vae" or not args.backbone):
        parser.error("--decoder-only goes with --stage vae and --backbone FILE, the VAE to go on from")
    if args.preset == "toy":
        if args.stage in ("1", "2"):
            args.backbone = args.backbone or ASSETS / "toy-backbone.safetensors"
        args.vae = args.vae or ASSETS / "toy-vae.safetensors"
    elif args.vae is None and args.backbone and (args.backbone / "vae").is_dir():
        args.vae = args.backbone
    return parser, args
# fmt: on


if __name__ == "__main__":
    PARSER, ARGS = parse_args()  # before torch is imported: --help answers at once

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import budget  # noqa: E402
import data  # noqa: E402
from diffusion import Schedule, ddim  # noqa: E402
from load_cogvideox import (  # noqa: E402
    checkpoints,
    load_transformer,
    load_vae,
    load_weights,
    newest_weights,
    read_header,
    save_weights,
)
from machine import check_compiler, keep_freed_memory  # noqa: E402
from model import DIT_PRESETS, DiT, DiTConfig  # noqa: E402
from muon import Muon, is_matrix  # noqa: E402
from ranks import TRAINED, Ranks, Saver, load_checkpoint, read_log, read_settings, rewind_log, shard, swapped  # noqa: E402
from vae import VAE_PRESETS, CausalVAE  # noqa: E402
from video import atomic, check_output, write_image  # noqa: E402


# ---- objectives: a batch in, named losses out ----------------------------------------------------------------------


def same2x(student: Tensor, teacher: Tensor) -> Tensor:
    """Eq. 4 without its expectation: minus the cosine of matching tokens, mean over tokens. (B, N, D) twice -> (B,).

    Paper silent: which tokens, and whether a head projects them. Here the video tokens leaving block `align_depth`, as they are.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    return -F.cosine_similarity(student.to(wide), teacher.to(wide), dim=-1).mean(dim=1)


class Denoising(nn.Module):
    """v-MSE over all latents; with a teacher also Eq. 4. Losses are (B,).

    Differs: Eq. 8 predicts the noise; this predicts v, as CogVideoX1.5 does.
    Paper silent: whether slot 0 counts; here it does. And what the teacher sees: here the student's own noisy latents,
    step, text and reference, but the clip's own cues.
    """

    def __init__(self, model: DiT, align_depth: int, teacher: DiT | None = None):
        super().__init__()
        self.model = model
        self.frozen = [teacher]  # in a list: no submodule, so neither DDP nor a checkpoint sees it
        self.align_depth = align_depth
        self.schedule = Schedule()

    def forward(self, batch: dict) -> dict[str, Tensor]:
        latents, noise, step, text = (batch[name] for name in ("latents", "noise", "step", "text"))
        x = torch.cat([self.schedule.add_noise(latents, noise, step), batch["condition"]], dim=2)
        target = self.schedule.velocity(latents, noise, step)
        v, student = self.model(x, step, text, batch.get("pose"), batch.get("face"), tap=self.align_depth)
        losses = {"denoise": F.mse_loss(v.to(target.dtype), target, reduction="none").flatten(1).mean(1)}
        if self.frozen[0] is not None and self.training:
            with torch.no_grad():
                pose, face = batch["teacher_pose"], batch["teacher_face"]
                teacher = self.frozen[0].features(x, step, text, pose, face, self.align_depth)
            losses["s2x"] = same2x(student, teacher)
        return losses


class Autoencoding(nn.Module):
    """The VAE's loss: absolute error of pixels and of their differences (for edges), and Kullback-Leibler divergence.

    The divergence keeps noise of about a tenth in every latent, so that small errors of a DiT stay small in the picture.
    Latents averaged to half their rows and columns must decode to the picture at half its size: they then vary as
    smoothly as pictures do, and a DiT learns them sooner (Kouzelis et al., EQ-VAE, 2025).
    """

    def __init__(self, model: CausalVAE):
        super().__init__()
        self.model = model

    def forward(self, batch: dict) -> dict[str, Tensor]:
        video = batch["video"]
        mean, logvar = self.model.encode(video)
        latents = mean + (0.5 * logvar).exp() * batch["noise"]
        error = self.model.decode(latents).float() - video
        edges = sum(error.diff(dim=axis).abs().flatten(1).mean(1) for axis in (1, 3, 4))
        kl = 0.5 * (mean.float().square() + logvar.float().exp() - 1 - logvar.float())
        losses = {"pixels": error.abs().flatten(1).mean(1), "edges": edges, "kl": kl.flatten(1).mean(1)}
        if not mean.requires_grad:  # the decoder learns alone, or nothing does
            return losses
        half = lambda x: F.avg_pool3d(x, (1, 2, 2))  # noqa: E731
        small = self.model.decode(half(latents)).float() - half(video)
        return losses | {"half": small.abs().flatten(1).mean(1)}


def total_loss(losses: dict[str, Tensor], args) -> Tensor:
    weights = {"denoise": 1.0, "s2x": args.s2x_weight, "pixels": 1.0, "edges": 0.5, "kl": 2e-3, "half": 0.5}
    return sum(weights[name] * value.mean() for name, value in losses.items())


# ---- networks ------------------------------------------------------------------------------------------------------


def dit_config(args) -> DiTConfig:
    return replace(DIT_PRESETS[args.preset], cue_injection=args.cue_injection)


def load_backbone(path: Path, config: DiTConfig) -> DiT:
    """A model of `config` with fresh cue layers around a backbone: a CogVideoX folder, or our own stage-0 weights."""
    if (path / "transformer").is_dir():
        return load_transformer(path, cue_injection=config.cue_injection)
    plain = replace(config, cue_channels=0, cue_injection="cuefusion")
    backbone, _ = load_weights(path, torch.float32, plain)
    model = DiT(config)
    model.load_state_dict(backbone.state_dict(), strict=False)
    model.init_cues()  # again: they copy from the backbone
    return model


def build(args) -> nn.Module:
    """The network to train, on the CPU; what comes from a file keeps the file's dtype and stays memory-mapped.

    Paper silent: what stage 2 starts from. Here the teacher, or with --init backbone what stage 1 started from (Fig. 1).
    """
    torch.manual_seed(args.seed)
    if args.stage == "vae":
        vae = load_weights(args.backbone)[0] if args.backbone else CausalVAE(VAE_PRESETS[args.preset])
        vae.encoder.requires_grad_(not args.decoder_only)
        return vae
    config = dit_config(args)
    if args.stage == "0":
        return DiT(replace(config, cue_channels=0, cue_injection="cuefusion"))
    if args.stage == "2" and args.init != "backbone":
        return load_weights(args.teacher if args.init == "teacher" else Path(args.init), config=config)[0]
    if args.backbone:
        return load_backbone(args.backbone, config)
    if args.preset == "tiny":
        return DiT(config)  # small enough to start from nothing
    raise ValueError(f"--stage {args.stage} starts from a backbone: give --backbone, a CogVideoX1.5-5B-I2V folder")


def load_teacher(args, dtype, device) -> DiT | None:
    """The frozen stage-1 model of stage 2: the embeddings and the first `align_depth` blocks, all it will ever run."""
    if args.stage != "2" or not args.s2x_weight:
        return None
    teacher, _ = load_weights(args.teacher, dtype, dit_config(args), depth=args.align_depth)
    return teacher.to(device).requires_grad_(False).eval()


def parameter_groups(parameters: Iterable, weight_decay: float, cue_rate: float = 1.0) -> list[dict]:
    """Of (name, parameter). No decay on biases and norms; decay would also pull CueFusion's -1 biases away from the identity.

    The cue layers start by adding nothing, and Adam moves a weight by one learning rate a step at most: with `cue_rate` they
    learn faster than the backbone around them.
    """
    groups = {}
    for name, p in parameters:
        fresh = ".cues." in name or name.startswith(("pose_embed", "face_embed"))
        groups.setdefault((p.ndim >= 2, fresh), []).append(p)
    return [
        {"params": params, "weight_decay": weight_decay * decayed, "rate": cue_rate if fresh else 1.0}
        for (decayed, fresh), params in groups.items()
    ]


def make_optimizers(model: nn.Module, args) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the matrices and AdamW for the rest."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (matrices if args.optimizer == "muon" and is_matrix(p) else rest).append((name, p))
    groups = lambda parameters: parameter_groups(parameters, args.weight_decay, args.cue_lr)  # noqa: E731
    optimizers = [torch.optim.AdamW(groups(rest), args.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)]
    return optimizers + ([Muon(groups(matrices), args.lr)] if matrices else [])


def learning_rate(step: int, args) -> float:
    """Up linearly over the warm-up, level, down linearly over the cool-down; the first and the last step move too."""
    up = (step + 1) / max(args.warmup, 1)
    down = (args.steps - step) / max(args.cooldown * args.steps, 1)
    return args.lr * min(up, 1.0, down)


def export(run: Path, output: Path) -> None:
    """The newest weights of a run, averaged if there is an average, as one bfloat16 file; a VAE's with whitened latents."""
    check_output(output, run, *run.glob("step-*/*.safetensors"), suffixes=(".safetensors",))
    network, header = load_weights(run, torch.float32)
    if isinstance(network, CausalVAE):
        network.whiten(*latent_statistics(network))
        network.config = replace(network.config, scaling_factor=1.0)
    kept = {name: header[name] for name in ("preset", "stage", "step", *TRAINED) if name in header}
    save_weights(output, network, dtype=torch.bfloat16, **kept)
    print(f"wrote {output}: stage {kept['stage']}, step {kept['step']}, {output.stat().st_size / 1e6:.1f} MB")


@torch.no_grad()
def latent_statistics(vae: CausalVAE, clips: int = 50) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel, (16,) both, over clips of the drawn world."""
    videos = (data.toy_clip(data.HELD_OUT + number).video for number in range(clips))
    latents = torch.cat([vae.encode(data.to_tensor(video)[None])[0] for video in videos])
    return latents.mean((0, 1, 3, 4)), latents.std((0, 1, 3, 4))


# ---- what is written while it runs ---------------------------------------------------------------------------------


class Meter:
    """Sums since the last log line: each loss, and the denoising loss by noise level in ten bins of 100 steps."""

    def __init__(self, device):
        self.sums: dict[str, Tensor] = {}
        self.bins = torch.zeros(2, 10, dtype=torch.float64, device=device)

    def add(self, losses: dict[str, Tensor], step: Tensor | None):
        for name, value in losses.items():
            value = value.detach().double()
            total = torch.stack([value.sum(), value.new_tensor(len(value))])
            self.sums[name] = self.sums.get(name, 0) + total
        if step is not None:
            bins = step // 100
            self.bins[0].index_add_(0, bins, losses["denoise"].detach().double())
            self.bins[1].index_add_(0, bins, torch.ones_like(bins, dtype=torch.float64))

    def read(self, ranks: Ranks) -> dict:
        record = {}
        for name, sums in self.sums.items():
            total, count = ranks.sum(sums).tolist()
            record[name] = total / count
        total, count = ranks.sum(self.bins).tolist()
        if sum(count):
            record["denoise_by_step"] = [round(a / b, 5) if b else None for a, b in zip(total, count)]
        self.sums, self.bins = {}, torch.zeros_like(self.bins)
        return record


@torch.no_grad()
def held_out_loss(objective: nn.Module, clips: data.Clips, ranks: Ranks, autocast, dtype, batches=4, size=16) -> float:
    """Mean denoising loss of the test split: the same clips, noise and steps every time, no dropouts."""
    size = max(size, ranks.count)
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    objective.eval()
    for k in range(batches):
        batch = to_device(clips.batch(k, range(ranks.rank, size, ranks.count), size), ranks.device, dtype)
        with autocast:
            loss = objective(batch)["denoise"].double()
        total += torch.stack([loss.sum(), loss.new_tensor(len(loss))])
    objective.train()
    total = ranks.sum(total)
    return (total[0] / total[1]).item()


@torch.no_grad()
def sample_strip(model: DiT, vae: CausalVAE, clips: data.Clips, ranks: Ranks, autocast, dtype, count=4, steps=10):
    """What the model makes of test clips, (rows, columns, 3) uint8: reference | pose cue, output, truth at three times.

    Sampled by DDIM in 10 steps without guidance: a look, not a measurement. None on all ranks but the first.
    """
    batch = to_device(clips.batch(0, range(count), count), ranks.device, dtype)
    pose, face = batch.get("pose"), batch.get("face")

    def velocity(latents: Tensor, step: int) -> Tensor:
        with autocast:
            x = torch.cat([latents, batch["condition"]], dim=2)
            return model(x, torch.tensor([step], device=ranks.device), batch["text"], pose, face)

    output = ddim(velocity, batch["noise"], Schedule(), steps)
    if ranks.rank:
        return None
    vae = vae.to(ranks.device)  # for as long as the strip takes, a clip at a time: a GPU in training has little room

    def pictures(latents: Tensor) -> np.ndarray:
        """(count, f, 16, h, w) -> the first, middle and last frame side by side, (count, H, 3 W, 3) uint8."""
        latents = latents[:, :, :16].float() / vae.config.scaling_factor
        video = np.concatenate([data.to_picture(vae.decode(z[None])) for z in latents])
        return np.concatenate([video[:, 0], video[:, video.shape[1] // 2], video[:, -1]], axis=2)

    columns = [pictures(z[:, 1:]) for z in (pose, output, batch["latents"]) if z is not None]
    reference = pictures(batch["latents"][:, :1])[:, :, : columns[0].shape[2] // 3]
    vae.to("cpu")
    return np.concatenate([np.concatenate(column) for column in (reference, *columns)], axis=1)


def load_strip_vae(path: Path, dtype) -> CausalVAE:
    """CogVideoX's in tiles, ours as it is."""
    if not (path / "vae").is_dir():
        return load_weights(path, dtype)[0].eval()
    vae = load_vae(path, dtype)
    vae.tile(True)
    return vae


def plot_losses(run: Path) -> None:
    """loss.png: every loss of log.jsonl over the steps, and the denoising loss by noise level."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    lines = read_log(run)
    names = [n for n in ("denoise", "held_out", "s2x", "pixels", "edges", "half") if any(n in line for line in lines)]
    levels = [line["denoise_by_step"] for line in lines if "denoise_by_step" in line]
    figure, axes = pyplot.subplots(1, len(names) + bool(levels), figsize=(4 * (len(names) + bool(levels)), 3))
    for axis, name in zip(np.atleast_1d(axes), names):
        axis.plot(*zip(*[(line["step"], line[name]) for line in lines if name in line]))
        axis.set(title=name, xlabel="step")
    if levels:
        recent = [[level for level in bin if level is not None] for bin in zip(*levels[-20:])]
        axes[-1].bar(range(50, 1000, 100), [np.mean(bin or [0]) for bin in recent], width=80)
        axes[-1].set(title="denoise by noise level", xlabel="diffusion step")
    figure.tight_layout()
    with atomic(run / "loss.png", ".png") as part:
        figure.savefig(part, format="png")
    pyplot.close(figure)


# ---- the loop ------------------------------------------------------------------------------------------------------


def to_device(batch: dict, device, dtype) -> dict:
    return {k: v.to(device, dtype if v.is_floating_point() else v.dtype, non_blocking=True) for k, v in batch.items()}


def open_data(args, ranks: Ranks):
    """(training samples, samples for the reports or None). The drawn world is drawn first, if nobody did."""
    if args.stage == "vae":
        return (None if args.dry_run else data.Pictures(args)), None
    if args.preset == "toy" and args.data == TOY_DATA and not (args.data / "clips.jsonl").exists():
        ranks.print(f"{args.data}: drawing and encoding the toy clips, once (python data.py toy)")
        if args.dry_run:
            return None, None
        if ranks.rank == 0:
            data.make_toy(data.parse_args(["toy", "-o", str(args.data)])[1])
        ranks.wait()
    scale = VAE_PRESETS[DEFAULTS[args.preset]["vae_preset"]].scaling_factor
    clips, shown = data.Clips(args.data, args, scale), None
    if args.eval_every:
        try:
            shown = data.Clips(args.data, args, scale, split="test")
        except ValueError as error:
            ranks.print(f"{error}: so there is no held-out loss, and the sample strips show training clips")
            shown = data.Clips(args.data, args, scale)
            shown.training = False  # no dropouts, no augmentation
    return clips, shown


def plan(args, clips: data.Clips | None, ranks: Ranks, compute, master) -> Callable[[dict], float]:
    """Print tokens, FLOPs and bytes of the largest bucket, choose --shard if nobody did, refuse what cannot fit.

    clips: None for those of the drawn world, when they are yet to be drawn. Returns a function, batch -> FLOPs.
    """
    config = replace(dit_config(args), **{"cue_channels": 0} if args.stage == "0" else {})
    (height, width, latents), (text, text_dim) = (data.TOY_SIZE, data.TOY_SIZE, args.window), data.TOY_TEXT
    if clips:
        height, width, latents = max(clips.buckets, key=math.prod)
        text, text_dim = clips.batch(0, [0], 1)["text"].shape[1:]
    if text_dim != config.text_dim:
        raise ValueError(
            f"{args.data}: texts of {text_dim} numbers a token, --preset {args.preset} reads {config.text_dim}: "
            "give the preset that the folder was prepared with"
        )
    video = budget.tokens(config, 1 + latents, height // 8, width // 8)
    teacher = args.align_depth if args.stage == "2" and args.s2x_weight else 0

    def parts(shard, count, batch, checkpointing) -> dict:
        state = config, count, shard, bool(args.ema), teacher, video, text, batch, checkpointing
        return budget.memory(*state, master.itemsize, compute.itemsize)

    here = ranks.count, args.batch, args.checkpointing
    room = ranks.least(budget.capacity(ranks.device, ranks.here))
    needed = lambda *setting: sum(parts(*setting).values())  # noqa: E731
    if args.shard is None:
        modes = ("none", "optimizer", "full") if ranks.count > 1 else ("none",)
        fitting = [mode for mode in modes if room is None or needed(mode, *here) <= room]
        args.shard = (fitting or modes[-1:])[0]
    if args.shard != "none" and ranks.count == 1:
        raise ValueError(
            f"--shard {args.shard} needs ranks to share with: torchrun --nproc_per_node 2 or more, or --shard none"
        )
    flops = budget.step_flops(config, video, text, args.batch * args.accumulate, teacher)
    ranks.print(
        f"{budget.numbers(config):,} parameters, {video:,} video and {text} text tokens a sample, "
        f"{flops / 1e12:,.3g} TFLOP a step and rank"
    )
    said = budget.describe(parts(args.shard, *here)) + (f"; {room / budget.GIB:.1f} are there" if room else "")
    ranks.print(f"--shard {args.shard}: {said}")
    if room and needed(args.shard, *here) > room:
        nearest = budget.nearest_fit(room, args.shard, *here, needed)
        raise ValueError(f"this needs {said}; what would fit: {nearest or 'nothing, on ranks like these'}")
    peak, whose = ranks.peak(), "the"
    if args.dry_run and not peak:
        peak, whose = budget.PEAK["H100"], "an H100's"
    if peak:
        ranks.print(f"about {flops / peak / budget.MFU:.2g} s a step at {budget.MFU:.0%} of {whose} peak")

    def flops_of(batch: dict) -> float:
        count, slots, _, h, w = batch["latents"].shape
        return budget.step_flops(config, budget.tokens(config, slots, h, w), text, count, teacher)

    return flops_of


def open_run(args, ranks: Ranks) -> tuple[Path | None, dict]:
    """(the checkpoint to go on from, or None; this launch's settings as given, before `plan` fills in --shard)."""
    settings = {name: str(value.resolve()) if isinstance(value, Path) else value for name, value in vars(args).items()}
    run = args.output
    newest, before = ranks.agree(((checkpoints(run) or [None])[-1], read_settings(run)))
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # torchrun after a failure: no one to say it
    if newest and not (args.resume or restarted and before == settings or args.dry_run):
        raise ValueError(f"{run} holds a run: go on with --resume, or name another -o")
    if newest and before:
        free = ("resume", "dry_run", "device", "log_every", "save_every", "async_save", "keep", "workers")
        changed = [name for name in settings if before.get(name) != settings[name] and name not in free]
        words = [f"{name} {before.get(name)} -> {settings[name]}" for name in changed]
        ranks.print(f"{run} goes on with other settings than before: {', '.join(words)}" if words else f"{run} goes on")
    return newest, settings


def check_files(args) -> None:
    """ValueError or FileNotFoundError for a mistyped path or an unfit teacher: found out before the drawn world is drawn."""
    start = None if args.init in ("teacher", "backbone") else Path(args.init)
    for path in (args.teacher, start, args.backbone):
        if path and not (path / "transformer").is_dir():
            file = newest_weights(path)
            header = read_header(file) if file.suffix == ".safetensors" else {}
            if path == args.teacher:
                check_teacher(args, header)
    if args.stage == "2" and args.align_depth > (depth := dit_config(args).depth):
        raise ValueError(f"--align-depth {args.align_depth}: the blocks count from 1 to {depth}")


def check_teacher(args, header: dict) -> None:
    """ValueError if a model with this header cannot guide the student: both read the same batch."""
    if header.get("stage", "1") != "1":
        raise ValueError(f"{args.teacher}: --teacher must be a stage-1 model, this one is of stage {header['stage']}")
    for name in ("ref_slot", "location", "face"):
        if header.get(name, getattr(args, name)) != getattr(args, name):
            flag = f"--{name.replace('_', '-')} {header[name]}"
            raise ValueError(f"{args.teacher} was trained with {flag}: give the same to stage 2")


def wrap(args, ranks: Ranks, compute, master):
    """(the objective; what a step calls, which is the objective or DDP around it; autocast), on the device, sharded, compiled."""
    model = build(args)
    autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=compute == torch.bfloat16)
    whole = args.shard in ("none", None)  # None: the VAE
    if whole:
        model = model.to(ranks.device, master)
    else:
        model, autocast = shard(model, args.shard == "full", ranks, compute, master), nullcontext()
    if args.stage == "vae":
        objective = Autoencoding(model)
    else:
        teacher = load_teacher(args, compute, ranks.device)
        objective = Denoising(model, args.align_depth, teacher)
        model.checkpointing = args.checkpointing
        for block in [*model.blocks, *(teacher.blocks if teacher else ())] if args.compile else ():
            block.compile()
    if ranks.count > 1 and whole:
        copies = DistributedDataParallel(objective, gradient_as_bucket_view=True)  # else gradients exist twice
        return objective, copies, autocast
    return objective, objective, autocast


def progress(args, ranks: Ranks, record: dict, losses: dict, speed: float) -> str:
    """A line for the terminal: losses, steps a second, use of the GPU, and the time left."""
    words = " | ".join(f"{name} {record[name]:.4f}" for name in losses)
    peak, rate = ranks.peak(), record["steps_per_s"]
    used = f"MFU {speed / peak:.0%} | " if peak else f"{speed / 1e12:.3g} TFLOP/s | "
    used = used if speed else ""  # of the VAE it is not counted
    left = (args.steps - record["step"]) / max(rate, 1e-9)
    return (
        f"stage {args.stage} | step {record['step']}/{args.steps} | {words} | grad {record['grad']:.2f} | {rate:.2f} it/s | "
        f"{used}{record['waiting_for_data']:.0%} waiting | {left // 3600:.0f}:{left % 3600 // 60:02.0f} left"
    )


def update(model: nn.Module, ema: dict | None, optimizers: list, step: int, args) -> float:
    """From gradients to weights and their moving average; the gradient's norm. ValueError where it is not finite."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if not math.isfinite(norm):
        raise ValueError(f"step {step}: the loss or its gradient is not finite: lower --lr; checkpoints in "
                         f"{args.output}, if any, stand, for --resume")  # fmt: skip
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args) * group["rate"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if ema:
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in model.parameters()], 1 - args.ema)
    return norm


def train(args) -> None:
    ranks, run = Ranks(args.device), args.output
    if ranks.device.type == "cpu":
        keep_freed_memory()
    newest, settings = open_run(args, ranks)
    check_files(args)
    compute, reason = (getattr(torch, args.dtype), "--dtype") if args.dtype else (ranks.dtype, ranks.reason)
    master = torch.float64 if compute == torch.float64 else torch.float32  # weights, gradients, noise and losses
    clips, shown = open_data(args, ranks)
    flops_of = lambda batch: 0.0  # noqa: E731
    if args.stage != "vae":
        if clips:  # shorter clips are seen whole, and the weights shall say so
            args.window = max(length for _, _, length in clips.buckets)
        flops_of = plan(args, clips, ranks, compute, master)
    if args.compile:
        check_compiler(ranks.device)
    G = args.batch * args.accumulate * ranks.count  # samples a step, over all ranks
    ranks.print(
        f"stage {args.stage}, preset {args.preset}: {len(clips or ())} clips, {G} samples a step on {ranks.count} x "
        f"{ranks.device.type}, {str(compute).removeprefix('torch.')} ({reason})"
    )
    if args.dry_run:
        return
    strip_vae = load_strip_vae(args.vae, compute) if args.vae and args.eval_every and args.stage != "vae" else None
    objective, wrapped, autocast = wrap(args, ranks, compute, master)
    model = objective.model
    ema = {name: p.detach().clone() for name, p in model.named_parameters()} if args.ema else None
    optimizers = make_optimizers(model, args)

    run.mkdir(parents=True, exist_ok=True)
    if not ranks.agree(ranks.alone_in(run) and newest == (checkpoints(run) or [None])[-1]):
        raise ValueError(f"{run}: another train.py writes there, or just did; name another -o, or wait")
    start = load_checkpoint(newest, args, ranks, model, ema, optimizers) if newest else 0
    saver = Saver(args, ranks, model)
    if ranks.rank == 0:
        rewind_log(run, start)
        data.write_text(run / "config.json", json.dumps(settings, indent=1))
    if start >= args.steps:
        ranks.print(f"{run} is at step {start} of {args.steps}: nothing to do; give more --steps to go on")

    def log(record: dict) -> None:
        if ranks.rank == 0:
            with open(run / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")

    def micro_batch(n: int) -> tuple[dict, int]:
        """Number n of this rank from `start` on, and how many samples of it stand in for damaged ones."""
        (step, k), before = divmod(n, args.accumulate), clips.skipped
        first = (k * ranks.count + ranks.rank) * args.batch
        batch = clips.batch(start + step, range(first, first + args.batch), G)
        return batch, clips.skipped - before

    meter, began, waited, flops, skipped = Meter(ranks.device), time.perf_counter(), 0.0, 0.0, 0
    total = max(args.steps - start, 0) * args.accumulate
    batches = data.prefetched(micro_batch, total, args.workers)
    for n in range(total):  # forward passes; after the last of every --accumulate of them the weights move
        before = time.perf_counter()
        batch, replaced = next(batches)
        waited, skipped = waited + time.perf_counter() - before, skipped + replaced
        done, last = start + n // args.accumulate + 1, n % args.accumulate == args.accumulate - 1
        batch = to_device(batch, ranks.device, master)
        # DDP sums gradients locally and exchanges them after the last forward pass; shards exchange each time, since no
        # rank has room for the whole sum
        with wrapped.no_sync() if wrapped is not objective and not last else nullcontext():
            with autocast:
                losses = wrapped(batch)
            loss = total_loss(losses, args)
            (loss / args.accumulate).backward()
        meter.add(losses, batch.get("step"))
        flops += flops_of(batch)
        if not last:
            continue

        norm = update(model, ema, optimizers, done - 1, args)
        if done % args.log_every == 0 or done == args.steps:
            elapsed = time.perf_counter() - began
            record = {"step": done, **meter.read(ranks), "grad": norm, "lr": learning_rate(done - 1, args)}
            record |= {
                "steps_per_s": round((done - start) / elapsed, 4),
                "waiting_for_data": round(waited / elapsed, 4),
            }
            log(record | {"skipped_samples": ranks.total(skipped)})
            ranks.print(progress(args, ranks, record, losses, flops / elapsed))
            skipped = 0
        if args.eval_every and (done % args.eval_every == 0 or done == args.steps):
            with torch.compiler.set_stance("force_eager"):  # other batch sizes, seldom: not worth a compilation
                report(args, done, objective, ema, shown, strip_vae, ranks, autocast, master, log)
        if done % args.save_every == 0 or done == args.steps:  # last: a run whose final checkpoint is there is complete
            saver.save(done, model, ema, optimizers)
    saver.finish()
    if ranks.count > 1:
        dist.destroy_process_group()


def report(args, done, objective, ema, shown, vae, ranks, autocast, dtype, log) -> None:
    """Held-out loss and sample strip, both with the averaged weights, and the loss plot."""
    if shown is not None:
        with swapped(objective.model, ema):
            if shown.split == "test":
                before = shown.skipped
                value = held_out_loss(objective, shown, ranks, autocast, dtype)
                log({"step": done, "held_out": value, "skipped_samples": ranks.total(shown.skipped - before)})
                ranks.print(f"stage {args.stage} | step {done}/{args.steps} | held-out denoise {value:.4f}")
            if vae:
                strip = sample_strip(objective.model, vae, shown, ranks, autocast, dtype)
                if ranks.rank == 0:
                    write_image(args.output / f"samples-{done:07d}.png", strip)
    if ranks.rank == 0:
        plot_losses(args.output)


if __name__ == "__main__":
    try:
        export(ARGS.export, ARGS.output) if ARGS.export else train(ARGS)
    except (ValueError, OSError) as error:
        PARSER.exit(2, f"{PARSER.prog}: {error}\n")
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        PARSER.exit(2, f"{PARSER.prog}: {reason} Use --checkpointing, a smaller --batch or --shard full\n")
    except KeyboardInterrupt:
        sys.exit(130)
