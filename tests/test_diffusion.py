"""The schedule (Eq. 5-8), the two samplers, the windows. Trajectories are compared with diffusers in test_parity.py.

Latents are (B, f, C, h, w) = (2, 3, 4, 5, 6): all different.
"""

import math

import pytest
import torch

from diffusion import Schedule, ddim, dpm_solver, windows

SHAPE = (2, 3, 4, 5, 6)
SAMPLERS = [ddim, dpm_solver]
LANDS_CLEAN = [1, 2, 3, 4, 10, 30, 50, 75, 100, 333, 1000]


@pytest.fixture(scope="module")
def schedule():
    return Schedule()


# ---- Eq. 5-8 -------------------------------------------------------------------------------------------------------


def betas_of(schedule):
    """beta_t of Eq. 5 from alpha_bar_t = prod (1 - beta_s)."""
    alpha_bar = schedule.alphas_cumprod.tolist()
    return [1 - now / before for now, before in zip(alpha_bar, [1.0] + alpha_bar[:-1])]


def test_eq5_composed_step_by_step_is_eq6(schedule):
    """Mean and variance of x_t after t draws of Eq. 5, by recursion, equal Eq. 6's closed form at every one of the 1000 steps."""
    mean, variance = 1.0, 0.0  # of x_t given x_0 = 1
    betas = betas_of(schedule)
    assert all(0 < beta <= 1 for beta in betas)
    for t, beta in enumerate(betas):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        alpha_bar = schedule.alphas_cumprod[t].item()
        assert mean == pytest.approx(math.sqrt(alpha_bar), abs=1e-12)
        assert variance == pytest.approx(1 - alpha_bar, abs=1e-12)


def test_schedule_starts_at_the_papers_betas_and_ends_in_pure_noise(schedule):
    """sqrt(beta) runs evenly from sqrt(.00085) to sqrt(.012); then sqrt(alpha_bar) is shifted to 0 at the end, unchanged at the start."""
    product, plain = 1.0, []
    for i in range(1000):
        beta = (math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * i / 999) ** 2
        product *= 1 - beta
        plain.append(math.sqrt(product))
    expected = [((s - plain[-1]) * plain[0] / (plain[0] - plain[-1])) ** 2 for s in plain]
    assert schedule.alphas_cumprod.dtype == torch.float64
    assert schedule.alphas_cumprod.tolist() == pytest.approx(expected, abs=1e-13)
    assert schedule.alphas_cumprod[0].item() == pytest.approx(1 - 0.00085, abs=1e-12)
    assert schedule.alphas_cumprod[999] == 0
    assert (schedule.alphas_cumprod.diff() < 0).all()


def test_eq6_add_noise_mixes_each_sample_by_its_own_step(schedule):
    """Every element by a loop. Catches square roots forgotten, and the step broadcast along the wrong axis."""
    clean, noise, step = (
        torch.randn(SHAPE, dtype=torch.float64),
        torch.randn(SHAPE, dtype=torch.float64),
        torch.tensor([999, 250]),
    )
    noisy = schedule.add_noise(clean, noise, step)
    for b in range(2):
        alpha_bar = schedule.alphas_cumprod[step[b]].item()
        for x_t, x_0, eps in zip(noisy[b].flatten().tolist(), clean[b].flatten().tolist(), noise[b].flatten().tolist()):
            assert x_t == pytest.approx(math.sqrt(alpha_bar) * x_0 + math.sqrt(1 - alpha_bar) * eps, abs=1e-12)
    assert torch.equal(noisy[0], noise[0])


def test_velocity_and_predict_x0_are_inverse_at_every_step(schedule):
    """Also at step 999, where no x_0 is left in x_t: v = -x_0 there. Catches a swapped sign or factor."""
    step = torch.arange(1000)
    clean, noise = torch.randn(2, 1000, 3, dtype=torch.float64)
    v = schedule.velocity(clean, noise, step)
    torch.testing.assert_close(
        schedule.predict_x0(schedule.add_noise(clean, noise, step), v, step), clean, rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(v[999], -clean[999])
    torch.testing.assert_close(
        v.square() + schedule.add_noise(clean, noise, step).square(), clean.square() + noise.square()
    )


def test_eq8_v_loss_is_cogvideox_weighted_x0_loss(schedule):
    """CogVideoX trains (x0_hat - x0)^2 / (1 - alpha_bar); that is plain MSE on v, exactly. And it is Eq. 8 weighted by 1/alpha_bar."""
    step = torch.arange(999)
    clean, noise, guess = torch.randn(3, 999, 7, dtype=torch.float64)
    noisy, v = schedule.add_noise(clean, noise, step), schedule.velocity(clean, noise, step)
    alpha_bar = schedule.alphas_cumprod[:999, None]
    x0_loss = (schedule.predict_x0(noisy, guess, step) - clean).square() / (1 - alpha_bar)
    guessed_noise = (1 - alpha_bar).sqrt() * noisy + alpha_bar.sqrt() * guess
    eq8 = (guessed_noise - noise).square() / alpha_bar
    torch.testing.assert_close(x0_loss, (guess - v).square(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(eq8, (guess - v).square(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("make", ["add_noise", "velocity", "predict_x0"])
def test_bf16_latents_are_handled_in_float32(schedule, make):
    """In bf16 alpha_bar rounds to 1 at steps 0 and 1: no noise at all would be added (fact sheet 4.1). float64 stays float64."""
    a, b = torch.ones(2, *SHAPE[1:], dtype=torch.bfloat16), torch.ones(2, *SHAPE[1:], dtype=torch.bfloat16)
    out = getattr(schedule, make)(a, b, torch.tensor([0, 1]))
    assert out.dtype == torch.float32
    assert torch.equal(out, getattr(schedule, make)(a.float(), b.float(), torch.tensor([0, 1])))
    assert getattr(schedule, make)(a.double(), b.double(), torch.tensor([0, 1])).dtype == torch.float64


def test_noise_is_added_at_step_0_and_1_in_bf16(schedule):
    noisy = schedule.add_noise(
        torch.zeros(2, 3, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.bfloat16), torch.tensor([0, 1])
    )
    assert noisy[0, 0].item() == pytest.approx(math.sqrt(1 - 0.99915), rel=1e-4) and noisy[1, 0] > noisy[0, 0]


# ---- samplers ------------------------------------------------------------------------------------------------------


def perfect(clean, schedule):
    """A denoiser that knows x_0: v = (sqrt(alpha_bar) x_t - x_0) / sqrt(1 - alpha_bar)."""

    def denoise(latents, step):
        alpha = schedule.alphas_cumprod[step].item()
        return (alpha**0.5 * latents - clean) / (1 - alpha) ** 0.5

    return denoise


@pytest.mark.parametrize("steps", LANDS_CLEAN)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_perfect_denoiser_recovers_x0(schedule, sampler, steps):
    """From pure noise, in float64 up to rounding; in one step too. Catches any wrong coefficient, and noise left at the end."""
    clean, start = torch.randn(2, *SHAPE, dtype=torch.float64)
    if steps > 100:
        clean, start = clean[:1, :1], start[:1, :1]
    torch.testing.assert_close(sampler(perfect(clean, schedule), start, schedule, steps), clean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [7, 13, 60])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_step_counts_whose_spacing_rounds_up_end_at_alpha_bar_0_as_released(schedule, sampler, steps):
    """CogVideoX's own schedulers do this (1000/60 = 16.67: the last step is 16, the next is 16 - 16 = 0): noise of 0.029 is left.

    The default of 50, and every divisor of 1000, end clean. test_parity.py holds us to it."""
    clean, start = torch.zeros(2, 30, 4, 5, 6), torch.randn(2, 30, 4, 5, 6)
    assert list(schedule.trail(steps))[-1][2] == schedule.alphas_cumprod[0]
    left = sampler(perfect(clean, schedule), start, schedule, steps)
    assert left.std().item() == pytest.approx((1 - schedule.alphas_cumprod[0].item()) ** 0.5, rel=0.1)


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_the_last_dpm_step_adds_no_noise(schedule, steps):
    """One draw a step but the last: the result is a prediction, not a noised one. Seeds of the draws do not matter there."""
    draws = 0

    def noise():
        nonlocal draws
        draws += 1
        return torch.randn(SHAPE)

    visited = []

    def denoise(latents, step):
        visited.append((latents.clone(), step))
        return torch.sin(latents)

    out = dpm_solver(denoise, torch.randn(SHAPE), schedule, steps, noise=noise)
    assert draws == steps - 1 and len(visited) == steps
    latents, step = visited[-1]
    torch.testing.assert_close(out, schedule.predict_x0(latents, torch.sin(latents), torch.tensor([step, step])))


def test_dpm_draws_anew_at_the_first_step(schedule):
    """alpha is 0 there: nothing of the starting noise is kept but what the prediction made of it."""
    constant = lambda latents, step: torch.full_like(latents, -0.5)  # noqa: E731
    fixed = torch.randn(SHAPE)
    a, b = (dpm_solver(constant, torch.randn(SHAPE), schedule, 2, noise=lambda: fixed) for _ in range(2))
    assert torch.equal(a, b)


def test_dpm_second_order_extrapolates_from_the_third_step(schedule):
    """A prediction that is linear in half log-SNR is met exactly by D at the middle of a step; written out for four steps."""
    clean = lambda step: 0.1 * step / 999  # a prediction of x_0 that drifts  # noqa: E731
    out, seen = [], []

    def denoise(latents, step):
        alpha = schedule.alphas_cumprod[step].item()
        seen.append(latents.clone())
        return (alpha**0.5 * latents - clean(step)) / (1 - alpha) ** 0.5

    x = torch.zeros(1, dtype=torch.float64)
    dpm_solver(denoise, x, schedule, 4, noise=lambda: torch.zeros(1, dtype=torch.float64))
    steps = [999, 749, 499, 249]
    alpha = [schedule.alphas_cumprod[s].item() for s in steps]
    lam = [0.5 * math.log(a / (1 - a)) if a else -math.inf for a in alpha]
    for i in range(3):
        h = lam[i + 1] - lam[i]
        estimate = clean(steps[i])
        if i == 2:
            r = (lam[i] - lam[i - 1]) / h
            estimate = (1 + 1 / (2 * r)) * clean(steps[i]) - 1 / (2 * r) * clean(steps[i - 1])
        keep = math.sqrt((1 - alpha[i + 1]) / (1 - alpha[i])) * math.exp(-h)
        out.append(keep * seen[i].item() + math.sqrt(alpha[i + 1]) * (1 - math.exp(-2 * h)) * estimate)
        assert seen[i + 1].item() == pytest.approx(out[-1], rel=1e-9)


def test_dpm_noise_has_the_schedules_variance(schedule):
    """With a clean signal of 0 known exactly, x at every step has variance 1 - alpha_bar. Catches a wrong noise factor."""
    shape = (40000,)
    spreads = []

    def denoise(latents, step):
        alpha = schedule.alphas_cumprod[step].item()
        spreads.append((latents.std().item(), (1 - alpha) ** 0.5))
        return alpha**0.5 * latents / (1 - alpha) ** 0.5

    dpm_solver(denoise, torch.randn(shape), schedule, 10)
    for got, expected in spreads:
        assert got == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_repeat_and_keep_float32_whatever_the_network_returns(schedule, sampler):
    """Same start, same clip: DPM++'s default noise is seeded. The solver's state stays float32 when v comes in bf16."""
    start = torch.randn(SHAPE)
    denoise = lambda latents, step: torch.cos(latents).bfloat16()  # noqa: E731
    a, b = (sampler(denoise, start, schedule, 5) for _ in range(2))
    assert torch.equal(a, b) and a.dtype == torch.float32 and a.isfinite().all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_progress_sees_every_step_and_steps_go_down(schedule, sampler):
    """`progress` is where tqdm goes: it gets a sized list. Steps are trailing: 999 first."""
    sizes, steps = [], []

    def progress(items):
        sizes.append(len(items))
        return iter(items)

    def denoise(latents, step):
        steps.append(step)
        return latents

    sampler(denoise, torch.randn(SHAPE), schedule, 10, progress=progress)
    assert sizes == [10] and steps == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]


@pytest.mark.parametrize("steps", [0, -1, 1001])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_step_counts_out_of_range_are_refused(schedule, sampler, steps):
    with pytest.raises(ValueError, match=f"^{steps} sampling steps: use 1 to 1000$"):
        sampler(lambda latents, step: latents, torch.randn(SHAPE), schedule, steps)


# ---- windows -------------------------------------------------------------------------------------------------------

LENGTHS = [1, 3, 11, 13, 15, 17, 21, 23, 29, 41, 61, 121]


def spans(length, **sizes):
    """[(start, latents given to the denoiser)] of one step, where latent i holds the number i (the reference slot holds -1)."""
    seen = []
    latents = torch.arange(-1.0, length).view(1, -1, 1, 1, 1).expand(2, -1, 3, 4, 5)

    def denoise(part, step, start):
        seen.append((start, part[0, :, 0, 0, 0].tolist()))
        return torch.zeros_like(part)

    windows(denoise, length, **sizes)(latents, 500)
    return seen


@pytest.mark.parametrize("length", LENGTHS)
def test_windows_cover_every_latent_from_even_starts_and_end_with_the_clip(length):
    """Each window is [reference, up to 13 latents in order]; none is padded. Catches a tail left out and an odd last start, which
    would split the pairs of latents that share a token."""
    seen = spans(length)
    starts = [start for start, _ in seen]
    assert starts[0] == 0 and starts == sorted(set(starts)) and all(start % 2 == 0 for start in starts)
    assert starts[-1] == max(length - 13, 0)
    for start, part in seen:
        assert part == [-1.0] + [float(i) for i in range(start, start + min(13, length))]
    assert {i for _, part in seen for i in part} == {float(i) for i in range(-1, length)}
    assert all(b - a <= 8 for a, b in zip(starts, starts[1:]))


def test_short_clips_are_one_window():
    """Up to 13 latents nothing is fused: the denoiser sees the clip as it is, and its answer is passed on bit for bit."""
    for length in (1, 5, 13):
        latents = torch.randn(2, 1 + length, 3, 4, 5)
        v = windows(lambda part, step, start: torch.sin(part) + step, length)(latents, 7)
        assert len(spans(length)) == 1
        assert torch.equal(v, torch.sin(latents) + 7)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_denoiser_local_to_each_latent_gives_the_same_as_unwindowed(length):
    """Weights sum to 1 at every latent, and each v goes back where it came from. Catches a shifted or doubled window."""
    latents = torch.randn(2, 1 + length, 3, 4, 5)
    local = lambda part, step, start=0: torch.sin(3 * part) + step  # noqa: E731
    torch.testing.assert_close(windows(local, length)(latents, 2), local(latents, 2), rtol=1e-6, atol=1e-6)


def test_windows_are_weighted_by_triangles_and_the_reference_by_the_plain_mean():
    """An oracle by loops: each window answers with its own number. 23 latents are three windows: 0, 8, 10."""
    length, size = 23, 13
    answers = {0: 1.0, 8: 10.0, 10: 100.0}
    v = windows(lambda part, step, start: torch.full_like(part, answers[start]), length)(
        torch.zeros(1, 1 + length, 2, 3, 4), 0
    )
    assert v[0, 0].unique().tolist() == pytest.approx([37.0])
    for i in range(length):
        weights = {}
        for start in answers:
            place = i - start
            if 0 <= place < size:
                weights[start] = 1 - abs(place - (size - 1) / 2) / (size / 2)  # 1 in the middle, 1/13 at both ends
        expected = sum(w * answers[start] for start, w in weights.items()) / sum(weights.values())
        assert v[0, 1 + i].unique().tolist() == pytest.approx([expected])


def test_a_constant_denoiser_is_unchanged_and_the_callers_latents_too():
    latents = torch.randn(2, 42, 3, 4, 5)
    before = latents.clone()
    v = windows(lambda part, step, start: part.mul_(0).add_(0.3), 41)(latents, 0)
    torch.testing.assert_close(v, torch.full_like(v, 0.3), rtol=1e-6, atol=0)
    assert torch.equal(latents, before)


@pytest.mark.parametrize("length, size, stride", [(14, 13, 8), (21, 12, 8), (21, 13, 7), (0, 13, 8), (21, 5, 8)])
def test_windows_that_would_split_a_token_are_refused(length, size, stride):
    """Even lengths or sizes and odd strides put the last start on an odd latent, wide strides leave latents out: in silence."""
    with pytest.raises(ValueError, match="odd"):
        windows(lambda part, step, start: part, length, size, stride)


def test_a_perfect_denoiser_recovers_x0_through_windows(schedule):
    """One solver moves the whole clip: fused windows lose nothing."""
    clean, start = torch.randn(2, 1, 24, 2, 3, 4, dtype=torch.float64)

    def denoise(part, step, first):
        index = [0, *range(1 + first, 1 + first + part.shape[1] - 1)]
        return perfect(clean[:, index], schedule)(part, step)

    for sampler in SAMPLERS:
        torch.testing.assert_close(sampler(windows(denoise, 23), start, schedule, 10), clean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", [ddim, dpm_solver])
def test_a_bfloat16_answer_is_rounded_once(sampler):
    """The solver's own arithmetic is in float32: as if the network had said the same numbers in float32."""
    start, half = torch.randn(2, 3, 4, 5, 6), lambda x, step: torch.cos(x).bfloat16()
    a = sampler(half, start, Schedule(), 5)
    assert torch.equal(a, sampler(lambda x, step: half(x, step).float(), start, Schedule(), 5))
