"""Settings of a transformer's training, and its presets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dalle1.data.cleaning import clean_prompt
from dalle1.data.crops import FOR_TRANSFORMER, Augmentation
from dalle1.model.arch import TransformerArch
from dalle1.training.fine_tuning import FineTuneConfig


@dataclass(frozen=True, kw_only=True)
class TransformerTrainConfig(FineTuneConfig):
    """Settings of a transformer's training (paper §2.2, B.2)."""

    dvae: Path = Path("runs/dvae")
    """Folder of the image tokenizer, whose codes are modelled; as --init, it may be bundled."""
    model: TransformerArch = field(default_factory=TransformerArch)
    """Architecture of the transformer; image tokenizer and vocabulary set the rest."""
    image_size: int | None = None
    """Image side in pixels, a multiple of 8. None: that of the image tokenizer."""
    vocab_captions: int = 20_000
    """Number of captions that the BPE is learned from, the first of the data."""
    bpe_dropout: float = 0.1
    """BPE dropout: probability of skipping a merge, in training only."""
    caption_dropout: float = 0.0
    """Probability of replacing a caption by padding, which guidance needs. Paper: 0."""
    augmentation: Augmentation = FOR_TRANSFORMER
    """Random crops of the training images; data that is already encoded is not cropped."""
    sample_codes: bool = False
    """Whether images are encoded by sampled codes, not by the most likely ones: a regularizer for
    small datasets (paper §2.2, footnote 2). Validation takes the most likely ones. For data that is
    already encoded, see `dalle1 encode --sample-codes`."""
    text_weight: float = 1 / 8
    """Weight of the text loss; that of the image loss is 1 minus this."""
    checkpointing: bool = False
    """Activation checkpointing of each resblock: less memory for a third more computation."""
    compile: bool = False
    """Compile the layers with torch.compile: a slow start, then faster updates."""
    prompts: tuple[str, ...] = (
        "an avocado armchair",
        "a zebra mug",
        "a red star",
        "a galaxy teapot",
        "two gold bells",
        "a blue house above a small pink fish",
    )
    """Prompts of the sample images at each validation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompts:
            raise ValueError("prompts is empty, expected at least one prompt to sample")
        for prompt in self.prompts:
            clean_prompt(prompt)
        for name in ("bpe_dropout", "caption_dropout", "text_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number in [0, 1]")

    def memory_flags(self) -> list[str]:
        return [*([] if self.checkpointing else ["--checkpointing"]), *super().memory_flags()]


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


# One GPU: a cosine, smaller batches, and caption dropout for guidance.
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
    # Half the side, 16 × 16 codes: the caption is a larger part of what there is to learn, and an
    # update takes a third of the time. `toy` then fine-tunes this model (--init).
    "toy-128": replace(
        _transformer_toy,
        out=Path("runs/toy-128"),
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
