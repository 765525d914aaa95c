"""Image tower and text tower, combined into a model that transformers saves and loads.

A ViT with a causal text tower is transformers' own `CLIPModel`. It has no modified ResNet, so
`ResNetCLIPModel` joins ours to the same text tower. This module imports transformers, which takes
seconds: import it where it is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
)
from transformers.models.clip.modeling_clip import CLIPPreTrainedModel

from dalle1.clip.arch import ClipArch
from dalle1.clip.resnet import WIDENING, ModifiedResNet


class ResNetVisionConfig(CLIPVisionConfig):
    """Config of the modified ResNet; `hidden_size` is the width of its last stage."""

    model_type = "clip_resnet_vision"
    layers: list[int] | tuple[int, ...] = (3, 4, 6, 3)


class ResNetCLIPConfig(CLIPConfig):
    """Config of a CLIP whose image tower is the modified ResNet."""

    model_type = "clip_resnet"
    sub_configs_defaults = {"vision_config": ResNetVisionConfig, "text_config": CLIPTextConfig}  # noqa: RUF012


class ResNetCLIPModel(CLIPPreTrainedModel):
    """A CLIPModel with a modified ResNet; its attention pooling projects to the shared space."""

    config_class = ResNetCLIPConfig
    get_text_features = CLIPModel.get_text_features

    def __init__(self, config: ResNetCLIPConfig) -> None:
        super().__init__(config)
        vision = config.vision_config
        self.text_model = CLIPTextModel._from_config(config.text_config)
        self.text_projection = nn.Linear(
            config.text_config.hidden_size, config.projection_dim, bias=False
        )
        self.visual = ModifiedResNet(
            vision.layers,
            image_size=vision.image_size,
            width=vision.hidden_size // WIDENING,
            heads=vision.num_attention_heads,
            embed_dim=config.projection_dim,
        )
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.post_init()

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Embed preprocessed images [B, 3, H, W]: [B, D]."""
        return self.visual(pixel_values)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ModifiedResNet):  # after its submodules, which it initializes again
            module.reset_parameters()
        if module is self:
            nn.init.normal_(self.text_projection.weight, std=self.text_projection.in_features**-0.5)


AutoConfig.register(ResNetCLIPConfig.model_type, ResNetCLIPConfig)


def new_model(arch: ClipArch, text_tokenizer: Any) -> CLIPModel | ResNetCLIPModel:
    """Build a model with random weights (torch's global generator).

    Args:
        text_tokenizer: of transformers; its vocabulary and special tokens define the text tower.
    """
    text = _transformer(arch.text_width, arch.text_layers, arch) | {
        "vocab_size": len(text_tokenizer),
        "max_position_embeddings": arch.text_len,
        "bos_token_id": text_tokenizer.bos_token_id,
        # The model pools at this id. Its default is from CLIP's own vocabulary, and 2 would select
        # an older rule, "the largest id", which is the pad token here.
        "eos_token_id": text_tokenizer.eos_token_id,
        "pad_token_id": text_tokenizer.pad_token_id,
    }
    if isinstance(arch.layers, int):
        vision = _transformer(arch.width, arch.layers, arch)
        vision |= {"image_size": arch.image_size, "patch_size": arch.patch_size}
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=arch.embed_dim)
        return CLIPModel(config).eval()
    hidden = arch.width * WIDENING
    vision = {"image_size": arch.image_size, "layers": list(arch.layers), "hidden_size": hidden}
    vision["num_attention_heads"] = hidden // arch.head_dim
    return ResNetCLIPModel(
        ResNetCLIPConfig(text_config=text, vision_config=vision, projection_dim=arch.embed_dim)
    ).eval()


def fast_attention(model: Any, device: torch.device) -> None:
    """Select the fastest attention for training: eager for short sequences on a CPU.

    It takes half the time of the fused one there; GPUs have their own kernels.
    """
    vision = model.config.vision_config
    is_vit = isinstance(model, CLIPModel)
    if is_vit and device.type == "cpu" and vision.image_size // vision.patch_size <= 16:
        model.set_attn_implementation("eager")


def arch_of(model: Any) -> ClipArch:
    """Return the architecture of a CLIP; ValueError for a SigLIP, whose text tower differs."""
    if model.config.model_type not in (CLIPConfig.model_type, ResNetCLIPConfig.model_type):
        raise ValueError(f"its model_type is {model.config.model_type!r}, expected a CLIP")
    text, vision = model.config.text_config, model.config.vision_config
    is_vit = isinstance(model, CLIPModel)
    return ClipArch(
        image_size=vision.image_size,
        patch_size=vision.patch_size if is_vit else None,
        layers=vision.num_hidden_layers if is_vit else tuple(vision.layers),
        width=vision.hidden_size // (1 if is_vit else WIDENING),
        text_width=text.hidden_size,
        text_layers=text.num_hidden_layers,
        text_len=text.max_position_embeddings,
        head_dim=text.hidden_size // text.num_attention_heads,
        embed_dim=model.config.projection_dim,
        activation=text.hidden_act,
    )


def _transformer(width: int, layers: int, arch: ClipArch) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // arch.head_dim,
        "hidden_act": arch.activation,
    }
