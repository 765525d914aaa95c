"""The other image tokenizer: VQ-VAE and VQGAN, trained here or imported."""

from dalle1.vqgan.model import VQGAN, VQGANConfig

__all__ = ["VQGAN", "VQGANConfig"]
