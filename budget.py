"""What a training step costs before it runs: tokens, FLOPs, and bytes on each rank, part by part.

    python budget.py                                   # the 5B model on 1, 4, 8 and 64 GPUs
    python train.py --stage 2 ... --dry-run            # the same arithmetic for one run

Parameters are counted on a network without memory (the meta device), so they are exact, and so are the bytes of
everything that lives from step to step. What lives within a step (gathered weights, activations) is the sum of the
tensors that autograd keeps; `tests/test_budget.py` compares both with real ones.
"""

import math
from dataclasses import replace
from functools import lru_cache

import torch

from model import DIT_PRESETS, DiT, DiTConfig
from video import Parser

GIB = 2**30
PEAK = {  # dense bfloat16 FLOP/s, by a part of the GPU's name; the first that fits counts
    "B200": 2250e12,
    "H100": 989e12,
    "H200": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "4090": 165e12,
}
MFU = 0.30  # share of the peak assumed for expected times; recomputing does not count, so with checkpointing 3/4 is the most
SAMPLING_TOKEN = 14  # numbers of width D that live at once of a token when nothing is kept
KEPT_TOKEN, KEPT_CUE = 24, 6  # numbers of width D that autograd keeps of a token in a block, and of its cues


# ---- tokens and FLOPs ----------------------------------------------------------------------------------------------


def tokens(config: DiTConfig, slots: int, h: int, w: int) -> int:
    """Video tokens of `slots` latents of h x w."""
    return slots * h * w // math.prod(config.patch)


def forward_flops(config: DiTConfig, video: int, text: int, depth: int | None = None) -> float:
    """One sample through the first `depth` blocks (default: all), two FLOPs a multiply-add, matrix products only.

    A block is 24 D^2 for each of S tokens (q, k, v, out: 8; feed-forward: 16) and 4 D S^2 for attention. The cues
    cost nothing here: Eq. 1 multiplies one vector a sample, Eq. 2 and 3 are elementwise.
    """
    D, S = config.dim, video + text
    block = 24 * D**2 * S + 4 * D * S**2
    if config.cue_channels and config.cue_injection == "cross":
        block += 8 * D**2 * video + 4 * D * video**2
    patches = math.prod(config.patch) * (config.in_channels + config.out_channels + 2 * config.cue_channels)
    ends = 2 * D * (patches * video + config.text_dim * text)
    return (config.depth if depth is None else depth) * block + ends


def step_flops(config: DiTConfig, video: int, text: int, samples: int, teacher_depth: int) -> float:
    """Forward, twice that backward, and the teacher's first blocks, of `samples` samples; recomputing is not counted."""
    teacher = forward_flops(config, video, text, teacher_depth) if teacher_depth else 0
    return samples * (3 * forward_flops(config, video, text) + teacher)


# ---- bytes ---------------------------------------------------------------------------------------------------------


@lru_cache
def parameters(config: DiTConfig) -> list[tuple[str, torch.Size]]:
    with torch.device("meta"):
        return [(name, p.shape) for name, p in DiT(config).named_parameters()]


def numbers(config: DiTConfig, ranks: int = 1, prefix: str = "") -> int:
    """How many numbers the fullest rank holds. FSDP2 cuts each tensor's rows into `ranks` shares, rounded up."""
    shapes = (shape for name, shape in parameters(config) if name.startswith(prefix))
    return sum(-(-shape[0] // ranks) * shape[1:].numel() for shape in shapes)


def state_bytes(config: DiTConfig, ranks: int, shard: str, ema: bool, teacher_depth: int, master=4, compute=2) -> dict:
    """What lives from step to step on the fullest rank: exact with AdamW; Muon has half the moments of a matrix."""
    own = numbers(config, 1 if shard == "none" else ranks) * master
    parts = {"parameters": own, "gradients": own, "Adam's moments": 2 * own + 4 * len(parameters(config))}
    if ema:
        parts["average"] = own
    if teacher_depth:
        parts["teacher"] = numbers(replace(config, depth=teacher_depth)) * compute
    return parts


def memory(config, ranks, shard, ema, teacher_depth, video, text, batch, checkpointing, master=4, compute=2) -> dict:
    """Bytes on the fullest rank by part, at a step's fullest moment: the backward pass through one block.

    Weights in the compute dtype: `full` has two blocks at a time (one runs, the next is on its way), the others all.
    A gradient is whole for a block or two before it is cut and sent. Of each block its input is kept; of the one that
    runs, all of it.
    """
    everything, block = numbers(config), numbers(config, prefix="blocks.0.")
    gathered = (everything - (config.depth - 2) * block) if shard == "full" else everything
    parts = state_bytes(config, ranks, shard, ema, teacher_depth, master, compute)
    parts["weights in compute dtype"] = compute * gathered if compute != master or shard != "none" else 0
    if shard != "none":
        parts["gradients on their way"] = (compute + master) * block
    S, D = video + text, config.dim
    streams = batch * D * (S + (2 * video if config.cue_channels and config.cue_injection == "cuefusion" else 0))
    inside = batch * D * (KEPT_TOKEN * S + (KEPT_CUE * video if config.cue_channels else 0))
    parts["activations"] = compute * (config.depth * streams + inside if checkpointing else config.depth * inside)
    return parts


def sampling_bytes(config: DiTConfig, video: int, text: int, branches: int, compute=2) -> int:
    """What a forward pass over `branches` samples needs beside the weights, when no gradient is asked for."""
    return SAMPLING_TOKEN * config.dim * (video + text) * branches * compute


def describe(parts: dict) -> str:
    words = ", ".join(f"{name} {value / GIB:.1f}" for name, value in parts.items() if value)
    return f"{sum(parts.values()) / GIB:.1f} GiB a rank: {words}"


def capacity(device: torch.device, ranks_here: int) -> float | None:
    """Bytes that one rank may still fill: of its GPU, or its share of the free RAM; None where the system does not say."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]  # others may be on this card too
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return 0.94 * (free + reusable)  # the rest is CUDA's own, and fragments
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    return free * 1024 / ranks_here


def nearest_fit(room: float, shard: str, ranks: int, batch: int, checkpointing: bool, needed) -> str | None:
    """The setting nearest to the given one that fits, in words: sharding, recomputing, a smaller batch, more ranks.

    needed: (shard, ranks, batch, checkpointing) -> bytes on a rank.
    """
    shards = ("none", "optimizer", "full")
    for count in (ranks, *(2**k for k in range(1, 11) if 2**k > ranks)):
        for rows, again in ((batch, checkpointing), (batch, True), (1, True)):
            for mode in shards[shards.index(shard) :] if count > 1 else ("none",):
                if needed(mode, count, rows, again) <= room:
                    words = [f"--shard {mode}"] * (mode != shard) + ["--checkpointing"] * (again != checkpointing)
                    words += [f"--batch {rows}"] * (rows != batch) + [f"{count} ranks"] * (count != ranks)
                    return ", ".join(words)
    return None


def peak_flops(name: str) -> float | None:
    """Dense bfloat16 peak of a GPU by its name."""
    return next((peak for key, peak in PEAK.items() if key in name), None)


# ---- the table -----------------------------------------------------------------------------------------------------


def table(config: DiTConfig, video: int, text: int, align_depth: int) -> str:
    """Markdown: GiB a rank and expected seconds a step on an H100 for both stages, batch 1 a rank, checkpointing."""
    lines = [
        "| GPUs | --shard | stage 1, GiB | stage 2, GiB | samples a step | s a step, stage 1 | stage 2 |",
        "|---" * 7 + "|",
    ]
    for ranks in (1, 4, 8, 64):
        for shard in ("none", "optimizer", "full")[: 1 if ranks == 1 else 3]:
            row = [str(ranks), shard]
            for depth in (0, align_depth):
                parts = memory(config, ranks, shard, False, depth, video, text, 1, True)
                row.append(f"{sum(parts.values()) / GIB:.1f}")
            row.append(str(ranks))
            row += [f"{step_flops(config, video, text, 1, d) / (PEAK['H100'] * MFU):.1f}" for d in (0, align_depth)]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def main():
    Parser(__doc__).parse_args()
    config, text = DIT_PRESETS["cogvideox1.5-5b"], 226
    video = tokens(config, 14, 64, 64)
    flops = forward_flops(config, video, text) / 1e12
    print(f"{numbers(config):,} parameters; {video:,} video and {text} text tokens a sample;")
    print(f"forward {flops:,.2f} TFLOP; times at {MFU:.0%} of one H100's bfloat16 peak\n")
    print(table(config, video, text, 10))


if __name__ == "__main__":
    main()
