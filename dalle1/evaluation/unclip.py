"""Which parts of a DALL·E 2 matter: the same prompts, sampled with parts exchanged or removed.

The paper's ablations (§5.1, table 1): the full stack; the caption's own embedding in place of the
prior's; a decoder trained so; the caption alone, as GLIDE; one or two samples of the prior; and
guidance. Beside them the embedding of a rendering of the scene that the prompt describes, which is
the most that any prior could reach, the other prior, and a DALL·E 1.

A classifier that never reads the prompt decides which images are correct, as in `toybox`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dalle1.console import bar
from dalle1.devices import pick_device
from dalle1.evaluation.classifier import BUNDLED, load_classifier
from dalle1.evaluation.report import Scores, wilson_interval
from dalle1.evaluation.toybox_prompts import MAX_PROMPTS, SPLITS, choose_prompts
from dalle1.evaluation.variants import Variant, measured
from dalle2.ar_prior import load_prior
from dalle2.loading import load_pipeline
from dalle2.pipeline import Unclip

FULL = "full stack"
MEASURES = ("first", "best", "diversity")


@dataclass(frozen=True, kw_only=True)
class UnclipOptions:
    """Measure which parts of a DALL·E 2 matter, on Toybox prompts."""

    model: str = "unclip"
    """Folder or name of a DALL·E 2 with a prior."""
    text_decoder: str | None = None
    """Folder of a decoder that was trained with --embedding text, for a row of its own."""
    ar_prior: Path | None = None
    """Folder of another prior between the same embeddings, for a row of its own."""
    beside: str | None = None
    """Folder or name of a DALL·E 1 that samples the same prompts, such as bundled."""
    guidance: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    """Guidance scales of the decoder, a row each."""
    num_prompts: int = 100
    """Prompts of held-out pairs, and as many of training pairs."""
    num_candidates: int = 4
    """Candidates of each prompt: the first counts, the best by CLIP, and how they differ."""
    steps: int = 20
    """Steps of the decoder."""
    seed: int = 0
    """Random seed of the prompts and of sampling."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1, ... auto is cuda, else mps, else cpu."""
    classifier: Path | None = None
    """File or training folder of the Toybox classifier; the bundled classifier by default."""
    out: Path = Path("runs/unclip-evaluation")
    """Folder for unclip.json."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_prompts <= MAX_PROMPTS:
            raise ValueError(f"num_prompts is {self.num_prompts}, expected 1 to {MAX_PROMPTS}")
        for name, least in (("num_candidates", 2), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")
        if any(scale < 0 for scale in self.guidance):
            raise ValueError(f"guidance is {self.guidance}, expected numbers of at least 0")


def variants(options: UnclipOptions) -> Iterator[Variant]:
    """Yield the rows that can be measured; ValueError for a model that cannot be ablated."""

    def loaded(name: str) -> Unclip:
        found = load_pipeline(name, device=options.device)
        if not isinstance(found, Unclip):
            raise ValueError(f"{name} is a DALL·E 1, expected a DALL·E 2")
        return found

    model = loaded(options.model)
    if model.prior is None:
        raise ValueError(f"{options.model} has no prior; join one by dalle1 export --prior FOLDER")
    steps = {"steps": options.steps}
    yield Variant(name=FULL, model=model, how=steps)
    yield Variant(name="one prior sample", model=model, how={**steps, "prior_samples": 1})
    if options.ar_prior is not None:
        other = model.with_parts(load_prior(options.ar_prior, model.device))
        yield Variant(name="other prior", model=other, how=steps)
    text = {**steps, "embedding": "caption"}
    yield Variant(name="z_t as z_i", model=model, how=text)
    if options.text_decoder is not None:
        yield Variant(name="decoder trained on z_t", model=loaded(options.text_decoder), how=text)
    yield Variant(name="caption alone", model=model, how={**steps, "embedding": "none"})
    yield Variant(name="true z_i", model=model, how=steps, reads_images=True)
    for scale in options.guidance:
        yield Variant(name=f"guidance {scale:g}", model=model, how={**steps, "guidance": scale})
    if options.beside is not None:
        yield Variant(name="beside", model=load_pipeline(options.beside, device=options.device))


def evaluate_unclip(options: UnclipOptions) -> Scores:
    """Yield `ROW/first`, `ROW/best` and `ROW/diversity` of each variant, and the number of prompts.

    `first` is the share of prompts whose first candidate is correct, `best` of those whose best by
    CLIP is. `diversity` is the mean cosine distance of a prompt's candidates from each other.
    """
    classifier = load_classifier(options.classifier or BUNDLED, pick_device(options.device))
    prompts = [p for s in SPLITS for p in choose_prompts(s, options.num_prompts, options.seed)]
    rows = list(variants(options))
    full = rows[0].model
    assert isinstance(full, Unclip)
    yield "prompts", len(prompts)
    with bar(total=len(rows) * len(prompts), unit="prompt") as progress:
        for row in rows:
            found: list[tuple[float, ...]] = []
            number, seed = options.num_candidates, options.seed
            for r in measured(row, prompts, classifier, full.encoder, number, seed):
                found.append((r.correct[0], r.correct[r.best], r.diversity))
                progress.update()
            for name, values in zip(MEASURES, zip(*found)):
                yield f"{row.name}/{name}", sum(values) / len(values)


def format_unclip_table(scores: Mapping[str, float]) -> str:
    """Return a row for each variant, with the 95 % Wilson interval of each share."""
    count = int(scores["prompts"])
    names = list(dict.fromkeys(n.rpartition("/")[0] for n in scores if "/" in n))
    width = max(map(len, names))
    lines = [f"{'':{width}}  {'first':>24}  {'best by CLIP':>24}  diversity"]
    for name in names:
        cells = []
        for measure in ("first", "best"):
            share = scores[f"{name}/{measure}"]
            low, high = wilson_interval(share, count)
            cells.append(f"{f'{share:.1%} ({low:.1%} to {high:.1%})':>24}")
        lines.append(f"{name:{width}}  {'  '.join(cells)}  {scores[f'{name}/diversity']:9.3f}")
    return "\n".join([*lines, f"{count} prompts, half of them of held-out pairs; 95 % intervals."])
