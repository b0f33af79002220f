"""muon.py: the orthogonal step against singular value decomposition, which weights it takes, and its run folder."""

import numpy as np
import pytest
import torch

import train
from muon import A, B, C, ITERATIONS, Muon, is_matrix, orthogonal
from model import DIT_PRESETS, DiT
from vae import VAE_PRESETS, CausalVAE


@pytest.mark.parametrize("shape", [(24, 24), (16, 200), (200, 16)])
def test_orthogonal_keeps_the_singular_vectors_and_levels_the_values(shape):
    """U f(S) V' with f the quintic, five times, on S / |M|: the loop is over singular values, in float64."""
    m = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    U, S, V = np.linalg.svd(m.numpy(), full_matrices=False)
    values = []
    for s in S / np.sqrt((S**2).sum()):
        for _ in range(ITERATIONS):
            s = A * s + B * s**3 + C * s**5
        values.append(s)
    np.testing.assert_allclose(orthogonal(m[None])[0].numpy(), U @ np.diag(values) @ V, atol=1e-6)
    assert 0.6 < min(values) and max(values) < 1.3, "all about 1"
    rough = orthogonal(torch.stack([m, 3 * m]).float())
    assert rough.dtype == torch.float32 and (rough - orthogonal(m[None])).norm() < 0.05 * rough.norm()


def test_a_step_is_the_equation_and_as_long_as_adamws():
    """Two steps with momentum and decay, written out; root mean square of a step about 0.2 lr, for a convolution too."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(32, 16, 3, 3, 3, dtype=torch.float64))
    start, gradients = p.detach().clone(), [torch.randn_like(p) for _ in range(2)]
    optimizer = Muon([p], lr=0.01, momentum=0.9, weight_decay=0.1)
    expected, momentum = start.clone(), torch.zeros_like(p)
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
        momentum = 0.9 * momentum + gradient
        step = orthogonal((gradient + 0.9 * momentum).reshape(1, 32, 16 * 27)).reshape(p.shape)
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * 0.2 * (16 * 27) ** 0.5 * step
    torch.testing.assert_close(p.detach(), expected)
    assert step.square().mean().sqrt() * (16 * 27) ** 0.5 == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("network", [DiT(DIT_PRESETS["tiny"]), CausalVAE(VAE_PRESETS["tiny"])])
def test_every_weight_has_one_optimizer_and_biases_have_adamw(network):
    _, args = train.parse_args(["--preset", "tiny", "--optimizer", "muon"])
    names = {id(p): name for name, p in network.named_parameters()}
    adamw, muon = (
        [names[id(p)] for g in o.param_groups for p in g["params"]] for o in train.make_optimizers(network, args)
    )
    assert sorted(muon + adamw) == sorted(names.values())
    matrices = {name for name, p in network.named_parameters() if is_matrix(p)}
    assert set(muon) == matrices and not any(name.endswith("bias") for name in matrices)
    assert any(is_matrix(p) for p in network.parameters() if p.ndim > 1) and not is_matrix(torch.zeros(3, 99))


def test_a_step_without_gradients_moves_nothing():
    p = torch.nn.Parameter(torch.ones(4, 4))
    Muon([p], lr=1.0).step()
    assert torch.equal(p, torch.ones(4, 4))


def test_a_matrix_without_a_gradient_stays_finite():
    """Fresh cue layers have gradients of exactly 0 in the first step: 0 / 0 would be NaN from then on."""
    p = torch.nn.Parameter(torch.ones(16, 32))
    p.grad = torch.zeros_like(p)
    Muon([p], lr=1.0).step()
    assert torch.equal(p, torch.ones(16, 32))


def test_16_rows_and_columns_are_a_matrix_and_15_are_not():
    for shape, expected in (
        ((16, 16), True),
        ((15, 99), False),
        ((99, 15), False),
        ((16, 2, 2, 4), True),
        ((16,), False),
    ):
        assert is_matrix(torch.zeros(shape)) == expected, shape
