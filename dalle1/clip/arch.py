"""How large a CLIP is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ClipArch:
    """The two towers of a CLIP (Radford et al. 2021, tables 19 and 20)."""

    image_size: int = 128
    """Side in pixels of the pictures that it reads; a multiple of patch_size, or of 32."""
    patch_size: int | None = 16
    """Side in pixels of the ViT's patches; None for the modified ResNet."""
    layers: int | tuple[int, int, int, int] = 4
    """Of the image tower: a number for a ViT; four, one a stage, for the modified ResNet."""
    width: int = 192
    """Of the ViT, or of the modified ResNet after its stem."""
    text_width: int = 128
    """Of the text tower."""
    text_layers: int = 2
    """Of the text tower."""
    text_len: int = 32
    """Tokens of a caption that are read, start and end included."""
    head_dim: int = 32
    """Channels of every attention head."""
    embed_dim: int = 128
    """Of the space in which captions and pictures meet."""
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    """Of the transformers. OpenAI's: quick_gelu, which is x σ(1.702 x)."""

    def __post_init__(self) -> None:
        if (self.patch_size is None) == isinstance(self.layers, int):
            raise ValueError(
                f"layers is {self.layers} and patch_size {self.patch_size}: expected one number "
                "and a patch_size for a ViT, four numbers and none for the modified ResNet"
            )
        multiple = self.patch_size or 32
        if self.image_size % multiple:
            raise ValueError(
                f"image_size is {self.image_size}: {multiple}, "
                f"{'patch_size' if self.patch_size else 'the reduction of the ResNet'}, must "
                "divide it"
            )
        last = self.width if self.patch_size else 32 * self.width
        if last % self.head_dim or self.text_width % self.head_dim:
            raise ValueError(
                f"head_dim is {self.head_dim}: it must divide both towers' widths, {last} and "
                f"{self.text_width}"
            )

    def differences(self, other: ClipArch) -> str | None:
        """Give the flags that make `other` what this is; None where it is so already."""
        given, wanted = asdict(self), asdict(other)
        changed = {k: v for k, v in given.items() if v != wanted[k]}
        flags = (f"--model.{k.replace('_', '-')} {_spelled(v)}" for k, v in changed.items())
        return " ".join(flags) or None


def _spelled(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
