"""CLIP: load any CLIP or SigLIP to score images, train one, rank files, and filter datasets."""

from dalle1.clip.arch import ClipArch
from dalle1.clip.loading import Clip, new_clip, random_blur
from dalle1.clip.losses import ContrastiveLoss, contrastive_loss, pair_loss, sigmoid_loss
from dalle1.clip.scoring import load_scoring_clip

__all__ = [
    "Clip",
    "ClipArch",
    "ContrastiveLoss",
    "contrastive_loss",
    "load_scoring_clip",
    "new_clip",
    "pair_loss",
    "random_blur",
    "sigmoid_loss",
]
