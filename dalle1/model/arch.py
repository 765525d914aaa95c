"""Architecture of the transformer: the paper's, what it leaves open, and what came later."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin, get_type_hints

from dalle1.model.masks import MaskKind, layer_masks

MAX_LENGTH = 20_000
"""Limit on T; the paper's is 1,280."""


@dataclass(frozen=True, kw_only=True)
class TransformerArch:
    """Architecture of a transformer. The defaults are the paper's 12 billion parameters."""

    text_vocab: int = 16_384
    """Number of BPE tokens without padding; fewer if the captions are too few to learn so many."""
    text_len: int = 256
    """L: text positions. A caption has at most L − 1 tokens."""
    width: int = 3968
    """D: channels of the residual stream."""
    depth: int = 64
    """Number of layers, each an attention and an MLP."""
    heads: int = 62
    """Attention heads; the width is a multiple of them."""

    # What the paper leaves open.
    image_start: Literal["token", "text", "none"] = "token"
    """Input of the first image state: its own start token, or the last text token. none: there are
    no start tokens; every state reads its own token and predicts the next one, as in ru-dalle and
    minDALL-E."""
    pad_targets: bool = True
    """Whether padding counts in the text loss; if not, only the caption's tokens do."""
    shared_softmax: bool = False
    """Whether each softmax covers both vocabularies, not only the state's own."""
    conv_wrap: bool = True
    """Whether the kernel of the convolutional mask wraps around the edges of the image."""

    # What came later. Paper: the first of each.
    attention: Literal["sparse", "full"] = "sparse"
    """Attention masks: the paper's row, column and conv, or full causal attention in all layers."""
    masks: tuple[MaskKind, ...] | None = None
    """Attention mask of each layer, instead of `attention`."""
    positions: Literal["learned", "rotary", "flat"] = "learned"
    """Position encoding: learned embeddings of text positions, rows and columns; rotary by the same
    three; or flat, one learned embedding for each code."""
    norm: Literal["layer", "rms"] = "layer"
    """Normalization: LayerNorm, or RMSNorm."""
    sandwich: bool = False
    """Whether the output of each attention and MLP is normalized too, before it is added."""
    head_norm: bool = False
    """Whether a second LayerNorm precedes the logits."""
    mlp: Literal["gelu", "swiglu", "gelu-tanh", "gelu-erf", "geglu"] = "gelu"
    """MLP: four times as wide with GELU, or 8/3 times with SwiGLU; both have as many parameters.
    gelu is x·σ(1.702x), gelu-tanh the usual approximation, gelu-erf the exact function; geglu is
    four times as wide and gated."""
    qk_norm: bool = False
    """Whether the queries and keys of each head are normalized."""
    head_width: int | None = None
    """Channels of a head. None: the width divided by the heads."""

    def __post_init__(self) -> None:
        for field in fields(self):
            kind = get_type_hints(type(self))[field.name]
            choices = get_args(kind) if get_origin(kind) is Literal else ()
            if choices and getattr(self, field.name) not in choices:
                value = getattr(self, field.name)
                raise ValueError(f"{field.name} is {value!r}, expected {' or '.join(choices)}")
            if field.type == "int" and getattr(self, field.name) < 1:
                value = getattr(self, field.name)
                raise ValueError(f"{field.name} is {value}, expected at least 1")
        if self.text_len < 2:
            raise ValueError(f"text_len is {self.text_len}, expected at least 2")
        if self.head_width is None and self.width % self.heads:
            raise ValueError(f"width is {self.width}, expected a multiple of heads, {self.heads}")
        if self.head_width is not None and self.head_width < 1:
            raise ValueError(f"head_width is {self.head_width}, expected at least 1")
        if self.positions == "rotary" and self.head_size % 4:
            raise ValueError(
                f"heads are {self.head_size} wide, expected a multiple of 4 for rotary positions"
            )
        if self.masks is not None:
            object.__setattr__(self, "masks", tuple(self.masks))  # JSON has lists only
            known = get_args(MaskKind)
            if len(self.masks) != self.depth or not set(self.masks) <= set(known):
                raise ValueError(
                    f"masks are {' '.join(map(str, self.masks))}, expected {self.depth}, one for "
                    f"each layer, of {', '.join(known)}"
                )

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.head_width or self.width // self.heads

    @property
    def mask_kinds(self) -> list[MaskKind]:
        """Attention mask of each layer."""
        if self.masks is not None:
            return list(self.masks)
        return layer_masks(self.depth) if self.attention == "sparse" else ["full"] * self.depth


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(TransformerArch):
    """Architecture of a transformer, with the sizes that the image tokenizer sets."""

    codebook_size: int = 8192
    """V: number of codes of the image tokenizer."""
    grid_size: int = 32
    """W: codes along each side of an image."""
    rotary_grid: int | None = None
    """W of the smaller images that the model was trained on first, whose rotary positions are
    interpolated; None without such a training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length > MAX_LENGTH:
            raise ValueError(
                f"text_len and grid_size make {self.length} positions, expected at most "
                f"{MAX_LENGTH}: each mask has an entry for each pair"
            )

    @property
    def arch(self) -> TransformerArch:
        """The architecture without the sizes that the image tokenizer sets."""
        return TransformerArch(**{f.name: getattr(self, f.name) for f in fields(TransformerArch)})

    @property
    def image_len(self) -> int:
        """N: codes of an image."""
        return self.grid_size**2

    @property
    def length(self) -> int:
        """T: positions of the stream."""
        return self.text_len + self.image_len
