"""Speed and peak memory of these networks beside diffusers' CogVideoX, in one run.

    python bench.py                       # everything at full size; needs diffusers: pip install -r requirements-dev.txt
    python bench.py vae -o bench.json     # one part, also as JSON
    python bench.py --size small          # tiny networks, seconds: shows that every part runs; its ratios mean nothing

Both sides get the same weights and the same inputs and run in turn (ours, theirs, ours, ...) after a warm-up, so that a machine whose
speed drifts slows both; a ratio is the median over the pairs. Speeds stand beside the machine's ceilings, the best matrix product and the
best channels-last 3x3x3 convolution of several sizes, measured just before in the same process. Peak memory is what comes on top of the
weights; on a CPU each side gets a fresh process for it. Seconds are shown on a GPU only, with its name.
"""

import argparse
import os
from pathlib import Path

NAMES = ("cues", "vae", "dit", "train", "pipeline")


# fmt: off
def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message} (see --help)\n")
    add = parser.add_argument
    add("part", nargs="?", choices=[*NAMES, "all"], default="all", help="what to measure")
    add("--size", choices=["full", "small"], default="full", help="small: tiny networks, to see that it runs")
    add("--device", choices=["cpu", "cuda"], help="default: cuda if present, else cpu")
    add("--repeat", type=int, default=5, help="timed runs of each side, after one that is not timed")
    add("-o", "--output", type=Path, help="also write the rows to this JSON file")
    args = parser.parse_args(argv)
    if args.repeat < 1:
        parser.error(f"--repeat {args.repeat}: at least 1; medians want 5")
    if args.output and not args.output.parent.is_dir():
        parser.error(f"-o {args.output}: there is no folder {args.output.parent}")
    return parser, args
# fmt: on


if __name__ == "__main__":
    PARSER, ARGS = parse_args()  # before torch is imported: --help answers at once
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars between the rows of a table

import copy  # noqa: E402
import ctypes  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from concurrent.futures import ProcessPoolExecutor  # noqa: E402
from dataclasses import dataclass, replace  # noqa: E402
from multiprocessing import get_context  # noqa: E402
from statistics import median  # noqa: E402
from types import SimpleNamespace  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import budget  # noqa: E402
import cues  # noqa: E402
import toy  # noqa: E402
from load_cogvideox import add_cues, dit_name, pick_device, vae_name  # noqa: E402
from model import DIT_PRESETS, OFS, DiT, DiTConfig  # noqa: E402
from vae import VAE_PRESETS, CausalVAE, VAEConfig  # noqa: E402

BF16, MIB = torch.bfloat16, 2**20
MIDDLE = DiTConfig(
    1024, 6, 16, 32, 16, 256, 512, True, 0, "cuefusion"
)  # 114 M parameters, for training steps
FRAME_RATE = 40  # frames a second that cue making should reach on two cores
SECONDS = 25  # that 49 frames at 512x512 in 50 steps should take at most on an H100
TABLE_7 = {"paper's ms a frame": 31, "paper's s (H20)": 152.8}


# ---- measuring -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Where and how large. Ceilings in FLOP/s: of matrix products and of channels-last convolutions."""

    small: bool
    device: torch.device
    repeats: int
    matmul: float = 1.0
    conv: float = 1.0

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self):
        if self.gpu:
            torch.cuda.synchronize()

    def target(self, text: str, on_gpu: bool = False) -> str:
        """Targets hold for the full sizes, and for a CPU unless said otherwise."""
        return "" if self.small or self.gpu != on_gpu else text

    def modes(self, *stacks: nn.ModuleList) -> Iterator[str]:
        """ "eager", and on a GPU then "compiled", with each block of the stacks compiled in place."""
        yield "eager"
        if self.gpu:
            for block in (block for stack in stacks for block in stack):
                block.compile()  # block by block: one compilation serves them all
            yield "compiled"


def alternate(
    sides: dict[str, Callable],
    repeats: int,
    wait: Callable = lambda: None,
    clock: Callable = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of `repeats` runs of each side, in turn, after one warm-up run of each. `wait` returns when the device is idle."""
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
    """Of each side GFLOP/s and share of the ceiling; `flops` of the plain computation, so equal for all sides."""
    figures = {}
    for name, seconds in times.items():
        rate = flops / median(seconds)
        figures |= {f"{name} GFLOP/s": rate / 1e9, f"{name} share": rate / ceiling}
        if setting.gpu:
            figures[f"{name} s"] = median(seconds)
    return figures | {"ceiling GFLOP/s": ceiling / 1e9}


@torch.no_grad()
def ceilings(setting: Setting) -> Setting:
    """The setting with the fastest matrix product and convolution that this machine shows in bfloat16."""
    matmul, conv, size = [], [], 8 if setting.small else 64
    for n in (2 * size, 4 * size) if setting.small else (4096, 8192) if setting.gpu else (1024, 2048, 4096):
        a, b = (torch.randn(n, n, dtype=BF16, device=setting.device) for _ in range(2))
        seconds = alternate({"product": lambda a=a, b=b: F.linear(a, b)}, 5, setting.wait)["product"]
        matmul.append(2 * n**3 / min(seconds))
    side = 4 * size if setting.gpu else size
    for dim, n in ((2 * size, 2 * side), (4 * size, side), (8 * size, side // 2)):  # as in the VAE's levels
        x = torch.randn(1, dim, 10, n, n, dtype=BF16, device=setting.device)
        weight = torch.randn(dim, dim, 3, 3, 3, dtype=BF16, device=setting.device)
        x, weight = (t.contiguous(memory_format=torch.channels_last_3d) for t in (x, weight))
        run = lambda x=x, weight=weight: F.conv3d(x, weight, padding=(0, 1, 1))  # noqa: E731
        seconds = alternate({"convolution": run}, 5, setting.wait)["convolution"]
        conv.append(2 * 27 * dim**2 * 8 * n**2 / min(seconds))
    return replace(setting, matmul=max(matmul), conv=max(conv))


def settle() -> None:
    """Give back what Python, the C library and CUDA's allocator hold without using it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def anonymous() -> int:
    """Bytes of memory of this process that no file backs."""
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
    before = most = anonymous()
    done = threading.Event()

    def watch():
        nonlocal most
        while not done.wait(0.001):
            most = max(most, anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        result = run()
        most = max(most, anonymous())
        del result
    finally:
        done.set()
        thread.join()
    return most - before


def fresh(function: Callable, *args):
    """The function's result from a new process, whose memory no earlier run has touched."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


# ---- rows ------------------------------------------------------------------------------------------------------------------


def row(
    part: str, what: str, sizes: str, dtype: str, repeats: int, ratio: float, target="", **figures
) -> dict:
    """One result. target: "<= 0.6" or ">= 4", then words; `met` says whether the ratio keeps it, None without one."""
    met = None
    if target:
        sign, limit = target.split()[:2]
        met = bool(ratio <= float(limit) if sign == "<=" else ratio >= float(limit))
    return dict(part=part, what=what, sizes=sizes, dtype=dtype, repeats=repeats, ratio=ratio, target=target,
                met=met, figures=figures)  # fmt: skip


HEAD = "| part | compared | sizes | dtype | runs | ratio | target | met | figures |\n" + "|---" * 9 + "|"


def line(entry: dict) -> str:
    """A row of the markdown table."""
    number = lambda value: f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"  # noqa: E731
    figures = ", ".join(f"{name} {number(value)}" for name, value in entry["figures"].items())
    met = {True: "yes", False: "NO", None: ""}[entry["met"]]
    cells = [entry[name] for name in ("part", "what", "sizes", "dtype", "repeats")]
    return "| " + " | ".join(map(str, [*cells, number(entry["ratio"]), entry["target"], met, figures])) + " |"


# ---- the same networks on both sides ---------------------------------------------------------------------------------------


def import_diffusers():
    try:
        import diffusers
    except ImportError:
        raise ValueError(
            "diffusers, to compare with, is not installed: pip install -r requirements-dev.txt, or measure cues alone"
        ) from None
    diffusers.utils.logging.set_verbosity_error()
    return diffusers


def random_network(build: Callable, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A network with every parameter random, never whole in another number format: the DiT would need 22 GB more."""
    with torch.device("meta"):
        network = build().to(dtype)
    network.to_empty(device=device).requires_grad_(False)
    torch.manual_seed(0)
    for p in network.parameters():
        p.normal_(0, 0.3 if p.ndim == 1 else p[0].numel() ** -0.5)
    return network.eval()


def their_vae(config: VAEConfig, device: torch.device) -> nn.Module:
    blocks = len(config.channels)
    build = lambda: import_diffusers().AutoencoderKLCogVideoX(  # noqa: E731
        block_out_channels=config.channels, layers_per_block=config.layers, norm_num_groups=config.norm_groups,
        latent_channels=config.latent_channels, scaling_factor=config.scaling_factor, invert_scale_latents=True,
        down_block_types=("CogVideoXDownBlock3D",) * blocks, up_block_types=("CogVideoXUpBlock3D",) * blocks,
    )  # fmt: skip
    return random_network(build, BF16, device)


def their_dit(config: DiTConfig, device: torch.device, dtype: torch.dtype = BF16) -> nn.Module:
    build = lambda: import_diffusers().CogVideoXTransformer3DModel(  # noqa: E731
        num_attention_heads=config.num_heads, attention_head_dim=config.dim // config.num_heads,
        num_layers=config.depth, in_channels=config.in_channels, out_channels=config.out_channels,
        text_embed_dim=config.text_dim, time_embed_dim=config.time_dim, ofs_embed_dim=config.time_dim,
        patch_size=2, patch_size_t=2, patch_bias=False, sample_frames=81, sample_height=96, sample_width=170,
        max_text_seq_length=226, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    return random_network(build, dtype, device)


def our_network(network_class, config, theirs: nn.Module, rename: Callable) -> nn.Module:
    """Ours around their tensors themselves: 11 GB of weights are there once, and equal."""
    with torch.device("meta"):
        ours = network_class(config)
    state = {rename(name): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict(state, strict=False, assign=True)
    if network_class is CausalVAE:
        ours.channels_last()
    elif config.cue_channels:
        add_cues(ours)
    return ours.requires_grad_(False).eval()


def dit_inputs(config: DiTConfig, slots: int, side: int, text: int, device, dtype=BF16) -> dict[str, Tensor]:
    """A random training batch; also what the forward passes read. Latents (1, slots, 16, side, side)."""
    draw = lambda *size: torch.randn(1, *size, dtype=dtype, device=device)  # noqa: E731
    batch = {name: draw(slots, 16, side, side) for name in ("latents", "noise", "condition")}
    batch |= {name: draw(slots, 17, side, side) for name in ("pose", "face")}
    return batch | {"text": draw(text, config.text_dim), "step": torch.tensor([500], device=device)}


class Theirs(nn.Module):
    """diffusers' transformer, called as `train.Denoising` calls ours, on one size of latents."""

    def __init__(self, network: nn.Module, config: DiTConfig, slots: int, side: int):
        super().__init__()
        from diffusers.models.embeddings import get_3d_rotary_pos_embed

        self.network, grid, device = network, (side // 2, side // 2), network.device
        self.rope = get_3d_rotary_pos_embed(config.dim // config.num_heads, None, grid, slots // 2,
                                            grid_type="slice", max_size=grid, device=device)  # fmt: skip
        self.ofs = torch.full((1,), OFS, device=device)

    def forward(self, x, step, text, pose=None, face=None, tap=None) -> tuple[Tensor, None]:
        ofs = self.ofs.to(x.dtype)
        v = self.network(x, text, step, ofs=ofs, image_rotary_emb=self.rope, return_dict=False)[0]
        return v, None


# ---- cues --------------------------------------------------------------------------------------------------------------------


@dataclass
class Loop:
    """A clip of any length out of a few drawn frames, there and back, each written when it is asked for."""

    frames: list[np.ndarray]
    length: int

    def __iter__(self) -> Iterator[np.ndarray]:
        last = len(self.frames) - 1
        for i in range(self.length):
            yield self.frames[last - abs(last - i % (2 * last))].copy()


def drawn(frames: int, side: int) -> tuple[np.ndarray, list, np.ndarray, list]:
    """(picture and mask of a reference, as a clip of one frame each, then frames and masks of a driver), drawn."""
    other, clip = toy.render(3, 4, frames=1, size=side), toy.render(1, 2, frames=frames, size=side)
    masks = [[cues.paint_mask(*pair) for pair in zip(c.body, c.face)] for c in (other, clip)]
    return other.video, masks[0], clip.video, masks[1]


def make_cues(length: int, side: int) -> tuple[Callable, tuple]:
    """(a call of both passes over a clip of `length` frames, which returns the bytes of its Track; the drawn parts)."""
    reference, own, frames, masks = drawn(9, side)
    find = cues.Finder(masks=Loop(masks, length), reference_mask=own[0])

    def run() -> int:
        video = Loop(list(frames), length)
        track = cues.analyse(video, reference[0], find)
        for _ in cues.render(video, track, (side, side)):
            pass
        return sum(map(len, track.masks))

    return run


def cues_memory(length: int, side: int) -> tuple[int, int]:
    """(peak bytes, bytes of the packed masks) of a clip; run in a fresh process."""
    make_cues(9, side)()
    run, kept = make_cues(length, side), []
    return peak(lambda: kept.append(run()), torch.device("cpu")), kept[0]


def bench_cues(setting: Setting) -> list[dict]:
    length, side, lengths = (9, 64, (10, 40)) if setting.small else (64, 512, (1000, 10_000))
    times = alternate({"ours": make_cues(length, side)}, setting.repeats)
    rate = length / median(times["ours"])
    target = "" if setting.small else ">= 1"
    rows = [row("cues", f"both passes, masks given: frames/s over {FRAME_RATE}", f"{length} frames {side}x{side}",
                "uint8, float32", setting.repeats, rate / FRAME_RATE, target, **{"frames/s": rate})]  # fmt: skip
    (short, _), (long, masks) = (fresh(cues_memory, n, side) for n in lengths)
    growth = (long - short) / (lengths[1] - lengths[0]) / (3 * side**2)
    figures = {f"MiB at {n} frames": value / MIB for n, value in zip(lengths, (short, long))}
    figures |= {"of them packed masks": masks / MIB}
    target = "" if setting.small else "<= 0.01"
    rows.append(row("cues", "memory that one more frame takes over the frame's own",
                    f"{lengths[0]:,} and {lengths[1]:,} frames {side}x{side}", "uint8, float32", 1, growth, target,
                    **figures))  # fmt: skip
    return rows


# ---- vae ---------------------------------------------------------------------------------------------------------------------


def vae_sizes(setting: Setting) -> tuple[VAEConfig, int, int]:
    """Network, frames, side in pixels."""
    name = "tiny" if setting.small else "cogvideox1.5"
    return VAE_PRESETS[name], *((9, 32) if setting.small else (49, 512) if setting.gpu else (9, 256))


def vae_networks(setting: Setting) -> dict[str, nn.Module]:
    config = vae_sizes(setting)[0]
    theirs = their_vae(config, setting.device)
    laid_out = CausalVAE.channels_last(
        copy.deepcopy(theirs)
    )  # touches parameters only, so it serves theirs too
    ours = our_network(CausalVAE, config, theirs, vae_name)
    return {"ours": ours, "diffusers": theirs, "diffusers channels-last": laid_out}


def vae_calls(network: nn.Module, frames: int, side: int, device, dtype=BF16) -> dict[str, Callable]:
    """Encode and decode a random clip; both give (B, T or f, C, ., .)."""
    generator = torch.Generator().manual_seed(1)
    video = torch.rand(1, frames, 3, side, side, generator=generator).to(device, dtype) * 2 - 1
    latents = torch.randn(1, frames // 4 + 1, 16, side // 8, side // 8, generator=generator).to(device, dtype)
    if isinstance(network, CausalVAE):
        return {"encode": lambda: network.encode(video)[0], "decode": lambda: network.decode(latents)}
    video, latents = (
        x.transpose(1, 2).contiguous() for x in (video, latents)
    )  # diffusers wants (B, C, T, H, W)
    return {
        "encode": lambda: network.encode(video).latent_dist.mean.transpose(1, 2),
        "decode": lambda: network.decode(latents).sample.transpose(1, 2),
    }


@torch.no_grad()
def vae_memory(name: str, setting: Setting) -> dict[str, int]:
    """Peak bytes of encode and decode above the weights; on a CPU run in a fresh process."""
    network = vae_networks(setting)[name]
    _, frames, side = vae_sizes(setting)
    for run in vae_calls(network, 9, 16, setting.device).values():
        run()  # small: loads libraries, leaves no large blocks behind
    calls = vae_calls(network, frames, side, setting.device)
    return {action: peak(run, setting.device) for action, run in calls.items()}


@torch.no_grad()
def bench_vae(setting: Setting) -> list[dict]:
    config, frames, side = vae_sizes(setting)
    sizes = f"{frames} frames {side}x{side}, {config.channels}"
    memory = {n: (vae_memory if setting.gpu else lambda *a: fresh(vae_memory, *a))(n, setting)
              for n in ("ours", "diffusers")}  # fmt: skip
    networks = vae_networks(setting)
    exact = vae_calls(
        copy.deepcopy(networks["diffusers"]).float(), frames, side, setting.device, torch.float32
    )
    calls = {name: vae_calls(network, frames, side, setting.device) for name, network in networks.items()}
    rows = []
    for action, fast, faster in (("encode", ">= 3", ">= 1.8"), ("decode", ">= 4", ">= 1.8")):
        truth = exact[action]()
        error = {name: ((calls[name][action]().float() - truth).square().mean() / truth.square().mean()).sqrt().item()
                 for name in ("ours", "diffusers")}  # fmt: skip
        del truth
        rows.append(row("vae", f"{action}: our distance from the float32 result / diffusers'", sizes, "bfloat16", 1,
                        error["ours"] / error["diffusers"], setting.target("<= 1.1"),
                        **{f"{name} relative": value for name, value in error.items()}))  # fmt: skip
        times = alternate({name: call[action] for name, call in calls.items()}, setting.repeats, setting.wait)
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            vae_calls(CausalVAE(config), frames, side, "meta")[action]()
        figures = speeds(setting, times, counter.get_total_flops(), setting.conv)
        for other, target in (("diffusers", fast), ("diffusers channels-last", faster)):
            shown = figures if other == "diffusers" else {}
            rows.append(row("vae", f"{action}: {other}' time / ours", sizes, "bfloat16", setting.repeats,
                            pairwise(times, other, "ours"), setting.target(target), **shown))  # fmt: skip
        bytes_ = {name: of_side[action] for name, of_side in memory.items()}
        rows.append(row("vae", f"{action}: our peak memory above the weights / diffusers'", sizes, "bfloat16", 1,
                        bytes_["ours"] / max(bytes_["diffusers"], 1), setting.target("<= 0.6"),
                        **{f"{name} MiB": value / MIB for name, value in bytes_.items()}))  # fmt: skip
    return rows


# ---- dit ---------------------------------------------------------------------------------------------------------------------


def dit_sizes(setting: Setting) -> tuple[DiTConfig, int, int, int]:
    """Network, latents with the reference's, their side, text tokens."""
    if setting.small:
        return DIT_PRESETS["tiny"], 2, 8, 8
    return DIT_PRESETS["cogvideox1.5-5b"], *((14, 64, 226) if setting.gpu else (4, 32, 226))


@torch.no_grad()
def bench_dit(setting: Setting) -> list[dict]:
    config, slots, side, text = dit_sizes(setting)
    config, video = replace(config, cue_channels=0), budget.tokens(slots, side, side)
    network = their_dit(config, setting.device)
    ours, theirs = our_network(DiT, config, network, dit_name), Theirs(network, config, slots, side)
    batch = dit_inputs(config, slots, side, text, setting.device)
    x, step, text_states = torch.cat([batch["latents"], batch["condition"]], 2), batch["step"], batch["text"]
    sides = {"ours": lambda: ours(x, step, text_states), "diffusers": lambda: theirs(x, step, text_states)[0]}
    rows = []
    for mode in setting.modes(ours.blocks, network.transformer_blocks):
        times = alternate(sides, setting.repeats, setting.wait)
        figures = speeds(setting, times, budget.forward_flops(config, video, text), setting.matmul)
        a, b = (run().float() for run in sides.values())
        figures["relative difference"] = ((a - b).norm() / b.norm()).item()
        if setting.gpu:
            figures |= {f"{name} peak MiB": peak(run, setting.device) / MIB for name, run in sides.items()}
        entry = row("dit", f"forward, {mode}: diffusers' time / ours",
                    f"{config.depth} blocks of {config.dim}, {text} + {video:,} tokens", "bfloat16", setting.repeats,
                    pairwise(times, "diffusers", "ours"), setting.target(">= 1.15 or our share >= 0.85"),
                    **figures)  # fmt: skip
        rows.append(entry | {"met": entry["met"] and True if not entry["target"] else
                             entry["met"] or figures["ours share"] >= 0.85})  # fmt: skip
    return rows


# ---- train -------------------------------------------------------------------------------------------------------------------


def step_of(objective: nn.Module, device: torch.device) -> Callable[[dict], None]:
    """A function that takes a batch and does what one step of train.py does: forward, backward, AdamW."""
    import train

    groups = train.parameter_groups(objective.model, 1e-4)
    optimizer = torch.optim.AdamW(groups, 2e-5, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def step(batch: dict) -> None:
        with torch.autocast(device.type, BF16):
            losses = objective(batch)
        train.total_loss(losses, SimpleNamespace(s2x_weight=0.5)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def train_beside(setting: Setting, config: DiTConfig, slots: int, side: int, text: int) -> dict:
    """A step without cues beside diffusers' transformer under the same loss and optimizer."""
    import train

    network = their_dit(config, setting.device, torch.float32)
    ours = copy.deepcopy(
        our_network(DiT, config, network, dit_name)
    )  # copied: each side trains weights of its own
    models = {"ours": ours, "diffusers": Theirs(network, config, slots, side)}
    batch = dit_inputs(config, slots, side, text, setting.device, torch.float32)
    batch = {name: value for name, value in batch.items() if name not in ("pose", "face")}
    steps = {name: step_of(train.Denoising(model.requires_grad_(True).train(), 1), setting.device)
             for name, model in models.items()}  # fmt: skip
    times = alternate(
        {name: lambda run=run: run(batch) for name, run in steps.items()}, setting.repeats, setting.wait
    )
    video = budget.tokens(slots, side, side)
    flops = budget.step_flops(config, video, text, 1, False, 0)
    return row("train", "step without cues: diffusers' time / ours",
               f"{budget.numbers(config) / 1e6:.3g} M parameters, {text} + {video:,} tokens",
               "float32, autocast bfloat16", setting.repeats, pairwise(times, "diffusers", "ours"),
               setting.target(">= 1.1"), **speeds(setting, times, flops, setting.matmul))  # fmt: skip


def train_cues(setting: Setting, config: DiTConfig, slots: int, side: int, text: int) -> dict:
    """What the cues add to a step of one and the same model."""
    import train

    step = step_of(train.Denoising(DiT(config).to(setting.device).train(), 1), setting.device)
    batch = dit_inputs(config, slots, side, text, setting.device, torch.float32)
    plain = {name: value for name, value in batch.items() if name not in ("pose", "face")}
    sides = {"with cues": lambda: step(batch), "without": lambda: step(plain)}
    times = alternate(sides, setting.repeats, setting.wait)
    return row("train", "step with cues / without, less 1",
               f"{config.depth} blocks of {config.dim}, {text} + {budget.tokens(slots, side, side):,} tokens",
               "float32, autocast bfloat16", setting.repeats, pairwise(times, "with cues", "without") - 1,
               setting.target("<= 0.08"))  # fmt: skip


@torch.no_grad()
def train_teacher(setting: Setting, config: DiTConfig, slots: int, side: int, text: int) -> dict:
    """What the teacher adds to a step, in forward passes of the whole model: its first blocks and the cosine of Eq. 4."""
    import train

    config, depth = replace(config, depth=21, cue_channels=17), 5  # 5 / 21 is the paper's 10 / 42
    model = random_network(lambda: DiT(config), BF16, setting.device)
    batch = dit_inputs(config, slots, side, text, setting.device)
    x = (
        torch.cat([batch["latents"], batch["condition"]], 2),
        batch["step"],
        batch["text"],
        batch["pose"],
        batch["face"],
    )
    student = model.features(*x, depth)
    sides = {
        "teacher": lambda: train.same2x(student, model.features(*x, depth)),
        "forward": lambda: model(*x, tap=depth),
    }
    times = alternate(sides, setting.repeats, setting.wait)
    return row("train", "teacher and Same2X loss / a whole forward",
               f"D {depth} of {config.depth} blocks of {config.dim}, {text} + {budget.tokens(slots, side, side):,} tokens",
               "bfloat16", setting.repeats, pairwise(times, "teacher", "forward"), setting.target("<= 0.3"))  # fmt: skip


def train_full_width(setting: Setting) -> list[dict]:
    """On a GPU: as many blocks of the full width as fit, with cues and checkpointing; the share of the GPU's peak."""
    import train

    config, slots, side, text = dit_sizes(setting)
    video, room = budget.tokens(slots, side, side), budget.capacity(setting.device, 1)
    needed = lambda c: sum(budget.memory(c, 1, "none", False, 0, video, text, 1, True).values())  # noqa: E731
    config = next(
        c for depth in range(config.depth, 0, -1) if needed(c := replace(config, depth=depth)) <= room
    )
    with setting.device:
        model = DiT(config).train()
    model.checkpointing = True
    step = step_of(train.Denoising(model, 1), setting.device)
    batch = dit_inputs(config, slots, side, text, setting.device, torch.float32)
    flops = budget.step_flops(config, video, text, 1, False, 0)  # what is recomputed does not count as use
    best, rows = budget.peak_flops(torch.cuda.get_device_name(setting.device)) or setting.matmul, []
    for mode in setting.modes(model.blocks):
        seconds = median(alternate({"step": lambda: step(batch)}, setting.repeats, setting.wait)["step"])
        held = torch.cuda.memory_allocated() + peak(lambda: step(batch), setting.device)
        rows.append(row("train", f"step with cues, {mode}: MFU", f"{config.depth} blocks of {config.dim}, {text} + "
                        f"{video:,} tokens", "float32, autocast bfloat16", setting.repeats, flops / seconds / best,
                        **{"tokens/s": (video + text) / seconds, "s": seconds, "peak GiB, all": held / 2**30}))  # fmt: skip
    return rows


def bench_train(setting: Setting) -> list[dict]:
    wide, *small = dit_sizes(setting)
    sizes = small if setting.small else (6, 32, 226)  # 226 + 768 tokens
    middle = replace(wide, cue_channels=0) if setting.small else MIDDLE
    rows = [train_beside(setting, middle, *sizes)]
    settle()
    rows.append(train_cues(setting, replace(wide, depth=2), *sizes))
    settle()
    rows.append(train_teacher(setting, middle, *sizes))
    settle()
    return rows + (train_full_width(setting) if setting.gpu else [])


# ---- pipeline ------------------------------------------------------------------------------------------------------------------


class Clock:
    """When each part of one run ended, in seconds after its start; the last run's."""

    def start(self):
        self.began, self.marks = time.perf_counter(), []

    def mark(self, *_):
        self.marks.append(time.perf_counter() - self.began)


def our_pipeline(setting: Setting, ours: tuple, inputs: dict, steps: int) -> tuple[Callable, list]:
    """sample.py from pictures, cue pictures and text states to frames; and [(encoded, denoised, decoded) of each run]."""
    import sample

    vae, dit = ours
    args = SimpleNamespace(guidance=3.0, seed=0, sampler="dpm", steps=steps)
    log, clock = [], Clock()

    def run():
        clock.start()
        latents = sample.encode(args, vae, setting.device, inputs["reference"], inputs["own"], inputs["cues"])
        clock.mark()
        latents = sample.denoise(args, dit, setting.device, inputs["text"], *latents, 13)
        clock.mark()
        frames = list(sample.pictures(vae, latents, len(inputs["cues"]), setting.device))
        clock.mark()
        log.append(clock.marks)
        return frames

    return run, log


def their_pipeline(setting: Setting, theirs: tuple, inputs: dict, steps: int) -> tuple[Callable, list]:
    """diffusers' image-to-video pipeline from the picture and text states to frames; and [(each step ..., end) of each run]."""
    from PIL.Image import fromarray

    diffusers, (vae, dit) = import_diffusers(), theirs
    scheduler = diffusers.CogVideoXDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        rescale_betas_zero_snr=True, snr_shift_scale=1.0, timestep_spacing="trailing", clip_sample=False,
    )  # fmt: skip
    pipe = diffusers.CogVideoXImageToVideoPipeline(None, None, vae, dit, scheduler)
    pipe.set_progress_bar_config(disable=True)
    height, width = inputs["reference"].shape[:2]
    log, clock = [], Clock()

    def mark(pipe, index, step, tensors) -> dict:
        clock.mark()  # on a GPU these say when a step was sent, not when it ended: used on CPUs only
        return {}

    def run():
        clock.start()
        frames = pipe(image=fromarray(inputs["reference"]), prompt_embeds=inputs["text"][:1], guidance_scale=3.0,
                      negative_prompt_embeds=inputs["text"][1:], height=height, width=width, output_type="np",
                      num_frames=len(inputs["cues"]), num_inference_steps=steps,
                      callback_on_step_end=mark).frames[0]  # fmt: skip
        clock.mark()
        log.append(clock.marks)
        return frames

    return run, log


def pipeline_inputs(setting: Setting, text_dim: int, text: int) -> tuple[dict, float]:
    """What both pipelines are given, and seconds a frame of making the cues from a driving video and its masks."""
    frames, side = (9, 32) if setting.small else (49, 512) if setting.gpu else (9, 256)
    reference, own, video, masks = drawn(frames, side)
    find = cues.Finder(masks=masks, reference_mask=own[0])
    made = {}

    def make():
        track = cues.analyse(video, reference[0], find)
        made["cues"] = list(cues.render(video, track, (side, side)))

    seconds = median(alternate({"cues": make}, setting.repeats)["cues"]) / frames
    inputs = made | {"reference": reference[0], "own": cues.extract(reference, reference[0], find.reference)}
    inputs["text"] = torch.randn(2, text, text_dim).to(setting.device, BF16)  # stands for T5's on both sides
    return inputs, seconds


@torch.no_grad()
def bench_pipeline(setting: Setting) -> list[dict]:
    config, _, _, text = dit_sizes(setting)
    text = 226  # the pipeline of diffusers is made for 226 text tokens
    vae, dit = their_vae(vae_sizes(setting)[0], setting.device), their_dit(config, setting.device)
    ours = (
        our_network(CausalVAE, vae_sizes(setting)[0], vae, vae_name),
        our_network(DiT, config, dit, dit_name),
    )
    inputs, preprocessing = pipeline_inputs(setting, config.text_dim, text)
    frames, side = len(inputs["cues"]), inputs["reference"].shape[0]
    steps = 50 if setting.gpu and not setting.small else 2
    rows, sizes = [], f"{frames} frames {side}x{side}, {config.depth} blocks, {steps} steps, guidance"
    for mode in setting.modes(ours[1].blocks, dit.transformer_blocks):
        (run, parts), (their_run, marks) = (
            our_pipeline(setting, ours, inputs, steps), their_pipeline(setting, (vae, dit), inputs, steps))  # fmt: skip
        sides = {"ours": run, "diffusers": their_run}
        times = alternate(sides, setting.repeats, setting.wait)
        pairs = list(zip(times["ours"], parts[1:], times["diffusers"], marks[1:]))  # [0]: the warm-up
        figures = {"ratio, cue encoding not counted": median(b / (a - p[0]) for a, p, b, _ in pairs)}
        if setting.gpu:
            figures |= {f"{name} s": median(seconds) for name, seconds in times.items()}
            figures |= {f"{name} peak MiB": peak(one, setting.device) / MIB for name, one in sides.items()}
        else:
            more = lambda p, m: ((50 - steps) / steps * (p[1] - p[0]), (50 - steps) * (m[1] - m[0]))  # noqa: E731
            figures["ratio at 50 steps, calculated"] = median(
                (b + more(p, m)[1]) / (a + more(p, m)[0]) for a, p, b, m in pairs)  # fmt: skip
        rows.append(row("pipeline", f"picture and cues to frames, {mode}: diffusers' time / ours", sizes, "bfloat16",
                        setting.repeats, pairwise(times, "diffusers", "ours"), setting.target(">= 1.5"),
                        **figures))  # fmt: skip
        rows.append(table_7(setting, sizes, mode, preprocessing, median(times["ours"]), frames))
    return rows


def table_7(
    setting: Setting, sizes: str, mode: str, preprocessing: float, generation: float, frames: int
) -> dict:
    """A row in the form of the paper's Table 7. Without a GPU its seconds would say nothing: the share is shown."""
    if not setting.gpu:
        return row("pipeline", "Table 7: preprocessing (masks given) / generation", sizes, "bfloat16",
                   setting.repeats, preprocessing * frames / generation)  # fmt: skip
    figures = {"preprocessing ms a frame, masks given": 1000 * preprocessing, "generation s": generation}
    return row("pipeline", f"Table 7, {mode}: generation s over {SECONDS}", sizes, "bfloat16", setting.repeats,
               generation / SECONDS, setting.target(f"<= 1 ({SECONDS} s on an H100)", on_gpu=True),
               **figures, **TABLE_7)  # fmt: skip


# ---- the command -----------------------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> None:
    parts = {
        "cues": bench_cues,
        "vae": bench_vae,
        "dit": bench_dit,
        "train": bench_train,
        "pipeline": bench_pipeline,
    }
    chosen = NAMES if args.part == "all" else (args.part,)
    if chosen != ("cues",):
        import_diffusers()
    setting = Setting(args.size == "small", pick_device(args.device)[0], args.repeat)
    torch.backends.cudnn.allow_tf32 = False  # the float32 result that others are held against
    name = torch.cuda.get_device_name(setting.device) if setting.gpu else "CPU"
    report = {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "size": args.size,
    }
    print(
        f"{name}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, size {args.size}\n\n{HEAD}"
    )
    rows = []
    for part in chosen:
        settle()
        if part != "cues":
            setting = ceilings(setting)
        for entry in parts[part](setting):
            print(line(entry), flush=True)
            rows.append(entry)
        if args.output:  # after each part: a later one may not fit
            args.output.write_text(json.dumps(report | {"rows": rows}, indent=1))


if __name__ == "__main__":
    try:
        main(ARGS)
    except (ValueError, OSError) as error:
        PARSER.exit(2, f"{PARSER.prog}: {error}\n")
    except KeyboardInterrupt:
        PARSER.exit(130, "\nstopped\n")
