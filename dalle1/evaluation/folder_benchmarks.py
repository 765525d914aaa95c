"""The evaluators on a user's own pictures: classes in folders, captions and foils beside them."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dalle1.clip import Clip
from dalle1.data import open_source
from dalle1.data.cleaning import NO_CLEANING, PICTURES
from dalle1.data.sources.folder import LISTS, Folder, caption_file
from dalle1.data.sources.streaming_shards import StreamingShards
from dalle1.data.spec import shards_of
from dalle1.evaluation.clip_metrics import (
    Scores,
    binding,
    class_embeddings,
    linear_probe,
    retrieval,
    zero_shot,
)
from dalle1.evaluation.samples import Pictures, features
from dalle1.outputs import SCORES, drawn_in

FOIL = ".foil.txt"
LEAST = 4  # pictures of each class that the linear probe needs


def folder_probes(clip: Clip, data: str, templates: Sequence[str], most: int | None) -> Scores:
    """Yield what can be measured on a folder, or on shards; ValueError where nothing can.

    Args:
        templates: see `class_embeddings`.
        most: pictures of each probe, at most; drawn at random, always the same, and of classes as
            many of each.
    """
    root = Path(data)
    found = False
    if root.is_dir() and (labelled := _labelled(root, most)):
        found = True
        paths, labels, classes = labelled
        images = features(clip, Pictures(Files(paths)))
        texts = class_embeddings(clip, classes, templates)
        for key, value in zero_shot(images, labels, texts):
            yield f"zero-shot/{key}", value
        least, name = min((labels.count(i), name) for i, name in enumerate(classes))
        if least >= LEAST:
            for key, value in linear_probe(images, labels):
                yield f"linear probe/{key}", value
        else:
            enough = f"at least {LEAST} of each class, {LEAST * len(classes)} in all"
            why = f"{least} pictures of {name!r} were drawn, and it needs {enough}"
            warnings.warn(f"the linear probe is left out: {why}", stacklevel=2)
    if not root.is_dir() or shards_of(data) or _has_captions(root):
        found = True
        source = open_source(data, "encode", reading=NO_CLEANING)
        if isinstance(source, StreamingShards):
            raise ValueError(f"{data} can only be read front to back: give fewer, local shards")
        shown = Pictures(source, most, seed=0)
        captions = [source.caption(i, random.Random(i)) for i in shown.indices]
        for key, value in retrieval(features(clip, shown), clip.embed_text(captions), captions):
            yield f"retrieval/{key}", value
    if foils := _drawn([p for p in _pictures_in(root) if p.with_suffix(FOIL).is_file()], most):
        found = True
        right, wrong = ([_first_line(p.with_suffix(s)) for p in foils] for s in (".txt", FOIL))
        for key, value in binding(clip, Pictures(Files(foils)), right, wrong):
            yield f"binding/{key}", value
    if not found:
        raise ValueError(
            f"nothing to measure in {data}: expected a folder of pictures for each class, or "
            "pictures and captions"
        )


class Files(Folder):
    """A source of the pictures in these files."""

    def __init__(self, paths: list[Path]) -> None:
        self.pictures, self.reading, self.detail = paths, NO_CLEANING, 0


def _labelled(root: Path, most: int | None) -> tuple[list[Path], list[int], list[str]] | None:
    """Draw pictures from folders of classes; None where there are not two classes."""
    folders: dict[str, list[Path]] = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        name = folder.name.replace("_", " ")
        if paths := _pictures_in(folder):
            if name in folders:
                raise ValueError(f"two folders in {root} are of the class {name!r}: rename one")
            folders[name] = paths
    if len(folders) < 2:
        return None
    each = max(1, most // len(folders)) if most else None
    entries = [(p, i) for i, paths in enumerate(folders.values()) for p in _drawn(paths, each)]
    return [path for path, _ in entries], [i for _, i in entries], list(folders)


def _drawn(paths: list[Path], most: int | None) -> list[Path]:
    """Draw at most so many at random, always the same, in their order."""
    if most is None or len(paths) <= most:
        return paths
    return sorted(random.Random(0).sample(paths, most))


def _pictures_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES)


def _has_captions(root: Path) -> bool:
    listed = any((root / name).is_file() for name in LISTS)
    return listed or any(caption_file(picture) for picture in _pictures_in(root))


def _first_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").strip().splitlines() if path.is_file() else []
    if not lines:
        raise ValueError(f"{path} is not there or empty, expected a line of text")
    return lines[0]


def drawn_pictures(folder: Path) -> Files:
    """Find what was drawn into a folder, and into those in it.

    Where scores.json names the pictures, the others (grid.png, preview.png) are none. ValueError
    where there are none at all.
    """
    found = Folder(folder, "encode", captions=False, reading=NO_CLEANING).pictures
    named = {parent: drawn_in(parent) for parent in {path.parent for path in found}}
    drawn = [p for p in found if (names := named[p.parent]) is None or p.name in names]
    if not drawn:
        raise ValueError(f"no pictures in {folder} that its {SCORES} names: draw them again")
    return Files(drawn)


def prompt_of(path: Path) -> str | None:
    """Find the prompt that a picture was drawn for: in name.txt beside it, or in the PNG."""
    text = path.with_suffix(".txt")
    if text.is_file():
        return _first_line(text)
    try:
        with Image.open(path) as image:
            prompt = image.info.get("prompt")
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} has too many pixels ({error}): make it smaller") from error
    return str(prompt) if prompt else None
