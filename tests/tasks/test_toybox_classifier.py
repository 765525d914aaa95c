"""Training of the Toybox classifier: it learns, resumes exactly, and augments its images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dalle1.data.images import to_float, to_tensor
from dalle1.evaluation.classifier import ClassifierConfig, load_classifier
from dalle1.tasks.toybox_classifier import (
    CLASSIFIER_PRESETS,
    ClassifierTask,
    ClassifierTrainConfig,
    augment,
    classifier_loss,
    main,
    scene_at,
    targets,
    train,
)
from dalle1.toybox import render
from dalle1.training.engines.base import LossModule

TINY = ClassifierConfig(image_size=32, widths=(8, 16))


def tiny_config(out: Path, **settings: object) -> ClassifierTrainConfig:
    small = {"num_scenes": 8, "batch_size": 8, "validation_images": 2}
    config = replace(CLASSIFIER_PRESETS["toy"], out=out, model=TINY, precision="fp32", **small)
    return replace(config, **settings)  # type: ignore[arg-type]


def test_a_short_training_learns_its_scenes(tmp_path: Path) -> None:
    train(tiny_config(tmp_path, steps=150, warmup_steps=20, seed=1))
    loaded = load_classifier(tmp_path)
    assert loaded.config == TINY
    shown = [scene_at(index, 1) for index in range(8)]
    verdicts = loaded.classify([render(scene, 64) for scene in shown])
    assert sum(bool(v.compare(s)["all"]) for v, s in zip(verdicts, shown)) >= 6


def test_training_resumes_exactly(tmp_path: Path) -> None:
    steps = {"schedule_steps": 4, "save_every": 2}
    whole = train(tiny_config(tmp_path / "whole", steps=4, **steps))
    train(tiny_config(tmp_path / "parts", steps=2, **steps))
    resumed = train(tiny_config(tmp_path / "parts", steps=4, **steps))
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_images_are_augmented_in_fp32_in_every_precision(tmp_path: Path, precision: str) -> None:
    task = ClassifierTask(tiny_config(tmp_path, num_workers=0))
    batch = next(task.loader.batches(0)).tensors
    totals = []
    for name in ("fp32", precision):
        total, _ = LossModule(task, name)(batch, 0, torch.Generator().manual_seed(0))
        totals.append(total.item())
    assert totals[1] == pytest.approx(totals[0], rel=0.02)


def test_scenes_are_deterministic_and_half_of_them_have_a_relation() -> None:
    shown = [scene_at(index, 0) for index in range(20)]
    assert shown == [scene_at(index, 0) for index in range(20)]
    assert shown != [scene_at(index, 1) for index in range(20)]
    assert [scene.relation is not None for scene in shown] == [False, True] * 10


def test_the_loss_ignores_what_is_not_asked_and_the_size_of_the_batch() -> None:
    torch.manual_seed(0)
    model = load_classifier()
    shown = [scene_at(index, 0) for index in range(4)]
    images = to_float(torch.stack([to_tensor(render(scene, 112)) for scene in shown]))
    labels = torch.tensor([targets(scene, model.config) for scene in shown])
    loss = classifier_loss(model(images), labels)
    twice = classifier_loss(model(images.repeat(2, 1, 1, 1)), labels.repeat(2, 1))
    torch.testing.assert_close(loss.total, twice.total)
    parts = loss.layout + loss.style + loss.counts + loss.fills + loss.nouns
    torch.testing.assert_close(loss.total, parts)
    wrong = classifier_loss(model(images), labels.roll(1, 0))
    assert wrong.total > 3 * loss.total
    single = classifier_loss(model(images[:1]), labels[:1])  # no relation: no counts
    assert single.counts == 0


def test_augmented_images_keep_shape_and_range() -> None:
    images = to_float(torch.stack([to_tensor(render(scene_at(i, 0), 128)) for i in range(8)]))
    first, second = (augment(images, 128, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == images.shape
    assert 0 <= first.min() <= first.max() <= 1
    assert 0 < (first - images).abs().mean() < 0.15


def test_one_batch_is_coarsened_in_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, counts = torch.nn.functional.avg_pool2d, {}

    def counting(images: torch.Tensor, factor: int) -> torch.Tensor:
        counts[factor] = len(images)
        return pool(images, factor)

    monkeypatch.setattr(torch.nn.functional, "avg_pool2d", counting)
    augment(torch.rand(48, 3, 128, 128), 112, torch.Generator().manual_seed(1))
    assert counts.keys() == {2, 4, 7}
    assert sum(counts.values()) == 48
    assert min(counts.values()) > 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "folder"], "data is 'folder', expected toybox"),
        (["--num-scenes", "0"], "--num-scenes is 0, expected at least 1"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["toy", *flags])
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
