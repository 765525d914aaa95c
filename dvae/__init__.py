"""Stage 1 of DALL·E: a discrete VAE between images and grids of codes (paper §2.1, A)."""

from dvae.losses import Distortion, DVAELoss, dvae_loss
from dvae.model import DVAE, Decoder, DVAEConfig, Encoder

__all__ = [
    "DVAE",
    "DVAEConfig",
    "DVAELoss",
    "Decoder",
    "Distortion",
    "Encoder",
    "dvae_loss",
]
