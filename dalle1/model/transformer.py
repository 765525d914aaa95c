"""The transformer of the paper (§2.2, B.1), at any size: caption and codes as one stream.

B batch, L text positions, W grid, N = W² codes, T = L + N, D width, V codebook size.

| states   | 0       1    …  L−1     | L       L+1  …  T−1     |
|----------|-------------------------|-------------------------|
| read     | start   t₀   …  t_{L−2} | start   z₀   …  z_{N−2} |
| predict  | t₀      t₁   …  t_{L−1} | z₀      z₁   …  z_{N−1} |

Text states are scored against the text vocabulary only, image states against the codebook only.
A text position without a token holds its own padding token: id text_vocab + position (§2.2).
Parameters start as the table in `dalle1.model.layers` lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle1.model.arch import TransformerArch, TransformerConfig
from dalle1.model.attention import Attend, Attention, MaskedAttention
from dalle1.model.layers import Embedding, Linear
from dalle1.model.lora import MergedState
from dalle1.model.rotary import Rotary
from dalle1.model.state_keys import upgrade_state_dict
from dalle1.storage import load_config, load_weights, model_folder, save_weights

__all__ = ["Transformer", "TransformerArch", "TransformerConfig", "TransformerLoss"]

FILE_NAME = "transformer.safetensors"


@dataclass(frozen=True, kw_only=True)
class TransformerLoss:
    """What `Transformer.loss` returns; scalar tensors."""

    total: Tensor
    """Weighted sum to minimize: text/8 + 7·image/8."""
    text: Tensor
    """Cross-entropy in nats per text token."""
    image: Tensor
    """Cross-entropy in nats per code."""


def quick_gelu(x: Tensor) -> Tensor:
    """Compute x·σ(1.702x), the GELU of Sparse Transformers."""
    return F.silu(1.702 * x) * (1 / 1.702)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": quick_gelu,
    "gelu-tanh": partial(F.gelu, approximate="tanh"),
    "gelu-erf": F.gelu,
    "swiglu": F.silu,
    "geglu": F.gelu,
}


class MLP(nn.Module):
    """Four times as wide inside, with one of `ACTIVATIONS`; see `TransformerArch`."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gated = config.mlp in ("swiglu", "geglu")
        self.activation = ACTIVATIONS[config.mlp]
        d, hidden = config.width, 4 * config.width
        if config.mlp == "swiglu":
            hidden = 8 * math.ceil(config.width / 3)
        self.up = Linear(d, 2 * hidden if self.gated else hidden)
        self.down = Linear(hidden, d, scale=1 / math.sqrt(2 * config.depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            return self.down(self.activation(gate) * x)
        return self.down(self.activation(x))


def _norm(config: TransformerConfig) -> nn.Module:
    return nn.RMSNorm(config.width) if config.norm == "rms" else nn.LayerNorm(config.width)


def clamped(x: Tensor) -> Tensor:
    """Limit what overflowed in fp16, before a norm makes nan of it; ru-dalle and CogView do so."""
    most = torch.finfo(torch.float16).max
    return x.clamp(-most, most) if x.dtype == torch.float16 else x


class Residual(nn.Module):
    """A resblock: x + branch(norm(x)), or x + norm(branch(norm(x))) in a sandwich."""

    def __init__(
        self, norm: nn.Module, branch: nn.Module, out_norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.norm, self.branch, self.out_norm = norm, branch, out_norm

    def update(self, x: Tensor, *args: Any) -> Tensor:
        """Compute what is added to x: [B, n, D] → [B, n, D]; `args` go to the branch."""
        y = self.branch(self.norm(x), *args)
        return y if self.out_norm is None else self.out_norm(clamped(y))

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """Compute the sum: x [B, n, D] → [B, n, D]; `args` go to the branch."""
        return x + self.update(x, *args)


class Layer(nn.Module):
    """Two resblocks: attention, then the MLP."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        sizes = config.width, config.heads, config.head_size, config.depth

        def residual(branch: nn.Module) -> Residual:
            return Residual(_norm(config), branch, _norm(config) if config.sandwich else None)

        self.attention = residual(Attention(*sizes, qk_norm=config.qk_norm))
        self.mlp = residual(MLP(config))

    def forward(self, x: Tensor, attend: Attend, angles: Tensor | None = None) -> Tensor:
        return self.mlp(self.attention(x, attend, angles))


class Transformer(nn.Module):
    """A decoder that predicts each token of caption and image from those before it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        d = config.width
        learned, rotary = config.positions == "learned", config.positions == "rotary"
        self.text_tokens = config.text_vocab + config.text_len
        # The last row of each table is the start token.
        self.text_embedding = Embedding(self.text_tokens + 1, d)
        self.image_embedding = Embedding(config.codebook_size + 1, d)
        self.text_position = None if rotary else Embedding(config.text_len, d, summed=2)
        self.row = Embedding(config.grid_size, d, summed=3) if learned else None
        self.column = Embedding(config.grid_size, d, summed=3) if learned else None
        flat = config.positions == "flat"
        self.image_position = Embedding(config.image_len, d, summed=2) if flat else None
        sizes = config.text_len, config.grid_size, config.head_size
        self.rotary = Rotary(*sizes, config.rotary_grid) if rotary else None
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.norm = _norm(config)
        self.head_norm = _norm(config) if config.head_norm else None
        self.text_head = Linear(d, self.text_tokens, scale=0.0)
        self.image_head = Linear(d, config.codebook_size, scale=0.0)
        self.kinds = config.mask_kinds
        shape = config.text_len, config.grid_size, config.conv_wrap
        self.masks = nn.ModuleDict({k: MaskedAttention(k, *shape) for k in sorted(set(self.kinds))})
        self.register_load_state_dict_pre_hook(upgrade_state_dict)

    def embed_text(self, text: Tensor) -> Tensor:
        """Embed the inputs of the text states: text [B, L] → [B, L, D]."""
        if self.config.image_start != "none":
            start = text.new_full((len(text), 1), self.text_tokens)
            text = torch.cat([start, text[:, :-1]], dim=1)
        x = self.text_embedding(text)
        if self.text_position is None:
            return x
        # Called instead of reading its weight: ZeRO gathers the weight when the module is called.
        return x + self.text_position(torch.arange(x.shape[1], device=x.device))

    def embed_codes(self, inputs: Tensor, positions: Tensor | None = None) -> Tensor:
        """Embed the inputs of image states, [B, n] → [B, n, D].

        Args:
            inputs: codes, or codebook_size for the start token.
            positions: indices among the image states, [n], or [1] if all share one; None is the
                first n.
        """
        return self._add_positions(self.image_embedding(inputs), positions)

    def embed_start(self, text: Tensor) -> Tensor:
        """Embed the input of the first image state, [B, L] → [B, 1, D]; see `image_start`."""
        if self.config.image_start == "text":
            return self._add_positions(self.text_embedding(text[:, -1:]))
        return self.embed_codes(text.new_full((len(text), 1), self.config.codebook_size))

    def embed(self, text: Tensor, codes: Tensor) -> Tensor:
        """Embed all states of text [B, L], and those of the codes [B, n] that they predict.

        Returns: [B, L + n, D], or one state less without start tokens, where the last of the text
            predicts the first code. The last of the codes is not read.
        """
        parts = [self.embed_text(text)]
        if self.config.image_start == "none":
            parts.append(self.embed_codes(codes[:, :-1]))
        elif codes.shape[1]:
            positions = torch.arange(1, codes.shape[1], device=codes.device)
            parts += [self.embed_start(text), self.embed_codes(codes[:, :-1], positions)]
        return torch.cat(parts, dim=1)

    def _add_positions(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        if self.image_position is not None:
            return x + self.image_position(positions)
        if self.row is None or self.column is None:
            return x
        rows = positions.div(self.config.grid_size, rounding_mode="floor")
        return x + self.row(rows) + self.column(positions % self.config.grid_size)

    def run(
        self,
        x: Tensor,
        attends: Sequence[Attend] | None = None,
        positions: Tensor | None = None,
        depth: int | None = None,
    ) -> Tensor:
        """Run embedded states [B, n, D] through all layers and the last norm.

        Args:
            attends: attention of each layer; None is its mask.
            positions: positions in the stream, [n], or [1] if all states share one; None is the
                first n.
            depth: number of layers, whose states are returned without a norm; None is all.
        """
        angles = None
        if self.rotary is not None:
            n = x.shape[1]
            angles = self.rotary(
                torch.arange(n, device=x.device) if positions is None else positions,
                torch.promote_types(x.dtype, torch.float32),
            )
        for i, layer in enumerate(self.layers[:depth]):
            x = layer(x, attends[i] if attends else self.masks[self.kinds[i]], angles)
        if depth is not None:
            return x
        x = self.norm(x)
        return x if self.head_norm is None else self.head_norm(x)

    def states(self, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the last states of whole streams: [B, L, D] of the text, [B, N, D] of the image.

        Without start tokens, no state predicts the first text token: the text has L − 1 states.

        Args:
            text: [B, L], ids in [0, text_vocab + L).
            codes: [B, N] or [B, W, W], in raster order.
        """
        self._check(text, codes)
        length, codes = self.config.text_len, codes.flatten(1)
        if self.config.image_start == "none":  # masks are of whole streams: embed the last code too
            x = self.run(self.embed(text, F.pad(codes, (0, 1))))
            return x[:, : length - 1], x[:, length - 1 : -1]
        x = self.run(self.embed(text, codes))
        return x[:, :length], x[:, length:]

    def forward(self, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Score every token of whole streams; see `states`.

        Returns: text logits [B, L, text_vocab + L], L − 1 of them without start tokens; and image
            logits [B, N, V].
        """
        text_states, image_states = self.states(text, codes)
        return self.text_head(text_states), self.image_head(image_states)

    def flops(self) -> float:
        """Count the multiplications and additions of one sample's forward pass.

        Matrix products and visible attention pairs count; what is hidden or recomputed does not.
        """
        c = self.config
        linears = [m for m in self.layers.modules() if isinstance(m, nn.Linear)]
        weights = sum(m.in_features * m.out_features for m in linears)
        visible = {kind: int(mask.get_buffer("dense").sum()) for kind, mask in self.masks.items()}
        pairs = sum(visible[kind] for kind in self.kinds)
        heads = c.width * (c.text_len * self.text_tokens + c.image_len * c.codebook_size)
        return 2 * (c.length * weights + heads + 2 * c.width * pairs)

    def _check(self, text: Tensor, codes: Tensor) -> None:
        c = self.config
        shapes = ((c.image_len,), (c.grid_size, c.grid_size))
        fits = text.shape[1:] == (c.text_len,) and codes.shape[1:] in shapes
        if not fits or not 0 < len(text) == len(codes):
            raise ValueError(
                f"got text {tuple(text.shape)} and codes {tuple(codes.shape)}, expected "
                f"[B, {c.text_len}] and [B, {c.grid_size}, {c.grid_size}]"
            )

    def losses(self, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Return −ln p of all predicted tokens: [B, L] of the text, [B, N] of the image."""
        text_states, image_states = self.states(text, codes)
        text = text[:, -text_states.shape[1] :]
        return (
            self._losses(self.text_head, self.image_head, text_states, text),
            self._losses(self.image_head, self.text_head, image_states, codes.flatten(1)),
        )

    def loss(self, text: Tensor, codes: Tensor, text_weight: float = 1 / 8) -> TransformerLoss:
        """Compute the two-part loss: each cross-entropy a mean over its own tokens (§2.2)."""
        text_losses, image_losses = self.losses(text, codes)
        if self.config.pad_targets:
            text_loss = text_losses.mean()
        else:
            real = text[:, -text_losses.shape[1] :] < self.config.text_vocab
            text_loss = (text_losses * real).sum() / real.sum().clamp_min(1)
        image_loss = image_losses.mean()
        total = text_weight * text_loss + (1 - text_weight) * image_loss
        return TransformerLoss(total=total, text=text_loss, image=image_loss)

    def _losses(self, head: nn.Linear, other: nn.Linear, states: Tensor, targets: Tensor) -> Tensor:
        """Return −ln p of each target [B, n], normalized over its own vocabulary or over both."""
        logits = _score(head, states)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        losses = losses.view(targets.shape)
        if not self.config.shared_softmax:
            return losses
        own_sum, other_sum = logits.logsumexp(-1), _score(other, states).logsumexp(-1)
        return losses - own_sum + torch.logaddexp(own_sum, other_sum)

    def save(self, directory: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write weights and config to `directory`/transformer.safetensors, rounded to `dtype`.

        LoRA's updates are added to the weights that are written.
        """
        return save_weights(self, Path(directory) / FILE_NAME, dtype, state=MergedState(self))

    @classmethod
    def load(
        cls,
        directory: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Transformer:
        """Load what `save` or a training wrote, directly into `dtype`.

        Raises: ValueError if the file is missing or damaged.
        """
        return load_weights(cls, TransformerConfig, cls.file_in(directory), device, dtype)

    @classmethod
    def config_of(cls, directory: str | Path) -> TransformerConfig:
        """Read the config of the model that `load` returns; ValueError if the file is missing."""
        return load_config(cls, TransformerConfig, cls.file_in(directory))

    @staticmethod
    def file_in(directory: str | Path) -> Path:
        """Return the file that `save` or a training writes."""
        return model_folder(directory) / FILE_NAME


def _score(head: nn.Linear, states: Tensor) -> Tensor:
    """Return logits in fp32; under fp16 autocast they are computed in fp32 too (paper §D)."""
    kind = states.device.type
    in_fp16 = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    with torch.autocast(kind, enabled=False) if in_fp16 else nullcontext():
        return head(states).float()
