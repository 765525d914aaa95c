"""The Toybox classifier: the correct verdict on a scene, training, accuracy and its files."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from dalle1.evaluation.classifier import (
    ASPECTS,
    BUNDLED,
    ClassifierConfig,
    ClassifierLogits,
    ToyboxClassifier,
    Verdict,
    load_classifier,
    true_verdict,
)
from dalle1.evaluation.classifier_accuracy import accuracy, print_accuracy
from dalle1.evaluation.toybox_prompts import SPLITS
from dalle1.tasks.toybox_classifier import NOT_ASKED, augment, targets
from dalle1.toybox import FILLS, NOUNS, Item, Scene
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
    verdicts = [true_verdict(other).compare(shown) for other, *_ in TRUTHS]
    assert [right["all"] for right in verdicts].count(True) == 1
    asked = targets(shown, TINY)
    assert len(asked) == 10
    nouns = [NOUNS[n] for n in asked[5::2] if n != NOT_ASKED]
    assert nouns == [noun for _, noun in verdict.things]
    assert (asked[5] == NOT_ASKED) == (shown.relation is not None)
    fills = [FILLS[f] for f in asked[4::2] if f != NOT_ASKED]
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


def test_two_counted_kinds_are_related_as_asked() -> None:
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


def test_a_low_accuracy_prints_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    scores = {f"classifier/{split}/{what}": 0.99 for split in SPLITS for what in ASPECTS}
    print_accuracy(scores, 10)
    assert "on 5 renderings of held-out pairs: noun 99.0%" in (printed := capsys.readouterr()).out
    assert not printed.err
    print_accuracy(scores | {"classifier/train/all": 0.97}, 10)
    assert capsys.readouterr().err == (
        "warning: the classifier's accuracy is below 98%; the scores below are unreliable\n"
    )


def test_the_bundled_classifier_is_accurate() -> None:
    classifier = load_classifier(BUNDLED)
    generator = torch.Generator().manual_seed(0)
    augmented = partial(augment, size=classifier.config.image_size, rng=generator)
    assert classifier.config == ClassifierConfig()
    assert BUNDLED.stat().st_size < 2.5e6
    assert dict(accuracy(classifier, scenes("all", "bundled"), 200))["all"] >= 0.98
    assert (
        dict(accuracy(classifier, scenes("all", "bundled"), 100, augment=augmented))["all"] >= 0.95
    )


def test_the_verdict_on_an_image_does_not_depend_on_its_batch() -> None:
    classifier = ToyboxClassifier(TINY).eval()
    images = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "white")]
    single = [classifier.classify([image])[0] for image in images]
    assert classifier.classify(images, batch_size=2) == single


def test_files_that_hold_no_classifier_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_size is 33, expected a multiple of 4"):
        ClassifierConfig(image_size=33, widths=(8, 16))
    with pytest.raises(ValueError, match=r"no ToyboxClassifier in .*none.safetensors"):
        load_classifier(tmp_path / "none.safetensors")
    (tmp_path / "classifier.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="holds no ToyboxClassifier"):
        load_classifier(tmp_path / "classifier.safetensors")
