"""The transformer of the paper (§2.2, B.1), at any size: caption and codes as one stream.

B batch, L text places, W grid, N = W² codes, T = L + N, D width, V codebook size.

| states   | 0       1    …  L−1     | L       L+1  …  T−1     |
|----------|-------------------------|-------------------------|
| read     | start   t₀   …  t_{L−2} | start   z₀   …  z_{N−2} |
| predict  | t₀      t₁   …  t_{L−1} | z₀      z₁   …  z_{N−1} |

Text states are scored against the text vocabulary only, image states against the codebook only.
A text place without a token holds a padding token of its own: id text_vocab + place (§2.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle1.attention import Attention, Cache, Mask, init_linear
from dalle1.masks import layer_masks
from dvae.weights import load_weights, model_folder, save_weights

FILE_NAME = "transformer.safetensors"


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The size of a transformer. The defaults are the paper's 12 billion parameters."""

    text_vocab: int = 16_384
    """BPE tokens, padding not counted."""
    text_len: int = 256
    """L: text places. A caption takes at most L − 1 of them."""
    codebook_size: int = 8192
    """V: the dVAE's codes."""
    grid_size: int = 32
    """W: codes along each side of a picture."""
    width: int = 3968
    """D."""
    depth: int = 64
    """Layers, each of attention and MLP."""
    heads: int = 62
    """Attention heads; they divide the width."""

    def __post_init__(self) -> None:
        for name in ("text_vocab", "codebook_size", "grid_size", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.text_len < 2:
            raise ValueError(f"text_len is {self.text_len}, expected at least 2")
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}, expected a multiple of heads, {self.heads}")

    @property
    def image_len(self) -> int:
        """N: codes of a picture."""
        return self.grid_size**2

    @property
    def length(self) -> int:
        """T: places of the stream."""
        return self.text_len + self.image_len


@dataclass(frozen=True, kw_only=True)
class TransformerLoss:
    """What `Transformer.loss` returns; scalar tensors."""

    total: Tensor
    """What is minimised: text/8 + 7·image/8."""
    text: Tensor
    """Cross-entropy in nats per text place."""
    image: Tensor
    """Cross-entropy in nats per code."""


class MLP(nn.Module):
    """Four times as wide inside, with the GELU of Sparse Transformers: x·σ(1.702x)."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        init_linear(self.up)
        init_linear(self.down, scale=1 / math.sqrt(2 * depth))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(1.702 * self.up(x)) / 1.702)


class Layer(nn.Module):
    """x += attention(norm(x)); x += MLP(norm(x))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config.width, config.heads, config.depth)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = MLP(config.width, config.depth)

    def forward(self, x: Tensor, mask: Mask, cache: Cache | None = None, start: int = 0) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask, cache, start)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Predicts each token of caption and picture from those before it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        d = config.width
        self.text_tokens = config.text_vocab + config.text_len
        # The last row of each table is the start token.
        self.text_embedding = _embedding(self.text_tokens + 1, d)
        self.image_embedding = _embedding(config.codebook_size + 1, d)
        self.text_position = _embedding(config.text_len, d, summed=2)
        self.row = _embedding(config.grid_size, d, summed=3)
        self.column = _embedding(config.grid_size, d, summed=3)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(d)
        self.text_head = nn.Linear(d, self.text_tokens)
        self.image_head = nn.Linear(d, config.codebook_size)
        for head in (self.text_head, self.image_head):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.kinds = layer_masks(config.depth)
        self.masks = nn.ModuleDict(
            {k: Mask(k, config.text_len, config.grid_size) for k in sorted(set(self.kinds))}
        )

    def embed_text(self, text: Tensor) -> Tensor:
        """Embed the start token and all but the last of text [B, L] → [B, L, D]."""
        start = text.new_full((len(text), 1), self.text_tokens)
        inputs = torch.cat([start, text[:, :-1]], dim=1)
        return self.text_embedding(inputs) + self.text_position.weight

    def embed_codes(self, inputs: Tensor, start: int = 0) -> Tensor:
        """Embed what image states from `start` on read, [B, n] → [B, n, D].

        Args:
            inputs: codes, or codebook_size for the start token.
        """
        places = torch.arange(start, start + inputs.shape[1], device=inputs.device)
        rows = places.div(self.config.grid_size, rounding_mode="floor")
        columns = places % self.config.grid_size
        return self.image_embedding(inputs) + self.row(rows) + self.column(columns)

    def run(self, x: Tensor, caches: list[Cache] | None = None, start: int = 0) -> Tensor:
        """Run embedded states [B, n, D], the first at place `start`, through all layers."""
        for i, layer in enumerate(self.layers):
            x = layer(x, self.masks[self.kinds[i]], caches[i] if caches else None, start)
        return self.norm(x)

    def forward(self, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Score every token of whole streams.

        Args:
            text: [B, L], ids in [0, text_vocab + L).
            codes: [B, N] or [B, W, W], in raster order.

        Returns: text logits [B, L, text_vocab + L] and image logits [B, N, V].
        """
        self._check(text, codes)
        codes = codes.flatten(1)
        start = codes.new_full((len(codes), 1), self.config.codebook_size)
        inputs = torch.cat([start, codes[:, :-1]], dim=1)
        x = self.run(torch.cat([self.embed_text(text), self.embed_codes(inputs)], dim=1))
        text_states, image_states = x.split([self.config.text_len, self.config.image_len], dim=1)
        return self.text_head(text_states), self.image_head(image_states)

    def _check(self, text: Tensor, codes: Tensor) -> None:
        c = self.config
        shapes = ((c.image_len,), (c.grid_size, c.grid_size))
        fits = text.shape[1:] == (c.text_len,) and codes.shape[1:] in shapes
        if not fits or not 0 < len(text) == len(codes):
            raise ValueError(
                f"got text {tuple(text.shape)} and codes {tuple(codes.shape)}, expected "
                f"[B, {c.text_len}] and [B, {c.grid_size}, {c.grid_size}]"
            )

    def loss(self, text: Tensor, codes: Tensor, text_weight: float = 1 / 8) -> TransformerLoss:
        """Give the two-part loss: each cross-entropy a mean over its own tokens (§2.2)."""
        text_logits, image_logits = self(text, codes)
        text_loss = F.cross_entropy(text_logits.flatten(0, 1).float(), text.flatten())
        image_loss = F.cross_entropy(image_logits.flatten(0, 1).float(), codes.flatten())
        total = text_weight * text_loss + (1 - text_weight) * image_loss
        return TransformerLoss(total=total, text=text_loss, image=image_loss)

    def save(self, directory: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write weights and config to `directory`/transformer.safetensors, rounded to `dtype`."""
        return save_weights(self, Path(directory) / FILE_NAME, dtype)

    @classmethod
    def load(cls, directory: str | Path, device: str | torch.device = "cpu") -> Transformer:
        """Read what `save` or a training wrote; ValueError where there is none or it is damaged."""
        return load_weights(cls, TransformerConfig, model_folder(directory) / FILE_NAME, device)


def _embedding(rows: int, width: int, summed: int = 0) -> nn.Embedding:
    """Make a table drawn from N(0, 0.125/√d), or 0.125/√(d·n) for one of n that are summed."""
    table = nn.Embedding(rows, width)
    nn.init.normal_(table.weight, std=0.125 / math.sqrt(width * max(summed, 1)))
    return table
