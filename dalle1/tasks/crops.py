"""What the trainings of image models share: random crops of images, without captions.

Stage 1 is trained on crops, be it a dVAE, a VQ-VAE or an autoencoder, and so is an upsampler.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from dalle1.data import Example, ReadOptions, Sample, first_examples, open_source
from dalle1.data.crops import Augmentation, augmented, centre_square
from dalle1.data.images import grid, save_png, to_float, to_pil, to_tensor
from dalle1.devices import autocast
from dalle1.training import distributed
from dalle1.training.config import TrainConfig, resolve_precision
from dalle1.training.loop import train_loader
from dalle1.training.resume_key import contents_of
from dalle1.training.task import Model, Task


@dataclass(frozen=True, kw_only=True)
class CropTrainConfig(TrainConfig):
    """Settings of a training on crops. A subclass adds `model`, which has an `image_size`."""

    init: Path | None = None
    """Folder of a model of the same architecture to fine-tune."""
    crop_size: int = 256
    """Side of the random training crops in pixels, a multiple of the pixels per code or latent."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """Random crops of the training images."""
    validation_images: int = 64
    """Number of validation images, which are not trained on."""

    @property
    def image_size(self) -> int:
        """Side of the validation images in pixels."""
        return self.model.image_size  # type: ignore[attr-defined]

    @property
    def crop_multiple(self) -> int:
        """Pixels of which a crop's side is a multiple."""
        return 8

    @property
    def decode_size(self) -> int:
        """Shorter side that suffices as files are decoded, in pixels; 0: their own."""
        return 0

    def __post_init__(self) -> None:
        super().__post_init__()
        step = self.crop_multiple
        if self.crop_size % step or not step <= self.crop_size <= self.image_size:
            raise ValueError(
                f"crop_size is {self.crop_size}, expected a multiple of {step} from {step} to "
                f"model.image_size, {self.image_size}"
            )
        if self.validation_images < 1:
            raise ValueError(f"validation_images is {self.validation_images}, expected 1 or more")


def crop(config: CropTrainConfig, sample: Sample, rng: random.Random) -> Example:
    """Prepare one example: a random crop, [3, size, size]."""
    image = augmented(
        sample.image(), config.crop_size, rng, config.augmentation, config.allow_upscale
    )
    return {"images": to_tensor(image)}


def centred(config: CropTrainConfig, sample: Sample, _: random.Random) -> Example:
    """Prepare one example to validate on: the centre of an image, [3, size, size]."""
    size = config.image_size
    return {"images": to_tensor(centre_square(sample.image(), size, config.allow_upscale))}


def refuse_other_architecture(
    what: str, folder: Path, loaded: Any, wanted: Any, ignored: tuple[str, ...] = ()
) -> None:
    """Raise ValueError where the config of a loaded model is not the one that is trained."""
    then, now = asdict(loaded), asdict(wanted)
    changed = [name for name in now if then[name] != now[name] and name not in ignored]
    if changed:
        flags = " ".join(f"--model.{name.replace('_', '-')} {then[name]}" for name in changed)
        raise ValueError(f"the {what} in {folder} has another architecture; add {flags}")


class Reconstructs(Protocol):
    """A model that encodes images and decodes them again."""

    def encode(self, images: Tensor) -> Tensor: ...
    def decode(self, codes: Tensor) -> Tensor: ...


Config = TypeVar("Config", bound=CropTrainConfig)


class CropTask(Task[Model], Generic[Model, Config]):
    """Trains a model on crops of images, and validates it on the centres of others."""

    def __init__(self, config: Config) -> None:
        self.device = distributed.init(config.device)
        self.config = config = resolve_precision(config, self.device)
        torch.manual_seed(config.seed)
        self.model = self.initial().to(self.device).train()
        options = ReadOptions(
            size=config.image_size,
            seed=config.seed,
            captions=False,
            cleaning=config,
            decode_size=config.decode_size,
        )
        source = open_source(config.data, "train", options)
        self.loader = train_loader(source, partial(self.prepare, config), config)
        files = {"init": config.init and self.init_file(config.init), **self.files()}
        self.contents = distributed.broadcast_from_main(partial(contents_of, source, **files))
        whole = config.decode_size and config.image_size
        held = open_source(config.data, "validation", replace(options, decode_size=whole))
        first = partial(first_examples, held, partial(centred, config), config.validation_images)
        self.held = to_float(distributed.broadcast_from_main(first)["images"]).to(self.device)

    prepare: ClassVar[Callable[..., Example]] = staticmethod(crop)
    """(config, sample, rng) → one example; a function of a module, which workers can unpickle."""

    def initial(self) -> Model:
        """Return a new model, or one that starts from --init."""
        raise NotImplementedError

    def init_file(self, folder: Path) -> Path:
        """Return the file that --init names."""
        raise NotImplementedError

    def files(self) -> Mapping[str, Path]:
        """Return the files of other models of the config, by setting, for resuming."""
        return {}

    def codec(self, model: Model) -> Reconstructs:
        """Return what encodes and decodes images; the model itself by default."""
        return model  # type: ignore[return-value]

    def sample(self, model: Model, path: Path) -> None:
        """Write 16 images above their reconstructions."""
        images, codec = self.held[:16], self.codec(model)
        with autocast(self.device, self.config.precision):
            both = to_pil(torch.cat([images, codec.decode(codec.encode(images))]))
        save_png(grid(both, len(images)), path)
