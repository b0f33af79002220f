"""One run on any number of processes: slices in memory, whole files on disk.

DDP keeps all of the model on every rank. FSDP2 (`shard`) leaves each rank a slice of every parameter, gradient,
moment and average, and gathers a block's weights when the block runs. A checkpoint has whole weights, so that any
program can read them, and the optimizer in slices, one file a rank, which torch.distributed.checkpoint deals out
again to any other number of ranks.
"""

import errno
import json
import os
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import budget
from load_cogvideox import checkpoints, load_weights, pick_device, save_weights
from model import DiT

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process's checkpoint says so


class Ranks:
    """Where this process stands among those that torchrun started; alone without torchrun."""

    def __init__(self, device: str | None):
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device, self.dtype, self.reason = pick_device(device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        if self.count > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")

    @property
    def mesh(self):
        return dist.init_device_mesh(self.device.type, (self.count,))

    def sum(self, value: Tensor) -> Tensor:
        if self.count > 1:
            dist.all_reduce(value)
        return value

    def count_all(self, number: int) -> int:
        return int(self.sum(torch.tensor(number, device=self.device)))

    def peak(self) -> float | None:
        """FLOP/s of this rank's GPU in bfloat16, if it is a known one."""
        return budget.peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None

    def wait(self):
        if self.count > 1:
            dist.barrier()

    def print(self, *words):
        if self.rank == 0:
            print(*words, flush=True)


# ---- slices --------------------------------------------------------------------------------------------------------


def shard(source: nn.Module, full: bool, ranks: Ranks, compute, master) -> nn.Module:
    """FSDP2: each rank keeps its slice of every parameter (and gradient, moments, average) in float32.

    A block's weights are gathered in the compute dtype when it runs; with `full` it drops them again after the
    forward pass and gathers them anew in the backward pass. The source stays memory-mapped: a rank copies only its
    own slices.
    """
    with torch.device("meta"):
        model = DiT(source.config).to(master)
    mixed = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=master)
    for part in [*model.blocks, model]:
        fully_shard(part, mesh=ranks.mesh, mp_policy=mixed, reshard_after_forward=full)
    model.to_empty(device=ranks.device)
    copy_parameters(model, dict(source.named_parameters()))
    return model


@torch.no_grad()
def copy_parameters(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Fill a model, sharded or not, from whole tensors."""
    for name, p in model.named_parameters():
        value = values[name].detach().to(p.device, p.dtype)
        if isinstance(p, DTensor):
            value = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
        p.copy_(value)


def whole(state: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Sharded tensors gathered one after another, kept by rank 0 only, on the CPU; every rank has to call this."""
    gathered = {}
    for name, value in state.items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if ranks.rank == 0:
            gathered[name] = value.detach().cpu()
    return gathered


@contextmanager
def swapped(model: nn.Module, ema: dict[str, Tensor] | None):
    """The model with its averaged weights inside the `with`; one tensor at a time, so no second copy."""

    @torch.no_grad()
    def swap():
        for name, p in model.named_parameters() if ema else ():
            trained = p.detach().clone()
            p.copy_(ema[name])
            ema[name].copy_(trained)

    swap()
    try:
        yield
    finally:
        swap()


# ---- run folder ----------------------------------------------------------------------------------------------------


def save_checkpoint(args, ranks: Ranks, step: int, model, ema, optimizer) -> None:
    """step-0001200/: model.safetensors, ema.safetensors, and the optimizer in slices, one file a rank.

    Written under a temporary name, then renamed: a kill at any moment leaves whole checkpoints only.
    """
    run = args.output
    final, part = run / f"step-{step:07d}", run / f".part-{step:07d}"
    header = {"preset": args.preset, "stage": args.stage, "step": step, "window": args.window}
    failure = None
    if ranks.rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    ranks.wait()
    try:
        for name, state in {"model": dict(model.named_parameters()), "ema": ema}.items():
            if state := whole(state or {}, ranks):
                save_weights(part / f"{name}.safetensors", model, state=state, **header)
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=part / "optimizer", no_dist=ranks.count == 1)
    except (OSError, CheckpointException) as error:
        failure = error
    if ranks.count_all(failure is not None):
        if ranks.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise OSError(save_error(run, model, ema, failure)) from None
    if ranks.rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        for old in checkpoints(run)[: -args.keep or None]:
            shutil.rmtree(old)


def save_error(run: Path, model: nn.Module, ema: dict | None, failure: BaseException | None) -> str:
    numbers = sum(p.numel() for p in model.parameters())
    need, free = numbers * 4 * (4 if ema else 3), shutil.disk_usage(run).free
    full = free < need or getattr(failure, "errno", None) == errno.ENOSPC
    why = "the disk is full" if full else f"it cannot be written ({str(failure or 'on another rank').splitlines()[0]})"
    return (
        f"{run}: {why}: a checkpoint needs {need / 2**20:,.0f} MiB, {free / 2**20:,.0f} are free; the last one stands"
    )


def load_checkpoint(args, ranks: Ranks, model, ema, optimizer) -> int:
    """Fill everything from the run folder's newest checkpoint; returns its step, 0 if there is none."""
    found = checkpoints(args.output)
    if not found:
        return 0
    weights, header = load_weights(found[-1] / "model.safetensors", config=model.config)
    copy_parameters(model, dict(weights.named_parameters()))
    if ema:
        averaged, _ = load_weights(found[-1] / "ema.safetensors", config=model.config)
        with swapped(model, ema):
            copy_parameters(model, dict(averaged.named_parameters()))
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=found[-1] / "optimizer", no_dist=ranks.count == 1)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return header["step"]


def rewind_log(run: Path, start: int) -> None:
    """Drop the lines after the step that a run goes on from: they will be written again."""
    path = run / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole_lines = [line for line in lines if line.endswith("\n")]  # a kill may have cut the last
    path.write_text("".join(line for line in whole_lines if json.loads(line)["step"] <= start))
