"""The text encoder: T5 v1.1 and its sentencepiece tokenizer, as CogVideoX uses them (frozen; paper Sec. 4.1).

Two habits of CogVideoX differ from T5's own: every prompt is padded to 226 tokens, and no attention mask is given, so
the padding is read like any word and reaches the DiT. Checked against transformers in `tests/test_parity.py`.

    states = T5Encoder(T5_PRESETS["tiny"])(Tokenizer("DIR/tokenizer")(["a dancer on a terrace"]))        # (1, 226, 32)
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

TEXT_LENGTH = 226
PAD, EOS, UNKNOWN = 0, 1, 2


@dataclass(frozen=True)
class T5Config:
    vocab: int
    dim: int
    num_heads: int
    head_dim: int
    ff_dim: int
    depth: int
    buckets: int = 32
    max_distance: int = 128


T5_PRESETS = {
    "t5-v1_1-xxl": T5Config(32128, 4096, 64, 64, 10240, 24),
    "tiny": T5Config(32128, 32, 2, 16, 64, 2),
}


class Tokenizer:
    """Prompts to token ids. `path` is a folder with spiece.model, or the file itself; raises FileNotFoundError."""

    def __init__(self, path: str | Path):
        from sentencepiece import SentencePieceProcessor

        path = Path(path)
        path = path / "spiece.model" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such tokenizer; it is a file named spiece.model in the checkpoint's tokenizer folder"
            )
        try:
            self.model = SentencePieceProcessor(model_file=str(path))
        except RuntimeError:
            raise ValueError(f"{path}: not a sentencepiece model; copy or download it again") from None

    def __call__(self, prompts: list[str], length: int = TEXT_LENGTH) -> Tensor:
        """(B, length) int64: at most length-1 pieces, the end mark, then padding."""
        rows = []
        for prompt in prompts:
            ids = self.pieces(prompt)[: length - 1] + [EOS]
            rows.append(ids + [PAD] * (length - len(ids)))
        return torch.tensor(rows)

    def pieces(self, prompt: str) -> list[int]:
        """Piece ids; the marks <pad>, </s> and <unk> written out in a prompt count as themselves, as in transformers."""
        marks = {"<pad>": PAD, "</s>": EOS, "<unk>": UNKNOWN}
        parts = re.split("(<pad>|</s>|<unk>)", prompt)
        return [i for part in parts for i in ([marks[part]] if part in marks else self.model.encode(part))]


def empty_prompt() -> Tensor:
    """Token ids of "", (1, 226): known without a tokenizer. Their T5 states are the null text of guidance and dropout."""
    return torch.tensor([[EOS] + [PAD] * (TEXT_LENGTH - 1)])


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).type_as(x)


def bucket(relative: Tensor, buckets: int, max_distance: int) -> Tensor:
    """T5's table of relative positions (key minus query): half for each direction, exact when near, logarithmic when far."""
    half = buckets // 2
    exact = half // 2
    distance = relative.abs()
    far = exact + (distance.clamp(min=1) / exact).log() / torch.log(torch.tensor(max_distance / exact)) * (half - exact)
    return (relative > 0) * half + torch.where(distance < exact, distance, far.long().clamp(max=half - 1))


class T5Block(nn.Module):
    """Self-attention without 1/sqrt(d), then a gated feed-forward; both pre-norm, no biases anywhere."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.head_dim = config.head_dim
        dim, inner = config.dim, config.num_heads * config.head_dim
        self.norm1 = RMSNorm(dim)
        self.q, self.k, self.v = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.out = nn.Linear(inner, dim, bias=False)
        self.norm2 = RMSNorm(dim)
        self.gate = nn.Linear(dim, config.ff_dim, bias=False)
        self.up = nn.Linear(dim, config.ff_dim, bias=False)
        self.down = nn.Linear(config.ff_dim, dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (layer(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-1, -2) + bias).to(torch.promote_types(x.dtype, torch.float32))  # (B, heads, L, L)
        h = (scores.softmax(-1).type_as(x) @ v).transpose(1, 2).flatten(2)
        x = x + self.out(h)
        h = self.norm2(x)
        return x + self.down(F.gelu(self.gate(h), approximate="tanh") * self.up(h))


class T5Encoder(nn.Module):
    """(B, L) token ids -> (B, L, dim) states. No attention mask, as CogVideoX uses it."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.dim)
        self.bias = nn.Embedding(config.buckets, config.num_heads)  # block 0 owns it on disk; every block adds it
        self.blocks = nn.ModuleList(T5Block(config) for _ in range(config.depth))
        self.norm_out = RMSNorm(config.dim)

    def forward(self, ids: Tensor) -> Tensor:
        position = torch.arange(ids.shape[1], device=ids.device)
        buckets = bucket(position[None, :] - position[:, None], self.config.buckets, self.config.max_distance)
        bias = self.bias(buckets).permute(2, 0, 1)  # (heads, L, L)
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, bias)
        return self.norm_out(x)
