"""CLIP: any of them to score pictures by, one's own to train, and what to do with either.

`dalle1 rank` sorts images by how well they fit a prompt, `dalle1
filter` keeps the pairs of a data set that fit each other.
"""

from dalle1.clip.arch import ClipArch
from dalle1.clip.loading import Clip, new_clip, random_blur
from dalle1.clip.losses import ContrastiveLoss, contrastive_loss, pair_loss, sigmoid_loss

__all__ = [
    "Clip",
    "ClipArch",
    "ContrastiveLoss",
    "contrastive_loss",
    "new_clip",
    "pair_loss",
    "random_blur",
    "sigmoid_loss",
]
