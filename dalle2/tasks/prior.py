"""Train the diffusion prior of DALL·E 2: CLIP image embeddings from captions (§2.2).

    dalle1 train prior small --data runs/embedded --out runs/prior

writes runs/prior/latest/prior.safetensors and a log. The same command resumes after an
interruption.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle1.clip.loading import clip_folder
from dalle1.console import one_line_errors, parse_preset
from dalle1.devices import autocast
from dalle1.training import distributed
from dalle1.training.interrupts import graceful_run
from dalle1.training.loop import fit
from dalle2.conditioning import Caption, clip_digest
from dalle2.diffusion.objective import Errors, prediction_errors, sample_times
from dalle2.prior import DiffusionPrior, PriorArch, PriorConfig
from dalle2.prior_metrics import prior_metrics
from dalle2.tasks.diffusion import (
    DiffusionLoss,
    binned,
    diffusion_loss,
    kept,
    validation_times,
)
from dalle2.tasks.embedded import EmbeddedTask, EmbeddedTrainConfig


@dataclass(frozen=True, kw_only=True)
class PriorTrainConfig(EmbeddedTrainConfig):
    """Settings of a diffusion prior's training (§2.2, App. C)."""

    model: PriorArch = field(default_factory=PriorArch)
    """Architecture of the prior."""
    caption_dropout: float = 0.1
    """Share of samples whose caption is dropped, for guidance. Paper: 0.1."""
    sampling_steps: int = 64
    """Steps of the embeddings that are sampled at each validation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(
                f"caption_dropout is {self.caption_dropout}, expected a number in [0, 1]"
            )
        if not 1 <= self.sampling_steps <= self.model.times:
            raise ValueError(
                f"sampling_steps is {self.sampling_steps}, expected 1 to {self.model.times}"
            )


_small = PriorTrainConfig(
    out=Path("runs/prior"),
    steps=3_000,
    batch_size=128,
    optimizer="muon",
    learning_rate=2e-3,
    final_learning_rate=1e-5,
    weight_decay=6e-2,
    beta2=0.96,
    validate_every=500,
)

# The paper's, table 3.
_paper = replace(
    _small,
    model=PriorArch(width=2048, depth=24, heads=32, mlp="gelu"),
    optimizer="adamw",
    steps=600_000,
    batch_size=4096,
    learning_rate=1.1e-4,
    warmup_steps=5_000,
    ema_decay=0.9999,
)

PRIOR_PRESETS: dict[str, PriorTrainConfig] = {"small": _small, "paper": _paper}


class PriorTask(EmbeddedTask[DiffusionPrior, PriorTrainConfig]):
    """Trains a diffusion prior."""

    def initial(self) -> DiffusionPrior:
        return DiffusionPrior(
            PriorConfig(
                **asdict(self.config.model),
                embedding_width=self.pairs.read.embedding_width,
                text_width=self.pairs.read.width,
                clip=clip_digest(clip_folder(self.config.clip)),
            )
        )

    def losses(
        self, batch: Mapping[str, Tensor], step: int, rng: torch.Generator
    ) -> Sequence[DiffusionLoss]:
        _, embedding, caption = self.pairs.split(batch)
        t = sample_times(len(embedding), self.model.schedule, rng)
        caption = caption.where(kept(len(embedding), self.config.caption_dropout, rng))
        return [diffusion_loss(self.errors(self.model, embedding, caption, t, rng))]

    def errors(
        self,
        model: DiffusionPrior,
        embedding: Tensor,
        caption: Caption,
        t: Tensor,
        rng: torch.Generator,
    ) -> Errors:
        """Return the errors of each sample's predicted z_i, in scaled units."""
        x0 = embedding * model.scale
        predict = lambda x, t: model(x, t, caption)  # noqa: E731
        return prediction_errors(predict, "x0", model.schedule, x0, t, rng)

    @torch.no_grad()
    def validate(self, model: DiffusionPrior) -> Iterator[tuple[str, float]]:
        """Yield the loss in all and in ten ranges of times, and the metrics of sampled z_i."""
        _, embedding, caption = self.pairs.split(self.held)
        yield from binned(self.measure(model))
        with autocast(self.device, self.config.precision):
            sampled = model.sample(caption, [0], steps=self.config.sampling_steps)[:, 0]
        yield from prior_metrics(sampled, F.normalize(embedding, dim=1), caption.embedding)

    @torch.no_grad()
    def measure(self, model: DiffusionPrior) -> Tensor:
        """Store in the model how far it is off on the validation pairs; return each one's error."""
        _, embedding, caption = self.pairs.split(self.held)
        t = validation_times(len(embedding), model.schedule, self.device)
        rng = torch.Generator(self.device).manual_seed(0)
        with autocast(self.device, self.config.precision):
            errors = self.errors(model, embedding, caption, t, rng).total
        model.measure(t, errors)
        return errors

    def save(self, model: DiffusionPrior, folder: Path) -> None:
        self.measure(model.to(self.device))
        model.save(folder)


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        config = parse_preset(PRIOR_PRESETS, args, __doc__.splitlines()[0])
        with graceful_run(config):
            fit(PriorTask(config), config)
        if distributed.is_main():
            print(f"The prior is in {config.out}")
