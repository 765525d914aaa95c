"""Join a trained transformer and a CLIP in one model folder, or publish them on Hugging Face.

dalle1 export --model runs/transformer --clip runs/clip --out my-model --push-to-hub user/my-model
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dalle1.console import one_line_errors, parse
from dalle1.devices import PRECISIONS
from dalle1.hub import check_repo_name
from dalle1.locking import folder_lock
from dalle2.ar_prior import load_prior
from dalle2.autoencoder import autoencoder_digest, load_autoencoder
from dalle2.bundled import name_folders
from dalle2.exchange.stable_unclip import write_stable_unclip
from dalle2.loading import load_pipeline
from dalle2.pipeline import Unclip
from dalle2.upsampler import Upsampler


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Options of `dalle1 export`."""

    model: str
    """Folder of the trained transformer, or the name of a model on Hugging Face."""
    prior: Path | None = None
    """Folder of the trained prior, for a decoder of DALL·E 2, or unclip for the bundled one; by
    default, its own, if any."""
    upsampler: Path | None = None
    """Folder of the trained upsampler, for a decoder of DALL·E 2, or unclip; by default, its own,
    if any."""
    autoencoder: Path | None = None
    """Folder of the autoencoder of a DALL·E 2, after a training of its decoder only; by default,
    its own."""
    clip: Path | None = None
    """Folder of the CLIP that reranks samples; by default, the model's own, if any."""
    out: Path | None = None
    """Output folder; it may be omitted with --push-to-hub."""
    format: Literal["dalle1", "diffusers"] = "dalle1"
    """Format of the output folder: ours, or a StableUnCLIPPipeline of diffusers in fp32, for a
    DALL·E 2 whose decoder has --model.stable-diffusion."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp16"
    """Data type of the saved parameters."""
    push_to_hub: str | None = None
    """Repository on Hugging Face (user/name) to upload the model to; it is created if needed."""
    private: bool = False
    """Create that repository as a private one."""
    license: str | None = None
    """License of the parameters, for the model card: an identifier of Hugging Face, such as mit. By
    default, that of the model, if it is known."""

    def __post_init__(self) -> None:
        name_folders(self, "prior", "upsampler", "autoencoder")
        if self.out is None and self.push_to_hub is None:
            raise ValueError("expected --out FOLDER, --push-to-hub user/name, or both")
        if self.push_to_hub is None and self.private:
            raise ValueError("--private needs --push-to-hub user/name")
        if self.push_to_hub is not None:
            check_repo_name(self.push_to_hub)
        if self.format == "diffusers" and (self.out is None or self.push_to_hub is not None):
            raise ValueError("--format diffusers writes to --out FOLDER alone; upload that folder")


def with_parts(model: Unclip, config: ExportConfig) -> Unclip:
    """Return a DALL·E 2 with the parts that are named; ValueError where one misfits."""
    if config.clip is not None:
        raise ValueError("--clip is for DALL·E 1; a decoder of DALL·E 2 keeps its own CLIP")
    if config.dtype == "bf16":
        raise ValueError("dtype is bf16, expected fp16 or fp32 for DALL·E 2")
    prior = load_prior(config.prior) if config.prior else model.prior
    upsampler = Upsampler.load(config.upsampler) if config.upsampler else None
    autoencoder = None
    if config.autoencoder:
        found, expected = autoencoder_digest(config.autoencoder), model.decoder.config.encoders
        if found != expected.split("-")[0]:
            raise ValueError(
                f"the autoencoder in {config.autoencoder} has other latents than the decoder was "
                "trained on; expected its own, or that after train autoencoder --decoder-only"
            )
        autoencoder = load_autoencoder(
            config.autoencoder, image_size=model.image_tokenizer.image_size
        )
    return model.with_parts(prior, upsampler, autoencoder)


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        config = parse(ExportConfig, args, __doc__.splitlines()[0])
        dtype = PRECISIONS[config.dtype]
        model = load_pipeline(config.model, clip=config.clip, device="cpu", precision=config.dtype)
        if isinstance(model, Unclip):
            model = with_parts(model, config)
        elif flags := [n for n in ("prior", "upsampler", "autoencoder") if getattr(config, n)]:
            flag = f"--{flags[0]}"
            raise ValueError(f"{flag} needs a decoder of DALL·E 2, and {config.model} has none")
        elif config.format == "diffusers":
            raise ValueError(f"diffusers has no DALL·E 1, and {config.model} is one")
        if config.license is not None:
            model.info = replace(model.info, license=config.license)
        if config.out is not None:
            if config.format == "diffusers" and isinstance(model, Unclip):
                write_stable_unclip(model, config.out)
            else:
                with folder_lock(config.out):
                    model.save_pretrained(config.out, dtype)
            size = sum(f.stat().st_size for f in config.out.rglob("*") if f.is_file())
            print(f"The model is in {config.out}: {size / 1e6:.1f} MB")
        if config.push_to_hub is not None:
            url = model.push_to_hub(config.push_to_hub, dtype=dtype, private=config.private or None)
            print(f"The model is at {url}; sample with: dalle1 sample PROMPT --model "
                f"{config.push_to_hub}")  # fmt: skip
