"""The network: CogVideoX1.5's expert DiT with CueFusion blocks (paper Sec. 3.1, Fig. 2, Eq. 1-3).

The parts come first: RoPE, one expert block, CueFusion, the model. Without cues it is CogVideoX1.5 (`tests/test_parity.py`
compares it with diffusers); with freshly made cue layers it still is, to the last bit, because they start by adding nothing.

Letters, the same in every file: B batch; f, h, w latent frames, rows, columns; N video tokens, each a patch of 2x2x2 latents
(2x1x1 in the drawn world); L text tokens; D width. Inside a block `x` are the video tokens (hidden_states in diffusers), `c` the text tokens
(encoder_hidden_states), `t_emb` the time embedding (temb), `pose` and `face` the cue streams.

    python model.py        # prints the shapes of one forward pass
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

OFS = 2.0  # CogVideoX1.5 I2V was trained with this constant beside the step: in effect a learned bias


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the network. `cue_injection` is Table 5: the paper's block, or its two baselines."""

    dim: int
    depth: int
    num_heads: int
    text_dim: int
    time_dim: int
    in_channels: int = 32  # noisy latents and image condition; 16 for text-to-video
    out_channels: int = 16
    ofs: bool = True  # image-to-video 1.5 adds the embedding of a constant to the step's
    cue_channels: int = 17  # 16 latent channels and 1 mask channel for each of pose and face; 0: no cue layers at all
    cue_injection: str = "cuefusion"  # or "concat" (DC injection), "cross" (CA injection)
    patch: tuple[int, int, int] = (2, 2, 2)  # latents in a token: frames, rows, columns

    def __post_init__(self):
        object.__setattr__(self, "patch", tuple(self.patch))  # a list where it comes from JSON
        if self.dim % (16 * self.num_heads):
            raise ValueError(
                f"dim={self.dim}: each of {self.num_heads} heads needs a multiple of 16 (RoPE splits it 4:6:6)"
            )
        if self.cue_injection not in ("cuefusion", "concat", "cross"):
            raise ValueError(f"cue_injection={self.cue_injection!r}: use 'cuefusion', 'concat' or 'cross'")


DIT_PRESETS = {
    "cogvideox1.5-5b": DiTConfig(dim=3072, depth=42, num_heads=48, text_dim=4096, time_dim=512),
    # small pictures need small patches: a person is 9 tokens tall here (20 at 512x512); 4 with 2x2x2 patches
    "toy": DiTConfig(dim=256, depth=4, num_heads=4, text_dim=64, time_dim=48, patch=(2, 1, 1)),
    "tiny": DiTConfig(dim=64, depth=2, num_heads=2, text_dim=32, time_dim=48),
}


# ---- embeddings ----------------------------------------------------------------------------------------------------


def sinusoid(value: Tensor, dim: int) -> Tensor:
    """(B,) -> (B, dim), float32, cosines first: cos(value * w_k), sin(value * w_k) with w_k = 10000^(-2k/dim)."""
    k = torch.arange(dim // 2, device=value.device, dtype=torch.float32)
    angle = value[:, None].float() * torch.exp(-math.log(10000) * k / (dim // 2))
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def rope_table(text_length: int, grid: tuple[int, int, int], head_dim: int, device) -> tuple[Tensor, Tensor]:
    """Angles of 3D RoPE for [text, video] as (cos, sin), each (L+N, head_dim/2), float32.

    A head's channels are shared 2:3:3 between time, row and column. Positions are the token's own indices, so any
    grid, landscape or portrait, works. Text has no position: angle 0, which leaves it unrotated.
    """
    shares = head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8
    axes = []
    for axis, (size, dim) in enumerate(zip(grid, shares)):
        frequency = 10000.0 ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
        angle = torch.arange(size, device=device, dtype=torch.float32)[:, None] * frequency  # (size, dim/2)
        axes.append(angle.view([size if i == axis else 1 for i in range(3)] + [-1]).expand(*grid, -1))
    angle = torch.cat(axes, dim=-1).flatten(0, 2)  # (N, head_dim/2)
    angle = F.pad(angle, (0, 0, text_length, 0))  # (L+N, head_dim/2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of neighbouring channels of x (B, heads, L+N, head_dim) by its angle; float32 inside."""
    cos, sin = rope
    pairs = x.unflatten(-1, (-1, 2))
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # as complex numbers: several times as fast there
        wide = pairs.to(torch.promote_types(x.dtype, cos.dtype))
        turned = torch.view_as_real(torch.view_as_complex(wide) * torch.complex(cos, sin))
    else:
        even, odd = pairs.unbind(-1)
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.flatten(-2).type_as(x)


def patchify(latents: Tensor, patch: tuple[int, int, int] = (2, 2, 2)) -> Tensor:
    """(B, f, C, h, w) -> (B, N, C*2*2*2); tokens ordered t, h, w; inside a token channel slowest, then t, h, w."""
    x = latents.unflatten(4, (-1, patch[2])).unflatten(3, (-1, patch[1])).unflatten(1, (-1, patch[0]))
    return x.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3)  # from (B, f/2, 2, C, h/2, 2, w/2, 2)


def unpatchify(x: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int] = (2, 2, 2)) -> Tensor:
    """The inverse of patchify: (B, N, C*2*2*2) -> (B, f, C, h, w); grid is (f, h, w) / patch."""
    x = x.unflatten(1, grid).unflatten(4, (-1, *patch))  # (B, f/2, h/2, w/2, C, 2, 2, 2)
    return x.permute(0, 1, 5, 4, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(1, 2)


def zero(linear: nn.Linear) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)


def time_mlp(in_dim: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, dim), nn.SiLU(), nn.Linear(dim, dim))


# ---- one expert block of CogVideoX ---------------------------------------------------------------------------------


class ExpertNorm(nn.Module):
    """Expert adaLN: one LayerNorm for both streams, but a shift, scale and gate of its own for each."""

    def __init__(self, dim: int, time_dim: int):
        super().__init__()
        self.linear = nn.Linear(time_dim, 6 * dim)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor, c: Tensor, t_emb: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shift_x, scale_x, gate_x, shift_c, scale_c, gate_c = self.linear(F.silu(t_emb))[:, None].chunk(6, dim=-1)
        x = self.norm(x) * (1 + scale_x) + shift_x
        c = self.norm(c) * (1 + scale_c) + shift_c
        return x, c, gate_x, gate_c


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, (B, heads, S, head_dim).

    Written out where a CPU trains on few tokens: the backward pass of its fused kernel would take a fifth of the step.
    """
    if q.device.type == "cpu" and q.requires_grad and k.shape[2] <= 1024:
        return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Full attention over [text, video]: every token sees every token, no mask. RoPE after the norm of q and k."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q = nn.LayerNorm(dim // num_heads, eps=1e-6)
        self.norm_k = nn.LayerNorm(dim // num_heads, eps=1e-6)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], context: Tensor | None = None) -> Tensor:
        """x (B, S, D); context (B, S', D) where keys and values come from, x itself if None; rope covers both."""
        context = x if context is None else context
        q, k, v = (  # (B, heads, S, head_dim) each
            y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (self.q(x), self.k(context), self.v(context))
        )
        q, k = rotate(self.norm_q(q), rope), rotate(self.norm_k(k), rope)
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))


# ---- CueFusion: how the driving cues enter (Eq. 1-3), and the two baselines of Table 5 -----------------------------


class CueFusion(nn.Module):
    """Eq. 1-3. The cues modulate what attention sees of the video, and flow on as streams of their own.

    Paper silent: "MLP" is one Linear after SiLU, as in both ancestors (DynamiCtrl, CogVideoX); e^G is the next block's e
    (otherwise Eq. 3 would have no effect). Differs: the paper adds to "text and vision embeddings"; here to the video
    tokens only, because the text has a different length. (`rope` is for CueCrossAttention: `Block` calls both alike.)
    """

    def __init__(self, dim: int, time_dim: int):
        super().__init__()
        self.mlp = nn.Linear(time_dim, 6 * dim)
        self.norm_pose = nn.LayerNorm(dim, eps=1e-5)
        self.norm_face = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor, pose: Tensor, face: Tensor, t_emb: Tensor, rope) -> tuple[Tensor, Tensor, Tensor]:
        factors = self.mlp(F.silu(t_emb))[:, None].chunk(6, dim=-1)  # 6 x (B, 1, D)
        scale_p, shift_p, gate_p, scale_f, shift_f, gate_f = factors  # Eq. 1
        pose_m = self.norm_pose(pose) * (1 + scale_p) + shift_p  # Eq. 2
        face_m = self.norm_face(face) * (1 + scale_f) + shift_f
        pose_g, face_g = pose + gate_p * pose_m, face + gate_f * face_m  # Eq. 3
        return x + (pose_m + face_m), pose_g.type_as(pose), face_g.type_as(face)  # autocast would widen the streams

    def init_identity(self):
        """1 + scale = 0, shift = 0, gate = 0: nothing is added, and each stream passes unchanged. Paper silent."""
        nn.init.zeros_(self.mlp.weight)
        scale_p, _, _, scale_f, _, _ = self.mlp.bias.data.zero_().chunk(6)
        scale_p.fill_(-1)
        scale_f.fill_(-1)


class CueCrossAttention(nn.Module):
    """Table 5, CA injection: the video tokens look the cues up by cross-attention (as ConsisID does)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm_pose = nn.LayerNorm(dim, eps=1e-5)
        self.norm_face = nn.LayerNorm(dim, eps=1e-5)
        self.attn = Attention(dim, num_heads)

    def forward(self, x: Tensor, pose: Tensor, face: Tensor, t_emb: Tensor, rope) -> tuple[Tensor, Tensor, Tensor]:
        rope = tuple(table[-x.shape[1] :] for table in rope)  # the video's positions, which the cues share
        cue = self.norm_pose(pose) + self.norm_face(face)  # one key per place: half the cost of two, same reach
        return x + self.attn(x, rope, context=cue.expand_as(x)), pose, face

    def init_identity(self):
        zero(self.attn.out)


# ---- the model -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """One CF-DiT block (Fig. 2b): CogVideoX's expert block, with the cues added before its attention."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        dim, time_dim = config.dim, config.time_dim
        self.norm1 = ExpertNorm(dim, time_dim)
        self.attn = Attention(dim, config.num_heads)
        self.norm2 = ExpertNorm(dim, time_dim)
        self.ff = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        self.cues = None
        if config.cue_channels and config.cue_injection == "cuefusion":
            self.cues = CueFusion(dim, time_dim)
        elif config.cue_channels and config.cue_injection == "cross":
            self.cues = CueCrossAttention(dim, config.num_heads)

    def forward(self, x, c, pose, face, t_emb, rope):
        """x (B, N, D), c (B, L, D); pose and face (B or 1, N, D) or None; t_emb (B or 1, time_dim) -> x, c, pose, face."""
        sizes = c.shape[1], x.shape[1]
        x_in, c_in, gate_x, gate_c = self.norm1(x, c, t_emb)
        if pose is not None:
            x_in, pose, face = self.cues(x_in, pose, face, t_emb, rope)
        c_out, x_out = self.attn(torch.cat([c_in, x_in], dim=1), rope).split(sizes, dim=1)
        x, c = x + gate_x * x_out, c + gate_c * c_out

        x_in, c_in, gate_x, gate_c = self.norm2(x, c, t_emb)
        c_out, x_out = self.ff(torch.cat([c_in, x_in], dim=1)).split(sizes, dim=1)
        return x + gate_x * x_out, c + gate_c * c_out, pose, face


class FinalNorm(nn.Module):
    def __init__(self, dim: int, time_dim: int):
        super().__init__()
        self.linear = nn.Linear(time_dim, 2 * dim)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor, t_emb: Tensor) -> Tensor:
        shift, scale = self.linear(F.silu(t_emb))[:, None].chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift


class DiT(nn.Module):
    """CogVideoX1.5's transformer with the two cue streams. Predicts v for the noisy latents.

    `model.checkpointing = True` recomputes each block in the backward pass. Per token and block 6 D bytes are then kept
    (x and the two cue streams in bfloat16) instead of 60 D.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        dim, volume = config.dim, math.prod(config.patch)
        self.checkpointing = False
        self.patch_embed = nn.Linear(config.in_channels * volume, dim)
        self.text_embed = nn.Linear(config.text_dim, dim)
        self.time_embed = time_mlp(dim, config.time_dim)
        self.ofs_embed = time_mlp(config.time_dim, config.time_dim) if config.ofs else None
        self.pose_embed = nn.Linear(config.cue_channels * volume, dim) if config.cue_channels else None
        self.face_embed = nn.Linear(config.cue_channels * volume, dim) if config.cue_channels else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm_final = nn.LayerNorm(dim, eps=1e-5)
        self.norm_out = FinalNorm(dim, config.time_dim)
        self.proj_out = nn.Linear(dim, config.out_channels * volume)
        self.init_backbone()
        self.init_cues()

    def init_backbone(self):
        """For training from scratch, as DiT does it: adaLN and output at zero, so each block starts as the identity."""
        for norm in [n for block in self.blocks for n in (block.norm1, block.norm2)] + [self.norm_out]:
            zero(norm.linear)
        zero(self.proj_out)

    @torch.no_grad()
    def init_cues(self):
        """Start the cue layers so that the model equals the backbone exactly, whatever the cues. Paper silent.

        The cue embeddings copy how the backbone reads the 16 noisy latents; the mask channel starts small. Scale and
        shift of Eq. 1 learn from the first step, the gates and the embeddings from the second (only then does Eq. 2
        let them through).
        """
        C = self.config.cue_channels
        for embed in (self.pose_embed, self.face_embed) if C else ():
            if self.config.cue_injection == "concat":  # DC injection: zero columns beside the latents' own
                zero(embed)
                continue
            embed.bias.copy_(self.patch_embed.bias)
            trunk = self.patch_embed.weight.unflatten(1, (self.config.in_channels, -1))[:, : C - 1]  # (D, 16, 2*2*2)
            mask = 0.02 * torch.randn_like(trunk[:, :1])
            embed.weight.copy_(torch.cat([trunk, mask], dim=1).flatten(1))
        for block in self.blocks:
            if block.cues is not None:
                block.cues.init_identity()

    def embed(self, latents, step, text, pose, face):
        """Everything before block 1 -> x (B,N,D), c (B,L,D), pose, face (B or 1,N,D) or None, t_emb, rope, grid."""
        B, f, C, h, w = latents.shape
        patch = self.config.patch
        grid = f // patch[0], h // patch[1], w // patch[2]
        if (f, h, w) != tuple(n * p for n, p in zip(grid, patch)) or C != self.config.in_channels:
            given = f"latents (B,f,C,h,w)={tuple(latents.shape)}"
            raise ValueError(f"{given}: f, h, w must be multiples of {patch} and C {self.config.in_channels}")
        dtype = self.patch_embed.weight.dtype
        x = self.patch_embed(patchify(latents.to(dtype), patch))  # (B, N, D)
        c = self.text_embed(text.to(dtype))  # (B, L, D)
        t_emb = self.time_embed(sinusoid(step, self.config.dim).to(dtype))  # (B, time_dim)
        if self.ofs_embed is not None:
            ofs = torch.full((1,), OFS, device=latents.device)
            t_emb = t_emb + self.ofs_embed(sinusoid(ofs, self.config.time_dim).to(dtype))
        if pose is not None:
            pose = self.pose_embed(patchify(pose.to(dtype), patch))  # (B, N, D)
            face = self.face_embed(patchify(face.to(dtype), patch))
            if self.config.cue_injection == "concat":  # one Linear over concatenated channels is a sum of Linears
                x, pose, face = x + pose + face, None, None
        rope = rope_table(c.shape[1], grid, self.config.dim // self.config.num_heads, latents.device)
        return x, c, pose, face, t_emb, rope, grid

    def run_block(self, block: Block, *streams_and_time):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *streams_and_time, use_reentrant=False)
        return block(*streams_and_time)

    def check_depth(self, depth: int):
        if not 1 <= depth <= len(self.blocks):
            raise ValueError(f"depth {depth}: this model has blocks 1 to {len(self.blocks)}")

    def features(self, latents: Tensor, step: Tensor, text: Tensor, pose: Tensor, face: Tensor, depth: int) -> Tensor:
        """Video tokens leaving block `depth`, counted from 1: (B, N, D). The teacher of Eq. 4; runs no further."""
        self.check_depth(depth)
        x, c, pose, face, t_emb, rope, _ = self.embed(latents, step, text, pose, face)
        for block in self.blocks[:depth]:
            x, c, pose, face = self.run_block(block, x, c, pose, face, t_emb, rope)
        return x

    def forward(
        self,
        latents: Tensor,
        step: Tensor,
        text: Tensor,
        pose: Tensor | None = None,
        face: Tensor | None = None,
        tap: int | None = None,
    ):
        """Predict v for the noisy latents.

        latents (B, f, in_channels, h, w): noisy latents, then the image condition; step (B,) or (1,), 0 to 999;
        text (B, L, text_dim); pose, face (B or 1, f, 17, h, w): cue latents and mask, or both None for plain CogVideoX.
        With batch 1 for step, pose and face, the cue streams are computed once for all of a guidance batch.
        Returns v (B, f, 16, h, w); with tap=d also the video tokens leaving block d, counted from 1, (B, N, D).
        Raises ValueError for sizes that are no multiple of the patch.
        """
        if tap is not None:
            self.check_depth(tap)
        x, c, pose, face, t_emb, rope, grid = self.embed(latents, step, text, pose, face)
        tapped = None
        for depth, block in enumerate(self.blocks, start=1):
            x, c, pose, face = self.run_block(block, x, c, pose, face, t_emb, rope)
            if depth == tap:
                tapped = x
        x = self.proj_out(self.norm_out(self.norm_final(x), t_emb))
        v = unpatchify(x, grid, self.config.patch)  # (B, f, 16, h, w)
        return v if tap is None else (v, tapped)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = DiT(DIT_PRESETS["toy"])
    for name, module in [*model.named_children(), ("blocks.0.cues", model.blocks[0].cues)]:
        if name != "blocks":
            module.register_forward_hook(
                lambda m, i, o, name=name: print(
                    f"{name:14s}", [tuple(t.shape) for t in (o if isinstance(o, tuple) else [o])]
                )
            )
    latents, cue = torch.randn(1, 6, 32, 12, 12), torch.randn(1, 6, 17, 12, 12)
    v = model(latents, torch.tensor([500]), torch.randn(1, 8, model.config.text_dim), cue, cue)
    print("v             ", [tuple(v.shape)], f"{sum(p.numel() for p in model.parameters()):,} parameters")
