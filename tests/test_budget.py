"""The arithmetic of budget.py against real tensors and counted multiplications."""

import weakref
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import budget
import model
from model import DIT_PRESETS, Block, DiT, rope_table
from ranks import shard

TINY, FULL = DIT_PRESETS["tiny"], DIT_PRESETS["cogvideox1.5-5b"]


def test_parameters_of_the_5b_model():
    assert budget.numbers(FULL) == 5_970_088_576
    assert budget.numbers(replace(FULL, cue_channels=0)) == 5_571_594_880


def test_forward_flops_of_the_5b_model_are_those_of_its_tokens():
    """9.513e9 S + 516,096 S^2 for S tokens, plus embeddings and output; 0.099 PFLOP for 49 frames at 512 x 512."""
    video = budget.tokens(FULL, 14, 64, 64)
    assert video == 7168
    S = video + 226
    whole = budget.forward_flops(FULL, video, 226)
    assert whole == pytest.approx(9.513e9 * S + 516_096 * S**2, rel=2e-3) and whole == pytest.approx(0.099e15, rel=0.01)


@pytest.mark.parametrize("injection", ["cuefusion", "concat", "cross", "none"])
def test_flops_equal_those_that_a_real_forward_pass_counts(injection):
    """torch's own counter, whose matrix products are all of ours but the few on one vector a sample (adaLN, time)."""
    config = replace(TINY, cue_channels=0) if injection == "none" else replace(TINY, cue_injection=injection)
    x, cue = torch.randn(1, 6, 32, 12, 8), torch.randn(1, 6, 17, 12, 8) if injection != "none" else None
    video, text = budget.tokens(TINY, 6, 12, 8), 5
    # the fused kernels of some versions and CPUs are not counted
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        DiT(config)(x, torch.tensor([5]), torch.randn(1, text, 32), cue, cue)
    vectors = sum(p[1].numel() * 2 for p in budget.parameters(config) if any(k in p[0] for k in ("time_embed", "ofs_embed", "norm1.linear", "norm2.linear", "norm_out.linear", "cues.mlp")) and len(p[1]) == 2)  # fmt: skip
    assert counter.get_total_flops() - vectors == budget.forward_flops(config, video, text)


@pytest.fixture
def fake_ranks():
    """A process group of this size in which nothing is sent: enough to cut tensors into slices."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def start(count):
        dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
        return Namespace(rank=0, count=count, device=torch.device("cpu"), mesh=dist.init_device_mesh("cpu", (count,)))

    yield start
    dist.destroy_process_group()


def local_bytes(tensors) -> int:
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


@pytest.mark.parametrize("teacher", [0, 1])
@pytest.mark.parametrize("ranks, how", [(2, "optimizer"), (4, "full"), (3, "full")])
def test_states_equal_the_bytes_of_real_tensors(fake_ranks, ranks, how, teacher):
    """Parameters, gradients, moments, average and teacher of the fullest rank, exactly; 3 ranks divide no size evenly."""
    group = fake_ranks(ranks)
    model = shard(DiT(TINY), how == "full", group, torch.float32, torch.float32)
    ema = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    expected = budget.state_bytes(TINY, ranks, how, True, teacher)
    assert local_bytes(model.parameters()) == expected["parameters"] == expected["average"] == local_bytes(ema)
    assert local_bytes(p.grad for p in model.parameters()) == expected["gradients"]
    assert local_bytes(t for s in optimizer.state.values() for t in s.values()) == expected["Adam's moments"]
    if teacher:
        real = DiT(replace(TINY, depth=teacher)).bfloat16()
        assert local_bytes(real.parameters()) == expected["teacher"]
    else:
        assert "teacher" not in expected


def test_kept_activations_are_those_that_autograd_saves(monkeypatch):
    """Of one bfloat16 block, saved tensors that are no parameters; within 3 %. With the fused attention of large models."""
    monkeypatch.setattr(model, "attend", torch.nn.functional.scaled_dot_product_attention)
    config, grid, text = replace(DIT_PRESETS["toy"], depth=1), (6, 6, 6), 40
    block, D, N = Block(config).bfloat16(), config.dim, 216
    x, c, pose, face = (torch.randn(1, n, D, dtype=torch.bfloat16, requires_grad=True) for n in (N, text, N, N))
    parameters, kept = {p.untyped_storage().data_ptr() for p in block.parameters()}, {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    rope = rope_table(text, grid, D // config.num_heads, "cpu")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x, c, pose, face, torch.randn(1, 48).bfloat16(), rope)
    found = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in parameters)
    expected = 2 * D * (budget.KEPT_TOKEN * (N + text) + budget.KEPT_CUE * N)
    assert found == pytest.approx(expected, rel=0.03)


class Live(TorchDispatchMode):
    """The most bytes that tensors made inside the `with` held at one time."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in (t for t in tree_leaves(made) if isinstance(t, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata)
        return made

    def free(self, key):
        self.now -= self.sizes.pop(key, 0)


def test_one_more_guidance_branch_takes_what_is_said():
    """Peaks of real forward passes over two samples and over one; within 10 %."""
    config, text = replace(DIT_PRESETS["toy"], dim=384, num_heads=6, depth=2), 20
    network, cue, peaks = DiT(config).bfloat16(), torch.randn(1, 6, 17, 12, 12).bfloat16(), []
    for branches in (1, 2):
        x = torch.randn(branches, 6, 32, 12, 12).bfloat16()
        with torch.inference_mode(), Live() as live:
            network(x, torch.tensor([5]), torch.randn(branches, text, 64).bfloat16(), cue, cue)
        peaks.append(live.peak)
    video = budget.tokens(config, 6, 12, 12)
    assert peaks[1] - peaks[0] == pytest.approx(budget.sampling_bytes(config, video, text, 1), rel=0.1)


def test_stage_2_of_the_5b_model_fits_four_cards():
    """Weights, states and the teacher: 38 GiB a rank with `optimizer`, 27 with `full`; DDP needs 89 for its states alone."""
    gib = lambda parts: sum(v for name, v in parts.items() if name != "activations") / budget.GIB  # noqa: E731
    of = lambda shard: budget.memory(FULL, 4, shard, False, 10, 7168, 226, 1, True)  # noqa: E731
    assert gib(of("optimizer")) <= 38 and gib(of("full")) <= 27
    states = budget.state_bytes(FULL, 1, "none", False, 0)
    assert sum(states.values()) / budget.GIB == pytest.approx(89, abs=0.5)
    assert budget.state_bytes(FULL, 4, "full", False, 10)["teacher"] / budget.GIB == pytest.approx(2.7, abs=0.15)


def test_what_cannot_fit_is_refused_with_the_nearest_setting_that_does():
    needed = lambda shard, ranks, batch, again: sum(  # noqa: E731
        budget.memory(FULL, ranks, shard, False, 0, 7168, 226, batch, again).values()
    )
    room = 80 * budget.GIB
    assert budget.nearest_fit(room, "none", 4, 1, True, needed) == "--shard optimizer"
    assert budget.nearest_fit(room, "none", 1, 1, True, needed) == "--shard optimizer, 2 ranks"
    assert budget.nearest_fit(room, "full", 4, 8, False, needed).startswith("--checkpointing")
    assert budget.nearest_fit(1 * budget.GIB, "none", 4, 1, True, needed) is None
