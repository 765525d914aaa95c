"""What a prior and a decoder are told: captions as a text encoder reads them, and embeddings.

B batch, T tokens of the longest caption, W width of the CLIP's text tower, D of its shared space.

The paper trains a text encoder with each network. Here the frozen text tower of the CLIP reads
captions: its last states are the tokens, and its embedding is z_t. `dalle2.text_encoders` has
others.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dalle1.clip import Clip
from dalle1.storage import model_folder, weights_digest
from dalle1.text.prompt_weights import WeightedPrompts

SIZES = 6
"""Numbers of `Caption.sizes`."""


@dataclass(frozen=True)
class Caption:
    """Captions as a text encoder reads them."""

    states: Tensor
    """[B, T, W]: the last state of each token."""
    mask: Tensor
    """[B, T], bool: True at tokens, False at padding."""
    embedding: Tensor
    """[B, D]: a CLIP's z_t, unit vectors; or the pooled states of another text encoder."""
    ids: Tensor | None = None
    """[B, T]: the CLIP's own tokens, for networks that do not read its states."""

    sizes: Tensor | None = None
    """[B, 6]: height and width of the original, top and left of the crop in the scaled image,
    height and width of the crop, in pixels, in the order of SDXL; NaN where unknown."""

    def repeat(self, count: int) -> Caption:
        """Return each caption `count` times in a row."""
        parts = {k: x.repeat_interleave(count, 0) for k, x in vars(self).items() if x is not None}
        return Caption(**parts)

    def where(self, keep: Tensor) -> Caption:
        """Return the captions with those that are not kept [B] dropped: no token, z_t = 0."""
        mask, embedding = self.mask & keep[:, None], self.embedding * keep[:, None].to(self.states)
        return replace(self, mask=mask, embedding=embedding)


class TextEncoder(ABC):
    """Reads captions; it is not trained."""

    width: int
    """W: width of the states."""
    embedding_width: int
    """D: width of the pooled embedding."""
    models: Sequence[nn.Module]
    """Networks that it reads by."""

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> Caption:
        """Read captions."""

    @abstractmethod
    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write what a model folder needs to load it, weights rounded to `dtype`."""

    def digest(self) -> str:
        """Return a hash of the first 1,024 numbers of each weight."""
        found = hashlib.sha256()
        for model in self.models:
            for name, x in model.state_dict().items():
                found.update(f"{name} {tuple(x.shape)}\n".encode())
                found.update(x.flatten()[:1024].float().cpu().numpy().tobytes())
        return found.hexdigest()[:16]

    def __call__(self, captions: Sequence[str]) -> Caption:
        return self.encode(captions)

    def contrasts(self, prompts: WeightedPrompts, count: int) -> list[tuple[Caption, Tensor]]:
        """Read P prompts without their weighted parts, `count` times each, with strengths [P·C].

        Where nothing is left of a prompt, its caption is dropped, as guidance drops it.
        """
        found = []
        for texts, strengths in zip(prompts.others, prompts.strengths, strict=True):
            caption = self(texts)
            keep = torch.tensor([bool(text) for text in texts], device=caption.mask.device)
            each = torch.tensor(strengths).repeat_interleave(count)
            found.append((caption.where(keep).repeat(count), each))
        return found


class CaptionReader(TextEncoder):
    """Reads captions by the text tower of a CLIP or SigLIP."""

    def __init__(self, clip: Clip) -> None:
        self.clip, config = clip, clip.model.config
        self.models = (clip.model,)
        self.width = config.text_config.hidden_size
        is_siglip = config.model_type == "siglip"
        self.embedding_width = (
            config.text_config.projection_size if is_siglip else config.projection_dim
        )

    def encode(self, captions: Sequence[str]) -> Caption:
        inputs = self.clip.tokenize(captions)
        return self.read({k: x.to(self.clip.model.device) for k, x in inputs.items()})

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        self.clip.save_pretrained(folder, dtype)

    @torch.no_grad()
    def read(self, inputs: dict[str, Tensor]) -> Caption:
        """Read what `Clip.tokenize` returned."""
        states, embedding = self.clip.read(**inputs)
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        # Tensors of inference mode cannot take part in a backward pass.
        return Caption(states.clone(), mask, embedding.clone(), inputs["input_ids"])


def clip_digest(folder: str | Path) -> str:
    """Return a hash of a CLIP's weights, by which priors and decoders know it."""
    return weights_digest(model_folder(folder) / "model.safetensors")
