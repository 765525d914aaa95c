"""Train the autoregressive prior of DALL·E 2: codes of CLIP image embeddings, from captions (§2.2).

    dalle1 train ar-prior small --data runs/embedded --out runs/ar-prior

writes runs/ar-prior/latest/prior.safetensors and a log. The same command resumes after an
interruption. Its metrics are those of `dalle1 train prior`, which trains the diffusion prior.
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
from dalle1.model.transformer import TransformerLoss
from dalle1.training import distributed
from dalle1.training.interrupts import graceful_run
from dalle1.training.loop import fit
from dalle2.ar_prior import ARPrior, ARPriorArch, ARPriorConfig
from dalle2.conditioning import Caption, clip_digest
from dalle2.prior_metrics import prior_metrics
from dalle2.tasks.diffusion import kept
from dalle2.tasks.embedded import EmbeddedTask, EmbeddedTrainConfig

PART = 256
"""Captions that the CLIP reads at once as the axes are found."""


@dataclass(frozen=True, kw_only=True)
class ARPriorTrainConfig(EmbeddedTrainConfig):
    """Settings of an autoregressive prior's training (§2.2, App. C)."""

    model: ARPriorArch = field(default_factory=ARPriorArch)
    """Architecture of the prior."""
    pca_pairs: int = 4_096
    """Number of training pairs, the first ones, whose main axes are the components."""
    caption_dropout: float = 0.1
    """Share of samples whose caption is dropped, for guidance. Paper: 0.1."""
    text_weight: float = 0.0
    """Weight of the loss of the caption's tokens; that of the codes is 1 minus this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("caption_dropout", "text_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number in [0, 1]")
        if self.pca_pairs < 2:
            raise ValueError(f"pca_pairs is {self.pca_pairs}, expected at least 2")


_small = ARPriorTrainConfig(
    out=Path("runs/ar-prior"),
    steps=3_000,
    batch_size=128,
    optimizer="muon",
    learning_rate=2e-3,
    final_learning_rate=1e-5,
    weight_decay=4e-2,
    beta2=0.91,
    validate_every=500,
)

# The paper's, table 3, with the nearest square number of codes.
_paper = replace(
    _small,
    model=ARPriorArch(
        width=1664, depth=24, heads=26, mlp="gelu", grid_size=18, buckets=1024, text_len=256
    ),
    optimizer="adamw",
    steps=1_000_000,
    batch_size=4096,
    learning_rate=1.6e-4,
    warmup_steps=5_000,
)

AR_PRIOR_PRESETS: dict[str, ARPriorTrainConfig] = {"small": _small, "paper": _paper}


class ARPriorTask(EmbeddedTask[ARPrior, ARPriorTrainConfig]):
    """Trains an autoregressive prior."""

    def initial(self) -> ARPrior:
        model = ARPrior(
            ARPriorConfig(
                **asdict(self.config.model),
                embedding_width=self.pairs.read.embedding_width,
                text_vocab=len(self.pairs.clip.tokenizer),
                clip=clip_digest(clip_folder(self.config.clip)),
            )
        ).to(self.device)
        first = self.pairs.first(self.pairs.source, self.config.pca_pairs)
        embeddings, captions = [], []
        for start in range(0, len(first["numbers"]), PART):
            batch = {name: tensor[start : start + PART] for name, tensor in first.items()}
            _, embedding, caption = self.pairs.split(batch)
            embeddings.append(embedding)
            captions.append(caption.embedding)
        model.fit(torch.cat(embeddings), torch.cat(captions))
        return model

    def losses(
        self, batch: Mapping[str, Tensor], step: int, rng: torch.Generator
    ) -> Sequence[TransformerLoss]:
        _, embedding, caption = self.pairs.split(batch)
        keep = kept(len(embedding), self.config.caption_dropout, rng)
        return [self.loss(self.model, embedding, caption, keep)]

    def loss(
        self, model: ARPrior, embedding: Tensor, caption: Caption, keep: Tensor
    ) -> TransformerLoss:
        """Compute the loss of the codes, and of the captions that are kept, bool [B]."""
        codes = model.encode(embedding, caption.embedding)
        text = model.tokens(caption.where(keep))
        return model.transformer.loss(text, codes, self.config.text_weight)

    @torch.no_grad()
    def validate(self, model: ARPrior) -> Iterator[tuple[str, float]]:
        """Yield the loss of a code in nats, and the metrics of sampled z_i.

        `coded_image` is the cosine of z_i with what its codes keep, the most that a sample reaches.
        """
        _, embedding, caption = self.pairs.split(self.held)
        own = F.normalize(embedding, dim=1)
        keep = torch.ones(len(embedding), dtype=torch.bool, device=self.device)
        with autocast(self.device, self.config.precision):
            loss = float(self.loss(model, embedding, caption, keep).image)
            sampled = model.sample(caption, [0])[:, 0]
        yield "loss", loss
        coded = model.decode(model.encode(embedding, caption.embedding))
        yield "coded_image", float((own * coded).sum(1).mean())
        yield from prior_metrics(sampled, own, caption.embedding)

    def save(self, model: ARPrior, folder: Path) -> None:
        model.save(folder)


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        config = parse_preset(AR_PRIOR_PRESETS, args, __doc__.splitlines()[0])
        with graceful_run(config):
            fit(ARPriorTask(config), config)
        if distributed.is_main():
            print(f"The prior is in {config.out}")
