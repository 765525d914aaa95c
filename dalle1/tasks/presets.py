"""The recipes by name: what each training is called with when only its preset is given."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from dalle1.clip import ClipArch
from dalle1.clip.losses import Kind as ContrastiveKind
from dalle1.data.images import FOR_TRANSFORMER, RANDOM_SQUARE, Augmentation
from dalle1.model.transformer import TransformerArch
from dalle1.training.loop import TrainConfig
from dalle1.training.schedules import cosine
from dvae import Distortion, DVAEConfig


@dataclass(frozen=True, kw_only=True)
class DVAETrainConfig(TrainConfig):
    """How a dVAE is trained (paper §2.1, A.2)."""

    model: DVAEConfig = field(default_factory=DVAEConfig)
    """Its size."""
    init: Path | None = None
    """Folder of a dVAE to begin with, of the same size: fine-tuning."""
    crop_size: int = 256
    """Side in pixels of the random crops that it is trained on; a multiple of 8."""
    crops_per_picture: int = 1
    """Crops of each picture that is read. Paper: 1. Reading may cost more than cutting."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """How they are cut."""
    distortion: Distortion = "logit-laplace"
    """How far reconstructions are from pictures. Paper: logit-laplace; or mse, or l1."""
    beta: float = 6.6
    """Weight of the KL at the end of its ramp."""
    beta_steps: int = 5_000
    """Updates in which β goes from 0 to its end, along a cosine."""
    temperature: float = 1.0
    """τ of the relaxation at the start."""
    final_temperature: float = 1 / 16
    """τ at the end of its cosine."""
    temperature_steps: int = 150_000
    """Updates in which τ falls."""
    validation_pictures: int = 64
    """Pictures that are set apart to measure it on."""
    usage_weight: float = 0.0
    """Weight of a term that keeps all codes in use, at the start. Paper: 0; small budgets collapse
    without."""
    mse_weight: float = 0.0
    """Weight of the mean squared error beside the distortion, once τ has fallen; before, it rises
    from 0. Paper: 0. It brings what is drawn from the median of what may be there to its mean."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop_size % 8 or not 8 <= self.crop_size <= self.model.image_size:
            raise ValueError(
                f"crop_size is {self.crop_size}, expected a multiple of 8 from 8 to "
                f"model.image_size, {self.model.image_size}"
            )
        for name in ("validation_pictures", "crops_per_picture"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")

        for name in ("temperature", "final_temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number above 0")

    def temperature_at(self, step: int) -> float:
        """τ of the relaxation."""
        return cosine(
            step,
            start=self.temperature,
            end=self.final_temperature,
            duration=self.temperature_steps,
        )

    def mse_weight_at(self, step: int) -> float:
        """Weight of the mean squared error."""
        return cosine(step, start=0.0, end=self.mse_weight, duration=self.temperature_steps)

    def beta_at(self, step: int) -> float:
        """β, the weight of the KL."""
        return cosine(step, start=0.0, end=self.beta, duration=self.beta_steps)


# Paper: no clipping is named. Here a loose one, since a training on other data than the paper's
# should not die of one bad batch.
_dvae_paper = DVAETrainConfig(
    out=Path("runs/dvae"),
    steps=3_000_000,
    batch_size=512,
    learning_rate=1e-4,
    final_learning_rate=1.25e-6,
    schedule_steps=1_200_000,
    warmup_steps=0,
)

# Small budgets: after 56 minutes of one CPU core, 25.90 dB on 1,000 scenes of Toybox, with all of
# 512 codes.
_dvae_small = replace(
    _dvae_paper,
    model=DVAEConfig(
        image_size=128,
        width=32,
        blocks_per_group=1,
        codebook_size=512,
        code_width=64,
        logit_gain=12.0,
        residual_gain=0.25,
        min_log_scale=-2.0,
    ),
    crop_size=64,
    augmentation=Augmentation(resize=(2.0, 2.0)),
    schedule_steps=None,
    steps=10_600,
    batch_size=32,
    learning_rate=3e-3,
    final_learning_rate=1e-4,
    beta2=0.98,
    warmup_steps=100,
    beta=0.1,
    beta_steps=1_000,
    temperature_steps=8_800,
    mse_weight=300.0,
    usage_weight=40.0,
    validation_pictures=1_000,
    validate_every=5_300,
)

# The same at the paper's geometry. Crops show the scenes as large as they are drawn.
_dvae_toy = replace(
    _dvae_small,
    model=replace(_dvae_small.model, image_size=256),
    augmentation=Augmentation(resize=(4.0, 4.0)),
    steps=14_000,
    temperature_steps=11_600,
    validation_pictures=256,
    validate_every=3_500,
)

DVAE_PRESETS: dict[str, DVAETrainConfig] = {
    "toy": _dvae_toy,
    # Goes on from it (--init), and lets go of codes that the usage term alone kept.
    "toy-finetune": replace(
        _dvae_toy,
        out=Path("runs/settled"),
        usage_weight=0.0,
        temperature=1 / 16,
        temperature_steps=1,
        beta_steps=1,
        learning_rate=1e-3,
        final_learning_rate=5e-5,
        steps=2_000,
        validate_every=500,
        save_every=500,
    ),
    "small": _dvae_small,
    "paper": _dvae_paper,
}


@dataclass(frozen=True, kw_only=True)
class TransformerTrainConfig(TrainConfig):
    """How a transformer is trained (paper §2.2, B.2)."""

    dvae: Path = Path("runs/dvae")
    """Folder of the dVAE whose codes it models."""
    model: TransformerArch = field(default_factory=TransformerArch)
    """Its size, but for what dVAE and vocabulary say."""
    image_size: int | None = None
    """Side of the pictures in pixels, a multiple of 8, if not the dVAE's own."""
    init: Path | None = None
    """Folder of a model to begin with, of the same size, with its vocabulary: fine-tuning. With
    rotary positions it may know smaller pictures."""
    vocab_captions: int = 20_000
    """Captions that the BPE is learned from: the first of the data."""
    bpe_dropout: float = 0.1
    """Chance that a merge of the BPE is skipped, in training only."""
    caption_dropout: float = 0.0
    """Chance that a caption is left out, all padding: what guidance needs. Paper: 0."""
    augmentation: Augmentation = FOR_TRANSFORMER
    """How pictures are cut; codes that were made before are as they are."""
    text_weight: float = 1 / 8
    """Weight of the text's loss; the picture's has the rest."""
    checkpointing: bool = False
    """Compute each resblock again going back: less memory for a third more work."""
    compile: bool = False
    """Compile the layers by torch.compile: slow to start, then faster."""
    prompts: tuple[str, ...] = (
        "an avocado armchair",
        "a zebra mug",
        "a red star",
        "a galaxy teapot",
        "two gold bells",
        "a blue house above a small pink fish",
    )
    """What sample pictures are drawn of at each validation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompts:
            raise ValueError("prompts is empty, expected at least one to draw samples of")
        for name in ("bpe_dropout", "caption_dropout", "text_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number in [0, 1]")


# Paper (B.2), but for the average, which it moves every 25 updates by 0.99 in a copy on the CPU.
_transformer_12b = TransformerTrainConfig(
    out=Path("runs/transformer"),
    steps=430_000,
    batch_size=1024,
    learning_rate=4.5e-4,
    schedule="plateau",
    warmup_steps=5_000,
    weight_decay=4.5e-2,
    beta2=0.96,
    variance_clip=5.0,
    ema_decay=0.99,
    ema_every=25,
    checkpointing=True,
)


def _sized(width: int, depth: int, heads: int, **changes: Any) -> TransformerTrainConfig:
    size = replace(_transformer_12b.model, width=width, depth=depth, heads=heads)
    return replace(_transformer_12b, model=size, **changes)


# One GPU: a cosine, smaller batches, and captions left out now and then, for guidance.
_ONE_GPU: dict[str, Any] = {
    "schedule": "cosine",
    "steps": 200_000,
    "warmup_steps": 2_000,
    "batch_size": 64,
    "final_learning_rate": 1.4e-5,
    "variance_clip": None,
    "ema_decay": 0.999,
    "ema_every": 1,
    "caption_dropout": 0.1,
    "checkpointing": False,
}

# The paper's 32 × 32 codes and its masks, for two CPU cores and a few hours: what makes small
# budgets learn faster is in docs/experiments.md.
_transformer_toy = TransformerTrainConfig(
    out=Path("runs/transformer"),
    model=TransformerArch(
        text_vocab=1024,
        text_len=64,
        width=256,
        depth=10,
        heads=4,
        positions="rotary",
        mlp="swiglu",
        qk_norm=True,
    ),
    steps=1_400,
    batch_size=16,
    optimizer="muon",
    learning_rate=2e-3,
    final_learning_rate=1e-5,
    warmup_steps=100,
    weight_decay=4.5e-2,
    beta2=0.99,
    ema_decay=0.998,
    caption_dropout=0.1,
    validate_every=1_000,
    save_every=100,
    prompts=(
        "an avocado armchair",
        "a teapot made of watermelon",
        "a snail that looks like a zebra",
        "a pixel art cat",
        "a sketch of a strawberry lamp",
        "three purple stars below a gold clock",
    ),
)

TRANSFORMER_PRESETS: dict[str, TransformerTrainConfig] = {
    "toy": _transformer_toy,
    # Begins with half the side, 16 × 16 codes, where the caption is a larger part of what there is
    # to learn, and an update takes a third of the time; `toy` goes on from it (--init).
    "toy-128": replace(
        _transformer_toy,
        out=Path("runs/half"),
        image_size=128,
        steps=5_000,
        final_learning_rate=5e-4,
        validate_every=500,
    ),
    "small": _sized(512, 8, 8, **_ONE_GPU),
    "base": _sized(1024, 16, 16, **_ONE_GPU),
    "1b": _sized(2048, 24, 32),
    "2.8b": _sized(1920, 64, 30),
    "5.6b": _sized(2688, 64, 42),
    "12b": _transformer_12b,
}


@dataclass(frozen=True, kw_only=True)
class ClipTrainConfig(TrainConfig):
    """How a CLIP is trained (Radford et al. 2021, arXiv 2103.00020)."""

    model: ClipArch = field(default_factory=ClipArch)
    """Its size."""
    init: str | None = None
    """Folder or Hugging Face name of a CLIP to begin with, of the same size: fine-tuning. It keeps
    its vocabulary."""
    loss: ContrastiveKind = "infonce"
    """infonce, CLIP's; or sigmoid, SigLIP's, with a bias that is learned."""
    encode_at_once: int | None = None
    """Pairs that hold their activations at a time, where a batch does not fit in memory: gradient
    caching, for a third more work. Unlike `accumulate`, the whole batch is compared."""
    augmentation: Augmentation = RANDOM_SQUARE
    """How pictures are cut."""
    soften: bool = False
    """Blur every second picture a little, for dVAEs' are softer. Paper: no."""
    vocab_size: int = 1024
    """BPE tokens at most; they are learned from the data."""
    vocab_captions: int = 20_000
    """Captions that the BPE is learned from: the first of the data."""
    validation_pairs: int = 256
    """Pairs among which retrieval is measured, at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation_pairs < 1:
            raise ValueError(f"validation_pairs is {self.validation_pairs}, expected at least 1")
        if self.encode_at_once is not None and self.encode_at_once < 1:
            raise ValueError(f"encode_at_once is {self.encode_at_once}, expected at least 1")
        if self.loss not in get_args(ContrastiveKind):
            raise ValueError(f"loss is {self.loss!r}, expected infonce or sigmoid")


def _clip_of_the_paper(learning_rate: float, beta2: float, **size: Any) -> ClipTrainConfig:
    # Radford et al. 2021, tables 18 to 20: 32 epochs of 400 million pairs.
    common: dict[str, Any] = {"image_size": 224, "text_width": 512, "text_layers": 12}
    common |= {"text_len": 77, "head_dim": 64, "activation": "quick_gelu"}
    return ClipTrainConfig(
        out=Path("runs/clip"),
        model=ClipArch(**{**common, **size}),
        steps=390_625,
        batch_size=32_768,
        learning_rate=learning_rate,
        final_learning_rate=0.0,
        warmup_steps=2_000,
        weight_decay=0.2,
        beta2=beta2,
        ema_decay=0.0,
        vocab_size=49_152,
        vocab_captions=10_000_000,
        validation_pairs=512,
    )


# The modified ResNet, which learns Toybox in a fraction of a ViT's time: in 50 minutes of one core
# it found the noun of 98.7 % of training pairs, the fill of 99.5 %, when Toybox had 23 nouns.
_clip_small = ClipTrainConfig(
    out=Path("runs/clip"),
    model=ClipArch(image_size=96, patch_size=None, layers=(1, 1, 1, 1), width=16, text_len=24),
    steps=6_000,
    batch_size=128,
    learning_rate=3e-3,
    ema_decay=0.99,
)

CLIP_PRESETS: dict[str, ClipTrainConfig] = {
    "toy": replace(
        _clip_small,
        model=replace(_clip_small.model, image_size=128, width=24, text_len=64),
        soften=True,
    ),
    "small": _clip_small,
    "rn50": _clip_of_the_paper(
        5e-4, 0.999, patch_size=None, layers=(3, 4, 6, 3), width=64, embed_dim=1024
    ),
    "vit-b-32": _clip_of_the_paper(5e-4, 0.98, patch_size=32, layers=12, width=768, embed_dim=512),
    "vit-b-16": _clip_of_the_paper(5e-4, 0.98, patch_size=16, layers=12, width=768, embed_dim=512),
    "vit-l-14": _clip_of_the_paper(
        4e-4, 0.98, patch_size=14, layers=24, width=1024, embed_dim=768, text_width=768
    ),
}
