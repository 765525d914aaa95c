"""The architecture of a CLIP."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ClipArch:
    """The two towers of a CLIP (Radford et al. 2021, tables 19 and 20)."""

    image_size: int = 128
    """Side of the input images in pixels; a multiple of patch_size, or of 32 for the ResNet."""
    patch_size: int | None = 16
    """Side of the ViT's patches in pixels; None selects the modified ResNet."""
    layers: int | tuple[int, int, int, int] = 4
    """Layers of a ViT, or four numbers: the blocks in each stage of the modified ResNet."""
    width: int = 192
    """Width of the ViT, or of the modified ResNet after its stem."""
    text_width: int = 128
    """Width of the text tower."""
    text_layers: int = 2
    """Layers of the text tower."""
    text_len: int = 32
    """Maximum number of tokens in a caption, including start and end."""
    head_dim: int = 32
    """Channels of every attention head."""
    embed_dim: int = 128
    """Dimension of the shared space of captions and images."""
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    """Activation of the transformers. OpenAI uses quick_gelu, x σ(1.702 x)."""

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
        """Return the flags that change `other` into this; None where they are equal."""
        mine, others = asdict(self), asdict(other)
        changed = {k: v for k, v in mine.items() if v != others[k]}
        flags = (f"--model.{k.replace('_', '-')} {_flag_value(v)}" for k, v in changed.items())
        return " ".join(flags) or None


def _flag_value(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
