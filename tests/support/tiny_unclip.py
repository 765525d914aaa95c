"""A DALL·E 2 with tiny random parts."""

from __future__ import annotations

from typing import Any

import torch
from tiny_model import CAPTIONS
from torch import nn

from dalle1.clip import Clip, ClipArch, new_clip
from dalle1.model_card import ModelInfo
from dalle1.text.bpe import Tokenizer
from dalle2.autoencoder import Autoencoder, AutoencoderConfig
from dalle2.ldm_autoencoder import LDMAutoencoder, LDMAutoencoderConfig
from dalle2.pipeline import Unclip
from dalle2.prior import DiffusionPrior, PriorConfig
from dalle2.text_encoders import Concatenated, PaddedText
from dalle2.unet import UNet, UNetConfig

TINY_AUTOENCODER = {"image_size": 16, "width": 4, "code_width": 8}


def randomized(model: nn.Module, std: float = 0.2) -> Any:
    """Return the model with random parameters, as zero-initialized branches hide their inlets."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(std * torch.randn(parameter.shape))
    return model.eval()


def tiny_clip(seed: int = 0, **sizes: int) -> Clip:
    """Return a CLIP with embeddings of 8 numbers and text states of 32."""
    torch.manual_seed(seed)
    size = {"image_size": 32, "patch_size": 16, "layers": 1, "width": 32, "embed_dim": 8}
    arch = ClipArch(**{**size, "text_width": 32, "text_layers": 1, "text_len": 12, **sizes})
    return new_clip(Tokenizer.train(CAPTIONS, 270), arch)


def tiny_prior(**sizes: Any) -> DiffusionPrior:
    """Return a prior between the embeddings of `tiny_clip`."""
    size = {"width": 16, "depth": 1, "heads": 2, "embedding_width": 8, "text_width": 32, **sizes}
    return randomized(DiffusionPrior(PriorConfig(**{"clip": "clip", **size})))


def tiny_decoder(**sizes: Any) -> UNet:
    """Return a decoder of 2 × 2 latents of 4 channels."""
    size = {"width": 8, "multipliers": (1,), "blocks": 1, "attention": (2,), "head_width": 8}
    size |= {"side": 2, "embedding_width": 8, "text_width": 32, "encoders": "autoencoder-clip"}
    return randomized(UNet(UNetConfig(**{**size, **sizes})))


def tiny_unclip(prior: DiffusionPrior | None = None) -> Unclip:
    """Return a model of images of 16 × 16 pixels."""
    clip, autoencoder = tiny_clip(), Autoencoder(AutoencoderConfig(**TINY_AUTOENCODER))  # type: ignore[arg-type]
    return Unclip(randomized(autoencoder), tiny_decoder(), clip, prior or tiny_prior(), clip=clip)


def tiny_stable_unclip() -> Unclip:
    """Return a model of images of 8 × 8 pixels that diffusers can hold as a StableUnCLIP."""
    clip, other = tiny_clip(embed_dim=32), tiny_clip(seed=1)
    config = LDMAutoencoderConfig(image_size=8, width=32, multipliers=(1, 2), blocks=1)
    sizes: dict[str, Any] = {"embedding_width": 32, "text_width": 32}
    steps = {"schedule": "linear", "times": 500, "errors": tuple(n / 10 for n in range(10))}
    prior = tiny_prior(**sizes, **steps, mlp="gelu-erf", qk_norm=False)
    sizes |= {"width": 32, "multipliers": (1, 2), "attention": (4,), "head_width": 16, "side": 4}
    reads = {"text_len": 12, "pooled_width": 32, "text_encoders": ("clip-text:text-0",)}
    decoder = tiny_decoder(**sizes, **reads, stable_diffusion=True, schedule="scaled-linear")
    text = PaddedText(other.model.text_model, other.tokenizer)
    decoder.null_caption.copy_(text([""]).states[0])
    together = Concatenated([text], decoder.config.text_encoders)
    autoencoder = randomized(LDMAutoencoder(config), 0.1)
    info = ModelInfo(license="cc-by-4.0")
    return Unclip(autoencoder, decoder, clip, prior, text=together, clip=clip, info=info)
