"""Train the decoder of DALL·E 2: image latents from a CLIP embedding and a caption (§2.1).

    dalle1 train decoder small --data runs/embedded --autoencoder runs/autoencoder \\
        --out runs/decoder

writes runs/decoder/latest/, which `dalle1 sample --model` reads, a log and samples. The same
command resumes after an interruption. The caption is dropped in half of the samples, and the
embedding in a tenth: so the decoder also samples from a caption alone, as GLIDE does.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dalle1.console import one_line_errors, parse_preset
from dalle1.data.images import grid, save_png, to_pil
from dalle1.devices import autocast
from dalle1.training import distributed
from dalle1.training.interrupts import graceful_run
from dalle1.training.loop import fit
from dalle2.autoencoder import PIXELS, Autoencoder, Pixels, load_autoencoder
from dalle2.bundled import name_folders
from dalle2.conditioning import Caption, TextEncoder
from dalle2.decoder import decoder_denoiser, sample_latents
from dalle2.diffusion.objective import Errors, prediction_errors, sample_times
from dalle2.diffusion.schedule import Schedule
from dalle2.embedded import Encoders
from dalle2.pipeline import Unclip
from dalle2.tasks.diffusion import (
    DiffusionLoss,
    binned,
    diffusion_loss,
    kept,
    validation_times,
)
from dalle2.tasks.embedded import EmbeddedTask, EmbeddedTrainConfig
from dalle2.text_encoders import Cached, load_text_encoders, stored_names
from dalle2.unet import READS, UNet, UNetArch, UNetConfig


@dataclass(frozen=True, kw_only=True)
class DecoderTrainConfig(EmbeddedTrainConfig):
    """Settings of a decoder's training (§2.1, App. C)."""

    autoencoder: Path
    """Folder of the autoencoder that the data was embedded with, "pixels" or "unclip"."""
    init: Path | None = None
    """Folder of a decoder to fine-tune, or "unclip", the bundled one. Its architecture replaces
    that of preset and flags, but for dropout and how captions are read; parts of other shapes
    start anew."""
    new_inlets: bool = False
    """Whether all parts that read conditions start anew, and only the others are those of --init:
    for another text encoder, or to compare conditions."""
    model: UNetArch = field(default_factory=UNetArch)
    """Architecture of the U-Net."""
    text_encoders: tuple[str, ...] = ()
    """Frozen text encoders of captions, concatenated: clip:WHERE, clip-text:WHERE (reads padding,
    too), t5:WHERE, dalle-middle:WHERE or dalle:WHERE, WHERE a folder, a Hugging Face name or
    bundled. None: the text tower of --clip."""
    embedding: Literal["image", "text", "none"] = "image"
    """Embedding that the decoder is trained on: the image's; its caption's, an ablation; or none,
    as in LDM, Imagen and SDXL."""
    embedding_dropout: float = 0.1
    """Share of samples whose embedding is dropped, for guidance. Paper: 0.1."""
    caption_dropout: float = 0.5
    """Share of samples whose caption is dropped. Paper: 0.5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        name_folders(self, "autoencoder", "init")
        if self.new_inlets and self.init is None:
            raise ValueError("new_inlets needs --init FOLDER, the decoder to start from")
        for name in ("embedding_dropout", "caption_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number in [0, 1]")
        if self.model.size_features and not self.text_encoders:
            raise ValueError("model.size_features needs text_encoders, such as clip:bundled")
        kinds = [name.partition(":")[0] for name in self.text_encoders]
        if self.model.stable_diffusion and kinds != ["clip-text"]:
            raise ValueError(
                f"text_encoders is {' '.join(self.text_encoders) or 'None'}, expected "
                "clip-text:WHERE alone for model.stable_diffusion"
            )
        if self.embedding == "text" and self.text_encoders:
            raise ValueError("embedding is text, the ablation of z_t; it reads no text_encoders")


_small = DecoderTrainConfig(
    out=Path("runs/decoder"),
    autoencoder=Path("runs/autoencoder"),
    model=UNetArch(width=48, multipliers=(1, 2, 3), attention=(8, 4), head_width=48, group_width=8),
    steps=4_500,
    batch_size=64,
    optimizer="muon",
    learning_rate=2e-3,
    final_learning_rate=1e-5,
    warmup_steps=50,
    weight_decay=1e-2,
    beta2=0.99,
    clip_norm=1.0,
    validate_every=500,
)

# The width and depth of the paper's decoder, in latents of 32 × 32.
_base = replace(
    _small,
    model=UNetArch(
        width=320, multipliers=(1, 2, 3, 4), attention=(32, 16, 8), head_width=64, dropout=0.1
    ),
    steps=800_000,
    batch_size=2048,
    optimizer="adamw",
    learning_rate=1.2e-4,
    warmup_steps=5_000,
    beta2=0.999,
    ema_decay=0.9999,
)

# The paper's own, in pixels, table 3: `dalle1 embed --autoencoder pixels` prepares its data.
_paper = replace(
    _base,
    autoencoder=Path(PIXELS),
    model=UNetArch(
        width=512,
        multipliers=(1, 2, 3, 4),
        blocks=3,
        attention=(32, 16, 8),
        head_width=64,
        dropout=0.1,
        objective="epsilon",
        learns_variance=True,
    ),
    final_learning_rate=1.2e-4,
)

# Other families' conditions for the U-Net of `small`: captions alone, dropped in a tenth.
_ldm = replace(
    _small, embedding="none", text_encoders=("clip:bundled",), caption_dropout=0.1
)  # Rombach et al. 2022, as in Stable Diffusion
_imagen = replace(
    _ldm,
    text_encoders=("dalle-middle:bundled",),  # Paper: a T5, as by t5:google/t5-v1_1-xxl
    model=replace(_small.model, text_norm=True, text_pool=True),
)  # Saharia et al. 2022
_sdxl = replace(
    _ldm,
    text_encoders=("clip:bundled", "dalle-middle:bundled"),
    model=replace(_small.model, text_pool=True, size_features=256),
)  # Podell et al. 2023

# Stable Diffusion 2.1's U-Net, told z_i, as in Stable unCLIP, in latents of 64 × 64.
_stable_unclip = replace(
    _base,
    model=UNetArch(
        width=320,
        multipliers=(1, 2, 4, 4),
        attention=(64, 32, 16),
        head_width=64,
        stable_diffusion=True,
    ),
    text_encoders=("clip-text:bundled",),
    caption_dropout=0.1,
)

DECODER_PRESETS: dict[str, DecoderTrainConfig] = {
    "small": _small,
    "base": _base,
    "paper": _paper,
    "ldm": _ldm,
    "imagen": _imagen,
    "sdxl": _sdxl,
    "stable-unclip": _stable_unclip,
}


def usual_sizes(sizes: Tensor) -> tuple[float, ...]:
    """Return the `Caption.sizes` for sampling: those of the original of median area.

    Args:
        sizes: those of the validation images, [N, 6], NaN where unknown; () without any.
    """
    known = sizes[~sizes.isnan().any(1)]
    if not len(known):
        return ()
    middle = known[:, :2].prod(1).argsort(stable=True)[len(known) // 2]
    return tuple(known[middle].tolist())


class DecoderTask(EmbeddedTask[UNet, DecoderTrainConfig]):
    """Trains a decoder in the latents of an autoencoder."""

    def __init__(self, config: DecoderTrainConfig) -> None:
        if config.init is not None:
            before = asdict(UNet.config_of(config.init))
            own = {field.name for field in fields(UNetArch)} - {"dropout", *READS}
            sizes = {name: before[name] for name in own}
            config = replace(config, model=replace(config.model, **sizes))
        super().__init__(config)

    def encoders(self) -> Encoders:
        return Encoders.of(self.config.autoencoder, self.config.clip)

    def text_encoder(self) -> TextEncoder | None:
        self.text: TextEncoder | None = None
        if self.config.text_encoders:
            text = load_text_encoders(self.config.text_encoders, self.device)
            # A processor remembers captions; a GPU reads those of a batch together.
            self.text = Cached(text) if self.device.type == "cpu" else text
        return self.text

    def files(self) -> Mapping[str, Path]:
        init = self.config.init
        found = {"autoencoder": Autoencoder.file_in(self.config.autoencoder)}
        return found if init is None else {**found, "init": UNet.file_in(init)}

    def initial(self) -> UNet:
        config, read = self.config, self.pairs.read
        autoencoder = load_autoencoder(config.autoencoder, self.device)
        channels = autoencoder.config.latent_channels
        latents = self.held["numbers"].shape[1] - read.embedding_width
        side = math.isqrt(latents // channels)
        size = autoencoder.downsampling * side  # that of the images that were embedded
        self.autoencoder = load_autoencoder(config.autoencoder, self.device, size)
        self.schedule = Schedule(config.model.schedule, config.model.times)
        levels = [side >> level for level in range(len(config.model.multipliers))]
        if not set(levels) & set(config.model.attention):
            hint = f" ({config.init} has it; embed images of its size)" if config.init else ""
            raise ValueError(
                f"model.attention is {config.model.attention}, and the sides of this data are "
                f"{levels}; without attention at one of them no caption is read{hint}"
            )
        reads_image, text = config.embedding != "none", self.text or read
        empty = text([""]).states[0] if config.model.stable_diffusion else None  # [T, W]
        model = UNet(
            UNetConfig(
                **asdict(config.model),
                channels=channels,
                side=side,
                pixels=isinstance(autoencoder, Pixels),
                embedding_width=read.embedding_width if reads_image else 0,
                text_width=text.width,
                pooled_width=text.embedding_width if self.text or not reads_image else 0,
                text_len=0 if empty is None else len(empty),
                text_encoders=stored_names(config.text_encoders),
                sizes=usual_sizes(self.held["sizes"]) if config.model.size_features else (),
                encoders=str(self.encoders()),
                embedding="text" if config.embedding == "text" else "image",
            )
        )
        if empty is not None:
            model.null_caption.copy_(empty)
        if config.init is not None:
            self.start_from(config.init, model)
        return model

    def start_from(self, init: Path, model: UNet) -> None:
        """Let the training begin with the parameters of a decoder, as far as they fit.

        Raises: ValueError where it is one of other latents.
        """
        before = UNet.config_of(init)
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in UNet(before).named_parameters()}
        anew = self.config.new_inlets
        self.kept = {
            name
            for name, p in model.named_parameters()
            if shapes.get(name) == p.shape and not (anew and UNet.is_inlet(name))
        }
        data = [(c.channels, "pixels" if c.pixels else "latents") for c in (before, model.config)]
        if data[0] != data[1]:
            had, has = (f"{kind} of {channels} channels" for channels, kind in data)
            raise ValueError(
                f"the decoder in {init} has {had}, and the data {has}; use the autoencoder that it "
                "was trained with"
            )
        self.warn_of_changes(init, before, model, shapes.keys() - self.kept)
        self.initial_weights = UNet.file_in(init)

    def warn_of_changes(
        self, init: Path, before: UNetConfig, model: UNet, lost: Collection[str]
    ) -> None:
        """Warn of what of --init has another meaning here, and what of it is not used."""
        found = []
        if before.encoders != model.config.encoders:
            found.append("it was trained with another autoencoder or CLIP, whose numbers differ")
        if lost and not self.config.new_inlets:
            names = sorted({name.partition(".")[0] for name in lost})
            found.append(f"{len(lost)} of its tensors do not fit ({', '.join(names)})")
        if found and distributed.is_main():
            warnings.warn(
                f"the decoder in {init} has to learn again: {'; '.join(found)}", stacklevel=3
            )

    def initial_name(self, name: str) -> str | None:
        return name if name in self.kept else None

    def split(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Caption]:
        """Return latents [B, c, h, w], the embeddings of `config.embedding` [B, D] and captions."""
        flat, embedding, caption = self.pairs.split(batch)
        if self.config.embedding == "text":
            embedding = caption.embedding
        return flat.unflatten(1, self.autoencoder.latent_shape), embedding, caption

    def losses(
        self, batch: Mapping[str, Tensor], step: int, rng: torch.Generator
    ) -> Sequence[DiffusionLoss]:
        config, count = self.config, len(batch["numbers"])
        t = sample_times(count, self.schedule, rng)
        keeps = kept(count, config.embedding_dropout, rng), kept(count, config.caption_dropout, rng)
        return [diffusion_loss(self.errors(self.model, batch, t, rng, *keeps))]

    def errors(
        self,
        model: UNet,
        batch: Mapping[str, Tensor],
        t: Tensor,
        rng: torch.Generator,
        keep_embedding: Tensor,
        keep_caption: Tensor,
    ) -> Errors:
        """Return the errors of each sample's prediction at times t [B]."""
        latents, embedding, caption = self.split(batch)
        context = model.condition(embedding, caption, keep_embedding, keep_caption)
        arch = self.config.model
        return prediction_errors(
            lambda x, t: model(x, t, context),
            arch.objective,
            self.schedule,
            latents,
            t,
            rng,
            arch.learns_variance,
        )

    @torch.no_grad()
    def validate(self, model: UNet) -> Iterator[tuple[str, float]]:
        """Yield the loss on the validation pairs, in all and in ten ranges of times."""
        count = len(self.held["numbers"])
        t = validation_times(count, self.schedule, self.device)
        rng, keep = torch.Generator(self.device).manual_seed(0), torch.ones(count, dtype=torch.bool)
        keep, parts = keep.to(self.device), []
        for start in range(0, count, 64):
            part = slice(start, start + 64)
            batch = {name: tensor[part] for name, tensor in self.held.items()}
            with autocast(self.device, self.config.precision):
                errors = self.errors(model, batch, t[part], rng, keep[part], keep[part])
            parts.append(errors.total)
        yield from binned(torch.cat(parts))

    def sample(self, model: UNet, path: Path) -> None:
        """Write eight images; below them, samples by embedding and caption, and by caption."""
        batch = {name: tensor[:8] for name, tensor in self.held.items()}
        latents, embedding, caption = self.split(batch)
        rows, count = [latents], len(latents)
        with autocast(self.device, self.config.precision):
            for has_embedding in (True, False):
                keep = torch.full((count,), has_embedding, device=self.device)
                denoise = decoder_denoiser(model, embedding, caption, keep_embedding=keep)
                rows.append(sample_latents(model, denoise, range(count), seed=0, steps=20))
            images = to_pil(self.autoencoder.decode(torch.cat(rows)))
        save_png(grid(images, count), path)

    def save(self, model: UNet, folder: Path) -> None:
        Unclip(self.autoencoder, model, self.pairs.clip, text=self.text).save_pretrained(folder)


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        config = parse_preset(DECODER_PRESETS, args, __doc__.splitlines()[0])
        with graceful_run(config):
            task = DecoderTask(config)
            fit(task, task.config)
        if distributed.is_main():
            command = f"dalle1 export --model {config.out} --prior runs/prior --out my-model"
            print(f"The decoder is in {config.out}; add a prior with: {command}")
