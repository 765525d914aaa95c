"""Convert a StableUnCLIP of diffusers to a DALL·E 2, and write one.

    dalle1 import stable-unclip stable-unclip/ --clip openai/clip-vit-large-patch14 --out my-model
    dalle1 export --model my-model --format diffusers --out stable-unclip/

A folder of each part and model_index.json, which names their classes. Ours also holds the whole
CLIP, since a StableUnCLIPPipeline has its text tower alone.

Embeddings are unit vectors here. There they have the lengths that CLIP gives them, of which a
conversion knows the usual one: the root mean square of z_i, and the mean of a few captions' z_t.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import load_file

from dalle1.clip import Clip
from dalle1.clip.loading import quiet_transformers
from dalle1.console import bar, one_line_errors, parse
from dalle1.importers.command import print_license
from dalle1.json_files import parse_json
from dalle1.model_card import ModelInfo
from dalle1.model_files import check_model_files
from dalle1.sampling.generation import GenerationConfig
from dalle1.storage import CLIP_NAME, write_atomic
from dalle2.embedded import Encoders
from dalle2.exchange.autoencoder import read_autoencoder, write_autoencoder
from dalle2.exchange.parts import new_folder, one_architecture, read_part, write_part
from dalle2.exchange.prior import read_prior, write_prior
from dalle2.exchange.schedulers import (
    read_scheduler,
    refuse_noise,
    write_no_noise,
    write_scheduler,
)
from dalle2.exchange.stable_unet import read_unet, write_unet
from dalle2.ldm_autoencoder import LDMAutoencoder
from dalle2.pipeline import Unclip
from dalle2.prior import DiffusionPrior
from dalle2.text_encoders import Concatenated, PaddedText, load_clip_text

INDEX = "model_index.json"
PIPELINES = ("StableUnCLIPPipeline", "StableUnCLIPImg2ImgPipeline")
CAPTIONS = ("a photo of a dog", "a red bicycle beside a wall", "an oil painting of two ships")
"""What the usual length of z_t is measured on."""
SAME = 0.01
"""Largest relative difference of equal weights, as one of two may be rounded."""


def index(tokenizer: str, text_tokenizer: str) -> dict[str, Any]:
    """Return what model_index.json says of the classes of the parts."""
    of_transformers = {
        "prior_tokenizer": tokenizer,
        "prior_text_encoder": "CLIPTextModelWithProjection",
        "tokenizer": text_tokenizer,
        "text_encoder": "CLIPTextModel",
    }
    of_diffusers = {
        "prior": "PriorTransformer",
        "prior_scheduler": "DDPMScheduler",
        "image_noising_scheduler": "DDPMScheduler",
        "unet": "UNet2DConditionModel",
        "scheduler": "DDIMScheduler",
        "vae": "AutoencoderKL",
    }
    return {
        "_class_name": PIPELINES[0],
        "_diffusers_version": "0.42.1",
        **{part: ["transformers", name] for part, name in of_transformers.items()},
        **{part: ["diffusers", name] for part, name in of_diffusers.items()},
        "image_normalizer": ["stable_diffusion", "StableUnCLIPImageNormalizer"],
    }


@torch.no_grad()
def usual_length(clip: Clip) -> float:
    """Return the mean length that z_t has before it becomes a unit vector."""
    inputs = clip.tokenize(CAPTIONS, warn=False)
    found = clip.model.get_text_features(**{k: x.to(clip.model.device) for k, x in inputs.items()})
    return float(getattr(found, "pooler_output", found).norm(dim=1).mean())


def write_stable_unclip(model: Unclip, folder: Path) -> None:
    """Write a DALL·E 2 as a StableUnCLIPPipeline, with unit vectors as embeddings.

    Raises: ValueError for a model that such a pipeline cannot hold, or a folder that is not empty.
    """
    autoencoder, prior, text = model.image_tokenizer, model.prior, model.text
    if not model.decoder.config.embedding_width:
        raise ValueError("the decoder reads no image embedding, expected one that does")
    if not isinstance(autoencoder, LDMAutoencoder):
        raise ValueError(
            "the autoencoder is not Stable Diffusion's, expected one of dalle1 import vae"
        )
    if not isinstance(prior, DiffusionPrior):
        raise ValueError("the model has no diffusion prior, expected one; use --prior FOLDER")
    tower = text.encoders[0] if isinstance(text, Concatenated) else None
    if not isinstance(tower, PaddedText):
        raise ValueError("the decoder has no text encoder clip-text, expected that alone")
    if model.upsampler is not None:
        warnings.warn("a StableUnCLIP has no upsampler; the folder has none", stacklevel=2)
    config, width = model.decoder.config, model.read.embedding_width
    with new_folder(folder) as path, bar(total=6, desc="writing", unit="part", delay=1) as progress:
        for write in (
            lambda: write_unet(model.decoder, path / "unet"),
            lambda: write_autoencoder(autoencoder, path / "vae"),
            lambda: write_prior(prior, path, model.encoder.text_len),
            lambda: _write_text_towers(path, model.encoder, tower),
            lambda: model.encoder.save_pretrained(path / CLIP_NAME),
        ):
            write()
            progress.update()
        statistics = {"mean": torch.zeros(1, width), "std": torch.full((1, width), width**-0.5)}
        normalizer = {"_class_name": "StableUnCLIPImageNormalizer", "embedding_dim": width}
        write_part(path / "image_normalizer", normalizer, statistics)
        write_no_noise(path / "image_noising_scheduler")
        steps = config.schedule, config.times, config.objective
        write_scheduler(path / "scheduler", "DDIMScheduler", *steps)
        steps = prior.config.schedule, prior.config.times, "x0"
        write_scheduler(path / "prior_scheduler", "DDPMScheduler", *steps)
        model.generation.save(path)
        model.info.save(path)
        kinds = (type(part.tokenizer).__name__ for part in (model.encoder, tower))
        write_atomic(path / INDEX, json.dumps(index(*kinds), indent=2) + "\n")
        progress.update()


def _write_text_towers(path: Path, clip: Clip, text: PaddedText) -> None:
    """Write the text tower of the CLIP, whose z_t become about unit vectors, and the decoder's."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    sizes = clip.model.config.text_config.to_dict()
    config = CLIPTextConfig(**{**sizes, "projection_dim": clip.model.config.projection_dim})
    with quiet_transformers():
        tower = CLIPTextModelWithProjection(config)
        state = clip.model.state_dict()
        own = {k: x for k, x in state.items() if k.startswith(("text_model.", "text_projection."))}
        own["text_projection.weight"] = own["text_projection.weight"] / usual_length(clip)
        tower.load_state_dict(own, strict=True)
        for name, part in (("prior_", (tower, clip.tokenizer)), ("", (text.model, text.tokenizer))):
            part[0].save_pretrained(path / f"{name}text_encoder")
            part[1].save_pretrained(path / f"{name}tokenizer")


def tower_scale(folder: Path, clip: Clip) -> float:
    """Return by what the projection of a tower in a folder exceeds that of the same CLIP.

    Raises: ValueError where the tower is another CLIP's, or damaged.
    """
    check_model_files(folder)
    file = folder / "model.safetensors"
    if not file.is_file():
        raise ValueError(f"no file {file}, expected the tower of a CLIP there")
    kind = "text" if folder.name.endswith("text_encoder") else "vision"
    parts = f"{kind}_model.", f"{'visual' if kind == 'vision' else kind}_projection."
    with one_architecture(folder):
        theirs = load_file(file)
        tensors = {k: x.float() for k, x in theirs.items() if not k.endswith("position_ids")}
    own = {k: x.cpu() for k, x in clip.model.state_dict().items() if k.startswith(parts)}
    shapes = [{name: x.shape for name, x in found.items()} for found in (own, tensors)]
    scale = 1.0
    same = shapes[0] == shapes[1]
    for name, x in tensors.items() if same else ():
        if name.startswith(parts[1]):
            scale = float(x.norm() / own[name].norm())
            x = x / scale
        same = same and bool((x - own[name]).norm() <= SAME * own[name].norm() + 1e-6)
    if not same:
        raise ValueError(f"{folder} is a tower of another CLIP; name its own by --clip")
    return scale


def lengths(folder: Path, clip: Clip) -> tuple[float, float]:
    """Return the usual lengths of z_i and z_t that the pipeline in a folder was trained on.

    Raises: ValueError where its towers are those of another CLIP.
    """
    of_text = 1.0
    for name in ("prior_text_encoder", "image_encoder"):
        if (folder / name).is_dir():
            scale = tower_scale(folder / name, clip)
            of_text = usual_length(clip) * scale if name.startswith("prior") else of_text
    part = folder / "image_normalizer"
    _, statistics = read_part(part)
    with one_architecture(part):
        mean, std = statistics["mean"], statistics["std"]
        squares, expected = mean.square() + std.square(), (1, clip.model.config.projection_dim)
        if {mean.shape, std.shape} != {expected} or not squares.isfinite().all():
            raise ValueError(
                f"mean and std are {tuple(mean.shape)} and {tuple(std.shape)}, expected "
                f"{expected} of finite numbers, for the CLIP's embeddings"
            )
    return float(squares.sum().sqrt()), of_text


def kind_of_pipeline(folder: Path, clip: str | Path | None) -> str:
    """Return the class of the pipeline in a folder; ValueError for one that cannot be read."""
    check_model_files(folder)
    kind = parse_json(folder / INDEX, dict).get("_class_name")
    if kind not in PIPELINES:
        raise ValueError(f"{folder} holds a {kind}, expected a {' or '.join(PIPELINES)}")
    for part in folder.iterdir():
        if part.is_symlink() and part.is_dir():
            raise ValueError(f"{part} is a link, expected a folder; copy what is linked")
    if clip is None and not (folder / CLIP_NAME).is_dir():
        raise ValueError(
            f"{folder} holds no whole CLIP, expected --clip with that of its embeddings, such as "
            "openai/clip-vit-large-patch14 (of 768 numbers)"
        )
    return kind


def _read_prior(folder: Path, clip: str, length: float) -> DiffusionPrior:
    """Read the prior of a pipeline, with the steps that its scheduler tells."""
    steps = read_scheduler(folder / "prior_scheduler")
    if (objective := steps.pop("objective")) != "x0":
        raise ValueError(f"the prior in {folder} predicts {objective}, expected x0 (sample)")
    return read_prior(folder, clip, length, **steps)


def read_stable_unclip(folder: Path, out: Path, clip: str | Path | None = None) -> Unclip:
    """Convert the pipeline in a folder to a model in the new folder `out`, and return it.

    Args:
        clip: folder or Hugging Face name of the CLIP of its embeddings; None is the one that
            `write_stable_unclip` wrote.

    Raises: ValueError where a part is missing, damaged or of another architecture or CLIP, or `out`
        is not empty.
    """
    kind = kind_of_pipeline(folder, clip)
    with new_folder(out) as path, bar(total=5, desc="reading", unit="part", delay=1) as progress:
        encoder = Clip.from_pretrained(folder / CLIP_NAME if clip is None else clip)
        of_image, of_text = lengths(folder, encoder)
        encoder.save_pretrained(path / CLIP_NAME)
        progress.update()
        autoencoder = read_autoencoder(folder / "vae")
        autoencoder.save(path)
        progress.update()
        encoders = Encoders.of(path, path / CLIP_NAME)
        text = load_clip_text(folder / "text_encoder", "cpu", folder / "tokenizer")
        empty = text([""]).states[0]
        progress.update()
        refuse_noise(folder / "image_noising_scheduler")
        decoder = read_unet(
            folder / "unet",
            empty,
            of_image,
            text_len=len(empty),
            text_encoders=("clip-text:text-0",),
            encoders=str(encoders),
            **read_scheduler(folder / "scheduler"),
        )
        progress.update()
        size = autoencoder.downsampling * decoder.config.side
        autoencoder.config = replace(autoencoder.config, image_size=size)
        has_prior = kind == PIPELINES[0]
        model = Unclip(
            autoencoder,
            decoder,
            encoder,
            _read_prior(folder, encoders.clip, of_text) if has_prior else None,
            text=Concatenated([text], decoder.config.text_encoders),
            clip=encoder,
            generation=GenerationConfig.load(folder),
            info=ModelInfo.load(folder),
        )
        model.save_pretrained(path)
        progress.update()
    return model


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Options of `dalle1 import stable-unclip`."""

    folder: tyro.conf.Positional[Path]
    """Folder of the pipeline, with model_index.json."""
    out: Path
    """Folder to write the model to."""
    clip: str | None = None
    """Folder or Hugging Face name of the CLIP whose embeddings it reads. None: the one in the
    folder, where dalle1 wrote it."""


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        config = parse(ImportConfig, args, __doc__.splitlines()[0])
        model = read_stable_unclip(config.folder, config.out, config.clip)
        count = sum(p.numel() for p in model.decoder.parameters())
        size, prior = model.image_tokenizer.image_size, "with" if model.prior else "without"
        print(
            f"The model is in {config.out}: a decoder of {count / 1e6:,.0f} million parameters, "
            f"images of {size} × {size} pixels, {prior} a prior"
        )
        print_license(model.info.license)
