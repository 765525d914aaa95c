"""A CLIP of this project that only scores, without transformers.

Importing transformers takes as much processor time as sampling an image. So our own CLIP, the
modified ResNet beside CLIP's text tower, is also read here, from the same files.

Legend: B captions or images, T tokens of a caption, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dalle1.clip.checks import check_clip
from dalle1.clip.loading import Clip, clip_folder
from dalle1.clip.resnet import WIDENING, ModifiedResNet
from dalle1.empty_modules import without_storage
from dalle1.json_files import parse_json
from dalle1.tensor_files import read_tensors

MODEL_TYPE = "clip_resnet"
PROCESSING: dict[str, Any] = {
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_processor_type": "CLIPImageProcessor",
    "resample": Image.Resampling.BICUBIC,
    "rescale_factor": 1 / 255,
}
"""What the image processor does, the same in all of our CLIPs."""


class TextLayer(nn.Module):
    """A layer of CLIP's text tower, with the names of transformers."""

    def __init__(self, width: int, hidden: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(width, eps) for _ in range(2))
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        layers = {"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)}
        self.mlp = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] → [B, T, D]
        y = self.layer_norm1(x)
        q, k, v = (
            self.self_attn[f"{name}_proj"](y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in "qkv"
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.self_attn["out_proj"](y.transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.layer_norm2(x))))


class TextTower(nn.Module):
    """Captions [B, T] to the state of their first end token, [B, D]."""

    embeddings: Any
    encoder: Any

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, self.end = config.hidden_size, config.eos_token_id
        sizes = {
            "token_embedding": config.vocab_size,
            "position_embedding": config.max_position_embeddings,
        }
        self.embeddings = nn.ModuleDict({k: nn.Embedding(n, width) for k, n in sizes.items()})
        heads, eps = config.num_attention_heads, config.layer_norm_eps
        layers = [
            TextLayer(width, config.intermediate_size, heads, eps)
            for _ in range(config.num_hidden_layers)
        ]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.final_layer_norm = nn.LayerNorm(width, eps)

    def forward(self, ids: Tensor) -> Tensor:
        # Captions are padded at their right, and attention is causal: no state sees padding.
        x = self.embeddings["token_embedding"](ids)
        x = x + self.embeddings["position_embedding"].weight[: ids.shape[1]]
        for layer in self.encoder["layers"]:
            x = layer(x)
        ends = (ids == self.end).int().argmax(-1)
        return self.final_layer_norm(x)[torch.arange(len(x), device=x.device), ends]


class ScoringModel(nn.Module):
    """Both towers, with the functions and names of a model of transformers."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        text, vision, width = config.text_config, config.vision_config, config.projection_dim
        self.text_model = TextTower(text)
        self.text_projection = nn.Linear(text.hidden_size, width, bias=False)
        self.visual = ModifiedResNet(
            vision.layers,
            image_size=vision.image_size,
            width=vision.hidden_size // WIDENING,
            heads=vision.num_attention_heads,
            embed_dim=width,
        )
        self.logit_scale = nn.Parameter(torch.tensor(0.0))

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        return self.logit_scale.dtype

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed captions [B, T]: [B, D]. The mask is that of the padding, which nothing sees."""
        return self.text_projection(self.text_model(input_ids))

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Embed preprocessed images [B, 3, H, W]: [B, D]."""
        return self.visual(pixel_values)


class ScoringTokenizer:
    """The tokenizer of our CLIPs, called as those of transformers are."""

    def __init__(self, folder: Path) -> None:
        settings = parse_json(folder / "tokenizer_config.json", dict)
        self.init_kwargs: dict[str, Any] = {}
        self.bpe = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.pad = settings["pad_token"], self.bpe.token_to_id(settings["pad_token"])

    def __call__(
        self,
        captions: Sequence[str],
        *,
        truncation: bool,
        max_length: int | None = None,
        padding: bool = False,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> dict[str, Any]:
        self.bpe.no_truncation()
        self.bpe.no_padding()
        if truncation and max_length is not None:
            self.bpe.enable_truncation(max_length)
        if padding:
            self.bpe.enable_padding(pad_token=self.pad[0], pad_id=self.pad[1])
        rows = self.bpe.encode_batch(list(captions))
        found = {"input_ids": [row.ids for row in rows]}
        found["attention_mask"] = [row.attention_mask for row in rows]
        return {k: torch.tensor(v) for k, v in found.items()} if return_tensors else found


class ScoringProcessor:
    """The image processor of our CLIPs: resize the shorter side, crop the centre, normalize."""

    def __init__(self, folder: Path) -> None:
        path = folder / "preprocessor_config.json"
        settings = parse_json(path, dict)
        self.image_mean, self.image_std = settings.pop("image_mean"), settings.pop("image_std")
        self.side = settings.pop("size")["shortest_edge"]
        crop = settings.pop("crop_size")
        if settings != PROCESSING or crop != {"height": self.side, "width": self.side}:
            raise ValueError(f"{path} is not that of a CLIP of this project")

    def __call__(self, images: Sequence[Image.Image], **_: Any) -> dict[str, Tensor]:
        pixels = np.stack([np.asarray(self._cropped(image)) for image in images])
        scaled = (pixels.astype(np.float64) * PROCESSING["rescale_factor"]).astype(np.float32)
        mean, std = (np.array(x, np.float32) for x in (self.image_mean, self.image_std))
        return {"pixel_values": torch.from_numpy((scaled - mean) / std).permute(0, 3, 1, 2)}

    def _cropped(self, image: Image.Image) -> Image.Image:
        short = min(image.size)
        width, height = (
            self.side if n == short else int(self.side * n / short) for n in image.size
        )
        left, top = (width - self.side) // 2, (height - self.side) // 2
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        return resized.crop((left, top, left + self.side, top + self.side))


class ScoringClip(Clip):
    """A `Clip` without transformers; whole again to be saved."""

    folder: Path

    def save_pretrained(self, directory: Path, dtype: torch.dtype | None = None) -> None:
        Clip.from_pretrained(self.folder).save_pretrained(directory, dtype)


def load_scoring_clip(
    name_or_dir: str | Path, device: str | torch.device = "cpu", precision: str = "fp32"
) -> Clip:
    """Load a CLIP to score with: one of ours without transformers, any other with it.

    The arguments, errors and scores are those of `Clip.from_pretrained`.
    """
    folder = clip_folder(name_or_dir)
    try:
        clip = _load_ours(folder, device, precision)
        check_clip(clip, str(folder))
        return clip
    except Exception:  # not ours, or damaged: transformers loads it, or reports why it cannot
        return Clip.from_pretrained(name_or_dir, device, precision)


def _namespace(value: Any) -> Any:
    """Return a JSON value whose objects have attributes."""
    if not isinstance(value, dict):
        return value
    return SimpleNamespace(**{name: _namespace(item) for name, item in value.items()})


def _load_ours(folder: Path, device: str | torch.device, precision: str) -> ScoringClip:
    config = _namespace(parse_json(folder / "config.json", dict))
    if config.model_type != MODEL_TYPE or config.text_config.hidden_act != "gelu":
        raise ValueError(f"{folder} holds no CLIP of this project")
    tokenizer, processor = ScoringTokenizer(folder), ScoringProcessor(folder)
    with without_storage():
        model: Any = ScoringModel(config)
    tensors = read_tensors(folder / "model.safetensors", torch.float32)
    model.load_state_dict(dict(tensors), assign=True)
    model.eval().requires_grad_(False).to(device)
    clip = ScoringClip(model, tokenizer, processor, precision)  # type: ignore[arg-type]
    clip.folder = folder
    return clip
