"""Convert a StableUnCLIP of diffusers, or write a DALL·E 2 as one.

    dalle1 import stable-unclip stable-unclip/ --clip openai/clip-vit-large-patch14 --out my-model
    dalle1 export --model my-model --format diffusers --out stable-unclip/

A folder of each part and model_index.json, which names their classes. Ours also holds the whole
CLIP, since a StableUnCLIPPipeline has its text tower alone.

Embeddings are unit vectors here. There they have the lengths that CLIP gives them, of which a
conversion knows the usual one: the root mean square of z_i, and the mean of a few captions' z_t.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from dalle1.clip import Clip
from dalle1.clip.loading import quiet_transformers
from dalle1.console import one_line_errors, parse
from dalle1.importers.command import refuse_training
from dalle1.json_files import parse_json
from dalle1.locking import folder_lock
from dalle1.sampling.generation import GenerationConfig
from dalle1.storage import CLIP_NAME, write_atomic
from dalle2.diffusion.schedule import ScheduleName
from dalle2.embedded import Encoders
from dalle2.exchange.autoencoder import read_autoencoder, write_autoencoder
from dalle2.exchange.parts import read_part, write_part
from dalle2.exchange.prior import read_prior, write_prior
from dalle2.exchange.stable_unet import read_unet, write_unet
from dalle2.ldm_autoencoder import LDMAutoencoder
from dalle2.pipeline import Unclip
from dalle2.prior import DiffusionPrior
from dalle2.text_encoders import Concatenated, PaddedText, load_clip_text
from dalle2.unet import UNetConfig

INDEX = "model_index.json"
PIPELINES = ("StableUnCLIPPipeline", "StableUnCLIPImg2ImgPipeline")
CAPTIONS = ("a photo of a dog", "a red bicycle beside a wall", "an oil painting of two ships")
"""What the usual length of z_t is measured on."""
SCHEDULES: dict[ScheduleName, dict[str, Any]] = {
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "scaled-linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
}
OBJECTIVES = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


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
        "_diffusers_version": "0.36.0",
        **{part: ["transformers", name] for part, name in of_transformers.items()},
        **{part: ["diffusers", name] for part, name in of_diffusers.items()},
        "image_normalizer": ["stable_diffusion", "StableUnCLIPImageNormalizer"],
    }


def scheduler_of(config: UNetConfig) -> dict[str, Any]:
    """Return the scheduler whose steps are those of `Schedule.steps`, as diffusers writes it."""
    betas = {
        name: value * 1000 / config.times if name != "beta_schedule" else value
        for name, value in SCHEDULES[config.schedule].items()
    }
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": config.times,
        "prediction_type": OBJECTIVES[config.objective],
        "clip_sample": False,
        "timestep_spacing": "trailing",
        **betas,
    }


def schedule_of(folder: Path) -> dict[str, Any]:
    """Return schedule, times and objective of a scheduler's folder, as fields of a `UNetConfig`."""
    file = folder / "scheduler_config.json"
    found = parse_json(file, dict)
    times, kind = found.get("num_train_timesteps", 1000), found.get("prediction_type", "epsilon")
    objectives = {theirs: ours for ours, theirs in OBJECTIVES.items()}
    betas = [found.get(name) for name in ("beta_schedule", "beta_start", "beta_end")]
    for name, own in SCHEDULES.items():
        scaled = [x * 1000 / times if isinstance(x, float) else x for x in own.values()]
        if betas[: len(scaled)] == scaled and kind in objectives:
            return {"schedule": name, "times": times, "objective": objectives[kind]}
    raise ValueError(
        f"{file} has the betas {' '.join(map(str, betas))} and predicts {kind}, expected one of "
        f"{', '.join(SCHEDULES)} and one of {', '.join(objectives)}"
    )


def text_features(clip: Clip, captions: Sequence[str]) -> Tensor:
    """Return z_t of captions with their own lengths, [B, D]."""
    inputs = {k: x.to(clip.model.device) for k, x in clip.tokenize(captions, warn=False).items()}
    with torch.no_grad():
        found = clip.model.get_text_features(**inputs)
    return getattr(found, "pooler_output", found)


def usual_length(clip: Clip) -> float:
    """Return the mean length of z_t."""
    return float(text_features(clip, CAPTIONS).norm(dim=1).mean())


def write_stable_unclip(model: Unclip, folder: Path) -> None:
    """Write a DALL·E 2 as a StableUnCLIPPipeline, with unit vectors as embeddings.

    Raises: ValueError for a model that such a pipeline cannot hold, or a folder that is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty, expected a new folder")
    autoencoder, prior, text = model.image_tokenizer, model.prior, model.text
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as made:
        path = Path(made) / "model"
        write_unet(model.decoder, path / "unet")
        write_autoencoder(autoencoder, path / "vae")
        write_prior(prior, path, model.encoder.text_len)
        _write_embedding_parts(path, model.read.embedding_width)
        _write_schedulers(path, model.decoder.config, prior)
        _write_text_towers(path, model.encoder, tower)
        model.encoder.save_pretrained(path / CLIP_NAME)
        model.generation.save(path)
        model.info.save(path)
        kinds = (type(part.tokenizer).__name__ for part in (model.encoder, tower))
        write_atomic(path / INDEX, json.dumps(index(*kinds), indent=2) + "\n")
        os.replace(path, folder)


def _write_embedding_parts(path: Path, width: int) -> None:
    """Write the statistics of unit vectors, and a scheduler that adds no noise to them."""
    config = {"_class_name": "StableUnCLIPImageNormalizer", "embedding_dim": width}
    tensors = {"mean": torch.zeros(1, width), "std": torch.full((1, width), width**-0.5)}
    write_part(path / "image_normalizer", config, tensors)
    no_noise = {"_class_name": "DDPMScheduler", "trained_betas": [1e-12], "num_train_timesteps": 1}
    _write_scheduler(path / "image_noising_scheduler", no_noise)


def _write_schedulers(path: Path, config: UNetConfig, prior: DiffusionPrior) -> None:
    """Write the schedulers of decoder and prior."""
    _write_scheduler(path / "scheduler", scheduler_of(config))
    steps = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": prior.config.times,
        "prediction_type": "sample",
        "clip_sample": False,
        "timestep_spacing": "trailing",
        **SCHEDULES[prior.config.schedule],
    }
    _write_scheduler(path / "prior_scheduler", steps)


def _write_scheduler(folder: Path, config: Mapping[str, Any]) -> None:
    write_atomic(folder / "scheduler_config.json", json.dumps(config, indent=2) + "\n")


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


def read_stable_unclip(folder: Path, out: Path, clip: str | Path | None = None) -> Unclip:
    """Convert the pipeline in a folder to the model folder `out`, and return it.

    Args:
        clip: folder or Hugging Face name of the CLIP of its embeddings; None is the one that
            `write_stable_unclip` wrote.

    Raises: ValueError where a part is missing, damaged or of another architecture.
    """
    kind = parse_json(folder / INDEX, dict).get("_class_name")
    if kind not in PIPELINES:
        raise ValueError(f"{folder} holds a {kind}, expected a {' or '.join(PIPELINES)}")
    if clip is None and not (folder / CLIP_NAME).is_dir():
        raise ValueError(
            f"{folder} holds no whole CLIP, expected --clip with that of its embeddings, such as "
            "openai/clip-vit-large-patch14 (of 768 numbers)"
        )
    encoder = Clip.from_pretrained(clip or folder / CLIP_NAME)
    autoencoder = read_autoencoder(folder / "vae")
    autoencoder.save(out)
    encoder.save_pretrained(out / CLIP_NAME)
    encoders = Encoders.of(out, out / CLIP_NAME)
    text = load_clip_text(folder / "text_encoder", "cpu", folder / "tokenizer")
    _, statistics = read_part(folder / "image_normalizer")
    squares = statistics["mean"].square() + statistics["std"].square()
    empty = text([""]).states[0]
    decoder = read_unet(
        folder / "unet",
        length=float(squares.sum().sqrt()),
        text_len=len(empty),
        text_encoders=("clip-text:text-0",),
        encoders=str(encoders),
        **schedule_of(folder / "scheduler"),
    )
    decoder.null_caption.copy_(empty)
    size = autoencoder.downsampling * decoder.config.side
    autoencoder.config = replace(autoencoder.config, image_size=size)
    has_prior, own_clip = (folder / "prior").is_dir(), clip is None
    length = 1.0 if own_clip or not has_prior else usual_length(encoder)
    model = Unclip(
        autoencoder,
        decoder,
        encoder,
        read_prior(folder, encoders.clip, length) if has_prior else None,
        text=Concatenated([text], decoder.config.text_encoders),
        clip=encoder,
        generation=GenerationConfig.load(folder) if own_clip else None,
    )
    model.save_pretrained(out)
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
        refuse_training(config.out)
        with folder_lock(config.out):
            model = read_stable_unclip(config.folder, config.out, config.clip)
        count = sum(p.numel() for p in model.decoder.parameters())
        size, prior = model.image_tokenizer.image_size, "with" if model.prior else "without"
        print(
            f"The model is in {config.out}: a decoder of {count / 1e6:,.0f} million parameters, "
            f"images of {size} × {size} pixels, {prior} a prior"
        )
