"""Whether the parts of a DALL·E 2 belong together, and options are such as it has."""

from __future__ import annotations

from dataclasses import fields

from torch import Tensor

from dalle1.sampling.filters import Sampling
from dalle1.sampling.generation import GenerationConfig
from dalle2.ar_prior import Prior
from dalle2.autoencoder import AnyAutoencoder
from dalle2.conditioning import CaptionReader, TextEncoder
from dalle2.unet import UNet

COMPLETES_NOTHING = "a DALL·E 2 completes no images; use a model that samples codes"


def check_parts(
    autoencoder: AnyAutoencoder,
    decoder: UNet,
    read: CaptionReader,
    text: TextEncoder | None,
    prior: Prior | None,
) -> None:
    """Raise ValueError for parts that do not fit the decoder.

    Args:
        read: the CLIP of prior and decoder.
        text: the decoder's own text encoders; None for one that reads captions by the CLIP.
    """
    config, shape = decoder.config, autoencoder.latent_shape
    if shape != (config.channels, config.side, config.side):
        raise ValueError(
            f"the autoencoder's latents are {shape}, the decoder expects "
            f"{(config.channels, config.side, config.side)}; use the autoencoder that it was "
            "trained with"
        )
    names = " and ".join(config.text_encoders)
    if bool(names) != (text is not None):
        raise ValueError(f"the decoder's text encoders are {names or 'missing'}, expected those")
    if text is not None:
        found, own = (text.width, text.embedding_width), (config.text_width, config.pooled_width)
        if found != own:
            raise ValueError(
                f"the text encoders {names} have states and embeddings of {found} numbers, the "
                f"decoder expects {own}; use those that it was trained with"
            )
    widths = read.embedding_width, config.text_width if text else read.width
    if (own := (config.embedding_width or widths[0], config.text_width)) != widths:
        raise ValueError(
            f"the CLIP has embeddings and states of {widths} numbers, the decoder expects "
            f"{own}; use the CLIP that it was trained with"
        )
    if prior is not None and not config.embedding_width:
        raise ValueError("the decoder reads no image embedding, expected no prior beside it")
    trained_with = config.encoders.split("-")[-1]
    if prior is not None and prior.config.clip != trained_with:
        raise ValueError(
            f"the prior was trained with the CLIP {prior.config.clip}, the decoder with "
            f"{trained_with}; expected the same CLIP: train one of them again"
        )


def refuse_codes(options: GenerationConfig, known_codes: Tensor | None) -> None:
    """Raise ValueError for options of models that sample codes."""
    plain = GenerationConfig()
    for name in (*(field.name for field in fields(Sampling)), "resample"):
        value, wanted = getattr(options, name), getattr(plain, name)
        if name != "guidance" and value != wanted:
            raise ValueError(
                f"{name} is {value}, expected {wanted}: a diffusion model has no codes"
            )
    if known_codes is not None:
        raise ValueError(COMPLETES_NOTHING)
