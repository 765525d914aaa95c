"""The denoising U-Net: that of ADM (Dhariwal & Nichol 2021), with GLIDE's and unCLIP's inlets.

B batch, C channels, H W sides, E width of the time embedding, T caption tokens, K tokens of z_i,
W width of the caption's states, D width of CLIP embeddings.

    x_t ─ conv ─┬─ level 1: blocks ─ down ─┬─ level 2 … ─ middle ─ … level 2 ─ up ─ level 1 ─ conv
                └────────── skips ─────────┴───────────────────────┘

Every residual block is scaled and shifted by the time embedding, to which z_i is added (§2.1).
Attention reads the image's own positions, the caption's states, and K tokens made of z_i, side by
side (GLIDE). Where z_i is dropped, a learned embedding replaces it in both inlets; where the
caption is dropped, none of its tokens is visible.

With `stable_diffusion`, parts and inlets are those of Stable Diffusion and StableUnCLIP instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from dalle1.storage import load_config, load_weights, model_folder, save_weights
from dalle2.blocks import (
    Attention,
    Context,
    Resample,
    ResBlock,
    SpatialTransformer,
    Stage,
    norm,
    time_embedding,
    zero,
)
from dalle2.conditioning import SIZES, Caption
from dalle2.diffusion.objective import Objective
from dalle2.diffusion.schedule import ScheduleName
from dvae.model import DOWNSAMPLING

FILE_NAME = "decoder.safetensors"
INLETS = ("null_embedding", "embedding", "text", "caption", "context")
"""Beginnings of the names of the parts that read conditions."""
READS = ("karlo", "text_norm", "text_pool", "size_features")
"""Fields of an architecture that say how it reads captions."""


@dataclass(frozen=True, kw_only=True)
class UNetArch:
    """The size of a U-Net, and what it learns."""

    width: int = 48
    """Channels at full resolution, a multiple of 8."""
    multipliers: tuple[int, ...] = (1, 2, 3)
    """Channels of each level, in widths; every level halves the sides."""
    blocks: int = 2
    """Residual blocks in each level."""
    attention: tuple[int, ...] = (16, 8)
    """Sides, in positions of the input, at which attention follows each block. With
    `stable_diffusion`, it also follows the first block of the middle."""
    head_width: int = 24
    """Channels of an attention head."""
    image_tokens: int = 4
    """K: tokens made of the CLIP image embedding. Paper: 4."""
    context_width: int | None = None
    """Width of the tokens that attention reads. None: that of the time embedding, 4 × width."""
    stable_diffusion: bool = False
    """Whether its parts are Stable Diffusion's and conditions are read as by StableUnCLIP, for
    exchange with diffusers; text encoders are then clip-text:WHERE."""
    karlo: bool = False
    """Whether captions are read as by karlo; it sets `text_norm` and `text_pool`."""
    text_norm: bool = False
    """Whether the caption's tokens are normalized by a LayerNorm, as in Imagen."""
    text_pool: bool = False
    """Whether the caption's pooled embedding is added to the time embedding, as in SDXL."""
    size_features: int = 0
    """Fourier features of each of the six sizes that are added to the time embedding; SDXL: 256."""
    group_width: int = 1
    """Least number of channels that are normalized together, in up to 32 groups, as in ADM. At 1, a
    channel of a narrow network is normalized by itself, and its mean over the image is lost."""
    dropout: float = 0.0
    """Dropout in the residual blocks. Paper: 0.1."""
    objective: Objective = "v"
    """Prediction: epsilon, x0 or v. Paper: epsilon, in pixels."""
    learns_variance: bool = False
    """Whether a second half of the output's channels is the variance of a step. Paper: yes."""
    schedule: ScheduleName = "cosine"
    """Noise schedule. Paper: cosine."""
    times: int = 1000
    """Number of times in training."""

    def __post_init__(self) -> None:
        for name in ("multipliers", "attention"):  # a file's metadata has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.width % 8 or self.width < 8:
            raise ValueError(f"width is {self.width}, expected a multiple of 8, such as 48")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers is {self.multipliers}, expected numbers of at least 1")
        for name in ("blocks", "times", "group_width", "head_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("text_norm", "text_pool") if self.karlo else ():
            object.__setattr__(self, name, True)
        channels = [m * self.width for m in self.multipliers]
        if self.size_features % 2 or self.size_features < 0:
            raise ValueError(f"size_features is {self.size_features}, expected an even number")
        if self.attention and any(c % self.head_width for c in channels):
            raise ValueError(f"head_width is {self.head_width}, expected a divisor of {channels}")
        if self.stable_diffusion:
            self.refuse_other_parts()

    def refuse_other_parts(self) -> None:
        """Raise ValueError for fields that a U-Net of Stable Diffusion's parts does not have."""
        plain = UNetArch()
        for name in (*READS, "group_width", "context_width"):
            if getattr(self, name) != (value := getattr(plain, name)):
                raise ValueError(
                    f"{name} is {getattr(self, name)}, expected {value} with stable_diffusion"
                )
        if self.width % 32:
            raise ValueError(
                f"width is {self.width}, expected a multiple of 32 with stable_diffusion"
            )


@dataclass(frozen=True, kw_only=True)
class UNetConfig(UNetArch):
    """A U-Net for certain data, and the models whose embeddings it reads."""

    channels: int = 4
    """Channels of the data."""
    side: int = 16
    """Side of the data in positions."""
    pixels: bool = False
    """Whether the data are pixels in [−1, 1], rather than latents."""
    concat_channels: int = 0
    """Channels of an image beside x_t: the low resolution of an upsampler."""
    embedding_width: int = 0
    """D: width of the CLIP embeddings z_i; 0 for a network that reads none."""
    text_width: int = 0
    """W: width of the caption's states; 0 for a network without condition."""
    pooled_width: int = 0
    """Width of the caption's pooled embedding, with `text_pool`; 0 is `embedding_width`."""
    text_len: int = 0
    """Positions of a caption, all of which are read, with `stable_diffusion`."""
    text_encoders: tuple[str, ...] = ()
    """Text encoders of captions, see `dalle2.text_encoders`; none: the CLIP's text tower."""
    sizes: tuple[float, ...] = ()
    """With `size_features`, the `Caption.sizes` of captions that have none, as in sampling."""
    encoders: str = ""
    """Digests of the autoencoder and the CLIP that it was trained with."""
    embedding: Literal["image", "text"] = "image"
    """Embedding that it was trained on: z_i, or the caption's own z_t."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("text_encoders", "sizes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.size_features and not self.sizes:  # data and models of earlier versions
            side = float(self.side * (1 if self.pixels else DOWNSAMPLING))
            object.__setattr__(self, "sizes", (side, side, 0.0, 0.0, side, side))
        if self.stable_diffusion and not (self.text_width and self.text_len):
            raise ValueError(
                "stable_diffusion reads all positions of a caption, expected the text encoder "
                "clip-text:WHERE alone"
            )
        if len(self.sizes) not in (0, SIZES):
            raise ValueError(f"sizes is {self.sizes}, expected {SIZES} numbers")
        if self.side % (1 << (len(self.multipliers) - 1)):
            raise ValueError(
                f"side is {self.side}, expected a multiple of {1 << (len(self.multipliers) - 1)} "
                f"for {len(self.multipliers)} levels"
            )


class UNet(nn.Module):
    """Predicts what `config.objective` names, of x_t at time t under a condition."""

    null_caption: Tensor
    muon_modules = ("down", "middle", "up")
    """Modules whose matrices and kernels Muon updates: all but those at the ends."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        c, e = config, 4 * config.width
        self.time = nn.Sequential(nn.Linear(c.width, e), nn.SiLU(), nn.Linear(e, e))
        self.add_stable_inlets() if c.stable_diffusion else self.add_inlets()
        self.input = nn.Conv2d(c.channels + c.concat_channels, c.width, 3, padding=1)
        widths, self.down, self.middle = [c.width], nn.ModuleList(), nn.ModuleList()
        channels, side = c.width, c.side
        for level, multiplier in enumerate(c.multipliers):
            for _ in range(c.blocks):
                self.down.append(self.stage(channels, multiplier * c.width, side in c.attention))
                channels = multiplier * c.width
                widths.append(channels)
            if level < len(c.multipliers) - 1:
                self.down.append(self.resample(channels, 0.5))
                widths.append(channels)
                side //= 2
        attends = side in c.attention or c.stable_diffusion
        self.middle.append(self.stage(channels, channels, attends))
        self.middle.append(self.stage(channels, channels))
        self.up = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(c.multipliers))):
            for _ in range(c.blocks + 1):
                attends = side in c.attention
                self.up.append(self.stage(channels + widths.pop(), multiplier * c.width, attends))
                channels = multiplier * c.width
            if level:
                self.up.append(self.resample(channels, 2.0))
                side *= 2
        outputs = c.channels * (2 if c.learns_variance else 1)
        self.output = nn.Sequential(
            norm(channels), nn.SiLU(), zero(nn.Conv2d(channels, outputs, 3, padding=1))
        )
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                module.num_groups = norm(module.num_channels, c.group_width).num_groups
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def add_inlets(self) -> None:
        """Add what reads conditions: GLIDE's and unCLIP's inlets."""
        c, e = self.config, 4 * self.config.width
        context = c.context_width or e
        if c.embedding_width:
            self.null_embedding = nn.Parameter(torch.randn(c.embedding_width))
            self.embedding_vector = nn.Linear(c.embedding_width, e)
            self.embedding_tokens = nn.Linear(c.embedding_width, c.image_tokens * context)
        if c.text_width:
            self.text_tokens = nn.Linear(c.text_width, context)
            pooled = (c.pooled_width or c.embedding_width) if c.text_pool else 0
            if pooled or c.size_features:
                self.caption_vector = nn.Linear(pooled + SIZES * c.size_features, e)
            if c.text_norm:
                self.text_norm = nn.LayerNorm(context)

    def add_stable_inlets(self) -> None:
        """Add what reads conditions as StableUnCLIP does: z_i, and states of the empty caption."""
        c, e = self.config, 4 * self.config.width
        if c.embedding_width:
            both = nn.Linear(2 * c.embedding_width, e)
            self.embedding_mlp = nn.Sequential(both, nn.SiLU(), nn.Linear(e, e))
        self.register_buffer("null_caption", torch.zeros(c.text_len, c.text_width))

    def stage(self, c_in: int, c_out: int, attends: bool = False) -> Stage:
        """Return a block, with attention where it attends."""
        c, e = self.config, 4 * self.config.width
        attention: Attention | SpatialTransformer | None = None
        if attends and c.stable_diffusion:
            attention = SpatialTransformer(c_out, c.text_width, c.head_width)
        elif attends:
            context = (c.context_width or e) if c.text_width else 0
            attention = Attention(c_out, context, c.head_width)
        block = ResBlock(c_in, c_out, e, c.dropout, scales=not c.stable_diffusion)
        return Stage(block, attention)

    def resample(self, channels: int, resize: float) -> Stage:
        """Return what halves or doubles the sides."""
        c = self.config
        if c.stable_diffusion:
            return Stage(Resample(channels, resize))
        return Stage(ResBlock(channels, channels, 4 * c.width, c.dropout, resize))

    def condition(
        self, embedding: Tensor, caption: Caption, keep_embedding: Tensor, keep_caption: Tensor
    ) -> Context:
        """Embed a condition for `forward`.

        Args:
            embedding: z_i, unit vectors [B, D]; ignored without `embedding_width`.
            keep_embedding, keep_caption: bool [B]; what is not kept is dropped from every inlet.
        """
        if self.config.stable_diffusion:
            return self.stable_condition(embedding, caption, keep_embedding, keep_caption)
        c, text = self.config, self.text_tokens(caption.states)
        caption = caption.where(keep_caption)
        if c.text_norm:
            text = self.text_norm(text)
        tokens, mask, vector = [text], [caption.mask], [self.caption_embedding(caption)]
        if c.embedding_width:
            # Unit vectors have small entries; √D gives each the variance 1.
            scaled = embedding * math.sqrt(c.embedding_width)
            z = torch.where(keep_embedding[:, None], scaled, self.null_embedding)
            from_image = self.embedding_tokens(z).unflatten(1, (c.image_tokens, -1))
            visible = torch.ones_like(from_image[..., 0], dtype=torch.bool)
            tokens, mask = [from_image, text], [visible, caption.mask]
            vector = [self.embedding_vector(z), *vector]
        present = [v for v in vector if v is not None]
        return Context(
            vector=sum(present[1:], present[0]) if present else text.new_zeros(len(text), 1),
            tokens=torch.cat(tokens, 1),
            mask=torch.cat(mask, 1),
        )

    def stable_condition(
        self, embedding: Tensor, caption: Caption, keep_embedding: Tensor, keep_caption: Tensor
    ) -> Context:
        """Embed a condition as StableUnCLIP does; see `condition`.

        All positions of a caption are read. A dropped one counts as the empty caption, a dropped
        z_i and its noise level as 0.
        """
        c = self.config
        tokens = torch.where(keep_caption[:, None, None], caption.states, self.null_caption)
        vector = tokens.new_zeros(len(tokens), 1)
        if c.embedding_width:
            no_noise = time_embedding(embedding.new_zeros(len(embedding)), c.embedding_width)
            label = torch.cat([embedding * math.sqrt(c.embedding_width), no_noise], 1)
            vector = self.embedding_mlp(label * keep_embedding[:, None])
        return Context(vector, tokens, torch.ones_like(tokens[..., 0], dtype=torch.bool))

    def caption_embedding(self, caption: Caption) -> Tensor | None:
        """Embed what a caption adds to the time embedding, [B, E]: pooled states and sizes.

        A caption that was dropped has neither: its sizes count as those of no image.
        """
        c, parts = self.config, []
        if c.text_pool:
            parts.append(caption.embedding)
        if c.size_features:
            usual = caption.states.new_tensor(c.sizes).expand(len(caption.states), -1)
            sizes = usual if caption.sizes is None else caption.sizes
            sizes = torch.where(sizes.isnan(), usual, sizes)
            features = time_embedding(sizes.flatten(), c.size_features)
            features = features.view(len(sizes), -1).to(caption.states.dtype)
            parts.append(features * caption.mask.any(1)[:, None])
        return self.caption_vector(torch.cat(parts, 1)) if parts else None

    def forward(
        self, x: Tensor, t: Tensor, context: Context | None = None, beside: Tensor | None = None
    ) -> Tensor:
        """Predict [B, C, H, W] of x_t [B, C, H, W] at times t [B], or [B, 2C, H, W] with variance.

        Args:
            beside: image that is concatenated to x_t, [B, concat_channels, H, W].
        """
        embedding = self.time(time_embedding(t, self.config.width).to(x.dtype))
        if context is not None:
            embedding = embedding + context.vector
        x = self.input(x if beside is None else torch.cat([x, beside], 1))
        skips = [x]
        for stage in self.down:
            x = stage(x, embedding, context)
            skips.append(x)
        for stage in self.middle:
            x = stage(x, embedding, context)
        for stage in self.up:
            if stage.block.resize == 1:
                x = torch.cat([x, skips.pop()], 1)
            x = stage(x, embedding, context)
        return self.output(x)

    @staticmethod
    def is_inlet(name: str) -> bool:
        """Whether a parameter reads conditions."""
        return any(part.startswith(INLETS) for part in name.split("."))

    def save(self, directory: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write the parameters and config to `directory`/decoder.safetensors."""
        return save_weights(self, Path(directory) / FILE_NAME, dtype)

    @classmethod
    def load(cls, directory: str | Path, device: str | torch.device = "cpu") -> UNet:
        """Load what `save` or a training wrote; ValueError where it is missing or damaged."""
        return load_weights(cls, UNetConfig, cls.file_in(directory), device)

    @staticmethod
    def file_in(directory: str | Path) -> Path:
        """Return the path of the file that `load` reads."""
        return model_folder(directory) / FILE_NAME

    @classmethod
    def config_of(cls, directory: str | Path) -> UNetConfig:
        """Read the config of the model that `load` returns."""
        return load_config(cls, UNetConfig, cls.file_in(directory))
