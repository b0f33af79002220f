"""The causal 3D VAE of CogVideoX1.5 (paper Sec. 3.1 and A.1; frozen there): 8x8 pixels of 4 frames become one latent.

Causal means that a convolution never looks at later frames: each sees its own frame and two before it. So a clip can be
coded in chunks, each convolution keeping the last two frames of its input, with memory that does not grow with the
clip. A chunk is 8 frames = 2 latent frames; a clip's first has one frame and one latent frame more. Only GroupNorm
looks at a whole chunk, so the size of the chunks is part of the model. Checked against diffusers' AutoencoderKLCogVideoX in `tests/test_parity.py`.

Video is (B, T, 3, H, W) in [-1, 1], T = 8k+1 (or 1); latents are (B, f, 16, h, w), f = (T-1)/4 + 1 odd, unscaled.
Inside, tensors are (B, C, T, H, W) in channels-last memory, which makes the convolutions several times faster on CPUs
with AMX.

    latents, _ = CausalVAE(VAE_PRESETS["tiny"]).encode(torch.rand(1, 9, 3, 64, 48) * 2 - 1)        # (1, 3, 16, 8, 6)
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

TILE, OVERLAP = 48, 12  # in latents: 384 and 96 pixels
PIECE = 2**22  # numbers that a convolution reads at once: 8 MiB in bfloat16, or two frames


@dataclass(frozen=True)
class VAEConfig:
    """Sizes. Every level but the last halves rows and columns; the first two halve time as well."""

    channels: tuple[int, ...]  # width of each level
    layers: int  # residual blocks per level of the encoder; the decoder has one more
    norm_groups: int
    scaling_factor: float  # the DiT sees the VAE's latents times this: about unit variance
    latent_channels: int = 16
    norm_eps: float = 1e-6


VAE_PRESETS = {
    "cogvideox1.5": VAEConfig(channels=(128, 256, 256, 512), layers=3, norm_groups=32, scaling_factor=0.7),
    "toy": VAEConfig(channels=(32, 32, 40, 48), layers=1, norm_groups=4, scaling_factor=1.0),
    "tiny": VAEConfig(channels=(8, 8, 16, 16), layers=1, norm_groups=4, scaling_factor=0.7),
}


# ---- layers. `cache` maps a convolution to the last two frames it saw; empty at the start of a clip ----------------


class CausalConv3d(nn.Conv3d):
    """3x3x3 convolution whose time axis looks back only; before a clip starts it sees the first frame standing still.

    Without gradients it takes large frames two at a time and, if `inplace` and the widths agree, puts the result where
    its input was, so that a chunk is not held three times: as it is, behind the past, and convolved.
    """

    def __init__(self, in_dim: int, dim: int, inplace: bool = False):
        super().__init__(in_dim, dim, kernel_size=3, padding=(0, 1, 1))
        self.inplace = inplace and in_dim == dim

    def forward(self, x: Tensor, cache: dict) -> Tensor:
        past = [cache.pop(self)] if self in cache else [x[:, :, :1]] * 2  # not expand: cat would lose channels-last
        if torch.is_grad_enabled():
            seen = torch.cat([*past, x], dim=2)
            cache[self] = seen[:, :, -2:].clone()  # a view would keep the whole chunk alive
            return super().forward(seen)
        (B, _, T, H, W), C = x.shape, self.out_channels
        out = x if self.inplace else x.new_empty(B, T, H, W, C).movedim(-1, 1)
        step = max(2, PIECE // x[:, :, :1].numel())  # small ones together: PyTorch is slow at them in float32
        for frames, result in zip(x.split(step, dim=2), out.split(step, dim=2)):
            seen = torch.cat([*past, frames], dim=2)
            past = [seen[:, :, -2:]]
            result.copy_(super().forward(seen))
        cache[self] = past[0].clone()
        return out


def normalize(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """GroupNorm of (B, C, T, H, W) in channels-last memory, result likewise; computed in float32 or wider."""
    (B, C), wide = x.shape[:2], torch.promote_types(x.dtype, torch.float32)
    inside = x.movedim(1, -1).unflatten(-1, (groups, -1))  # (B, T, H, W, groups, C/groups)
    each = [torch.var_mean(frame.to(wide), dim=(1, 2, 4), correction=0) for frame in inside.unbind(1)]
    var, mean = map(torch.stack, zip(*each))
    var, mean = var.mean(0) + mean.var(0, correction=0), mean.mean(0)  # within frames and between them
    scale = weight.to(wide).view(groups, -1) * (var + eps).rsqrt()[..., None]
    shift = bias.to(wide).view(groups, -1) - scale * mean[..., None]
    scale, shift = (part.view(B, C, 1, 1, 1) for part in (scale, shift))
    return torch.addcmul(shift, x, scale, out=torch.empty_like(x))


class GroupNorm(nn.GroupNorm):
    """Keeps the channels-last layout on a GPU; PyTorch's own loses it there, and takes up to seven times as long as a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda or torch.is_grad_enabled():  # out= knows no gradients
            return super().forward(x)
        return normalize(x, self.num_groups, self.weight, self.bias, self.eps)


def spread(z: Tensor) -> Tensor:
    return z[:, :, :, None, :, None, :, None]


def modulate_(x: Tensor, y: Tensor, b: Tensor) -> None:
    """x <- x * y + b in place, as if y and b (B,C,t,h,w) were resized to x (B,C,T,H,W) by repeating; T/t, H/h, W/w whole."""
    (t, h, w), (T, H, W) = y.shape[2:], x.shape[2:]
    x = x.view(*x.shape[:2], t, T // t, h, H // h, w, W // w)
    x.mul_(spread(y)).add_(spread(b))


class Norm(nn.Module):
    """GroupNorm; in the decoder also modulated by the latents z under each place: GN(x) * conv_y(z) + conv_b(z).

    The 1x1x1 convolutions run at z's own size, which at most levels is far smaller than x's, and the result is
    broadcast. They look at one frame at a time and need no cache.
    """

    def __init__(self, dim: int, config: VAEConfig, decoder: bool):
        super().__init__()
        self.norm = GroupNorm(config.norm_groups, dim, eps=config.norm_eps)
        self.conv_y = nn.Conv3d(config.latent_channels, dim, 1) if decoder else None
        self.conv_b = nn.Conv3d(config.latent_channels, dim, 1) if decoder else None

    def forward(self, x: Tensor, z: Tensor | None) -> Tensor:
        x = self.norm(x)
        if z is None:
            return x
        y, b = self.conv_y(z), self.conv_b(z)
        alone = x.shape[2] % 2  # a clip's first latent frame is one frame (maybe all of x), the others up to four
        for part in (slice(0, alone), slice(alone, None)):
            if x[:, :, part].shape[2]:
                modulate_(x[:, :, part], y[:, :, part], b[:, :, part])
        return x


class ResBlock(nn.Module):
    def __init__(self, in_dim: int, dim: int, config: VAEConfig, decoder: bool):
        super().__init__()
        self.norm1 = Norm(in_dim, config, decoder)
        self.conv1 = CausalConv3d(in_dim, dim, inplace=True)
        self.norm2 = Norm(dim, config, decoder)
        self.conv2 = CausalConv3d(dim, dim, inplace=True)
        self.shortcut = nn.Conv3d(in_dim, dim, 1) if in_dim != dim else nn.Identity()

    def forward(self, x: Tensor, z: Tensor | None, cache: dict) -> Tensor:
        h = F.silu(self.norm1(x, z), inplace=True)
        h = self.conv1(h, cache)
        h = F.silu(self.norm2(h, z), inplace=True)
        h = self.conv2(h, cache)
        h += self.shortcut(x)
        return h


def per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a 2-D layer to each frame of (B, C, T, H, W)."""
    B = x.shape[0]
    return layer(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (B, -1)).transpose(1, 2)


class Downsample(nn.Module):
    def __init__(self, dim: int, time: bool):
        super().__init__()
        self.time = time
        self.conv = nn.Conv2d(dim, dim, 3, stride=2)

    def forward(self, x: Tensor, z: None, cache: dict) -> Tensor:
        if self.time and x.shape[2] > 1:  # a clip's first frame stays alone
            first, rest = x.split([x.shape[2] % 2, x.shape[2] // 2 * 2], dim=2)
            rest = (rest[:, :, 0::2] + rest[:, :, 1::2]) / 2
            x = torch.cat([first, rest], dim=2) if first.shape[2] else rest
        return per_frame(self.conv, F.pad(x, (0, 1, 0, 1)))  # right and bottom only


class Upsample(nn.Module):
    def __init__(self, dim: int, time: bool):
        super().__init__()
        self.time = time
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor, z: Tensor, cache: dict) -> Tensor:
        x = per_frame(lambda frames: self.conv(F.interpolate(frames, scale_factor=2.0)), x)
        if self.time and x.shape[2] > 1:  # repeated after the convolution, which then runs on half the frames
            first, rest = x.split([x.shape[2] % 2, x.shape[2] // 2 * 2], dim=2)
            rest = F.interpolate(rest, scale_factor=(2.0, 1.0, 1.0))
            x = torch.cat([first, rest], dim=2) if first.shape[2] else rest  # cat with nothing loses channels-last
        return x


# ---- encoder, decoder ----------------------------------------------------------------------------------------------


class Level(nn.Module):
    """Residual blocks and what changes the size. Iterated over, not called: a call would hold its input to the end."""

    def __init__(
        self, in_dim: int, dim: int, layers: int, resample: nn.Module | None, config: VAEConfig, decoder: bool
    ):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(in_dim if i == 0 else dim, dim, config, decoder) for i in range(layers))
        self.resample = resample

    def __iter__(self) -> Iterator[nn.Module]:
        yield from self.blocks
        if self.resample is not None:
            yield self.resample


class Encoder(nn.Module):
    """(B, 3, T, H, W) -> (B, 32, t, h, w): mean and log-variance."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        dims, last = config.channels, len(config.channels) - 1
        self.conv_in = CausalConv3d(3, dims[0])
        self.levels = nn.ModuleList()
        for i, dim in enumerate(dims):
            resample = Downsample(dim, i < 2) if i < last else None
            self.levels.append(Level(dims[max(i - 1, 0)], dim, config.layers, resample, config, False))
        self.mid = Level(dims[-1], dims[-1], 2, None, config, False)
        self.norm_out = Norm(dims[-1], config, False)
        self.conv_out = CausalConv3d(dims[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor, cache: dict) -> Tensor:
        x = self.conv_in(x, cache)
        for layer in chain(*self.levels, self.mid):
            x = layer(x, None, cache)
        return self.conv_out(F.silu(self.norm_out(x, None), inplace=True), cache)


class Decoder(nn.Module):
    """(B, 16, t, h, w) -> (B, 3, T, H, W)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        dims, last = config.channels[::-1], len(config.channels) - 1
        self.conv_in = CausalConv3d(config.latent_channels, dims[0])
        self.mid = Level(dims[0], dims[0], 2, None, config, True)
        self.levels = nn.ModuleList()
        for i, dim in enumerate(dims):
            resample = Upsample(dim, i < 2) if i < last else None
            self.levels.append(Level(dims[max(i - 1, 0)], dim, config.layers + 1, resample, config, True))
        self.norm_out = Norm(dims[-1], config, True)
        self.conv_out = CausalConv3d(dims[-1], 3)

    def forward(self, z: Tensor, cache: dict) -> Tensor:
        x = self.conv_in(z, cache)
        for layer in chain(self.mid, *self.levels):
            x = layer(x, z, cache)
        return self.conv_out(F.silu(self.norm_out(x, z), inplace=True), cache)


# ---- the model: chunks in time, tiles in space ---------------------------------------------------------------------


class Forgetful(dict):
    """The cache of a clip's last chunk: it gives out what it holds and keeps nothing more, for nothing follows."""

    def __setitem__(self, layer, past):
        pass


def chunks(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items, the first with one more: 9, 8, 8, ... frames, or 3, 2, 2, ... latent frames."""
    items = iter(items)
    chunk = list(islice(items, size + 1))
    while chunk:
        yield chunk
        chunk = list(islice(items, size))


def mark_last(items: Iterable) -> Iterator[tuple]:
    """(item, whether it is the last) of each; one item is read ahead."""
    items = iter(items)
    for item in islice(items, 1):
        for following in items:
            yield item, False
            item = following
        yield item, True


def tile_starts(size: int) -> list[int]:
    """First rows (or columns) of equal, evenly spaced tiles: a thin last tile would give GroupNorm almost nothing to see."""
    count = -(-max(size - OVERLAP, 1) // (TILE - OVERLAP))
    return [round(i * (size - TILE) / max(count - 1, 1)) for i in range(count)] if size > TILE else [0]


def ramp(n: int, overlap: int, device) -> Tensor:
    """Weights of a tile along one axis: up over `overlap`, flat, down. Divided by their sum over all tiles, so 1 at a border."""
    i = torch.arange(n, device=device) + 0.5
    return torch.minimum(i, n - i).clamp(max=overlap) / overlap


class CausalVAE(nn.Module):
    """Encode and decode clips of any length in chunks, and pictures of any size in tiles once `tile(True)` was called."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.tiling = False
        self.init_weights()
        self.channels_last()

    @torch.no_grad()
    def init_weights(self):
        """For training from scratch: convolutions that keep the variance, decoder norms that start as plain GroupNorm (a
        random conv_y would drown x in noise), a posterior that starts narrow (or its noise would hide the latents)."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        for module in self.modules():  # after the convolutions, among which theirs are
            if isinstance(module, Norm) and module.conv_y is not None:
                for conv, value in ((module.conv_y, 1.0), (module.conv_b, 0.0)):
                    nn.init.zeros_(conv.weight), nn.init.constant_(conv.bias, value)
        C = self.config.latent_channels
        nn.init.zeros_(self.encoder.conv_out.weight[C:]), nn.init.constant_(self.encoder.conv_out.bias[C:], -6.0)

    @torch.no_grad()
    def whiten(self, mean: Tensor, std: Tensor):
        """Let the latents be (z - mean) / std from now on, mean and std (16,) in float32, and the pictures what they were.

        Every layer that makes or reads latents is linear in them, so both go into its weights. Only at the picture's
        border the decoder differs a little: where its first convolution saw zeros it now sees the mean.
        """
        C, out = self.config.latent_channels, self.encoder.conv_out
        out.weight[:C] /= std.view(-1, 1, 1, 1, 1)
        out.bias[:C] = (out.bias[:C] - mean) / std
        out.bias[C:] -= 2 * std.log()
        readers = [m for m in self.decoder.modules() if isinstance(m, Norm)]
        for conv in [self.decoder.conv_in, *(c for m in readers for c in (m.conv_y, m.conv_b))]:
            conv.bias += (conv.weight * mean.view(1, -1, 1, 1, 1)).sum((1, 2, 3, 4))
            conv.weight *= std.view(1, -1, 1, 1, 1)

    def channels_last(self):
        """Lay the weights out for channels-last convolutions (again after loading: assignment keeps the file's layout)."""
        for p in self.parameters():
            if p.ndim >= 4:
                p.data = p.data.contiguous(memory_format=torch.channels_last if p.ndim == 4 else torch.channels_last_3d)
        return self

    def tile(self, enabled: bool):
        """Cut large pictures into overlapping tiles: less memory, 1.5 times the work per axis that is cut."""
        self.tiling = enabled

    def memory(self, H: int, W: int) -> int:
        """About how many bytes decoding HxW pixels takes beside the weights, untiled. Measured at full size, for 7 latents or
        more: 22 to 23 KiB a pixel in bfloat16, or 46 numbers for each of the widest layer's 256 channels; said with room."""
        return 50 * self.config.channels[1] * H * W * next(self.parameters()).element_size()

    def encode_stream(self, frames: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """frames: (B, 3, H, W) each, 8k+1 (or 1) of them -> (mean, logvar) of 1 to 3 latent frames at a time, (B, f, 16, h, w).

        Reads 8 frames ahead. Raises ValueError for sizes that are no multiple of 8, and at its end for other counts."""
        frames = iter(frames)
        first = next(frames, None)
        if first is None:
            raise ValueError(frame_count_error(0))
        H, W = first.shape[2:]
        if H % 8 or W % 8:
            raise ValueError(
                f"{W}x{H} pixels: the VAE needs multiples of 8, for example {nearest(W, 8)}x{nearest(H, 8)}"
            )
        tiles = Tiles(self.encoder, H // 8, W // 8, self.tiling, scale_in=8, scale_out=1)
        for count, (chunk, last) in enumerate(mark_last(chunks(chain([first], frames), 8))):
            if len(chunk) != (9 if count == 0 else 8) and (count, len(chunk)) != (0, 1):
                raise ValueError(frame_count_error(len(chunk) + (8 * count + 1 if count else 0)))
            mean, logvar = tiles(torch.stack(chunk, dim=2), last).transpose(1, 2).chunk(2, dim=2)
            yield mean, logvar.clamp(-30, 20)

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, 3, H, W), T = 8k+1 or 1 -> mean and log-variance, each (B, (T-1)/4+1, 16, H/8, W/8); unscaled."""
        if video.shape[1] % 8 != 1:
            raise ValueError(frame_count_error(video.shape[1]))
        mean, logvar = zip(*self.encode_stream(video.unbind(1)))
        return torch.cat(mean, dim=1), torch.cat(logvar, dim=1)

    def decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        """(B, f, 16, h, w), f odd, unscaled -> 4f-3 frames (B, 3, 8h, 8w), one after another in constant memory."""
        f, _, h, w = latents.shape[1:]
        if f % 2 == 0:
            raise ValueError(f"{f} latents: the decoder needs an odd number, for example {f - 1} or {f + 1}")
        tiles = Tiles(self.decoder, h, w, self.tiling, scale_in=1, scale_out=8)
        for chunk, last in mark_last(chunks(latents.unbind(1), 2)):
            yield from tiles(torch.stack(chunk, dim=2), last).unbind(2)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, f, 16, h, w), f odd -> video (B, 4f-3, 3, 8h, 8w); not clamped."""
        return torch.stack(list(self.decode_stream(latents)), dim=1)


class Tiles:
    """One pass of a network over a clip, chunk by chunk, in one tile or many, each with its own cache."""

    def __init__(self, net: nn.Module, h: int, w: int, tiling: bool, scale_in: int, scale_out: int):
        self.net, self.size, self.scale_in, self.scale_out = net, (h, w), scale_in, scale_out
        rows, columns = (tile_starts(h), tile_starts(w)) if tiling else ([0], [0])
        self.tile = (min(h, TILE), min(w, TILE)) if tiling else (h, w)
        self.caches = {(row, column): {} for row in rows for column in columns}

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        """x (B, C, T, H, W), a chunk, maybe the last -> the network's output for it, tiles blended where they overlap."""
        x = x.to(next(self.net.parameters()).dtype)
        if last:
            self.caches = {start: Forgetful(cache) for start, cache in self.caches.items()}
        if len(self.caches) == 1:
            return self.run((0, 0), x)
        total = weights = 0
        for start in self.caches:
            tile = self.run(start, x)
            overlap = OVERLAP * self.scale_out
            weight = ramp(tile.shape[3], overlap, x.device)[:, None] * ramp(tile.shape[4], overlap, x.device)
            # padded to the whole picture: plain, and small beside what the network itself needs
            top, left = (s * self.scale_out for s in start)
            bottom, right = (n * self.scale_out - s - m for n, s, m in zip(self.size, (top, left), tile.shape[3:]))
            total = total + F.pad(tile * weight, (left, right, top, bottom))
            weights = weights + F.pad(weight, (left, right, top, bottom))
        return (total / weights).to(tile.dtype)

    def run(self, start: tuple[int, int], x: Tensor) -> Tensor:
        (top, left), (h, w) = ([n * self.scale_in for n in pair] for pair in (start, self.tile))
        x = x[..., top : top + h, left : left + w].contiguous(memory_format=torch.channels_last_3d)
        return self.net(x, self.caches[start])


def nearest(value: int, multiple: int) -> int:
    return max(round(value / multiple), 1) * multiple


def frame_count_error(frames: int) -> str:
    low = max(frames - 1, 0) // 8 * 8 + 1
    return f"{frames} frames: the VAE needs 8k+1, for example {low} or {low + 8}"
