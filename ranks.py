"""One run on any number of processes: slices in memory, whole files on disk.

DDP keeps all of the model on every rank. FSDP2 (`shard`) leaves each rank a slice of every parameter, gradient,
moment and average, and gathers a block's weights when the block runs. A checkpoint has whole weights, so that any
program can read them, and the optimizer in slices, one file a rank, which torch.distributed.checkpoint deals out
again to any other number of ranks.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import budget
from data import write_text
from load_cogvideox import checkpoints, load_weights, save_weights
from machine import lock, pick_device
from model import DiT

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process's checkpoint says so
logging.getLogger("torch.distributed.checkpoint").setLevel(logging.CRITICAL)  # it logs the traceback of what it raises


class Ranks:
    """Where this process stands among those that torchrun started; alone without torchrun."""

    def __init__(self, device: str | None):
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # ranks on this machine
        if torch.cuda.is_available() and (device or "cuda").startswith("cuda"):
            if self.here > torch.cuda.device_count():
                raise ValueError(f"{self.here} ranks on a machine with {torch.cuda.device_count()} GPUs: give torchrun "
                                 f"--nproc_per_node {torch.cuda.device_count()}, or train.py --device cpu")  # fmt: skip
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # before anything is put on another rank's card
        self.device, self.dtype, self.reason = pick_device(device)
        if self.device.type == "mps":
            raise ValueError("--device mps: losses are summed in float64, which Apple's GPUs lack: use --device cpu")
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", self.device.index or 0)))
            torch.cuda.set_device(self.device)
        if self.count > 1:
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=meeting_place(), rank=self.rank, world_size=self.count)

    @property
    def mesh(self):
        return dist.init_device_mesh(self.device.type, (self.count,))

    def sum(self, value: Tensor) -> Tensor:
        if self.count > 1:
            dist.all_reduce(value)
        return value

    def least(self, number: float | None) -> float | None:
        """The smallest of all ranks' numbers, so that what follows from it is the same on all."""
        if self.count == 1 or number is None:
            return number
        smallest = torch.tensor(float(number), dtype=torch.float64, device=self.device)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        return smallest.item()

    def agree(self, value):
        """The first rank's value, on all ranks."""
        box = [value]
        if self.count > 1:
            dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]

    def alone_in(self, run: Path) -> bool:
        """Whether no other training writes into this run folder; the first rank looks, and holds the lock until it ends."""
        self.held = lock(run / ".lock") if self.rank == 0 else True
        return self.held is not None

    def total(self, number: int) -> int:
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


def meeting_place() -> dist.Store:
    """The key-value store where torchrun's ranks find each other, a corner of its own for each restart.

    torchrun on one machine keeps its store over restarts, and in it the addresses of dead ranks, which refuse a
    connection or never answer. On several machines (--rdzv_backend c10d) each restart has a new store.
    """
    store, _, _ = next(dist.rendezvous("env://"))
    several = int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1  # each of which counts its own restarts
    return store if several else dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


# ---- slices --------------------------------------------------------------------------------------------------------


def shard(source: nn.Module, full: bool, ranks: Ranks, compute, master) -> nn.Module:
    """FSDP2: each rank keeps its slice of every parameter (and gradient, moments, average) in float32.

    A block's weights are gathered in the compute dtype when it runs; with `full` it drops them again after the
    forward pass and gathers them anew in the backward pass. The source stays memory-mapped: a rank copies only its
    own slices.
    """
    with torch.device("meta"):
        model = DiT(source.config).to(master)
    mixed = MixedPrecisionPolicy(compute, reduce_dtype=master, cast_forward_inputs=False)  # RoPE stays float32
    mesh = ranks.mesh
    for part in [*model.blocks, model]:
        fully_shard(part, mesh=mesh, mp_policy=mixed, reshard_after_forward=full)
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
        for part in model.modules():  # --shard optimizer: a forward pass without a backward leaves whole weights behind
            if isinstance(part, FSDPModule):
                part.reshard()
        swap()


# ---- run folder ----------------------------------------------------------------------------------------------------


TRAINED = "window", "ref_slot", "location", "face"  # what sampling has to do as training did


class Saver:
    """step-0001200/: model.safetensors, ema.safetensors, and the optimizers in slices, one file a rank.

    Written under a temporary name, then renamed, so a kill at any moment leaves only whole checkpoints. In the background
    mode training continues while copies in host memory are written, one checkpoint at a time; for this the ranks use
    a process group of their own, apart from the gradients'. If the host lacks room for the copies, training waits,
    unless --async-save is given.
    """

    def __init__(self, args, ranks: Ranks, model: nn.Module):
        self.args, self.ranks = args, ranks
        background = args.async_save
        if background is None and ranks.device.type == "cuda":
            needed = copies_bytes(model, bool(args.ema), args.shard, ranks)
            room = ranks.least(budget.capacity(torch.device("cpu"), 1))
            background = room is None or needed <= room
            if not background:
                ranks.print(f"no --async-save: copies for a checkpoint would take {needed / budget.GIB:.0f} of "
                            f"{room / budget.GIB:.0f} GiB of host memory")  # fmt: skip
        self.pool = ThreadPoolExecutor(1) if background else None
        self.group = dist.new_group(backend="gloo") if ranks.count > 1 else None
        self.pending: Future | None = None

    def save(self, step: int, model, ema, optimizers: list) -> None:
        """Raises OSError if this checkpoint, or the one still being written, cannot be."""
        self.finish()
        copied = self.pool is not None and self.ranks.device.type == "cpu"  # of a GPU's weights `whole` makes copies
        copy = (lambda t: t.clone() if isinstance(t, Tensor) else t) if copied else lambda t: t
        weights = {"model": whole(dict(model.named_parameters()), self.ranks), "ema": whole(ema or {}, self.ranks)}
        weights = {name: {k: copy(v) for k, v in state.items()} for name, state in weights.items() if state}
        state = get_optimizer_state_dict(model, optimizers, options=StateDictOptions(cpu_offload=self.pool is not None))
        state["state"] = {name: {k: copy(v) for k, v in moments.items()} for name, moments in state["state"].items()}
        if self.pool is None:
            return self.write(step, model, weights, state)
        self.pending = self.pool.submit(self.write, step, model, weights, state)

    def finish(self) -> None:
        """Wait for what is still being written."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()

    def write(self, step: int, model, weights: dict, optimizer: dict) -> None:
        args, ranks, run = self.args, self.ranks, self.args.output
        final, part = run / f"step-{step:07d}", run / f".part-{step:07d}"
        header = {"preset": args.preset, "stage": args.stage, "step": step}
        header |= {name: getattr(args, name) for name in TRAINED}
        failure = None
        if ranks.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self.sum_over_ranks(0)  # wait until the folder is there
        try:
            for name, state in weights.items():
                save_weights(part / f"{name}.safetensors", model, state=state, **header)
        except OSError as error:
            failure = error
        if not self.sum_over_ranks(failure is not None):  # else the others would wait in dcp.save
            try:
                dcp.save(
                    {"optimizer": optimizer},
                    checkpoint_id=part / "optimizer",
                    process_group=self.group,
                    no_dist=self.group is None,
                )
            except (OSError, CheckpointException) as error:
                failure = error
        if self.sum_over_ranks(failure is not None):
            if ranks.rank == 0:
                shutil.rmtree(part, ignore_errors=True)
            reasons = [reason for reason, _ in getattr(failure, "failures", {}).values()]
            if any(isinstance(reason, KeyboardInterrupt) for reason in reasons):
                raise KeyboardInterrupt  # Ctrl-C is no fault of the disk
            raise OSError(save_error(run, model, len(weights) > 1, failure)) from None
        if ranks.rank == 0:
            shutil.rmtree(final, ignore_errors=True)
            part.rename(final)
            for old in checkpoints(run)[: -args.keep] if args.keep else ():
                shutil.rmtree(old)

    def sum_over_ranks(self, number: int) -> int:
        """Each rank waits for the others."""
        total = torch.tensor(int(number))
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        return int(total)


def copies_bytes(model: nn.Module, ema: bool, shard: str | None, ranks: Ranks) -> int:
    """Host memory that copies for a checkpoint take on the first rank's machine: weights (and average) whole, once, and
    every rank's moments: slices, or without sharding all of them."""
    moments = 2 * ranks.here / (1 if shard in (None, "none") else ranks.count)
    return round(4 * sum(p.numel() for p in model.parameters()) * (1 + ema + moments))


def save_error(run: Path, model: nn.Module, ema: bool, failure: BaseException | None) -> str:
    numbers = sum(p.numel() for p in model.parameters())
    need, free = numbers * 4 * (4 if ema else 3), shutil.disk_usage(run).free
    stands = "the last one stands" if checkpoints(run) else "none is there yet"
    full = free < need or getattr(failure, "errno", None) == errno.ENOSPC
    why = "the disk is full" if full else f"it cannot be written ({str(failure or 'on another rank').splitlines()[0]})"
    return f"{run}: {why}: a checkpoint needs {need / 2**20:,.0f} MiB, {free / 2**20:,.0f} are free; {stands}"


def read_settings(run: Path) -> dict | None:
    """What the run was started with, None if that is not known."""
    try:
        return json.loads((run / "config.json").read_text())
    except (OSError, ValueError):
        return None


def load_checkpoint(folder: Path, args, ranks: Ranks, model, ema, optimizers: list) -> int:
    """Fill everything from a checkpoint of the run; returns its step."""
    weights, header = load_weights(folder / "model.safetensors", config=model.config)
    if header["stage"] != args.stage:
        raise ValueError(f"{args.output} is a run of stage {header['stage']}: give another -o to stage {args.stage}")
    copy_parameters(model, dict(weights.named_parameters()))
    if ema and not (folder / "ema.safetensors").is_file():
        raise ValueError(f"{folder} has no moving average: give --ema 0, as before")
    if ema:
        averaged, _ = load_weights(folder / "ema.safetensors", config=model.config)
        with swapped(model, ema):
            copy_parameters(model, dict(averaged.named_parameters()))
    state = {"optimizer": get_optimizer_state_dict(model, optimizers)}
    groups = lambda: [group for optimizer in optimizers for group in optimizer.param_groups]  # noqa: E731
    asked = [(group["rate"], group["weight_decay"]) for group in groups()]
    try:
        dcp.load(state, checkpoint_id=folder / "optimizer", no_dist=ranks.count == 1)
    except CheckpointException as error:
        if "Missing key" in str(error):
            raise ValueError(f"{folder} is not of --optimizer {args.optimizer}: give the other one") from None
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{folder}: cannot be read ({reason}): remove it, to go on from the one before") from None
    set_optimizer_state_dict(model, optimizers, state["optimizer"])
    for group, (rate, weight_decay) in zip(groups(), asked):  # this run's flags, not those of the run before
        group["rate"], group["weight_decay"] = rate, weight_decay
    return header["step"]


def read_log(run: Path) -> list[dict]:
    """The records of log.jsonl. Any other line, such as one that a kill cut short, is left out."""
    found, path = [], run / "log.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            record["step"]
            found.append(record)
    return found


def rewind_log(run: Path, start: int) -> None:
    """Drop the lines after the step that a run goes on from: they will be written again."""
    kept = [record for record in read_log(run) if record["step"] <= start]
    write_text(run / "log.jsonl", "".join(json.dumps(record) + "\n" for record in kept))
