"""Train DirectAnimator: both stages of Same2X in one loop (paper Sec. 3.2, Fig. 4, Eq. 4), and what must come before them.

    torchrun --nproc_per_node 4 train.py --stage 1 --data DATA --backbone DIR
    torchrun --nproc_per_node 4 train.py --stage 2 --data DATA --teacher RUN
    python train.py --stage 1 --preset toy                                         # the same on a laptop, in a drawn world

    stage vae   the drawn world's VAE (CogVideoX brings its own)
    stage 0     its backbone, image-to-video without cues (CogVideoX brings its own)
    stage 1     same identity: the clip's own cues                 loss = v-MSE
    stage 2     cross identity: another person's cues for the same motion, beside a frozen stage-1 model with the clip's own
                                                                   loss = v-MSE + lambda * S2X

Every random draw is keyed by (seed, step, index in the global batch), so any step can be recomputed alone, on any number of ranks.
"""

import argparse
import errno
import json
import os
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

STAGES = ("vae", "0", "1", "2")
VAE_OF = {
    "cogvideox1.5-5b": "cogvideox1.5",
    "tiny": "toy",
}  # whose latents a preset is trained on, where the names differ
DEFAULTS = {  # those of the 5B model are the paper's (Sec. 4.1, Table 4)
    "cogvideox1.5-5b": dict(
        steps=(0, 0, 10_000, 30_000), lr=2e-5, batch=1, align_depth=10, ema=0.0, checkpointing=True, window=13
    ),
    "toy": dict(
        steps=(8000, 20_000, 3000, 3000),
        lr=5e-4,
        batch=16,
        align_depth=1,
        ema=0.999,
        checkpointing=False,
        window=5,
    ),
    "tiny": dict(
        steps=(10, 10, 10, 10), lr=1e-3, batch=2, align_depth=1, ema=0.9, checkpointing=False, window=5
    ),
}


def parse_args(argv=None):
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument(
        "--preset", choices=list(DEFAULTS), default="cogvideox1.5-5b", help="sizes and defaults"
    )
    first.add_argument("--stage", choices=STAGES, default="1", help="see above")
    known, _ = first.parse_known_args(argv)
    default = DEFAULTS[known.preset]
    steps = default["steps"][STAGES.index(known.stage)]

    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        parents=[first],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message} (see --help)\n")
    add = parser.add_argument
    add("-o", "--output", type=Path, help="run folder (default: runs/PRESET-stageN)")
    add("--data", type=Path, default=Path("runs/toy-data"), help="data folder made by data.py")
    add(
        "--window",
        type=int,
        default=default["window"],
        help="latents of a clip seen at once, odd: 13 are 49 frames",
    )
    add("--backbone", type=Path, help="CogVideoX1.5-5B-I2V folder, or a stage-0 weights file or run")
    add("--teacher", type=Path, help="stage 2: a stage-1 run folder or weights file")
    add(
        "--init",
        choices=["teacher", "backbone"],
        default="teacher",
        help="stage 2: what the student starts from",
    )
    add("--resume", action="store_true", help="go on from the run folder's newest checkpoint")
    add("--dry-run", action="store_true", help="print what would be trained, and stop")
    add("--steps", type=int, default=steps, help="optimiser steps")
    add("--batch", type=int, default=default["batch"], help="samples per rank and forward pass")
    add("--accumulate", type=int, default=1, help="forward passes per optimiser step")
    add("--lr", type=float, default=default["lr"], help="learning rate after the warm-up")
    add("--warmup", type=int, default=100, help="steps of linear warm-up")
    add("--weight-decay", type=float, default=1e-4, help="AdamW's; none on biases and norms")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--ema", type=float, default=default["ema"], help="decay of the weights' moving average; 0: none")
    add(
        "--lambda",
        dest="s2x_weight",
        type=float,
        default=0.5,
        help="weight of the Same2X loss (Table 4); 0: row S8",
    )
    add(
        "--align-depth",
        type=int,
        default=default["align_depth"],
        help="block whose tokens Same2X aligns, counted from 1 (Table 4: D)",
    )
    add("--cue-injection", choices=["cuefusion", "concat", "cross"], default="cuefusion", help="Table 5")
    add("--location", choices=["soft", "hard", "none"], default="soft", help="Location Cue (Table 3: S7, S6)")
    add("--face", choices=["centered", "none"], default="centered", help="Face Cue (Table 3: S1)")
    add(
        "--ref-slot",
        choices=["reference", "copy"],
        default="reference",
        help="what slot 0 holds; copy: CogVideoX's own padding",
    )
    add(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        default=default["checkpointing"],
        help="recompute blocks in the backward pass",
    )
    add(
        "--dtype",
        choices=["bfloat16", "float32", "float64"],
        help="of the computation; weights stay float32 (default: bfloat16 where fast)",
    )
    add("--device", help="default: cuda if present, else cpu")
    add("--seed", type=int, default=0, help="of every random draw")
    add("--log-every", type=int, default=20, help="steps between log lines")
    add("--save-every", type=int, default=500, help="steps between checkpoints")
    add("--keep", type=int, default=2, help="checkpoints to keep, the newest; 0: all")
    add(
        "--eval-every",
        type=int,
        default=500,
        help="steps between held-out losses, loss plots and sample strips; 0: never",
    )
    args = parser.parse_args(argv)
    args.output = args.output or Path("runs") / f"{args.preset}-stage{args.stage}"
    if (args.stage == "2") != (args.teacher is not None):
        parser.error(
            "--stage 2 needs --teacher RUN, a stage-1 run folder or weights file; the other stages take none"
        )
    if args.init == "backbone" and args.stage != "2":
        parser.error("--init is a choice of stage 2: stage 1 always starts from the backbone")
    return parser, args


if __name__ == "__main__":
    PARSER, ARGS = parse_args()  # before torch is imported: --help answers at once

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from data import Clips, Pictures, prefetched  # noqa: E402
from diffusion import Schedule  # noqa: E402
from load_cogvideox import load_transformer, load_weights, pick_device, save_weights  # noqa: E402
from model import DIT_PRESETS, DiT, DiTConfig  # noqa: E402
from vae import VAE_PRESETS, CausalVAE  # noqa: E402


# ---- objectives: a batch in, named losses out -------------------------------------------------------------------------------


def same2x(student: Tensor, teacher: Tensor) -> Tensor:
    """Eq. 4 without its expectation: minus the cosine of matching tokens, mean over tokens. (B, N, D) twice -> (B,), float32."""
    wide = torch.promote_types(student.dtype, torch.float32)
    return -F.cosine_similarity(student.to(wide), teacher.to(wide), dim=-1).mean(dim=1)


class Denoising(nn.Module):
    """v-MSE, Eq. 8 in v-prediction, over all latents (slot 0 too); with a teacher's features also Eq. 4. Losses are (B,)."""

    def __init__(self, model: DiT, align_depth: int):
        super().__init__()
        self.model = model
        self.align_depth = align_depth
        self.schedule = Schedule()

    def noisy(self, batch: dict) -> Tensor:
        """x_t beside the image condition, (B, f, 32, h, w): what student and teacher both see."""
        latents = self.schedule.add_noise(batch["latents"], batch["noise"], batch["step"])
        return torch.cat([latents, batch["condition"]], dim=2)

    def forward(self, batch: dict) -> dict[str, Tensor]:
        target = self.schedule.velocity(batch["latents"], batch["noise"], batch["step"])
        v, features = self.model(
            self.noisy(batch),
            batch["step"],
            batch["text"],
            batch.get("pose"),
            batch.get("face"),
            tap=self.align_depth,
        )
        losses = {"denoise": F.mse_loss(v.to(target.dtype), target, reduction="none").flatten(1).mean(1)}
        if "teacher_features" in batch:
            losses["s2x"] = same2x(features, batch["teacher_features"])
        return losses


class Coding(nn.Module):
    """The VAE's loss: absolute error of pixels and of their differences (for edges), and a little Kullback-Leibler."""

    def __init__(self, model: CausalVAE):
        super().__init__()
        self.model = model

    def forward(self, batch: dict) -> dict[str, Tensor]:
        video = batch["video"]
        mean, logvar = self.model.encode(video)
        decoded = self.model.decode(mean + (0.5 * logvar).exp() * batch["noise"]).float()
        error = decoded - video
        edges = sum(error.diff(dim=axis).abs().flatten(1).mean(1) for axis in (1, 3, 4))
        kl = 0.5 * (mean.float().square() + logvar.float().exp() - 1 - logvar.float())
        return {"pixels": error.abs().flatten(1).mean(1), "edges": edges, "kl": kl.flatten(1).mean(1)}


# ---- networks ---------------------------------------------------------------------------------------------------------------


def newest_weights(path: Path, ema: bool = True) -> Path:
    """A weights file as it is; a run folder's newest checkpoint, its moving average first."""
    if path.is_file():
        return path
    steps = checkpoints(path)
    if not steps:
        raise FileNotFoundError(f"{path}: neither a weights file nor a run folder with a checkpoint in it")
    averaged = steps[-1] / "ema.safetensors"
    return averaged if ema and averaged.is_file() else steps[-1] / "model.safetensors"


def load_backbone(path: Path, config) -> DiT:
    """A model of `config` with fresh cue layers around a backbone: a CogVideoX folder, or our own stage-0 weights."""
    if (path / "transformer").is_dir():
        return load_transformer(path, torch.float32)
    backbone, header = load_weights(newest_weights(path))
    if (
        replace(backbone.config, cue_channels=config.cue_channels, cue_injection=config.cue_injection)
        != config
    ):
        raise ValueError(f"{path}: its sizes {backbone.config} are not those of the preset, {config}")
    model = DiT(config)
    model.load_state_dict(backbone.state_dict(), strict=False)
    model.init_cues()  # again: they copy from the backbone
    return model


def dit_config(args) -> DiTConfig:
    return replace(DIT_PRESETS[args.preset], cue_injection=args.cue_injection)


def build(args) -> nn.Module:
    """The network to train, on the CPU in float32."""
    torch.manual_seed(args.seed)
    if args.stage == "vae":
        return CausalVAE(VAE_PRESETS[args.preset])
    config = dit_config(args)
    if args.stage == "0":
        return DiT(replace(config, cue_channels=0))
    if args.stage == "2" and args.init == "teacher":
        return load_weights(newest_weights(args.teacher), torch.float32, config)[0]
    if args.backbone:
        return load_backbone(args.backbone, config)
    if args.preset == "tiny":
        return DiT(config)  # small enough to start from nothing
    raise ValueError(
        f"--stage {args.stage} starts from a backbone: give --backbone (a CogVideoX1.5-5B-I2V folder, or a stage-0 run)"
    )


def load_teacher(args, dtype, device) -> DiT:
    """The frozen stage-1 model: the embeddings and the first `align_depth` blocks, all it will ever run."""
    path = newest_weights(args.teacher)
    config = dit_config(args)
    teacher, header = load_weights(path, dtype, config)
    if header.get("stage") != "1":
        raise ValueError(
            f"{path}: --teacher must be a stage-1 model, this one is stage {header.get('stage')}"
        )
    teacher.blocks = teacher.blocks[: args.align_depth]
    return teacher.to(device).requires_grad_(False).eval()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """No decay on biases and norms; decay would also pull CueFusion's -1 biases away from the identity."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


# ---- run folder -------------------------------------------------------------------------------------------------------------


def checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints, oldest first; what a kill left half-written has a temporary name."""
    return sorted(run.glob("step-*[0-9]"))


def save_checkpoint(run: Path, step: int, args, model, ema, optimizer) -> None:
    """step-0001200/ with weights, their average and the optimizer: written under a temporary name, then renamed."""
    final, part = run / f"step-{step:07d}", run / f".part-{step:07d}"
    header = {"preset": args.preset, "stage": args.stage, "step": step}
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_weights(part / "model.safetensors", model, **header)
        if ema:
            save_weights(part / "ema.safetensors", model, state=ema, **header)
        torch.save({"optimizer": optimizer.state_dict(), "step": step}, part / "optimizer.pt")
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        if error.errno == errno.ENOSPC:
            need = sum(p.numel() for p in model.parameters()) * 4 * (4 if ema else 3) / 2**20
            raise OSError(
                f"{run}: the disk is full, a checkpoint needs {need:,.0f} MiB; the previous one stands"
            ) from None
        raise
    for old in checkpoints(run)[: -args.keep or None]:
        shutil.rmtree(old)


def load_checkpoint(run: Path, model, ema, optimizer) -> int:
    """Fill everything from the newest checkpoint of a run; returns its step, 0 if there is none."""
    found = checkpoints(run)
    if not found:
        return 0
    weights, _ = load_weights(found[-1] / "model.safetensors", config=model.config)
    model.load_state_dict(weights.state_dict())
    if ema:
        weights, _ = load_weights(found[-1] / "ema.safetensors", config=model.config)
        for name, value in weights.named_parameters():
            ema[name].copy_(value.data)
    state = torch.load(found[-1] / "optimizer.pt", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


# ---- the loop ---------------------------------------------------------------------------------------------------------------


class Ranks:
    """Where this process stands among those torchrun started; alone without torchrun."""

    def __init__(self, device: str | None):
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device, self.dtype, self.reason = pick_device(device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        if self.count > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def wrap(self, objective: nn.Module) -> nn.Module:
        return DistributedDataParallel(objective) if self.count > 1 else objective

    def sum(self, value: Tensor) -> Tensor:
        if self.count > 1:
            dist.all_reduce(value)
        return value

    def print(self, *words):
        if self.rank == 0:
            print(*words, flush=True)


class Meter:
    """Sums since the last log line: each loss, and the denoising loss by noise level in ten bins of 100 steps."""

    def __init__(self, device):
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.bins = torch.zeros(2, 10, dtype=torch.float64, device=device)

    def add(self, losses: dict[str, Tensor], step: Tensor | None):
        for name, value in losses.items():
            total = torch.stack(
                [
                    value.detach().double().sum(),
                    torch.tensor(float(len(value)), dtype=torch.float64, device=self.device),
                ]
            )
            self.sums[name] = self.sums.get(name, 0) + total
        if step is not None:
            bins = step // 100
            self.bins[0].index_add_(0, bins, losses["denoise"].detach().double())
            self.bins[1].index_add_(0, bins, torch.ones_like(bins, dtype=torch.float64))

    def read(self, ranks: Ranks) -> dict:
        record = {name: (ranks.sum(total)[0] / total[1]).item() for name, total in self.sums.items()}
        total, count = ranks.sum(self.bins).tolist()
        if sum(count):
            record["denoise_by_step"] = [round(a / b, 5) if b else None for a, b in zip(total, count)]
        self.__init__(self.device)
        return record


@torch.no_grad()
def held_out_loss(
    args, objective: nn.Module, ema: dict | None, scale: float, device, autocast, wide, batches: int = 4
) -> float:
    """Denoising loss on the test split with the averaged weights: the same clips, noise and steps every time, no dropouts."""
    clips, G = Clips(args.data, args, scale, split="test"), 16
    model, total = objective.model, 0.0
    trained = {name: p.data for name, p in model.named_parameters()}
    for name, p in model.named_parameters() if ema else ():
        p.data = ema[name]
    for k in range(batches):
        batch = to_device(clips.batch(k, range(G), G), device, wide)
        with autocast:
            total += (
                objective({n: v for n, v in batch.items() if not n.startswith("teacher")})["denoise"]
                .mean()
                .item()
                / batches
            )
    for name, p in model.named_parameters():
        p.data = trained[name]
    return total


def total_loss(losses: dict[str, Tensor], args) -> Tensor:
    weights = {"denoise": 1.0, "s2x": args.s2x_weight, "pixels": 1.0, "edges": 0.5, "kl": 1e-5}
    return sum(weights[name] * value.mean() for name, value in losses.items())


def to_device(batch: dict, device, dtype) -> dict:
    return {
        k: v.to(device, dtype if v.is_floating_point() else v.dtype, non_blocking=True)
        for k, v in batch.items()
    }


def train(args) -> None:
    ranks = Ranks(args.device)
    dtype = getattr(torch, args.dtype) if args.dtype else ranks.dtype
    double = dtype == torch.float64
    autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    wide = torch.float64 if double else torch.float32  # of weights, gradients, noise and losses
    run = args.output
    run.mkdir(parents=True, exist_ok=True)

    model = build(args).to(ranks.device, wide)
    teacher = None
    if args.stage == "2" and args.s2x_weight:
        teacher = load_teacher(args, dtype if double else torch.float32, ranks.device)
    if args.stage != "vae":
        model.checkpointing = args.checkpointing
    ema = {name: p.detach().clone() for name, p in model.named_parameters()} if args.ema else None
    optimizer = torch.optim.AdamW(
        parameter_groups(model, args.weight_decay), args.lr, betas=(0.9, 0.95), eps=1e-8, fused=True
    )
    start = load_checkpoint(run, model, ema, optimizer) if args.resume else 0
    objective = Coding(model) if args.stage == "vae" else Denoising(model, args.align_depth)
    wrapped = ranks.wrap(objective)

    G = (
        args.batch * args.accumulate * ranks.count
    )  # samples a step; this rank's are i = rank, rank + ranks.count, ...
    scale = VAE_PRESETS[VAE_OF.get(args.preset, args.preset)].scaling_factor
    data = Pictures(args) if args.stage == "vae" else Clips(args.data, args, scale)
    ranks.print(
        f"stage {args.stage}, preset {args.preset}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(data)} clips, "
        f"{G} samples a step on {ranks.count} x {ranks.device.type}, {str(dtype).removeprefix('torch.')} ({ranks.reason})"
    )
    if args.dry_run:
        return
    if ranks.rank == 0:
        (run / "config.json").write_text(
            json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}, indent=1)
        )
    log = open(run / "log.jsonl", "a") if ranks.rank == 0 else None
    meter, began = Meter(ranks.device), time.perf_counter()

    def micro_batches():
        for step in range(start, args.steps):
            for k in range(args.accumulate):
                first = (k * ranks.count + ranks.rank) * args.batch
                yield step, k, data.batch(step, range(first, first + args.batch), G)

    for step, k, batch in prefetched(micro_batches()):
        batch = to_device(batch, ranks.device, wide)
        last = k == args.accumulate - 1
        with nullcontext() if last or ranks.count == 1 else wrapped.no_sync():
            with autocast:
                if teacher is not None:  # same x_t, step, text and reference; its own cues
                    with torch.no_grad():
                        batch["teacher_features"] = teacher.features(
                            objective.noisy(batch),
                            batch["step"],
                            batch["text"],
                            batch["teacher_pose"],
                            batch["teacher_face"],
                            args.align_depth,
                        )
                losses = wrapped(batch)
            loss = total_loss(losses, args)
            (loss / args.accumulate).backward()
        meter.add(losses, batch.get("step"))
        if not last:
            continue

        norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        if not torch.isfinite(norm):
            raise ValueError(
                f"step {step}: the loss or its gradient is not finite; the last checkpoint in {run} stands: lower --lr, or --resume"
            )
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min((step + 1) / max(args.warmup, 1), 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            torch._foreach_lerp_(list(ema.values()), [p.detach() for p in model.parameters()], 1 - args.ema)

        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            record = {
                "step": done,
                **meter.read(ranks),
                "grad": norm.item(),
                "lr": optimizer.param_groups[0]["lr"],
            }
            rate = (done - start) / (time.perf_counter() - began)
            if ranks.rank == 0:
                log.write(json.dumps(record) + "\n"), log.flush()
                words = [f"{name} {record[name]:.4f}" for name in record if name in losses]
                left = (args.steps - done) / rate
                ranks.print(
                    f"stage {args.stage} | step {done}/{args.steps} | {' | '.join(words)} | grad {record['grad']:.2f} | "
                    f"{rate:.2f} it/s | {left // 3600:.0f}:{left % 3600 // 60:02.0f} left"
                )
        if args.stage != "vae" and args.eval_every and done % args.eval_every == 0 and ranks.rank == 0:
            value = held_out_loss(args, objective, ema, scale, ranks.device, autocast, wide)
            log.write(json.dumps({"step": done, "held_out": value}) + "\n"), log.flush()
            ranks.print(f"stage {args.stage} | step {done}/{args.steps} | held-out denoise {value:.4f}")
        if (done % args.save_every == 0 or done == args.steps) and ranks.rank == 0:
            save_checkpoint(run, done, args, model, ema, optimizer)
    if ranks.count > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        train(ARGS)
    except (ValueError, OSError) as error:
        PARSER.exit(2, f"{PARSER.prog}: {error}\n")
    except KeyboardInterrupt:
        sys.exit(130)
