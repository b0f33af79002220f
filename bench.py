"""Speed and peak memory of these networks beside diffusers' CogVideoX, in one run.

    python bench.py                     # all, at full size; diffusers: pip install -r requirements-dev.txt
    python bench.py vae -o bench.json   # one part, also as JSON
    python bench.py --size small        # tiny networks: shows that every part runs; its ratios mean nothing

Both sides get the same weights and inputs and run in turn (ours, theirs, ours, ...) after a warm-up, so that
a machine whose speed drifts slows both; a ratio is the median over the pairs. Speeds stand beside ceilings:
the best matrix product and the best channels-last 3x3x3 convolution of several sizes, measured just before.
Peak memory is what comes on top of the weights; on a CPU each side gets a fresh process for it. Seconds are
shown on a GPU only, with its name. Targets are for full size on a CPU with two cores and AMX.
"""

import argparse
import copy
import ctypes
import gc
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import budget
import cues
import toy
from data import toy_finder, write_text
from load_cogvideox import add_cues, dit_name, vae_name
from machine import keep_freed_memory, pick_device
from model import DIT_PRESETS, OFS, DiT, DiTConfig
from vae import VAE_PRESETS, CausalVAE, VAEConfig
from video import Parser, check_output, natural

BF16, CPU, MIB = torch.bfloat16, torch.device("cpu"), 2**20
AUTOCAST = "bfloat16 autocast over float32"
MIDDLE = DiTConfig(dim=1024, depth=6, num_heads=16, text_dim=256, time_dim=512, cue_channels=0)  # 116 M parameters
FRAME_RATE = 40  # frames a second that cue making should reach on two cores
SECONDS = 25  # that 49 frames at 512x512 in 50 steps should take at most on one H100
OFFLOAD_GIB = 16  # that the same may hold on the GPU with --offload
TABLE_7 = {"the paper's ms": 31, "the paper's s (H20)": 152.8}
Sides, Times = dict[str, Callable], dict[str, list[float]]


@dataclass(frozen=True)
class Setting:
    """Where, how large, how often; ceilings in FLOP/s, of matrix products and channels-last convolutions."""

    small: bool
    device: torch.device
    repeats: int
    matmul: float = 1.0
    conv: float = 1.0

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def vae(self) -> tuple[VAEConfig, int, int]:
        """Network, frames, side in pixels."""
        if self.small:
            return VAE_PRESETS["tiny"], 9, 64
        return VAE_PRESETS["cogvideox1.5"], *((49, 512) if self.gpu else (9, 256))

    @property
    def dit(self) -> tuple[DiTConfig, int, int, int]:
        """Network, latents with the reference's, their side, text tokens."""
        if self.small:
            return DIT_PRESETS["tiny"], 4, 8, 8
        return DIT_PRESETS["cogvideox1.5-5b"], *((14, 64, 226) if self.gpu else (4, 32, 226))

    def times(self, sides: Sides, warm_up: bool = True) -> Times:
        return alternate(sides, self.repeats, warm_up, torch.cuda.synchronize if self.gpu else lambda: None)

    def modes(self, *stacks: nn.ModuleList) -> Iterator[str]:
        """eager, and on a GPU then compiled: block by block, so that one compilation serves a whole stack."""
        yield "eager"
        if self.gpu:
            for block in (block for stack in stacks for block in stack):
                block.compile()
            yield "compiled"


# ---- time and memory ---------------------------------------------------------------------------------------


def alternate(sides: Sides, repeats: int, warm_up=True, wait=lambda: None, clock=time.perf_counter) -> Times:
    """Seconds of each side's runs, in turn, after one of each that warms up; `wait` returns on an idle device."""
    times = {name: [] for name in sides}
    for turn in range(not warm_up, 1 + repeats):
        for name, run in sides.items():
            wait()
            began = clock()
            run()
            wait()
            times[name] += [clock() - began] * (turn > 0)
    return times


def ratio(times: Times, above: str = "diffusers", below: str = "ours") -> float:
    """Median over pairs of runs: what slows the machine for a while slows both runs of a pair."""
    return median(a / b for a, b in zip(times[above], times[below]))


def speeds(setting: Setting, times: Times, flops: float, ceiling: float) -> dict[str, float]:
    """GFLOP/s and share of the ceiling; `flops` are those the result needs, so the same for every side."""
    figures = {"ceiling GFLOP/s": ceiling / 1e9}
    for name, seconds in ((name, median(values)) for name, values in times.items()):
        figures |= {f"{name} GFLOP/s": flops / seconds / 1e9, f"{name} share": flops / seconds / ceiling}
        figures |= {f"{name} s": seconds} if setting.gpu else {}
    return figures


@torch.no_grad()
def ceilings(setting: Setting) -> Setting:
    """The setting with the fastest matrix product and convolution that the device shows in bfloat16."""
    draw = lambda *size: torch.randn(size, dtype=BF16, device=setting.device)  # noqa: E731
    best = lambda run: min(replace(setting, repeats=5).times({"run": run})["run"])  # noqa: E731
    matmul, conv = [], []
    for n in (64, 128) if setting.small else (4096, 8192) if setting.gpu else (1024, 2048, 4096):
        a, b = draw(n, n), draw(n, n)
        matmul.append(2 * n**3 / best(lambda: F.linear(a, b)))
    dim, side = (8, 8) if setting.small else (128, 512) if setting.gpu else (128, 128)
    for dim, side in ((dim << level, side >> level) for level in range(3)):  # as the VAE's levels do
        x, weight = draw(1, dim, 10, side, side), draw(dim, dim, 3, 3, 3)
        x, weight = (t.contiguous(memory_format=torch.channels_last_3d) for t in (x, weight))
        seconds = best(lambda: F.conv3d(x, weight, padding=(0, 1, 1)))
        conv.append(2 * 27 * dim**2 * 8 * side**2 / seconds)
    return replace(setting, matmul=max(matmul), conv=max(conv))


def settle() -> None:
    """Give back what Python, the C library and CUDA's allocator hold without using it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024


def peak(run: Callable, device: torch.device) -> int:
    """Bytes that a call holds at its fullest, on top of what was there before it."""
    settle()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    before, seen, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.wait(0.001):  # the largest tensors of a network live for much longer
            seen[0] = max(seen[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        result = run()
        seen.append(anonymous())
        del result
    finally:
        done.set()
        thread.join()
    return max(seen) - before


def fresh(function: Callable, *args):
    """The function's result from a new process, whose memory nothing has touched."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


# ---- the same networks on both sides -----------------------------------------------------------------------


def import_diffusers():
    try:
        import diffusers
    except ImportError:
        raise ValueError("diffusers is not installed: pip install -r requirements-dev.txt") from None
    diffusers.utils.logging.set_verbosity_error()
    return diffusers


def random_network(build: Callable, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A network with every parameter random, never whole in another dtype: in float32 the DiT takes 22 GB."""
    with torch.device("meta"):
        network = build().to(dtype)
    network.to_empty(device=device).requires_grad_(False)
    torch.manual_seed(0)
    for p in network.parameters():
        p.normal_(0, 0.3 if p.ndim == 1 else p[0].numel() ** -0.5)
    return network.eval()


# fmt: off
def their_vae(c: VAEConfig, device: torch.device) -> nn.Module:
    n = len(c.channels)
    sizes = dict(block_out_channels=c.channels, layers_per_block=c.layers, norm_num_groups=c.norm_groups,
                 latent_channels=c.latent_channels, scaling_factor=c.scaling_factor,
                 invert_scale_latents=True, down_block_types=("CogVideoXDownBlock3D",) * n,
                 up_block_types=("CogVideoXUpBlock3D",) * n)
    return random_network(lambda: import_diffusers().AutoencoderKLCogVideoX(**sizes), BF16, device)


def their_dit(c: DiTConfig, device: torch.device, dtype: torch.dtype = BF16) -> nn.Module:
    sizes = dict(num_attention_heads=c.num_heads, attention_head_dim=c.dim // c.num_heads, num_layers=c.depth,
                 in_channels=c.in_channels, out_channels=c.out_channels, text_embed_dim=c.text_dim,
                 time_embed_dim=c.time_dim, ofs_embed_dim=c.time_dim, patch_size=2, patch_size_t=2,
                 patch_bias=False, sample_frames=81, sample_height=96, sample_width=170,
                 use_rotary_positional_embeddings=True)
    return random_network(lambda: import_diffusers().CogVideoXTransformer3DModel(**sizes), dtype, device)
# fmt: on


def our_network(network_class, config, theirs: nn.Module, rename: Callable) -> nn.Module:
    """Ours around their very tensors, so that 11 GB of weights are there once; the VAE lays them out anew."""
    with torch.device("meta"):
        ours = network_class(config)
    state = {rename(name): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict(state, strict=False, assign=True)
    if network_class is CausalVAE:
        ours.channels_last()
    elif config.cue_channels:
        add_cues(ours)
    return ours.requires_grad_(False).eval()


class Theirs(nn.Module):
    """diffusers' transformer, called as `train.Denoising` calls ours, for latents of one size."""

    def __init__(self, network: nn.Module, config: DiTConfig, slots: int, side: int):
        super().__init__()
        from diffusers.models.embeddings import get_3d_rotary_pos_embed as rope

        head, grid = config.dim // config.num_heads, (side // 2, side // 2)
        kind = {"grid_type": "slice", "max_size": grid, "device": network.device}
        self.network, self.rope = network, rope(head, None, grid, slots // 2, **kind)
        self.ofs = torch.full((1,), OFS, device=network.device)

    def forward(self, x, step, text, pose=None, face=None, tap=None) -> tuple[Tensor, None]:
        ofs, rope = self.ofs.to(x.dtype), self.rope
        return self.network(x, text, step, ofs=ofs, image_rotary_emb=rope, return_dict=False)[0], None


def random_batch(c: DiTConfig, slots: int, side: int, text: int, device, dtype=BF16) -> dict[str, Tensor]:
    """What train.py trains on; latents are (1, slots, 16, side, side)."""
    draw = lambda *size: torch.randn(1, *size, dtype=dtype, device=device)  # noqa: E731
    batch = {name: draw(slots, 16, side, side) for name in ("latents", "noise", "condition")}
    batch |= {name: draw(slots, 17, side, side) for name in ("pose", "face")}
    return batch | {"text": draw(text, c.text_dim), "step": torch.tensor([500], device=device)}


def inputs_of(batch: dict, *cue_names: str) -> tuple:
    x = torch.cat([batch["latents"], batch["condition"]], dim=2)
    return x, batch["step"], batch["text"], *(batch[name] for name in cue_names)


# ---- the parts: each yields rows ---------------------------------------------------------------------------


def row(what: str, sizes: str, ratio: float, target="", dtype="bfloat16", repeats=0, **figures) -> dict:
    """One result. target: "<= 0.6" or ">= 4", perhaps with words; repeats 0: as many as were asked for."""
    numbers = {"repeats": repeats, "ratio": ratio, "target": target, "figures": figures}
    return {"what": what, "sizes": sizes, "dtype": dtype} | numbers


def token_words(c: DiTConfig, slots: int, side: int, text: int) -> str:
    return f"{c.depth} blocks of {c.dim}, {text} + {budget.tokens(c, slots, side, side):,} tokens"


def loop(frames: list, length: int) -> Iterator:
    """A clip of any length out of a few frames, there and back, each made when it is asked for."""
    last = len(frames) - 1
    return (frames[last - abs(last - i % (2 * last))].copy() for i in range(length))


def scene(side: int, length: int) -> tuple[dict, Callable]:
    """(a drawn reference and its cues; a function that streams the cues of a drawn clip, given its masks)."""
    other, clip = toy.render(3, 4, frames=1, size=side), toy.render(1, 2, frames=9, size=side)
    own, find, reference = toy_finder(other), toy_finder(clip), other.video[0]

    def make() -> Iterator[tuple]:
        masked = replace(own, masks=loop(find.masks, length))
        track = cues.analyse(loop(clip.video, length), reference, masked)
        return cues.render(loop(clip.video, length), track)

    rows = cues.render(other.video, cues.analyse(other.video, reference, own))
    return {"reference": reference, "own": list(rows)}, make


def count(items) -> int:
    return sum(1 for _ in items)


def cues_memory(side: int, length: int) -> int:
    """Peak bytes of both passes over a clip; for a fresh process."""
    count(scene(side, 9)[1]())
    make = scene(side, length)[1]
    return peak(lambda: count(make()), CPU)


def bench_cues(setting: Setting) -> Iterator[dict]:
    side, length, clips = (64, 9, (10, 40)) if setting.small else (512, 64, (1000, 10_000))
    make, dtype = scene(side, length)[1], "uint8, float32"
    rate = length / median(setting.times({"ours": lambda: count(make())})["ours"])
    what, words = f"both passes, masks given: frames/s over {FRAME_RATE}", f"{length} frames {side}x{side}"
    yield row(what, words, rate / FRAME_RATE, ">= 1", dtype, **{"frames/s": rate})
    short, long = (fresh(cues_memory, side, n) for n in clips)
    growth = (long - short) / (clips[1] - clips[0]) / (3 * side**2)
    figures = {f"MiB at {n:,} frames": value / MIB for n, value in zip(clips, (short, long))}
    what, words = "memory that a further frame adds over the frame's own", f"clips {side}x{side}"
    yield row(what, words, growth, "<= 0.01", dtype, 1, **figures)


def vae_networks(setting: Setting) -> dict[str, nn.Module]:
    theirs = their_vae(setting.vae[0], setting.device)
    laid_out = CausalVAE.channels_last(copy.deepcopy(theirs))  # it looks at parameters only
    ours = our_network(CausalVAE, setting.vae[0], theirs, vae_name)
    return {"ours": ours, "diffusers": theirs, "channels-last diffusers": laid_out}


def vae_calls(network: nn.Module, frames: int, side: int, device, dtype=BF16) -> Sides:
    """Encode and decode a random clip."""
    draw = torch.Generator().manual_seed(1)
    video = torch.rand(1, frames, 3, side, side, generator=draw).to(device, dtype) * 2 - 1
    latents = torch.randn(1, frames // 4 + 1, 16, side // 8, side // 8, generator=draw).to(device, dtype)
    if isinstance(network, CausalVAE):
        return {"encode": lambda: network.encode(video)[0], "decode": lambda: network.decode(latents)}
    video, latents = (x.transpose(1, 2).contiguous() for x in (video, latents))  # theirs: (B, C, T, H, W)
    return {
        "encode": lambda: network.encode(video).latent_dist.mean.transpose(1, 2),
        "decode": lambda: network.decode(latents).sample.transpose(1, 2),
    }


@torch.no_grad()
def vae_memory(name: str, setting: Setting) -> dict[str, int]:
    """Peak bytes of encode and decode above the weights; for a fresh process on a CPU."""
    network, (_, *size), device = vae_networks(setting)[name], setting.vae, setting.device
    for run in vae_calls(network, 9, 16, device).values():
        run()  # small: loads libraries, leaves no large blocks behind
    return {action: peak(run, device) for action, run in vae_calls(network, *size, device).items()}


@torch.no_grad()
def bench_vae(setting: Setting) -> Iterator[dict]:
    (config, *size), device = setting.vae, setting.device
    words = f"{size[0]} frames {size[1]}x{size[1]}, {config.channels}"
    remember = vae_memory if setting.gpu else lambda *args: fresh(vae_memory, *args)
    memory = {name: remember(name, setting) for name in ("ours", "diffusers")}
    networks = vae_networks(setting)
    exact = vae_calls(copy.deepcopy(networks["diffusers"]).float(), *size, device, torch.float32)
    truth = {action: run() for action, run in exact.items()}
    del exact
    calls = {name: vae_calls(network, *size, device) for name, network in networks.items()}
    for action, target in (("encode", ">= 3"), ("decode", ">= 4")):
        sides = {name: of_side[action] for name, of_side in calls.items()}
        error = {n: ((sides[n]() - truth[action]).norm() / truth[action].norm()).item() for n in memory}
        what, share = f"{action}: our error against float32 / theirs", error["ours"] / error["diffusers"]
        yield row(what, words, share, "<= 1.1", repeats=1, **error)
        times = setting.times(sides)
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            vae_calls(CausalVAE(config), *size, "meta")[action]()
        figures = speeds(setting, times, counter.get_total_flops(), setting.conv)
        yield row(f"{action}: diffusers' time / ours", words, ratio(times), target, **figures)
        what, other = f"{action}: time of diffusers with channels-last weights / ours", list(times)[2]
        yield row(what, words, ratio(times, other), ">= 1.8")
        held = {f"{name} MiB": of_side[action] / MIB for name, of_side in memory.items()}
        what, share = f"{action}: our peak memory / diffusers'", held["ours MiB"] / held["diffusers MiB"]
        yield row(what, words, share, "<= 0.6", repeats=1, **held)


@torch.no_grad()
def bench_dit(setting: Setting) -> Iterator[dict]:
    (config, *size), device = setting.dit, setting.device
    config, (slots, side, text) = replace(config, cue_channels=0), size
    network = their_dit(config, device)
    ours, theirs = our_network(DiT, config, network, dit_name), Theirs(network, config, slots, side)
    inputs = inputs_of(random_batch(config, *size, device))
    sides = {"ours": lambda: ours(*inputs), "diffusers": lambda: theirs(*inputs)[0]}
    flops = budget.forward_flops(config, budget.tokens(config, slots, side, side), text)
    for mode in setting.modes(ours.blocks, network.transformer_blocks):
        times, words = setting.times(sides), token_words(config, *size)
        figures = speeds(setting, times, flops, setting.matmul)
        if setting.gpu:
            figures |= {f"{name} peak MiB": peak(run, device) / MIB for name, run in sides.items()}
        a, b = (run().float() for run in sides.values())
        figures["relative difference"] = ((a - b).norm() / b.norm()).item()
        what = f"forward, {mode}: diffusers' time / ours"
        yield row(what, words, ratio(times), ">= 1.15 or the next", **figures)
        what, share = f"forward, {mode}: our share of the ceiling", figures["ours share"]
        yield row(what, words, share, ">= 0.85 or the last")


def step_of(model: nn.Module, device: torch.device) -> Callable[[dict], float]:
    """A function that does with a batch what a step of train.py does: forward, backward, AdamW; the loss."""
    import train

    keep_freed_memory()  # for both sides
    objective = train.Denoising(model.requires_grad_(True).train(), align_depth=1)
    settings = SimpleNamespace(optimizer="adamw", lr=2e-5, cue_lr=1.0, weight_decay=1e-4, s2x_weight=0.5)
    (optimizer,) = train.make_optimizers(model, settings)

    def step(batch: dict) -> float:
        with torch.autocast(device.type, BF16):
            losses = objective(batch)
        loss = train.total_loss(losses, settings)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def train_beside(setting: Setting, config: DiTConfig, slots: int, side: int, text: int) -> dict:
    """A step without cues beside diffusers' transformer, under the same loss and optimizer."""
    network = their_dit(config, setting.device, torch.float32)
    ours = copy.deepcopy(our_network(DiT, config, network, dit_name))  # each trains weights of its own
    models = {"ours": ours, "diffusers": Theirs(network, config, slots, side)}
    batch = random_batch(config, slots, side, text, setting.device, torch.float32)
    del batch["pose"], batch["face"]
    steps = {name: step_of(model, setting.device) for name, model in models.items()}
    times = setting.times({name: lambda step=step: step(batch) for name, step in steps.items()})
    flops = budget.step_flops(config, budget.tokens(config, slots, side, side), text, 1, 0)
    figures = {"M parameters": budget.numbers(config) / 1e6} | speeds(setting, times, flops, setting.matmul)
    what, words = "step without cues: diffusers' time / ours", token_words(config, slots, side, text)
    return row(what, words, ratio(times), ">= 1.1", AUTOCAST, **figures)


def train_cues(setting: Setting, config: DiTConfig, *size: int) -> dict:
    """What the cues add to a step of one and the same model."""
    step = step_of(DiT(config).to(setting.device), setting.device)
    batch = random_batch(config, *size, setting.device, torch.float32)
    plain = {name: value for name, value in batch.items() if name not in ("pose", "face")}
    times = setting.times({"with": lambda: step(batch), "without": lambda: step(plain)})
    added, what = ratio(times, "with", "without") - 1, "what cues add to a step / the step without"
    return row(what, token_words(config, *size), added, "<= 0.08", AUTOCAST)


@torch.no_grad()
def train_teacher(setting: Setting, config: DiTConfig, *size: int) -> dict:
    """What the teacher adds to a step, in forward passes: the first blocks and the cosine of Eq. 4."""
    import train

    config, depth = replace(config, depth=21, cue_channels=17), 5  # 5 of 21 blocks: the paper's 10 of 42
    model = random_network(lambda: DiT(config), BF16, setting.device)
    inputs = inputs_of(random_batch(config, *size, setting.device), "pose", "face")
    student = model.features(*inputs, depth)
    teach = lambda: train.same2x(student, model.features(*inputs, depth))  # noqa: E731
    times = setting.times({"teacher": teach, "forward": lambda: model(*inputs)})
    what, words = "teacher and Same2X loss / a whole forward", f"{depth} of {token_words(config, *size)}"
    return row(what, words, ratio(times, "teacher", "forward"), "<= 0.3")


def train_full_width(setting: Setting) -> Iterator[dict]:
    """On a GPU: as many blocks of full width as fit, with cues and checkpointing, and the use of its peak."""
    (config, slots, side, text), device = setting.dit, setting.device
    video, room = budget.tokens(config, slots, side, side), budget.capacity(device, 1)
    needed = lambda c: sum(budget.memory(c, 1, "none", False, 0, video, text, 1, True).values())  # noqa: E731
    depths = (replace(config, depth=depth) for depth in range(config.depth, 0, -1))
    config = next(c for c in depths if needed(c) <= room)
    with device:
        model = DiT(config)
    model.checkpointing = True
    step, batch = step_of(model, device), random_batch(config, slots, side, text, device, torch.float32)
    flops = budget.step_flops(config, video, text, 1, 0)
    best = budget.peak_flops(torch.cuda.get_device_name(device)) or setting.matmul
    for mode in setting.modes(model.blocks):
        seconds = median(setting.times({"step": lambda: step(batch)})["step"])
        held = torch.cuda.memory_allocated() + peak(lambda: step(batch), device)
        figures = {"tokens/s": (video + text) / seconds, "s": seconds, "peak GiB": held / 2**30}
        what, words = f"step with cues, {mode}: MFU", token_words(config, slots, side, text)
        yield row(what, words, flops / seconds / best, dtype=AUTOCAST, **figures)


def step_memory(config: DiTConfig, slots: int, side: int, text: int) -> tuple[float, int]:
    """A step of stage 1 with checkpointing -> its loss, and the bytes held at its fullest; for a fresh process."""
    small = random_batch(tiny := DIT_PRESETS["tiny"], 4, 8, 8, CPU, torch.float32)
    step_of(DiT(tiny), CPU)(small)  # loads libraries
    batch, before = random_batch(config, slots, side, text, CPU, torch.float32), anonymous()
    model = DiT(config)
    model.checkpointing = True
    step, losses = step_of(model, CPU), []
    step(batch)  # makes the optimizer's states
    settle()
    held = anonymous() - before
    more = peak(lambda: losses.append(step(batch)), CPU)
    return losses[0], held + more


def train_memory(setting: Setting, config: DiTConfig, slots: int, side: int, text: int) -> dict:
    """The peak of a whole step beside what budget.py, and so --dry-run, says of it."""
    parts = budget.memory(config, 1, "none", False, 0, budget.tokens(config, slots, side, side), text, 1, True)
    runs = 1 if setting.small else 3  # what the allocator keeps differs by a tenth from run to run
    loss, held = sorted((fresh(step_memory, config, slots, side, text) for _ in range(runs)), key=lambda r: r[1])[
        runs // 2
    ]
    if not math.isfinite(loss):
        raise ValueError(f"a step of full width gives a loss of {loss}")
    figures = {"loss": loss, "measured MiB": held / MIB, "predicted MiB": sum(parts.values()) / MIB}
    what, words = "peak memory of a step with cues: distance from budget.py", token_words(config, slots, side, text)
    return row(what, words, abs(held / sum(parts.values()) - 1), "<= 0.1", AUTOCAST, repeats=runs, **figures)


def bench_train(setting: Setting) -> Iterator[dict]:
    wide, *size = setting.dit
    middle = replace(wide, cue_channels=0) if setting.small else MIDDLE
    size = size if setting.small else (6, 32, 226)  # 226 + 768 tokens
    two = replace(wide, depth=2)
    for measure_one, config in ((train_beside, middle), (train_cues, two), (train_teacher, middle)):
        yield measure_one(setting, config, *size)
        settle()
    if setting.gpu:
        yield from train_full_width(setting)
    else:
        yield train_memory(setting, two, *(size if setting.small else (14, 64, 226)))


def our_pipeline(vae: CausalVAE, dit: DiT, given: dict, steps: int, device, log: list) -> Callable:
    """sample.py from picture, cue pictures and text states to frames; logs seconds of encoding, of a step."""
    import sample

    args = sample.parse_args(["--preset", "tiny", "--steps", str(steps), "--guidance", "3"])[1]

    def run() -> None:
        began = time.perf_counter()
        encoded = sample.encode(args, vae, device, given["reference"], given["own"], given["cues"])
        middle = time.perf_counter()
        latents, _ = sample.denoise(args, dit, device, given["text"], *encoded)
        log.append((middle - began, (time.perf_counter() - middle) / steps))
        count(sample.pictures(vae, latents, len(given["cues"]), device))

    return run


# fmt: off
def their_pipeline(vae: nn.Module, dit: nn.Module, given: dict, steps: int, log: list) -> Callable:
    """diffusers' image-to-video pipeline from picture and text states to frames; logs seconds of a step."""
    from PIL.Image import fromarray

    diffusers, picture, text = import_diffusers(), fromarray(given["reference"]), given["text"]
    scheduler = diffusers.CogVideoXDPMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing",
                                                prediction_type="v_prediction", clip_sample=False)
    pipe = diffusers.CogVideoXImageToVideoPipeline(None, None, vae, dit, scheduler)
    pipe.set_progress_bar_config(disable=True)

    def run() -> None:
        ends = []  # of the steps; on a GPU of their sending off, which nobody reads
        step_ended = lambda *_: ends.append(time.perf_counter()) or {}  # noqa: E731
        pipe(image=picture, prompt_embeds=text[:1], negative_prompt_embeds=text[1:], height=picture.height,
             width=picture.width, num_frames=len(given["cues"]), num_inference_steps=steps,
             guidance_scale=3.0, output_type="np", callback_on_step_end=step_ended)
        log.append(median(b - a for a, b in pairwise(ends)))

    return run
# fmt: on


@torch.no_grad()
def bench_pipeline(setting: Setting) -> Iterator[dict]:
    (vae_config, frames, side), (config, *_), device = setting.vae, setting.dit, setting.device
    given, make = scene(side, frames)
    making = median(setting.times({"cues": lambda: count(make())})["cues"])
    text = torch.randn(2, 226, config.text_dim).to(device, BF16)  # stands for T5's states on both sides
    given |= {"cues": list(make()), "text": text}
    theirs = their_vae(vae_config, device), their_dit(config, device)
    vae = our_network(CausalVAE, vae_config, theirs[0], vae_name)
    dit = our_network(DiT, config, theirs[1], dit_name)
    steps, log, their_log = 50 if setting.gpu and not setting.small else 2, [], []
    sides = {"ours": our_pipeline(vae, dit, given, steps, device, log)}
    sides |= {"diffusers": their_pipeline(*theirs, given, steps, their_log)}
    short = {"ours": our_pipeline(vae, dit, given, 2, device, [])}  # warms up; its peak is that of any number of steps
    short |= {"diffusers": their_pipeline(*theirs, given, 2, [])}
    words = f"{frames} frames {side}x{side}, {config.depth} blocks of {config.dim}, {steps} steps, guidance"
    if setting.gpu:
        yield offloaded(vae, dit, given, device, words)
    for mode in setting.modes(dit.blocks, theirs[1].transformer_blocks):
        log.clear(), their_log.clear()
        held = {f"{name} peak MiB": peak(run, device) / MIB for name, run in short.items()}
        times = setting.times(sides, warm_up=False)
        runs = list(zip(times["ours"], times["diffusers"], log, their_log))
        figures = {"ratio but for encoding cues": median(b / (a - encode) for a, b, (encode, _), _ in runs)}
        if setting.gpu:
            figures |= {f"{name} s": median(seconds) for name, seconds in times.items()} | held
        else:
            longer = median((b + 48 * their_step) / (a + 48 * step) for a, b, (_, step), their_step in runs)
            figures["ratio at 50 steps, calculated"] = longer
        what = f"picture and cues to frames, {mode}: diffusers' time / ours"
        yield row(what, words, ratio(times), ">= 1.5", **figures)
        seconds = median(times["ours"])
        if setting.gpu:  # in the form of the paper's Table 7
            figures = {"cues (masks given), ms a frame": 1000 * making / frames, "generation s": seconds}
            what = f"Table 7, {mode}: generation over {SECONDS} s (aim: at most 1 on an H100)"
            yield row(what, words, seconds / SECONDS, **figures, **TABLE_7)
        else:
            yield row("Table 7: making cues (masks given) / generation", words, making / seconds)


def offloaded(vae: CausalVAE, dit: DiT, given: dict, device, words: str) -> dict:
    """Peak memory of 2 steps of a DiT that waits in host memory, block by block, as with sample.py --offload."""
    import sample

    args, log = sample.parse_args(["--preset", "tiny", "--offload"])[1], []
    cold, before = copy.deepcopy(dit).to("cpu"), torch.cuda.memory_allocated() - sum(p.nbytes for p in vae.parameters())
    sample.move(args, cold, device, BF16)
    here = torch.cuda.memory_allocated() - before
    gib = (here + peak(our_pipeline(vae, cold, given, 2, device, log), device)) / 2**30
    what = f"--offload: peak over {OFFLOAD_GIB} GiB (aim: at most 1)"
    return row(what, words, gib / OFFLOAD_GIB, repeats=1, **{"peak GiB": gib, "a step, s": log[0][1]})


# ---- the command -------------------------------------------------------------------------------------------

PARTS = dict(cues=bench_cues, vae=bench_vae, dit=bench_dit, train=bench_train, pipeline=bench_pipeline)
HEAD = "| part | compared | sizes | dtype | runs | ratio | target | met | figures |\n" + "|---" * 9 + "|"


def met(target: str, value: float) -> str:
    if not target:
        return ""
    sign, limit = target.split()[:2]
    return "yes" if (value <= float(limit) if sign == "<=" else value >= float(limit)) else "no"


def line(row: dict) -> str:
    """A row of the markdown table."""
    words = lambda value: f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"  # noqa: E731
    cells = [row[name] for name in ("part", "what", "sizes", "dtype", "repeats")]
    cells += [words(row["ratio"]), row["target"], row["met"]]
    cells += [", ".join(f"{name} {words(value)}" for name, value in row["figures"].items())]
    return f"| {' | '.join(map(str, cells))} |"


def measure(args: argparse.Namespace) -> None:
    chosen = list(PARTS) if args.part == "all" else [args.part]
    if chosen != ["cues"]:
        import_diffusers()
    setting = Setting(args.size == "small", pick_device(args.device)[0], args.repeat)
    torch.backends.cudnn.allow_tf32 = False  # in the float32 result that others are held against
    report = {"device": torch.cuda.get_device_name(setting.device) if setting.gpu else "CPU"}
    report |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "size": args.size}
    print(", ".join(f"{name} {value}" for name, value in report.items()) + f"\n\n{HEAD}")
    rows = []
    for part in chosen:
        settle()
        setting = setting if part == "cues" else ceilings(setting)
        for entry in PARTS[part](setting):
            target = "" if setting.small or setting.gpu else entry["target"]
            entry |= {"part": part, "repeats": entry["repeats"] or args.repeat, "target": target}
            rows.append(entry | {"met": met(target, entry["ratio"])})
            print(line(rows[-1]), flush=True)
        if args.output:  # after each part: a later one may not fit
            write_text(args.output, json.dumps(report | {"rows": rows}, indent=1) + "\n")


def main(argv=None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("part", nargs="?", choices=[*PARTS, "all"], default="all", help="what to measure")
    add("--size", choices=["full", "small"], default="full", help="small: tiny networks, to see that it runs")
    add("--device", choices=["cpu", "cuda"], help="default: cuda if present, else cpu")
    add("--repeat", type=natural, default=5, help="timed runs of each side, after one that is not timed")
    add("-o", "--output", type=Path, help="also write the rows to this JSON file")
    args = parser.parse_args(argv)
    try:
        if args.output:
            check_output(args.output, suffixes=(".json",))
        measure(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: stopped\n")


if __name__ == "__main__":
    main()
