"""CLIP and SigLIP: embed captions and images in one space, and score images (paper §2.6).

The paper samples 512 candidates and keeps those that a contrastive model (Radford et al. 2021,
arXiv 2103.00020) scores highest for the caption. Any `CLIPModel` or `SiglipModel` of transformers
works, and so do ours with the modified ResNet. `new_clip` builds one to train.

Legend: B captions, N images, D width of the shared space.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import processors
from torch import Tensor, nn

from dalle1.clip.arch import ClipArch
from dalle1.clip.checks import UnfitClip, check_clip, check_files, check_weights, lower_cases
from dalle1.clip.losses import BIAS, MAX_LOG_SCALE, unit_features
from dalle1.data.cleaning import SURROGATE
from dalle1.data.images import to_rgb
from dalle1.devices import inference
from dalle1.storage import BUNDLED, CLIP_NAME, model_folder
from dalle1.text.bpe import Tokenizer

if TYPE_CHECKING:  # transformers takes seconds to import: it is imported where it is used
    from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

SCALE = "logit_scale"
START, END, PAD = "<|start|>", "<|end|>", "<|pad|>"
NEW_MEAN = NEW_STD = 0.5  # normalization of the pixels of a new model


def clip_folder(name_or_dir: str | Path) -> Path:
    """Return the folder of a CLIP, its newest checkpoint, or that of the "bundled" one."""
    is_bundled = str(name_or_dir) == "bundled"
    return BUNDLED / CLIP_NAME if is_bundled else model_folder(name_or_dir)


def random_blur(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur half of the images `[B, 3, H, W]` at random, by random amounts; H and W are even.

    A dVAE's images are blurrier than those that a CLIP is trained on.
    """
    size = images.shape[-2:]
    blurred = F.interpolate(F.avg_pool2d(images, 2), size=size, mode="bilinear")
    softer = F.interpolate(F.avg_pool2d(images, 4), size=size, mode="bilinear")
    draw = torch.rand(3, len(images), 1, 1, 1, generator=generator, device=images.device)
    blur = torch.lerp(blurred, softer, draw[0])
    return torch.lerp(images, blur, draw[1] * (draw[2] < 0.5))


class Clip:
    """A contrastive model with its tokenizer and image processor."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        processor: BaseImageProcessor,
        precision: str = "fp32",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.processor = processor
        self.precision = precision

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | Path,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
    ) -> Clip:
        """Load a CLIP or SigLIP from a folder, by its Hugging Face name, or the "bundled" one.

        A name is looked up in the local cache first, then on the network. Weights are loaded as
        float32, whatever their stored type. `precision` (fp32, bf16, fp16) is that of matrix
        products. ValueError where there is no complete model.
        """
        folder = clip_folder(name_or_dir)
        name = str(folder if folder.is_dir() else name_or_dir)
        is_folder = os.path.isdir(name)
        if not is_folder and (isinstance(name_or_dir, Path) or not _is_hub_name(name)):
            raise ValueError(f"no CLIP at {name}: the folder does not exist")
        if not is_folder and "/" not in name:
            raise ValueError(
                f"no CLIP at {name}: the folder does not exist; on Hugging Face, names have a /"
            )
        if is_folder:
            check_weights(folder)
            check_files(folder)
        failure: Exception | None = None
        for local_only in (True,) if is_folder else (True, False):
            try:
                with quiet_transformers():
                    parts = _load(name, local_files_only=local_only)
                break
            except Exception as error:  # tokenizers raises nothing more special
                failure = error
        else:
            raise _cannot_load(name, failure) from failure
        clip = cls(*parts, precision)
        clip.model.eval().requires_grad_(False).to(device)
        try:
            check_clip(clip, name)
        except UnfitClip:
            raise
        except Exception as error:  # wrong types in its JSON files fail in any way
            raise _cannot_load(name, error) from error
        return clip

    def save_pretrained(self, directory: Path, dtype: torch.dtype | None = None) -> None:
        """Write Hugging Face files that transformers can load without this package.

        `dtype` is the type of the stored weights, except scalars (default: unchanged). Existing
        files in `directory` are replaced one by one, after all new files are complete. The scale
        is limited to 100, as in the paper, except for SigLIP.
        """
        directory = Path(directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
        model = self.model if dtype is None else copy.deepcopy(self.model).to(dtype)
        numbers = {k: x for k, x in self.model.state_dict().items() if x.ndim == 0}
        weights = model.state_dict() | numbers
        if model.config.model_type != "siglip":
            weights[SCALE] = weights[SCALE].clamp(max=MAX_LOG_SCALE)
            if BIAS in weights:  # transformers' CLIPModel has no such weight: a mistake to it
                setattr(model.config, BIAS, float(weights.pop(BIAS)))
        unfinished = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        try:
            with quiet_transformers():
                model.save_pretrained(unfinished, state_dict=weights)
                for part in (self.tokenizer, self.processor):
                    part.save_pretrained(unfinished)
            directory.mkdir(exist_ok=True)
            for file in unfinished.iterdir():
                os.replace(file, directory / file.name)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    @property
    def text_len(self) -> int:
        """The maximum number of tokens in a caption, including start and end."""
        return self.model.config.text_config.max_position_embeddings

    @property
    def image_size(self) -> int:
        """The side of the square input images in pixels."""
        return self.model.config.vision_config.image_size

    def arch(self) -> ClipArch:
        """Return the architecture of both towers; ValueError for a SigLIP."""
        from dalle1.clip.towers import arch_of

        return arch_of(self.model)

    def tokenize(self, captions: Sequence[str], warn: bool = True) -> dict[str, Tensor]:
        """Return the inputs of `get_text_features` for captions, on the CPU.

        They are padded to the longest (SigLIP: to `text_len`). Captions that exceed the model's
        limit are truncated, with a warning if `warn` is set.
        """
        if isinstance(captions, str) or not captions:
            raise ValueError(f"captions is {captions!r}, expected a list of at least one string")
        captions = [SURROGATE.sub("\ufffd", caption) for caption in captions]
        if lower_cases(self):
            captions = [caption.lower() for caption in captions]
        whole = self.tokenizer(captions, truncation=False, verbose=False)["input_ids"]
        too_long = sum(len(ids) > self.text_len for ids in whole)
        if too_long and warn:
            warnings.warn(
                f"{too_long} of {len(captions)} captions have more than the {self.text_len} tokens "
                "that this CLIP reads; they are truncated",
                stacklevel=2,
            )
        is_siglip = self.model.config.model_type == "siglip"
        inputs = self.tokenizer(
            captions,
            truncation=True,
            max_length=self.text_len,
            padding="max_length" if is_siglip else True,
            return_tensors="pt",
        )
        # SigLIP was trained on full-length text with its padding visible; it pools the last token.
        kept = ("input_ids",) if is_siglip else ("input_ids", "attention_mask")
        return {name: inputs[name] for name in kept}

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Resize, crop and normalize images for the model: `[N, 3, size, size]` on its device."""
        if isinstance(images, (Image.Image, str, Path)):
            raise ValueError(f"images is a {type(images).__name__}, expected a list of PIL images")
        if not images:
            raise ValueError("images is empty, expected a list of at least one image")
        pixels = self.processor(
            images=[to_rgb(image) for image in images],
            input_data_format="channels_last",  # otherwise an image 3 pixels high is misread
            return_tensors="pt",
        )["pixel_values"]
        return pixels.to(self.model.device, self.model.dtype)

    def normalise(self, images: Tensor) -> Tensor:
        """Normalize images [B, 3, H, W] in [0, 1] by the model's mean and standard deviation."""
        mean, std = (
            images.new_tensor(values).view(3, 1, 1)
            for values in (self.processor.image_mean, self.processor.image_std)
        )
        return (images - mean) / std

    def embed_text(self, captions: Sequence[str], batch_size: int = 256) -> Tensor:
        """Embed captions as unit vectors `[B, D]`, on the model's device."""
        inputs = {name: x.to(self.model.device) for name, x in self.tokenize(captions).items()}
        parts = zip(*(x.split(batch_size) for x in inputs.values()))
        tower = self.model.get_text_features
        return finite(torch.cat([self._embed(tower, **dict(zip(inputs, x))) for x in parts]))

    def embed_images(self, images: Sequence[Image.Image], batch_size: int = 64) -> Tensor:
        """Embed images as unit vectors `[N, D]`, on the model's device."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        starts = range(0, max(len(images), 1), batch_size)
        batches = (self.preprocess(images[start : start + batch_size]) for start in starts)
        return finite(torch.cat([self.embed_pixels(pixels) for pixels in batches]))

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Embed the output of `preprocess` as unit vectors `[N, D]`; NaN where the model fails."""
        return self._embed(self.model.get_image_features, pixel_values=pixels)

    def _embed(self, tower: Callable[..., Any], **inputs: Tensor) -> Tensor:
        """Compute unit features; in fp32 from then on, if they overflow otherwise."""
        with inference(self.model.device, self.precision):
            features = unit_features(tower(**inputs))
        if self.precision == "fp32" or features.isfinite().all():
            return features
        warnings.warn(f"this CLIP overflows in {self.precision}; it computes in fp32", stacklevel=3)
        self.precision = "fp32"
        return self._embed(tower, **inputs)

    def read(self, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Read what `tokenize` returned: states of all tokens [B, T, W], unit vectors [B, D]."""
        with inference(self.model.device, self.precision):
            states = self.model.text_model(**inputs).last_hidden_state
        return states.float(), self._embed(self.model.get_text_features, **inputs)

    def score(self, caption: str, images: Sequence[Image.Image], batch_size: int = 64) -> Tensor:
        """Compute the cosine similarities `[N]` of images with a caption, in [-1, 1]."""
        embeds, text = self.embed_images(images, batch_size), self.embed_text([caption])[0]
        with inference(self.model.device):
            return embeds @ text

    def probabilities(self, scores: Tensor) -> Tensor:
        """Compute the softmax of the `scores` [N] times the learned scale; they sum to 1."""
        return (self.model.logit_scale.detach().exp().item() * scores.float()).softmax(-1)


def finite(features: Tensor) -> Tensor:
    """Return features; ValueError where one is nan or infinite, as nothing is ranked by those."""
    if not features.isfinite().all():
        raise ValueError(
            "the CLIP's features are nan or infinite in fp32; its weights are damaged, use another "
            "CLIP or an earlier checkpoint"
        )
    return features


def new_clip(tokenizer: Tokenizer | PreTrainedTokenizerBase, arch: ClipArch) -> Clip:
    """Build a CLIP with random weights (torch's global generator).

    Args:
        tokenizer: ours, or that of another CLIP.
    """
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    is_ours = isinstance(tokenizer, Tokenizer)
    text_tokenizer = _tokenizer_with_ends(tokenizer, arch.text_len) if is_ours else tokenizer
    side = arch.image_size
    with quiet_transformers():
        from dalle1.clip.towers import new_model

        model = new_model(arch, text_tokenizer)
        processor = CLIPImageProcessorPil(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            do_center_crop=True,
            image_mean=[NEW_MEAN] * 3,
            image_std=[NEW_STD] * 3,
        )
    return Clip(model, text_tokenizer, processor)


def _tokenizer_with_ends(tokenizer: Tokenizer, text_len: int) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    bpe = tokenizers.Tokenizer.from_str(tokenizer.bpe.to_str())  # a copy
    bpe.add_special_tokens([START, END, PAD])
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        special_tokens=[(token, bpe.token_to_id(token)) for token in (START, END)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        model_max_length=text_len,
        clean_up_tokenization_spaces=False,
    )


def _load(name: str, *, local_files_only: bool) -> tuple[Any, Any, Any]:
    """Load model, tokenizer and image processor; errors are transformers' own."""
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel, SiglipModel

    from dalle1.clip.towers import ResNetCLIPModel

    # Without trust_remote_code, transformers may ask whether to run code of the folder.
    safely: Any = {"local_files_only": local_files_only, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(name, **safely)
    models = {"clip": CLIPModel, "siglip": SiglipModel, "clip_resnet": ResNetCLIPModel}
    if config.model_type not in models:
        family, _, rest = config.model_type.partition("_")
        if family in models and rest in ("text_model", "vision_model"):
            found, missing = ("text", "image")[:: 1 if rest == "text_model" else -1]
            raise ValueError(f"it has a {found} tower, and no {missing} tower")
        raise ValueError(f"its model_type is {config.model_type!r}, expected clip or siglip")
    model, info = models[config.model_type].from_pretrained(
        name,
        local_files_only=local_files_only,
        dtype=torch.float32,  # half precision is slow or missing on CPUs, and scores are compared
        output_loading_info=True,
    )
    if info["missing_keys"]:  # transformers would continue with random weights
        raise ValueError(f"its weights miss {', '.join(sorted(info['missing_keys'])[:3])} …")
    if (bias := getattr(config, BIAS, None)) is not None:
        model.register_parameter(BIAS, nn.Parameter(torch.tensor(bias)))
    tokenizer = AutoTokenizer.from_pretrained(name, **safely)
    # The Pillow backend needs no torchvision, and gives the same pixels with and without it.
    processor = AutoImageProcessor.from_pretrained(name, backend="pil", **safely)
    return model, tokenizer, processor


def _cannot_load(name: str, error: Exception | None) -> ValueError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    remedy = "use a folder or Hugging Face name of a CLIPModel or SiglipModel"
    return ValueError(f"cannot load a CLIP from {name} ({reason}): {remedy}")


def _is_hub_name(name: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


_ONE_AT_A_TIME = RLock()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide the messages and progress bars of transformers and the hub, then restore them.

    One thread at a time: while it loads, transformers replaces functions of torch. A second thread
    would take the replacements for the originals, and leave them in torch for good.
    """
    with _ONE_AT_A_TIME:
        yield from _quiet()


def _quiet() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    had_bars = transformers_logging.is_progress_bar_enabled()
    try:
        transformers_logging.disable_progress_bar()
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if had_bars:
            transformers_logging.enable_progress_bar()
