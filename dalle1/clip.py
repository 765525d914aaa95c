"""CLIP and SigLIP: embed captions and pictures in one space, score (paper §2.6).

The paper draws 512 candidates and keeps those that a contrastive model (Radford et al. 2021,
arXiv 2103.00020) finds nearest to the caption. Any `CLIPModel` or `SiglipModel` that transformers
can load serves; `tiny_clip` builds a small one to be trained from nothing.

Legend: B captions, N pictures, D width of the shared space.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from tokenizers import processors
from torch import Tensor

from dalle1.text import Tokenizer
from dvae.weights import model_folder

if TYPE_CHECKING:  # transformers takes seconds to import: it is imported where it is used
    from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

START, END, PAD = "<|start|>", "<|end|>", "<|pad|>"
TINY_MEAN = TINY_STD = 0.5  # what `normalise` and the tiny model's image processor share
MAX_LOGIT_SCALE = 100.0  # Radford et al. 2021, §2.5

_LOAD_ERRORS = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError),
    SafetensorError,
)


@dataclass(frozen=True, kw_only=True)
class ContrastiveLoss:
    """What `contrastive_loss` measures, both averaged over the batch and over both directions."""

    total: Tensor  # [] nats
    accuracy: Tensor  # [] share of pairs whose partner is the nearest of the batch, no gradient


def contrastive_loss(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor | float
) -> ContrastiveLoss:
    """Compute the symmetric InfoNCE loss of `[B, D]` unit-length pairs, averaged over the batch.

    `logit_scale` is the factor on the cosines (CLIP keeps its logarithm as a parameter).
    """
    if image_embeds.ndim != 2 or image_embeds.shape != text_embeds.shape:
        shapes = f"{tuple(image_embeds.shape)} and {tuple(text_embeds.shape)}"
        raise ValueError(f"embeddings have shapes {shapes}: expected the same [B, D] twice")
    with torch.autocast(image_embeds.device.type, enabled=False):  # bf16 is too coarse at ×100
        logits = logit_scale * image_embeds.float() @ text_embeds.float().T  # [B image, B text]
    pairs = torch.arange(len(logits), device=logits.device)
    total = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
    hits = torch.cat([side.argmax(dim=1) == pairs for side in (logits, logits.T)])
    return ContrastiveLoss(total=total, accuracy=hits.float().mean())


def pair_loss(model: PreTrainedModel, pixels: Tensor, input_ids: Tensor) -> ContrastiveLoss:
    """Compute a CLIPModel's contrastive loss on a batch of pairs.

    Args:
        pixels: [B, 3, H, W], normalised as the model wants.
        input_ids: [B, T], from `Clip.tokenize`. Padding comes last, so that causal text needs no
            attention mask.
    """
    images = unit_features(model.get_image_features(pixel_values=pixels))
    texts = unit_features(model.get_text_features(input_ids=input_ids))
    # The learned temperature stops at its limit, as it has no gradient beyond.
    scale = model.logit_scale.clamp(max=math.log(MAX_LOGIT_SCALE)).exp()
    return contrastive_loss(images, texts, scale)


def normalise(images: Tensor) -> Tensor:
    """Bring pictures in [0, 1] to the range that `tiny_clip` reads."""
    return (images - TINY_MEAN) / TINY_STD


def soften(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur every second picture a little, each differently: `[B, 3, H, W]`, H and W even.

    A dVAE's pictures are softer than those that the scores are learned on.
    """
    size = images.shape[-2:]
    blurred = F.interpolate(F.avg_pool2d(images, 2), size=size, mode="bilinear")
    softer = F.interpolate(F.avg_pool2d(images, 4), size=size, mode="bilinear")
    draw = torch.rand(3, len(images), 1, 1, 1, generator=generator, device=images.device)
    blur = torch.lerp(blurred, softer, draw[0])
    return torch.lerp(images, blur, draw[1] * (draw[2] < 0.5))


class Clip:
    """A contrastive model with its own way of preparing text and pictures."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        processor: BaseImageProcessor,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.processor = processor

    @classmethod
    def from_pretrained(cls, name_or_dir: str | Path, device: str | torch.device = "cpu") -> Clip:
        """Load a CLIP or SigLIP from a folder, or by its Hugging Face name.

        A name is looked up in the local cache first, then on the network. Weights are loaded as
        float32 whatever their stored type. ValueError when that gives no complete model.
        """
        folder = model_folder(name_or_dir)
        name = str(folder if folder.is_dir() else name_or_dir)
        is_folder = os.path.isdir(name)
        if not is_folder and (isinstance(name_or_dir, Path) or not _is_hub_name(name)):
            raise ValueError(f"no CLIP at {name}: there is no such folder")
        failure: Exception | None = None
        for local_only in (True,) if is_folder else (True, False):
            try:
                with _quiet_transformers():
                    parts = _load(name, local_files_only=local_only)
                break
            except _LOAD_ERRORS as error:
                failure = error
        else:
            reason = " ".join(str(failure).split())[:300] or type(failure).__name__
            remedy = "give a folder or Hugging Face name of a CLIPModel or SiglipModel"
            raise ValueError(f"cannot load a CLIP from {name} ({reason}): {remedy}") from failure
        clip = cls(*parts)
        clip.model.eval().requires_grad_(False).to(device)
        clip._check_image_size(name)
        return clip

    def save_pretrained(self, directory: Path, dtype: torch.dtype | None = None) -> None:
        """Write plain Hugging Face files that transformers loads by itself.

        `dtype` is the type of the stored weights (default: as they are); files already in
        `directory` are replaced one by one, and only once all new ones are complete.
        """
        directory = Path(directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
        model = self.model if dtype is None else copy.deepcopy(self.model).to(dtype)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        try:
            with _quiet_transformers():
                for part in (model, self.tokenizer, self.processor):
                    part.save_pretrained(unfinished)
            directory.mkdir(exist_ok=True)
            for file in unfinished.iterdir():
                os.replace(file, directory / file.name)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    @property
    def text_len(self) -> int:
        """The most tokens of a caption that the model reads, start and end included."""
        return self.model.config.text_config.max_position_embeddings

    @property
    def image_size(self) -> int:
        """The side in pixels of the square pictures that the model reads."""
        return self.model.config.vision_config.image_size

    def tokenize(self, captions: Sequence[str], *, full_length: bool = False) -> dict[str, Tensor]:
        """Prepare captions as inputs of `get_text_features`, on the CPU.

        They are padded to the longest, or to `text_len` with `full_length` (SigLIP: always).
        Captions beyond the model's limit are cut, with a warning.
        """
        if isinstance(captions, str) or not captions:
            raise ValueError(f"captions is {captions!r}: pass a list of at least one string")
        captions = list(captions)
        whole = self.tokenizer(captions, truncation=False, verbose=False)["input_ids"]
        too_long = sum(len(ids) > self.text_len for ids in whole)
        if too_long:
            warnings.warn(
                f"{too_long} of {len(captions)} captions exceed the {self.text_len} tokens that "
                "this CLIP reads: the rest of them is ignored",
                stacklevel=2,
            )
        is_siglip = self.model.config.model_type == "siglip"
        inputs = self.tokenizer(
            captions,
            truncation=True,
            max_length=self.text_len,
            padding="max_length" if full_length or is_siglip else True,
            return_tensors="pt",
        )
        # SigLIP was trained on full-length text with its padding visible; it pools the last token.
        kept = ("input_ids",) if is_siglip else ("input_ids", "attention_mask")
        return {name: inputs[name] for name in kept}

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Resize, crop and normalise as the model wants: `[N, 3, size, size]` on its device."""
        if not images:
            raise ValueError("images is empty: pass a list of at least one picture")
        pixels = self.processor(
            images=[image.convert("RGB") for image in images],
            input_data_format="channels_last",  # else a picture 3 pixels high is misread
            return_tensors="pt",
        )["pixel_values"]
        return pixels.to(self.model.device, self.model.dtype)

    @torch.inference_mode()
    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """Embed captions as unit vectors `[B, D]`, on the model's device."""
        inputs = {name: x.to(self.model.device) for name, x in self.tokenize(captions).items()}
        return unit_features(self.model.get_text_features(**inputs))

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image.Image], batch_size: int = 64) -> Tensor:
        """Embed pictures as unit vectors `[N, D]`, on the model's device."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
        starts = range(0, max(len(images), 1), batch_size)
        batches = (self.preprocess(images[start : start + batch_size]) for start in starts)
        features = [self.model.get_image_features(pixel_values=pixels) for pixels in batches]
        return torch.cat([unit_features(part) for part in features])

    def score(self, caption: str, images: Sequence[Image.Image]) -> Tensor:
        """Compare pictures with a caption: cosine similarities `[N]` in [-1, 1]."""
        return self.embed_images(images) @ self.embed_text([caption])[0]

    def _check_image_size(self, name: str) -> None:
        prepared = tuple(self.preprocess([Image.new("RGB", (8, 8))]).shape[-2:])
        if prepared != (self.image_size, self.image_size):
            raise ValueError(
                f"the CLIP in {name} is inconsistent: its image processor gives {prepared} pixels, "
                f"its model reads {self.image_size}: put the right preprocessor_config.json there"
            )


def unit_features(output: Any) -> Tensor:
    """Take the features out of `get_text_features` or `get_image_features`, at unit length."""
    features = output if isinstance(output, Tensor) else output.pooler_output
    return F.normalize(features.float(), dim=-1)


def tiny_clip(
    tokenizer: Tokenizer,
    *,
    image_size: int = 128,
    patch_size: int = 16,
    width: int = 192,
    layers: int = 4,
    text_width: int = 128,
    text_layers: int = 2,
    text_len: int = 32,
    embed_dim: int = 128,
    head_dim: int = 32,
) -> Clip:
    """Build a small CLIP with random weights (torch's global generator) and our vocabulary."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    if image_size % patch_size or width % head_dim or text_width % head_dim:
        raise ValueError(
            f"patch_size must divide image_size (got {patch_size}, {image_size}), and head_dim "
            f"both widths (got {head_dim}; {width}, {text_width})"
        )
    text_tokenizer = _tokenizer_with_ends(tokenizer, text_len)
    text = _tower(text_width, text_layers, head_dim) | {
        "vocab_size": len(text_tokenizer),
        "max_position_embeddings": text_len,
        "bos_token_id": text_tokenizer.bos_token_id,
        # The model pools where it finds this id (its default points into CLIP's own vocabulary,
        # and 2 would mean the old rule "the largest id", which here is the pad).
        "eos_token_id": text_tokenizer.eos_token_id,
        "pad_token_id": text_tokenizer.pad_token_id,
    }
    vision = _tower(width, layers, head_dim) | {"image_size": image_size, "patch_size": patch_size}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=embed_dim)
    side = {"height": image_size, "width": image_size}
    with _quiet_transformers():
        model = CLIPModel(config).eval()
        # On short sequences twice as fast to train on a CPU as the fused kernel.
        model.set_attn_implementation("eager")
        processor = CLIPImageProcessorPil(
            size=side,
            crop_size=side,
            do_center_crop=False,
            image_mean=[TINY_MEAN] * 3,
            image_std=[TINY_STD] * 3,
        )
    return Clip(model, text_tokenizer, processor)


def _tower(width: int, layers: int, head_dim: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // head_dim,
        "hidden_act": "gelu",
    }


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

    config = AutoConfig.from_pretrained(name, local_files_only=local_files_only)
    models = {"clip": CLIPModel, "siglip": SiglipModel}
    if config.model_type not in models:
        raise ValueError(f"its model_type is {config.model_type!r}, expected clip or siglip")
    model, info = models[config.model_type].from_pretrained(
        name,
        local_files_only=local_files_only,
        dtype=torch.float32,  # half precision is slow or missing on CPUs, and scores are compared
        output_loading_info=True,
    )
    if info["missing_keys"]:  # transformers would go on with random weights
        raise ValueError(f"its weights lack {', '.join(sorted(info['missing_keys'])[:3])} …")
    tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local_files_only)
    # The Pillow backend needs no torchvision, and gives the same pixels with and without it.
    processor = AutoImageProcessor.from_pretrained(
        name, local_files_only=local_files_only, backend="pil"
    )
    return model, tokenizer, processor


def _is_hub_name(name: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' and the hub's notes and progress bars off the screen, then restore."""
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
