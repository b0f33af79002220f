"""Speed and peak memory of these networks beside diffusers' CogVideoX, in one run.

    python bench.py                       # everything at full size; diffusers: pip install -r requirements-dev.txt
    python bench.py vae -o bench.json     # one part, also as JSON
    python bench.py --size small          # tiny networks: shows that every part runs; its ratios mean nothing

Both sides get the same weights and inputs and run in turn (ours, theirs, ours, ...) after a warm-up, so that a machine
whose speed drifts slows both; a ratio is the median over the pairs. Speeds stand beside the machine's ceilings: the best
matrix product and the best channels-last 3x3x3 convolution of several sizes, measured just before. Peak memory is what
comes on top of the weights; on a CPU each side gets a fresh process for it. Seconds are shown on a GPU only.
"""

import argparse
import copy
import ctypes
import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import budget
import cues
import toy
from load_cogvideox import add_cues, dit_name, pick_device, vae_name
from model import DIT_PRESETS, OFS, DiT, DiTConfig
from vae import VAE_PRESETS, CausalVAE, VAEConfig

BF16, MIB = torch.bfloat16, 2**20
AUTOCAST = "bfloat16 autocast over float32"
MIDDLE = DiTConfig(
    1024, 6, 16, 32, 16, 256, 512, True, 0, "cuefusion"
)  # 114 M parameters: its steps take seconds
FRAME_RATE = 40  # frames a second that cue making should reach on two cores
SECONDS = 25  # that 49 frames at 512x512 in 50 steps should take at most on one H100
TABLE_7 = {"the paper's ms": 31, "the paper's s (H20)": 152.8}


@dataclass(frozen=True)
class Setting:
    """Where, how large and how often; ceilings in FLOP/s, of matrix products and of channels-last convolutions."""

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

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def on_cpu(self, target: str) -> str:
        """A target that was set for the full size on a CPU."""
        return "" if self.small or self.gpu else target

    def modes(self, *stacks: nn.ModuleList) -> Iterator[str]:
        """ "eager", and on a GPU then "compiled": block by block, so that one compilation serves a whole stack."""
        yield "eager"
        if self.gpu:
            for block in (block for stack in stacks for block in stack):
                block.compile()
            yield "compiled"


# ---- time and memory -----------------------------------------------------------------------------------------------------


def alternate(
    sides: dict, repeats: int, wait=lambda: None, clock=time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of `repeats` runs of each side, in turn, after one warm-up of each; `wait` until the device is idle."""
    for run in sides.values():
        run()
    times = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            wait()
            began = clock()
            run()
            wait()
            times[name].append(clock() - began)
    return times


def pairwise(times: dict[str, list[float]], above: str, below: str) -> float:
    """Median over the pairs of runs: what slows the machine for a while slows both runs of a pair."""
    return median(a / b for a, b in zip(times[above], times[below]))


def speeds(setting: Setting, times: dict[str, list[float]], flops: float, ceiling: float) -> dict[str, float]:
    """GFLOP/s and share of the ceiling; `flops` are those that the result needs, so the same for every side."""
    figures = {"ceiling GFLOP/s": ceiling / 1e9}
    for name, seconds in times.items():
        rate = flops / median(seconds)
        figures |= {f"{name} GFLOP/s": rate / 1e9, f"{name} share": rate / ceiling}
        figures |= {f"{name} s": median(seconds)} if setting.gpu else {}
    return figures


@torch.no_grad()
def ceilings(setting: Setting) -> Setting:
    """The setting with the fastest matrix product and convolution that the device shows in bfloat16."""

    def fastest(cases: list[tuple[Callable, float]]) -> float:
        return max(flops / min(alternate({"": run}, 5, setting.wait)[""]) for run, flops in cases)

    def product(n: int) -> tuple[Callable, float]:
        a, b = (torch.randn(n, n, dtype=BF16, device=setting.device) for _ in range(2))
        return lambda: F.linear(a, b), 2 * n**3

    def convolution(dim: int, side: int) -> tuple[Callable, float]:
        shapes = (1, dim, 10, side, side), (dim, dim, 3, 3, 3)
        x, weight = (torch.randn(shape, dtype=BF16, device=setting.device) for shape in shapes)
        x, weight = (t.contiguous(memory_format=torch.channels_last_3d) for t in (x, weight))
        return lambda: F.conv3d(x, weight, padding=(0, 1, 1)), 2 * 27 * dim**2 * 8 * side**2

    sizes = (64, 128) if setting.small else (4096, 8192) if setting.gpu else (1024, 2048, 4096)
    dim, side = (8, 8) if setting.small else (128, 512) if setting.gpu else (128, 128)
    levels = [
        convolution(dim << level, side >> level) for level in range(3)
    ]  # as the VAE's levels grow and shrink
    return replace(setting, matmul=fastest([product(n) for n in sizes]), conv=fastest(levels))


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
    before, seen, done = anonymous(), [], threading.Event()

    def watch():
        while not done.wait(0.001):  # networks hold their largest tensors for much longer
            seen[:] = [max(anonymous(), *seen, 0)]

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        result = run()
        last = anonymous()
        del result
    finally:
        done.set()
        thread.join()
    return max(last, *seen, 0) - before


def fresh(function: Callable, *args):
    """The function's result from a new process, whose memory nothing has touched."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


# ---- rows ------------------------------------------------------------------------------------------------------------------


def row(
    what: str, sizes: str, ratio: float, target="", dtype="bfloat16", repeats=0, **figures: float
) -> dict:
    """One result. target: "<= 0.6" or ">= 4", then words; `met` is None without one. repeats 0: as often as asked for."""
    met = None
    if target:
        sign, limit = target.split()[:2]
        met = bool(ratio <= float(limit) if sign == "<=" else ratio >= float(limit))
    row = {"what": what, "sizes": sizes, "dtype": dtype, "repeats": repeats, "ratio": ratio, "target": target}
    return row | {"met": met, "figures": figures}


HEAD = "| part | compared | sizes | dtype | runs | ratio | target | met | figures |\n" + "|---" * 9 + "|"


def line(row: dict) -> str:
    """A row of the markdown table."""
    words = lambda value: f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"  # noqa: E731
    cells = [row[name] for name in ("part", "what", "sizes", "dtype", "repeats")]
    cells += [words(row["ratio"]), row["target"], {True: "yes", False: "NO", None: ""}[row["met"]]]
    cells.append(", ".join(f"{name} {words(value)}" for name, value in row["figures"].items()))
    return f"| {' | '.join(map(str, cells))} |"


# ---- the same networks on both sides ---------------------------------------------------------------------------------------


def import_diffusers():
    try:
        import diffusers
    except ImportError:
        what = "diffusers, which this compares with, is not installed: pip install -r requirements-dev.txt"
        raise ValueError(f"{what}; `bench.py cues` does without") from None
    diffusers.utils.logging.set_verbosity_error()
    return diffusers


def random_network(build: Callable, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A network with every parameter random, never whole in another dtype: in float32 the DiT would need 22 GB."""
    with torch.device("meta"):
        network = build().to(dtype)
    network.to_empty(device=device).requires_grad_(False)
    torch.manual_seed(0)
    for p in network.parameters():
        p.normal_(0, 0.3 if p.ndim == 1 else p[0].numel() ** -0.5)
    return network.eval()


# fmt: off
def their_vae(c: VAEConfig, device: torch.device) -> nn.Module:
    levels = len(c.channels)
    sizes = dict(block_out_channels=c.channels, layers_per_block=c.layers, norm_num_groups=c.norm_groups,
                 latent_channels=c.latent_channels, scaling_factor=c.scaling_factor, invert_scale_latents=True,
                 down_block_types=("CogVideoXDownBlock3D",) * levels, up_block_types=("CogVideoXUpBlock3D",) * levels)
    return random_network(lambda: import_diffusers().AutoencoderKLCogVideoX(**sizes), BF16, device)


def their_dit(c: DiTConfig, device: torch.device, dtype: torch.dtype = BF16) -> nn.Module:
    sizes = dict(num_attention_heads=c.num_heads, attention_head_dim=c.dim // c.num_heads, num_layers=c.depth,
                 in_channels=c.in_channels, out_channels=c.out_channels, text_embed_dim=c.text_dim,
                 time_embed_dim=c.time_dim, ofs_embed_dim=c.time_dim, patch_size=2, patch_size_t=2, patch_bias=False,
                 sample_frames=81, sample_height=96, sample_width=170, use_rotary_positional_embeddings=True)
    return random_network(lambda: import_diffusers().CogVideoXTransformer3DModel(**sizes), dtype, device)
# fmt: on


def our_network(network_class, config, theirs: nn.Module, rename: Callable) -> nn.Module:
    """Ours around their very tensors, so 11 GB of weights are there once. (The VAE's are laid out anew, as it needs.)"""
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
        ofs = self.ofs.to(x.dtype)
        return self.network(x, text, step, ofs=ofs, image_rotary_emb=self.rope, return_dict=False)[0], None


def random_batch(
    config: DiTConfig, slots: int, side: int, text: int, device, dtype=BF16
) -> dict[str, Tensor]:
    """What train.py trains on; latents are (1, slots, 16, side, side)."""
    draw = lambda *size: torch.randn(1, *size, dtype=dtype, device=device)  # noqa: E731
    batch = {name: draw(slots, 16, side, side) for name in ("latents", "noise", "condition")}
    batch |= {name: draw(slots, 17, side, side) for name in ("pose", "face")}
    return batch | {"text": draw(text, config.text_dim), "step": torch.tensor([500], device=device)}


def token_words(config: DiTConfig, slots: int, side: int, text: int) -> str:
    return f"{config.depth} blocks of {config.dim}, {text} + {budget.tokens(slots, side, side):,} tokens"


# ---- cues --------------------------------------------------------------------------------------------------------------------


@dataclass
class Loop:
    """A clip of any length out of a few frames, there and back, each made when it is asked for."""

    frames: list[np.ndarray]
    length: int

    def __iter__(self) -> Iterator[np.ndarray]:
        last = len(self.frames) - 1
        for i in range(self.length):
            yield self.frames[last - abs(last - i % (2 * last))].copy()


def drawn(frames: int, side: int, length: int) -> tuple[np.ndarray, cues.Finder, Loop]:
    """A drawn reference picture, a finder that is given all masks, and a driving clip of `length` frames."""
    clips = toy.render(3, 4, frames=1, size=side), toy.render(1, 2, frames=frames, size=side)
    own, masks = ([cues.paint_mask(*pair) for pair in zip(clip.body, clip.face)] for clip in clips)
    find = cues.Finder(masks=Loop(masks, length), reference_mask=own[0])
    return clips[0].video[0], find, Loop(list(clips[1].video), length)


def make_cues(reference: np.ndarray, find: cues.Finder, video: Loop) -> Iterator[tuple]:
    """Both passes, everything but the segmenter and the face finder; streams the cues."""
    yield from cues.render(video, cues.analyse(video, reference, find), reference.shape[:2])


def count(items) -> int:
    return sum(1 for _ in items)


def cues_memory(length: int, side: int) -> int:
    """Peak bytes of making the cues of a clip; for a fresh process."""
    count(make_cues(*drawn(9, side, 9)))
    scene = drawn(9, side, length)
    return peak(lambda: count(make_cues(*scene)), torch.device("cpu"))


def bench_cues(setting: Setting) -> Iterator[dict]:
    length, side, clips = (9, 64, (10, 40)) if setting.small else (64, 512, (1000, 10_000))
    scene, dtype = drawn(9, side, length), "uint8, float32"
    rate = length / median(alternate({"ours": lambda: count(make_cues(*scene))}, setting.repeats)["ours"])
    what, target = f"both passes, masks given: frames/s over {FRAME_RATE}", "" if setting.small else ">= 1"
    yield row(what, f"{length} frames {side}x{side}", rate / FRAME_RATE, target, dtype, **{"frames/s": rate})
    short, long = (fresh(cues_memory, n, side) for n in clips)
    growth = (long - short) / (clips[1] - clips[0]) / (3 * side**2)
    figures = {f"MiB at {n:,} frames": value / MIB for n, value in zip(clips, (short, long))}
    what, target = "memory that a further frame adds over the frame's own", "" if setting.small else "<= 0.01"
    yield row(what, f"clips of frames {side}x{side}", growth, target, dtype, 1, **figures)


# ---- vae ---------------------------------------------------------------------------------------------------------------------


def vae_networks(setting: Setting) -> dict[str, nn.Module]:
    theirs = their_vae(setting.vae[0], setting.device)
    laid_out = CausalVAE.channels_last(
        copy.deepcopy(theirs)
    )  # looks at parameters only, so it serves any network
    ours = our_network(CausalVAE, setting.vae[0], theirs, vae_name)
    return {"ours": ours, "diffusers": theirs, "diffusers channels-last": laid_out}


def vae_calls(network: nn.Module, frames: int, side: int, device, dtype=BF16) -> dict[str, Callable]:
    """Encode and decode a random clip."""
    generator = torch.Generator().manual_seed(1)
    video = torch.rand(1, frames, 3, side, side, generator=generator).to(device, dtype) * 2 - 1
    latents = torch.randn(1, frames // 4 + 1, 16, side // 8, side // 8, generator=generator).to(device, dtype)
    if isinstance(network, CausalVAE):
        return {"encode": lambda: network.encode(video)[0], "decode": lambda: network.decode(latents)}
    video, latents = (
        x.transpose(1, 2).contiguous() for x in (video, latents)
    )  # diffusers takes (B, C, T, H, W)
    return {
        "encode": lambda: network.encode(video).latent_dist.mean.transpose(1, 2),
        "decode": lambda: network.decode(latents).sample.transpose(1, 2),
    }


@torch.no_grad()
def vae_memory(name: str, setting: Setting) -> dict[str, int]:
    """Peak bytes of encode and decode above the weights; for a fresh process on a CPU."""
    network, (_, *size) = vae_networks(setting)[name], setting.vae
    for run in vae_calls(network, 9, 16, setting.device).values():
        run()  # small: loads libraries, leaves no large blocks behind
    return {
        action: peak(run, setting.device) for action, run in vae_calls(network, *size, setting.device).items()
    }


@torch.no_grad()
def bench_vae(setting: Setting) -> Iterator[dict]:
    config, *size = setting.vae
    words = f"{size[0]} frames {size[1]}x{size[1]}, {config.channels}"
    remember = vae_memory if setting.gpu else lambda *args: fresh(vae_memory, *args)
    memory = {name: remember(name, setting) for name in ("ours", "diffusers")}
    networks = vae_networks(setting)
    exact = vae_calls(copy.deepcopy(networks["diffusers"]).float(), *size, setting.device, torch.float32)
    truth = {action: run() for action, run in exact.items()}
    del exact
    calls = {name: vae_calls(network, *size, setting.device) for name, network in networks.items()}
    for action, target in (("encode", ">= 3"), ("decode", ">= 4")):
        sides = {name: of_side[action] for name, of_side in calls.items()}
        error = {n: ((sides[n]() - truth[action]).norm() / truth[action].norm()).item() for n in memory}
        what = f"{action}: our distance from the float32 result / diffusers'"
        yield row(
            what, words, error["ours"] / error["diffusers"], setting.on_cpu("<= 1.1"), repeats=1, **error
        )
        times = alternate(sides, setting.repeats, setting.wait)
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            vae_calls(CausalVAE(config), *size, "meta")[action]()
        figures = speeds(setting, times, counter.get_total_flops(), setting.conv)
        ratios = {other: pairwise(times, other, "ours") for other in list(sides)[1:]}
        yield row(
            f"{action}: diffusers' time / ours", words, ratios["diffusers"], setting.on_cpu(target), **figures
        )
        what = f"{action}: time of diffusers with channels-last weights / ours"
        yield row(what, words, ratios["diffusers channels-last"], setting.on_cpu(">= 1.8"))
        held = {f"{name} MiB": of_side[action] / MIB for name, of_side in memory.items()}
        ratio = held["ours MiB"] / held["diffusers MiB"]
        what = f"{action}: our peak memory above the weights / diffusers'"
        yield row(what, words, ratio, setting.on_cpu("<= 0.6"), repeats=1, **held)


# ---- dit ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def bench_dit(setting: Setting) -> Iterator[dict]:
    config, *size = setting.dit
    config, (slots, side, text) = replace(config, cue_channels=0), size
    network = their_dit(config, setting.device)
    ours, theirs = our_network(DiT, config, network, dit_name), Theirs(network, config, slots, side)
    batch = random_batch(config, *size, setting.device)
    inputs = torch.cat([batch["latents"], batch["condition"]], dim=2), batch["step"], batch["text"]
    sides = {"ours": lambda: ours(*inputs), "diffusers": lambda: theirs(*inputs)[0]}
    flops = budget.forward_flops(config, budget.tokens(slots, side, side), text)
    for mode in setting.modes(ours.blocks, network.transformer_blocks):
        times = alternate(sides, setting.repeats, setting.wait)
        figures = speeds(setting, times, flops, setting.matmul)
        if setting.gpu:
            figures |= {f"{name} peak MiB": peak(run, setting.device) / MIB for name, run in sides.items()}
        a, b = (run().float() for run in sides.values())
        figures["relative difference"] = ((a - b).norm() / b.norm()).item()
        ratio, what = pairwise(times, "diffusers", "ours"), f"forward, {mode}: diffusers' time / ours"
        target = setting.on_cpu(">= 1.15 or our share >= 0.85")
        entry = row(what, token_words(config, *size), ratio, target, **figures)
        if target and figures["ours share"] >= 0.85:
            entry["met"] = True
        yield entry


# ---- train -------------------------------------------------------------------------------------------------------------------


def step_of(model: nn.Module, device: torch.device) -> Callable[[dict], None]:
    """A function that does with a batch what a step of train.py does: forward, backward, AdamW."""
    import train

    objective = train.Denoising(model.requires_grad_(True).train(), align_depth=1)
    groups = train.parameter_groups(model, 1e-4)
    optimizer = torch.optim.AdamW(groups, 2e-5, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def step(batch: dict) -> None:
        with torch.autocast(device.type, BF16):
            losses = objective(batch)
        train.total_loss(losses, SimpleNamespace(s2x_weight=0.5)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def without_cues(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if name not in ("pose", "face")}


def train_beside(setting: Setting, config: DiTConfig, slots: int, side: int, text: int) -> dict:
    """A step without cues beside diffusers' transformer, under the same loss and optimizer."""
    network = their_dit(config, setting.device, torch.float32)
    ours = copy.deepcopy(our_network(DiT, config, network, dit_name))  # each side trains weights of its own
    models = {"ours": ours, "diffusers": Theirs(network, config, slots, side)}
    batch = without_cues(random_batch(config, slots, side, text, setting.device, torch.float32))
    steps = {name: step_of(model, setting.device) for name, model in models.items()}
    sides = {name: lambda step=step: step(batch) for name, step in steps.items()}
    times = alternate(sides, setting.repeats, setting.wait)
    flops = budget.step_flops(config, budget.tokens(slots, side, side), text, 1, False, 0)
    words = f"{budget.numbers(config) / 1e6:.3g} M parameters, {token_words(config, slots, side, text)}"
    ratio, target = pairwise(times, "diffusers", "ours"), setting.on_cpu(">= 1.1")
    figures = speeds(setting, times, flops, setting.matmul)
    return row("step without cues: diffusers' time / ours", words, ratio, target, AUTOCAST, **figures)


def train_cues(setting: Setting, config: DiTConfig, *size: int) -> dict:
    """What the cues add to a step of one and the same model."""
    step = step_of(DiT(config).to(setting.device), setting.device)
    batch = random_batch(config, *size, setting.device, torch.float32)
    plain = without_cues(batch)  # the cue layers then get no gradient, and AdamW leaves them alone
    times = alternate(
        {"with": lambda: step(batch), "without": lambda: step(plain)}, setting.repeats, setting.wait
    )
    ratio, target = pairwise(times, "with", "without") - 1, setting.on_cpu("<= 0.08")
    return row(
        "what cues add to a step / the step without", token_words(config, *size), ratio, target, AUTOCAST
    )


@torch.no_grad()
def train_teacher(setting: Setting, config: DiTConfig, *size: int) -> dict:
    """What the teacher adds to a step, in forward passes of the whole model: its first blocks, and the cosine of Eq. 4."""
    import train

    config, depth = replace(config, depth=21, cue_channels=17), 5  # 5 of 21 blocks are the paper's 10 of 42
    model = random_network(lambda: DiT(config), BF16, setting.device)
    batch = random_batch(config, *size, setting.device)
    x = torch.cat([batch["latents"], batch["condition"]], dim=2)
    inputs = x, batch["step"], batch["text"], batch["pose"], batch["face"]
    student = model.features(*inputs, depth)
    teach = lambda: train.same2x(student, model.features(*inputs, depth))  # noqa: E731
    times = alternate({"teacher": teach, "forward": lambda: model(*inputs)}, setting.repeats, setting.wait)
    words = f"{depth} of {token_words(config, *size)}"
    ratio, target = pairwise(times, "teacher", "forward"), setting.on_cpu("<= 0.3")
    return row("teacher's blocks and Same2X loss / a whole forward pass", words, ratio, target)


def train_full_width(setting: Setting) -> Iterator[dict]:
    """On a GPU: as many blocks of full width as fit, with cues and checkpointing, and the use of the GPU's peak."""
    config, *size = setting.dit
    video, text, room = budget.tokens(size[0], size[1], size[1]), size[2], budget.capacity(setting.device, 1)
    needed = lambda c: sum(budget.memory(c, 1, "none", False, 0, video, text, 1, True).values())  # noqa: E731
    depths = (replace(config, depth=depth) for depth in range(config.depth, 0, -1))
    config = next(c for c in depths if needed(c) <= room)
    with setting.device:
        model = DiT(config)
    model.checkpointing = True
    step, batch = step_of(model, setting.device), random_batch(config, *size, setting.device, torch.float32)
    flops = budget.step_flops(config, video, text, 1, False, 0)  # what is recomputed is no use of the GPU
    best = budget.peak_flops(torch.cuda.get_device_name(setting.device)) or setting.matmul
    for mode in setting.modes(model.blocks):
        seconds = median(alternate({"": lambda: step(batch)}, setting.repeats, setting.wait)[""])
        held = torch.cuda.memory_allocated() + peak(lambda: step(batch), setting.device)
        figures = {"tokens/s": (video + text) / seconds, "s": seconds, "peak GiB": held / 2**30}
        mfu = flops / seconds / best
        yield row(f"step with cues, {mode}: MFU", token_words(config, *size), mfu, dtype=AUTOCAST, **figures)


def bench_train(setting: Setting) -> Iterator[dict]:
    wide, *size = setting.dit
    middle = replace(wide, cue_channels=0) if setting.small else MIDDLE
    size = size if setting.small else (6, 32, 226)  # 226 + 768 tokens
    yield train_beside(setting, middle, *size)
    settle()
    yield train_cues(setting, replace(wide, depth=2), *size)
    settle()
    yield train_teacher(setting, middle, *size)
    settle()
    if setting.gpu:
        yield from train_full_width(setting)


# ---- pipeline ------------------------------------------------------------------------------------------------------------------


def our_pipeline(vae: CausalVAE, dit: DiT, given: dict, steps: int, device, log: list) -> Callable:
    """sample.py from picture, cue pictures and text states to frames; logs seconds until encoded and until denoised."""
    import sample

    args = sample.parse_args(["--preset", "tiny", "--steps", str(steps)])[1]  # networks aside, the defaults

    def run() -> None:
        began = time.perf_counter()
        encoded = sample.encode(args, vae, device, given["reference"], given["own"], given["cues"])
        middle = time.perf_counter()
        latents, _ = sample.denoise(args, dit, device, given["text"], *encoded, 13)
        log.append((middle - began, time.perf_counter() - began))
        count(sample.pictures(vae, latents, len(given["cues"]), device))

    return run


def their_pipeline(vae: nn.Module, dit: nn.Module, given: dict, steps: int, log: list) -> Callable:
    """diffusers' image-to-video pipeline from picture and text states to frames; logs when each step ended."""
    from PIL.Image import fromarray

    diffusers = import_diffusers()
    scheduler = diffusers.CogVideoXDPMScheduler(rescale_betas_zero_snr=True, snr_shift_scale=1.0, timestep_spacing="trailing",
                                                prediction_type="v_prediction", clip_sample=False)  # fmt: skip
    pipe = diffusers.CogVideoXImageToVideoPipeline(None, None, vae, dit, scheduler)
    pipe.set_progress_bar_config(disable=True)

    def mark(pipe, index, step, tensors) -> dict:
        log.append(time.perf_counter())  # on a GPU this is when the step was sent off: read on CPUs only
        return {}

    def run() -> None:
        (height, width), (text, null) = given["reference"].shape[:2], given["text"].split(1)
        pipe(image=fromarray(given["reference"]), prompt_embeds=text, negative_prompt_embeds=null, height=height,
             width=width, num_frames=len(given["cues"]), num_inference_steps=steps, guidance_scale=3.0,
             output_type="np", callback_on_step_end=mark)  # fmt: skip

    return run


@torch.no_grad()
def bench_pipeline(setting: Setting) -> Iterator[dict]:
    (vae_config, frames, side), (config, *_), device = setting.vae, setting.dit, setting.device
    reference, find, video = drawn(frames, side, frames)
    seconds = alternate({"cues": lambda: count(make_cues(reference, find, video))}, setting.repeats)["cues"]
    own = list(cues.extract(reference[None], reference, find.reference).frames())
    given = {"reference": reference, "own": own, "cues": list(make_cues(reference, find, video))}
    given["text"] = torch.randn(2, 226, config.text_dim).to(
        device, BF16
    )  # stands for T5's states on both sides
    vae, dit = their_vae(vae_config, device), their_dit(config, device)
    our_dit = our_network(DiT, config, dit, dit_name)
    steps, log, marks = 50 if setting.gpu and not setting.small else 2, [], []
    ours = our_pipeline(our_network(CausalVAE, vae_config, vae, vae_name), our_dit, given, steps, device, log)
    sides = {"ours": ours, "diffusers": their_pipeline(vae, dit, given, steps, marks)}
    words = f"{frames} frames {side}x{side}, {config.depth} blocks of {config.dim}, {steps} steps, guidance"
    for mode in setting.modes(our_dit.blocks, dit.transformer_blocks):
        log.clear(), marks.clear()
        times = alternate(sides, setting.repeats, setting.wait)
        runs = list(
            zip(times["ours"], times["diffusers"], log[1:], marks[steps::steps], marks[steps + 1 :: steps])
        )
        figures = {
            "ratio but for encoding cues": median(b / (a - encoded) for a, b, (encoded, _), *_ in runs)
        }
        if setting.gpu:
            figures |= {f"{name} s": median(values) for name, values in times.items()}
            figures |= {f"{name} peak MiB": peak(run, device) / MIB for name, run in sides.items()}
        else:
            longer = [
                (a + 48 * (end - start) / steps, b + 48 * (second - first))
                for a, b, (start, end), first, second in runs
            ]
            figures["ratio at 50 steps, calculated"] = median(b / a for a, b in longer)
        what, ratio = (
            f"picture and cues to frames, {mode}: diffusers' time / ours",
            pairwise(times, "diffusers", "ours"),
        )
        yield row(what, words, ratio, setting.on_cpu(">= 1.5"), **figures)
        yield table_7(setting, words, mode, median(seconds), median(times["ours"]), frames)


def table_7(setting: Setting, words: str, mode: str, making: float, generation: float, frames: int) -> dict:
    """A row in the form of the paper's Table 7. On a CPU, where seconds say little, the share of making cues."""
    if not setting.gpu:
        return row("Table 7: making the cues (masks given) / generation", words, making / generation)
    figures = {
        "making cues (masks given), ms a frame": 1000 * making / frames,
        "generation s": generation,
    } | TABLE_7
    target = "" if setting.small else f"<= 1 ({SECONDS} s, one H100)"
    return row(
        f"Table 7, {mode}: generation over {SECONDS} s", words, generation / SECONDS, target, **figures
    )


# ---- the command -----------------------------------------------------------------------------------------------------------------

PARTS = {
    "cues": bench_cues,
    "vae": bench_vae,
    "dit": bench_dit,
    "train": bench_train,
    "pipeline": bench_pipeline,
}


def measure(args: argparse.Namespace) -> None:
    chosen = list(PARTS) if args.part == "all" else [args.part]
    if chosen != ["cues"]:
        import_diffusers()
    setting = Setting(args.size == "small", pick_device(args.device)[0], args.repeat)
    torch.backends.cudnn.allow_tf32 = False  # in the float32 result that others are held against
    name = torch.cuda.get_device_name(setting.device) if setting.gpu else "CPU"
    report = {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "size": args.size,
    }
    print(", ".join(f"{key} {value}" for key, value in report.items()) + f"\n\n{HEAD}")
    rows = []
    for part in chosen:
        settle()
        setting = setting if part == "cues" else ceilings(setting)
        for entry in PARTS[part](setting):
            rows.append({"part": part} | entry | {"repeats": entry["repeats"] or args.repeat})
            print(line(rows[-1]), flush=True)
        if args.output:  # after each part: a later one may not fit
            args.output.write_text(json.dumps(report | {"rows": rows}, indent=1))


def main(argv=None) -> None:
    shown = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], **shown)
    add = parser.add_argument
    add("part", nargs="?", choices=[*PARTS, "all"], default="all", help="what to measure")
    add("--size", choices=["full", "small"], default="full", help="small: tiny networks, to see that it runs")
    add("--device", choices=["cpu", "cuda"], help="default: cuda if present, else cpu")
    add("--repeat", type=int, default=5, help="timed runs of each side, after one that is not timed")
    add("-o", "--output", type=Path, help="also write the rows to this JSON file")
    args = parser.parse_args(argv)
    try:
        if args.repeat < 1:
            raise ValueError(f"--repeat {args.repeat}: give at least 1; a median wants 5")
        if args.output and not args.output.parent.is_dir():
            raise ValueError(f"-o {args.output}: there is no folder {args.output.parent}")
        measure(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped\n")


if __name__ == "__main__":
    main()
