"""The Toybox classifier: the correct verdict on a scene, training, accuracy and its files."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from toybox_scenes import alone

from dalle1.evaluation import classifier_training
from dalle1.evaluation.classifier import (
    ASPECTS,
    BUNDLED,
    ClassifierConfig,
    ClassifierLogits,
    ToyboxClassifier,
    Verdict,
    load_classifier,
    save_classifier,
    true_verdict,
)
from dalle1.evaluation.classifier_accuracy import accuracy, print_accuracy
from dalle1.evaluation.classifier_training import (
    NONE,
    Renderings,
    answers_of,
    degrade,
    mixed_scenes,
    render_many,
    train_classifier,
)
from dalle1.evaluation.toybox_prompts import SPLITS
from dalle1.toybox import FILLS, NOUNS, STYLES, Item, Scene, render
from dalle1.toybox.captions import plain_caption
from dalle1.toybox.kinds import scenes

CUBE, BALL = ("red", "cube"), ("blue", "ball")
TINY = ClassifierConfig(image_size=32, widths=(8, 16))


def scene(*pairs: tuple[str, str], relation: str | None = None, style: str | None = None) -> Scene:
    items = tuple(Item(fill=fill, noun=noun) for fill, noun in pairs)
    return Scene(items=items, relation=relation, style=style)


def two(layout: str, *things: tuple[str, str], counts: tuple[int, int] = (1, 1)) -> Verdict:
    return Verdict(layout, things, counts)


TRUTHS = [
    (scene(CUBE), Verdict("one", (CUBE,)), "a red cube"),
    (scene(CUBE, CUBE), Verdict("two", (CUBE,)), "two red cubes"),
    (scene(BALL, BALL, BALL), Verdict("three", (BALL,)), "three blue balls"),
    (scene(*[BALL] * 4), Verdict("four", (BALL,)), "four blue balls"),
    *(
        (scene(CUBE, BALL, relation=where), verdict, f"a red cube {where} a blue ball")
        for where, verdict in (
            ("left of", two("across", CUBE, BALL)),
            ("right of", two("across", BALL, CUBE)),
            ("above", two("down", CUBE, BALL)),
            ("below", two("down", BALL, CUBE)),
        )
    ),
    (
        scene(BALL, BALL, CUBE, relation="below"),
        two("down", CUBE, BALL, counts=(1, 2)),
        "two blue balls below a red cube",
    ),
    (scene(CUBE, style="sketch"), Verdict("one", (CUBE,), style="sketch"), "a sketch of a cube"),
    (
        scene(CUBE, style="neon"),
        Verdict("one", (CUBE,), style="neon"),
        "a neon sign of a red cube",
    ),
]


@pytest.mark.parametrize(("shown", "verdict", "caption"), TRUTHS)
def test_the_true_verdict_on_a_scene(shown: Scene, verdict: Verdict, caption: str) -> None:
    assert true_verdict(shown) == verdict
    assert plain_caption(shown) == caption
    said = [true_verdict(other).compare(shown) for other, *_ in TRUTHS]
    assert [right["all"] for right in said].count(True) == 1
    asked = answers_of(shown, TINY)
    assert len(asked) == 10
    nouns = [NOUNS[n] for n in asked[5::2] if n != NONE]
    assert nouns == [noun for _, noun in verdict.things]
    assert (asked[5] == NONE) == (shown.relation is not None)
    fills = [FILLS[f] for f in asked[4::2] if f != NONE]
    assert fills == ([] if shown.style == "sketch" else [fill for fill, _ in verdict.things])


WRONG = [
    (two("across", ("red", "star"), BALL), {"noun", "both"}),
    (two("across", ("green", "cube"), BALL), {"fill", "both"}),
    (two("across", ("blue", "cube"), ("red", "ball")), {"both"}),
    (two("across", CUBE, BALL, counts=(2, 1)), {"count"}),
    (two("across", BALL, CUBE), {"relation"}),
    (two("down", CUBE, BALL), {"relation"}),
    (two("across", ("red", "star"), CUBE), {"noun", "fill", "both", "relation"}),
    (two("across", ("gold", "star"), ("gold", "hat")), {"noun", "fill", "both", "relation"}),
    (Verdict("across", (CUBE, BALL), (1, 1), "neon"), {"style"}),
    (Verdict("one", (CUBE,)), {"noun", "fill", "both", "count", "relation"}),
]


@pytest.mark.parametrize(("seen", "wrong"), WRONG)
def test_each_wrong_aspect_is_recognized(seen: Verdict, wrong: set[str]) -> None:
    right = seen.compare(scene(CUBE, BALL, relation="left of"))
    assert list(right) == list(ASPECTS)
    assert {what for what, value in right.items() if not value} == wrong | {"all"}


def test_two_counted_kinds_lie_as_asked() -> None:
    shown = scene(CUBE, CUBE, BALL, relation="below")
    right = two("down", BALL, CUBE, counts=(1, 2)).compare(shown)
    assert all(right.values())
    right = two("down", CUBE, BALL, counts=(2, 1)).compare(shown)
    assert [what for what, value in right.items() if not value] == ["relation", "all"]


def test_a_fill_that_the_style_hides_is_not_counted() -> None:
    seen = Verdict("one", (("gold", "cube"),), style="sketch")
    right = seen.compare(scene(CUBE, style="sketch"))
    assert right["fill"] is None
    assert right["all"]


def test_a_classifier_learns_what_scenes_show(tmp_path: Path) -> None:
    rng = random.Random(0)
    few = [
        *(alone(fill, noun, style=style, extent=0.7, seed=rng.randrange(9))
          for fill, noun, style in (("red", "cube", None), ("blue", "cube", None),
                                    ("red", "star", "neon"), ("blue", "star", "pixel art"))),
        scene(CUBE, CUBE),
    ]  # fmt: skip
    across = (Item(fill="red", noun="cube", x=0.25, extent=0.4),
              Item(fill="blue", noun="star", x=0.75, extent=0.4))  # fmt: skip
    few += [Scene(items=across, relation="left of")]
    turned = tuple(Item(fill=i.fill, noun=i.noun, x=1 - i.x, extent=0.4) for i in across)
    few += [Scene(items=turned, relation="right of")]
    data = render_many(TINY, 14, iter(few * 2))
    classifier = train_classifier(TINY, data, steps=150, batch_size=14)
    save_classifier(classifier, tmp_path / "classifier.safetensors")
    loaded = load_classifier(tmp_path / "classifier.safetensors")
    assert loaded.config == TINY
    seen = loaded.classify([render(s, 64) for s in few])
    assert sum(bool(v.compare(s)["all"]) for v, s in zip(seen, few)) >= 6


def test_training_repeats_itself() -> None:
    data = render_many(TINY, 8, mixed_scenes("all", "x"))
    one, other = (train_classifier(TINY, data, steps=3, batch_size=4) for _ in range(2))
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def test_training_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier_training, "KEEP_EVERY", 2)
    kept, data = tmp_path / "kept", render_many(TINY, 8, mixed_scenes("all", "x"))
    how: dict[str, Any] = {"steps": 5, "batch_size": 4}
    whole = train_classifier(TINY, data, **how)
    calls, loss_of = [], classifier_training.loss_of

    def interrupted(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss_of(*arguments)

    monkeypatch.setattr(classifier_training, "loss_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_classifier(TINY, data, kept=kept, **how)
    with pytest.raises(ValueError, match="of a training with other settings"):
        train_classifier(TINY, data, kept=kept, steps=6, batch_size=4)
    classifier = train_classifier(TINY, data, kept=kept, **how)
    assert len(calls) == 4 + 3  # from the third step on
    assert all(map(torch.equal, classifier.state_dict().values(), whole.state_dict().values()))
    assert not kept.exists()


def test_one_batch_is_degraded_in_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, counts = torch.nn.functional.avg_pool2d, {}

    def counting(images: torch.Tensor, factor: int) -> torch.Tensor:
        counts[factor] = len(images)
        return pool(images, factor)

    monkeypatch.setattr(torch.nn.functional, "avg_pool2d", counting)
    degrade(torch.rand(48, 3, 128, 128), 112, torch.Generator().manual_seed(1))
    assert counts.keys() == {2, 4, 7}
    assert sum(counts.values()) == 48
    assert min(counts.values()) > 8


def test_accuracy_counts_only_aspects_that_apply() -> None:
    class Same(ToyboxClassifier):
        """Returns the verdict "a red cube" on every image."""

        def verdicts(self, logits: ClassifierLogits) -> Iterator[Verdict]:
            yield from [Verdict("one", (CUBE,))] * len(logits.layout)

    shown = [scene(CUBE), scene(BALL), scene(CUBE, style="sketch"), scene(CUBE, CUBE)]
    augmented = []

    def augment(images: torch.Tensor) -> torch.Tensor:
        augmented.append(len(images))
        return images

    found = dict(accuracy(Same(TINY).eval(), iter(shown), 4, augment=augment, batch_size=3))
    assert augmented == [3, 1]
    assert found.pop("fill") == pytest.approx(2 / 3)  # a sketch hides it
    assert found.pop("both") == pytest.approx(2 / 3)
    assert found == {"noun": 0.75, "count": 0.75, "style": 0.75, "all": 0.25}


def test_a_low_accuracy_gives_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    scores = {f"classifier/{split}/{what}": 0.99 for split in SPLITS for what in ASPECTS}
    print_accuracy(scores, 10)
    assert "on 5 renderings of held-out pairs: noun 99.0%" in (said := capsys.readouterr()).out
    assert not said.err
    print_accuracy(scores | {"classifier/train/all": 0.97}, 10)
    assert capsys.readouterr().err == (
        "warning: the classifier's accuracy is below 98%; the scores below are unreliable\n"
    )


def test_augmented_images_keep_shape_and_range() -> None:
    data: Renderings = render_many(TINY, 16, scenes("all", "y"))
    images = data.pictures.float() / 255
    first, second = (degrade(images, 128, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == images.shape
    assert 0 <= first.min() <= first.max() <= 1
    assert 0 < (first - images).abs().mean() < 0.15


def test_the_bundled_classifier_is_accurate() -> None:
    classifier = load_classifier(BUNDLED)
    generator = torch.Generator().manual_seed(0)
    augment = partial(degrade, size=classifier.config.image_size, generator=generator)
    assert classifier.config == ClassifierConfig()
    assert BUNDLED.stat().st_size < 2.5e6
    assert dict(accuracy(classifier, scenes("all", "bundled"), 200))["all"] >= 0.98
    assert dict(accuracy(classifier, scenes("all", "bundled"), 100, augment=augment))["all"] >= 0.95


def test_the_verdict_on_an_image_does_not_depend_on_its_batch() -> None:
    classifier = ToyboxClassifier(TINY).eval()
    pictures = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "white")]
    single = [classifier.classify([picture])[0] for picture in pictures]
    assert classifier.classify(pictures, batch_size=2) == single


def test_files_that_hold_no_classifier_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_size is 33, expected a multiple of 4"):
        ClassifierConfig(image_size=33, widths=(8, 16))
    with pytest.raises(ValueError, match=r"no ToyboxClassifier in .*none.safetensors"):
        load_classifier(tmp_path / "none.safetensors")
    (tmp_path / "classifier.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="holds no ToyboxClassifier"):
        load_classifier(tmp_path / "classifier.safetensors")


def test_a_classifier_trains_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, few = tmp_path / "classifier.safetensors", ["--pictures", "8", "--check-pictures", "8"]
    classifier_training.main(["--out", str(out), "--steps", "1", *few])
    assert load_classifier(out).config.styles == ("plain", *STYLES)
    assert "held-out" in capsys.readouterr().out
