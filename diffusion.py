"""Diffusion: the noise schedule, v-prediction, two samplers, and windows for clips of any length (paper A.1, Eq. 5-8).

The schedule is CogVideoX's: betas linear in their square root, rescaled so that the last step is pure noise.
Everything here is float64 or float32, whatever the networks run in. Checked against diffusers' schedulers in
`tests/test_parity.py`.

A denoiser is a function (latents (B,f,C,h,w), step) -> v of the same shape; guidance and windows are wrapped around it.

    schedule = Schedule()
    latents = dpm_solver(lambda x, step: model(...), torch.randn(1, 14, 16, 64, 64), schedule, steps=50)
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, int], Tensor]


class Schedule:
    """alphas_cumprod (1000,) float64: how much of the clean signal's power is left at each step; 0 at the last one."""

    def __init__(self, num_steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012):
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64) ** 2
        signal = (1 - betas).cumprod(0).sqrt()
        signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])  # zero terminal signal-to-noise ratio
        self.num_steps = num_steps
        self.alphas_cumprod = signal**2

    def factors(self, step: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar) and sqrt(1 - alpha_bar) of each sample's step (B,), shaped to multiply `like`; float32 at least."""
        alpha = self.alphas_cumprod[step.cpu()].view(-1, *[1] * (like.ndim - 1))
        dtype = torch.promote_types(like.dtype, torch.float32)  # bf16 would round alpha_bar to 1: no noise at step 0
        return alpha.sqrt().to(like.device, dtype), (1 - alpha).sqrt().to(like.device, dtype)

    def add_noise(self, clean: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """Eq. 6: x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise. step (B,) integers."""
        signal, sigma = self.factors(step, clean)
        return signal * clean + sigma * noise

    def velocity(self, clean: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """The network's target, v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0; defined at every step, unlike Eq. 8's noise."""
        signal, sigma = self.factors(step, clean)
        return signal * noise - sigma * clean

    def predict_x0(self, noisy: Tensor, v: Tensor, step: Tensor) -> Tensor:
        """x_0 = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v."""
        signal, sigma = self.factors(step, noisy)
        return signal * noisy - sigma * v

    def trail(self, steps: int) -> Iterator[tuple[int, float, float]]:
        """(step, its alpha_bar, the alpha_bar to go to), from step 999 down to the clean end, where alpha_bar is 1.

        "Trailing" spacing, as released: the target is num_steps // steps lower. If `steps` does not divide 1000 that
        is not exactly the next step visited, and for some counts (7, 15, 24) the last target is alpha_bar[0] = 0.99915
        instead of 1.
        """
        if not 1 <= steps <= self.num_steps:
            raise ValueError(f"{steps} sampling steps: use 1 to {self.num_steps}")
        alphas = self.alphas_cumprod.tolist()
        for i in range(steps):
            step = round(self.num_steps - i * self.num_steps / steps) - 1
            target = step - self.num_steps // steps
            yield step, alphas[step], alphas[target] if target >= 0 else 1.0


def ddim(denoise: Denoiser, latents: Tensor, schedule: Schedule, steps: int = 50, progress=iter) -> Tensor:
    """Deterministic sampling (DDIM, eta 0). latents: (B, f, C, h, w) standard normal noise, float32; returns clean latents."""
    for step, alpha, alpha_next in progress(list(schedule.trail(steps))):
        v = denoise(latents, step).to(latents.dtype)
        clean = alpha**0.5 * latents - (1 - alpha) ** 0.5 * v
        keep = ((1 - alpha_next) / (1 - alpha)) ** 0.5
        latents = keep * latents + (alpha_next**0.5 - alpha**0.5 * keep) * clean
    return latents


def dpm_solver(
    denoise: Denoiser,
    latents: Tensor,
    schedule: Schedule,
    steps: int = 50,
    noise: Callable[[], Tensor] | None = None,
    progress=iter,
) -> Tensor:
    """DPM-Solver++(2M) in its SDE form, the sampler CogVideoX was released with.

    In half log-SNR lambda, with step width h, and n fresh noise from `noise()` (default: a generator seeded with 0):
        x <- sigma_next/sigma e^-h x  +  sqrt(alpha_next) (1 - e^-2h) D  +  sigma_next sqrt(1 - e^-2h) n
    D extrapolates the last two predictions of x_0. With e^-h as a ratio, nothing is infinite at the ends: at the
    first step (alpha 0) x is drawn anew around the prediction, at the last (alpha_next 1) x is the prediction itself.
    """
    if noise is None:
        generator = torch.Generator().manual_seed(0)
        noise = lambda: torch.randn(latents.shape, generator=generator, dtype=latents.dtype)  # noqa: E731
    last_clean = last_alpha = None
    for step, alpha, alpha_next in progress(list(schedule.trail(steps))):
        v = denoise(latents, step).to(latents.dtype)
        clean = alpha**0.5 * latents - (1 - alpha) ** 0.5 * v
        if alpha_next == 1:
            latents = clean
            continue  # the last step; no return, so that `progress` sees its end
        ratio = (alpha / (1 - alpha) * (1 - alpha_next) / alpha_next) ** 0.5  # e^-h, h = lambda_next - lambda
        estimate = clean
        if last_alpha:  # second order needs two finite steps; alpha is 0 at the first
            last_ratio = (last_alpha / (1 - last_alpha) * (1 - alpha) / alpha) ** 0.5  # since the last visited step
            r = math.log(last_ratio) / math.log(ratio)  # h_last / h
            estimate = (1 + 1 / (2 * r)) * clean - 1 / (2 * r) * last_clean
        keep = ((1 - alpha_next) / (1 - alpha)) ** 0.5 * ratio
        spread = (1 - alpha_next) ** 0.5 * (1 - ratio**2) ** 0.5
        latents = keep * latents + alpha_next**0.5 * (1 - ratio**2) * estimate + spread * noise().to(latents.device)
        last_clean, last_alpha = clean, alpha
    return latents


def windows(
    denoise: Callable[[Tensor, int, int], Tensor], length: int, size: int = 13, stride: int | None = None
) -> Denoiser:
    """Turn a denoiser of [reference slot, `size` latent frames] into one of [reference slot, `length` latent frames].

    Each step, every window is denoised and v averaged with triangular weights; the reference slot, which all windows
    share, gets the plain mean. One solver then moves the whole clip, so that windows cannot drift apart as chained
    clips do. Starts are even (the same two latent frames share a token in every window), the last window ends with
    the clip: none is padded.

    denoise: (latents (B, 1+size, C, h, w), step, start) -> v. `length` is odd; shorter clips are one window. `stride`
    is 8 of 13, 2 of 5, if not given. Paper silent.
    """
    stride = max(size // 3, 1) * 2 if stride is None else stride
    size = min(size, length)
    if not length % 2 or not size % 2 or stride % 2 or (stride > size and size < length):
        raise ValueError(
            f"windows of {size} latents every {stride} over {length}: length and size must be odd, the stride even and "
            "no larger than the size"
        )
    starts = sorted({*range(0, length - size, stride), length - size})
    slots = [torch.tensor([0, *range(1 + start, 1 + start + size)]) for start in starts]
    place = (torch.arange(size) + 0.5) / size
    triangle = torch.cat([torch.ones(1), torch.minimum(2 * place, 2 - 2 * place)])
    total = torch.zeros(1 + length)
    for index in slots:
        total[index] += triangle
    weights = [(triangle / total[index]).view(-1, 1, 1, 1) for index in slots]

    def fused(latents: Tensor, step: int) -> Tensor:
        v = torch.zeros_like(latents)
        for start, index, weight in zip(starts, slots, weights):
            index = index.to(latents.device)
            v[:, index] += weight.to(latents.device) * denoise(latents[:, index], step, start).to(latents.dtype)
        return v

    return fused
