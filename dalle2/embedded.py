"""Encode images once, as latents and CLIP embeddings, before priors and decoders are trained.

    dalle1 embed --autoencoder runs/autoencoder --clip bundled --data toybox:40000 \\
        --out runs/embedded

writes shards with `KEY.npy` (float16: the latents, then the embedding) and `KEY.json` (its
captions, and the sizes of its crops), and `embedded.json`, which identifies both models. The same
command resumes after an interruption.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle1.clip import Clip
from dalle1.clip.loading import clip_folder
from dalle1.console import one_line_errors, parse
from dalle1.data.codes import CodeSource
from dalle1.data.encoded import EncodeOptions, encode_images
from dalle1.data.sources.mixture import Mixture
from dalle1.data.spec import split_names
from dalle1.devices import pick_device
from dalle1.json_files import parse_json
from dalle1.locking import folder_lock
from dalle2.autoencoder import AnyAutoencoder, autoencoder_digest, load_autoencoder
from dalle2.bundled import name_folders
from dalle2.conditioning import SIZES, clip_digest

INDEX_NAME = "embedded.json"


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(EncodeOptions):
    """Options of `dalle1 embed`."""

    autoencoder: Path
    """Folder of the autoencoder whose latents are stored, or "unclip"; "pixels" stores pixels."""
    clip: str = "bundled"
    """Folder of the CLIP whose image embeddings are stored, or "bundled"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        name_folders(self, "autoencoder")


class Embedder:
    """Encodes images as one row of numbers: the latents, then the CLIP embedding."""

    def __init__(self, autoencoder: AnyAutoencoder, clip: Clip) -> None:
        self.autoencoder, self.clip = autoencoder, clip
        self.image_size = autoencoder.config.image_size

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] in [0, 1]: [B, 1, c·h·w + D]."""
        latents = self.autoencoder.encode(images).flatten(1)
        embeddings = image_embeddings(self.clip, images)
        return torch.cat([latents, embeddings.to(latents)], 1)[:, None]


def image_embeddings(clip: Clip, images: Tensor) -> Tensor:
    """Embed images [B, 3, H, W] in [0, 1] as unit vectors [B, D], resized to the CLIP's size."""
    size = (clip.image_size, clip.image_size)
    if images.shape[2:] != size:
        images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
    return clip.embed_pixels(clip.normalise(images))


@dataclass(frozen=True)
class Encoders:
    """The models behind a folder of embeddings, as its index identifies them."""

    autoencoder: str
    clip: str

    @classmethod
    def of(cls, autoencoder: str | Path, clip: str | Path) -> Encoders:
        """Return the digests of the models in two folders."""
        return cls(autoencoder_digest(autoencoder), clip_digest(clip_folder(clip)))

    def __str__(self) -> str:
        return f"{self.autoencoder}-{self.clip}"


class EmbeddedSource(CodeSource):
    """Pairs of caption and latents with a CLIP embedding, read from their shards on demand."""

    index_name = INDEX_NAME
    command = "dalle1 embed"
    model_key = "encoders"

    def codes(self, index: int, rng: random.Random) -> Tensor:
        """Return the numbers of one of the crops of sample `index`: [c·h·w + D], float32."""
        return torch.from_numpy(rng.choice(self.crops(index))[0].astype(np.float32))

    def sized_crop(self, index: int, rng: random.Random) -> tuple[Tensor, Tensor]:
        """Return the numbers and the `Caption.sizes` [6] of one of the crops of sample `index`.

        The sizes are NaN in data of earlier versions, which do not hold them.
        """
        crops = self.crops(index)
        number = rng.randrange(len(crops))
        with self._one_error(index):
            stored = parse_json(self._read(index, 3), dict).get("sizes")
            sizes = torch.full((SIZES,), math.nan)
            if stored is not None:
                sizes = torch.tensor(stored[number], dtype=torch.float32).reshape(SIZES)
        return torch.from_numpy(crops[number][0].astype(np.float32)), sizes


def open_embedded(data: str, split: str, encoders: Encoders | None) -> EmbeddedSource | Mixture:
    """Open --data, one folder of embeddings or several; refuse those of other models.

    Args:
        encoders: the models that must have written them; None accepts any.
    """
    names, weights = split_names(data)
    for name in names:
        if not os.path.isfile(os.path.join(name, INDEX_NAME)):
            raise ValueError(f"data is {data!r}: {name} holds no embeddings; run dalle1 embed")
    sources = [EmbeddedSource(Path(name), split) for name in names]
    for name, source in zip(names, sources, strict=True):
        if encoders is not None and source.dvae != str(encoders):
            kinds = zip(("autoencoder", "CLIP"), source.dvae.split("-"), str(encoders).split("-"))
            other = " and ".join(kind for kind, before, now in kinds if before != now)
            raise ValueError(
                f"the embeddings in {name} are of another {other}; embed the data again, or name "
                "the models that it was embedded with"
            )
    numbers = {name: source.numbers for name, source in zip(names, sources, strict=True)}
    if len({*numbers.values()}) > 1:
        found = ", ".join(f"{name} {count}" for name, count in numbers.items())
        raise ValueError(
            f"the folders of {data!r} store different counts of values per image ({found}), "
            "expected the same; embed them with the same models and --image-size"
        )
    return sources[0] if len(sources) == 1 else Mixture(sources, weights)


def embed(config: EmbedConfig) -> int:
    """Encode all of `config.data`, shard by shard; keep shards that are already complete.

    Returns: the number of damaged shards of the data.
    """
    device = pick_device(config.device)
    autoencoder = load_autoencoder(config.autoencoder, device, config.image_size)
    clip = Clip.from_pretrained(config.clip, device)
    if clip.model.config.model_type == "siglip":
        raise ValueError(
            f"clip is {config.clip}, a SigLIP, expected a CLIP, by which prior and decoder read "
            "captions"
        )
    embedder = Embedder(autoencoder, clip)
    width = clip.model.config.projection_dim
    identity = {
        "encoders": str(Encoders.of(config.autoencoder, config.clip)),
        "grid_size": autoencoder.grid_size,
        "numbers": math.prod(autoencoder.latent_shape) + width,
    }
    return encode_images(config, embedder, device, config.out / INDEX_NAME, identity, np.float16)


def main(args: Sequence[str] | None = None) -> None:
    """Run `dalle1 embed`."""
    with one_line_errors():
        config = parse(EmbedConfig, args, __doc__.splitlines()[0])
        with folder_lock(config.out):
            damaged = embed(config)
        print(f"Embeddings are in {config.out}")
        if damaged:
            raise SystemExit(1)
