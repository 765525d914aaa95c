"""Image tokenizers: stage 1 of DALL·E, as sampling, encoding and stage 2 see it.

B batch, H W image in pixels, h w grid of codes (h = H / downsampling), V codebook size.

To add a class: enter it in `IMAGE_TOKENIZERS` under a `kind` of its own, and have its `save` pass
that kind to `storage.save_weights`, which writes it to the metadata of the model file.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from dalle1.storage import model_folder, read_kind
from dalle1.vqgan.model import FILE_NAME as IMAGE_TOKENIZER_FILE
from dalle1.vqgan.model import VQGAN
from dalle1.vqgan.strided_dvae import StridedDVAE
from dvae.model import DVAE, FILE_NAME


class ImageTokenizer(Protocol):
    """A model that turns images into grids of discrete codes and back."""

    @property
    def codebook_size(self) -> int:
        """V: number of codes."""

    @property
    def downsampling(self) -> int:
        """Pixels per code, along each side."""

    @property
    def image_size(self) -> int:
        """Side of its images in pixels."""

    @property
    def grid_size(self) -> int:
        """Codes along each side of an image: image_size / downsampling."""

    def encode(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] in [0, 1] as codes [B, h, w], integers in [0, V)."""

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes [B, h, w] to images [B, 3, H, W] in [0, 1]."""

    def save(self, directory: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write parameters and config to one model file in `directory`, rounded to `dtype`."""


class ImageTokenizerClass(Protocol):
    """What `load_image_tokenizer` calls: the class of an image tokenizer."""

    def load(
        self, file: str | Path, device: str | torch.device, image_size: int | None
    ) -> ImageTokenizer:
        """Load the file that `save` wrote; see `load_image_tokenizer`."""


IMAGE_TOKENIZERS: dict[str, ImageTokenizerClass] = {
    "dvae": DVAE,
    "vqgan": VQGAN,
    "strided-dvae": StridedDVAE,
}
"""Kind, as in a model file's metadata → class."""


def image_tokenizer_file(directory: str | Path) -> Path:
    """Return the model file of the image tokenizer in a model folder or a training's folder."""
    folder = model_folder(directory)
    other = folder / IMAGE_TOKENIZER_FILE
    return other if other.is_file() else folder / FILE_NAME


@contextmanager
def replaced_image_tokenizer(
    tokenizer: ImageTokenizer, folder: Path, dtype: torch.dtype | None = None
) -> Iterator[Path]:
    """Write an image tokenizer that becomes the folder's only one if the block succeeds.

    Yields its file. So a model that cannot be written, as on a full disk, leaves the earlier one
    whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=".partial") as partial:
        path = tokenizer.save(Path(partial), dtype)
        yield folder / path.name
        os.replace(path, folder / path.name)
    for name in {FILE_NAME, IMAGE_TOKENIZER_FILE} - {path.name}:
        (folder / name).unlink(missing_ok=True)


def load_image_tokenizer(
    directory: str | Path, device: str | torch.device = "cpu", image_size: int | None = None
) -> ImageTokenizer:
    """Load the image tokenizer in `directory`; the kind in its file picks the class.

    Args:
        image_size: side of its images in pixels; None is the size it was trained on.

    Raises: ValueError where the file is missing, damaged or of an unknown kind.
    """
    path = image_tokenizer_file(directory)
    if not path.parent.exists():
        raise ValueError(
            f"no image tokenizer in {path.parent}: the folder does not exist; check its path"
        )
    if not path.is_file():
        raise ValueError(
            f"no image tokenizer in {path.parent}: expected the file {path.name} there"
        )
    kind = read_kind(path) or "dvae"  # dVAEs of earlier versions have none
    if kind not in IMAGE_TOKENIZERS:
        raise ValueError(f"{path} is of kind {kind!r}, expected {' or '.join(IMAGE_TOKENIZERS)}")
    tokenizer = IMAGE_TOKENIZERS[kind].load(path, device, image_size)
    weights = tokenizer.parameters() if isinstance(tokenizer, nn.Module) else ()
    if not all(weight.isfinite().all() for weight in weights):
        raise ValueError(f"the weights in {path} are nan or infinite; use an earlier checkpoint")
    return tokenizer


def require_dvae(tokenizer: ImageTokenizer, folder: str | Path) -> DVAE:
    """Return the image tokenizer of `folder` if it is a `DVAE`, whose codes can be sampled.

    Raises: ValueError for another class.
    """
    if isinstance(tokenizer, DVAE):
        return tokenizer
    kind = type(tokenizer).__name__
    raise ValueError(
        "--sample-codes needs a dVAE, as `dalle1 train dvae` writes it; the image tokenizer in "
        f"{folder} is a {kind}"
    )
