"""The evaluators on a user's own pictures: classes in folders, captions and foils beside them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dalle1.clip import Clip
from dalle1.data import open_source
from dalle1.data.folder import Folder
from dalle1.data.reading import AS_IT_IS, PICTURES
from dalle1.data.streams import Streamed
from dalle1.evaluation.clips import (
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


def folder_probes(clip: Clip, data: str, templates: Sequence[str], most: int | None) -> Scores:
    """Yield what can be measured on a folder, or on shards; ValueError where nothing can.

    Args:
        templates: see `class_embeddings`.
        most: pictures of each probe, at most; drawn at random, always the same.
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
        if min(map(labels.count, set(labels))) >= 4:
            for key, value in linear_probe(images, labels):
                yield f"linear probe/{key}", value
    if not root.is_dir() or any(root.rglob("*.tar")) or _captioned(root):
        found = True
        source = open_source(data, "encode", reading=AS_IT_IS)
        if isinstance(source, Streamed):
            raise ValueError(f"{data} can only be read front to back: give fewer, local shards")
        shown = Pictures(source, most)
        captions = [source.caption(i, random.Random(i)) for i in range(len(shown))]
        for key, value in retrieval(features(clip, shown), clip.embed_text(captions), captions):
            yield f"retrieval/{key}", value
    if foils := [p for p in _captioned(root) if p.with_suffix(FOIL).is_file()][:most]:
        right, wrong = ([_first_line(p.with_suffix(s)) for p in foils] for s in (".txt", FOIL))
        for key, value in binding(clip, Pictures(Files(foils)), right, wrong):
            yield f"binding/{key}", value
    if not found:
        raise ValueError(
            f"nothing to measure in {data}: expected a folder of pictures for each class, or "
            "pictures beside .txt captions"
        )


class Files(Folder):
    """A source of the pictures in these files."""

    def __init__(self, paths: list[Path]) -> None:
        self.pictures, self.reading, self.detail = paths, AS_IT_IS, 0


def _labelled(root: Path, most: int | None) -> tuple[list[Path], list[int], list[str]] | None:
    """List pictures in folders of classes, at random; None where there are not two classes."""
    folders = {
        folder.name.replace("_", " "): sorted(_pictures_in(folder))
        for folder in sorted(root.iterdir())
        if folder.is_dir()
    }
    classes = [name for name, paths in folders.items() if paths]
    if len(classes) < 2:
        return None
    entries = [(path, i) for i, name in enumerate(classes) for path in folders[name]]
    random.Random(0).shuffle(entries)
    entries = entries[:most]
    return [path for path, _ in entries], [i for _, i in entries], classes


def _pictures_in(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.suffix.lower() in PICTURES]


def _captioned(root: Path) -> list[Path]:
    return sorted(p for p in _pictures_in(root) if p.with_suffix(".txt").is_file())


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip().splitlines()[0]


def drawn_pictures(folder: Path) -> Files:
    """Find what was drawn into a folder, and into those in it.

    Where scores.json names the pictures, the others (grid.png, preview.png) are none. ValueError
    where there are none at all.
    """
    found = Folder(folder, "encode", captions=False, reading=AS_IT_IS).pictures
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
    with Image.open(path) as image:
        prompt = image.info.get("prompt")
    return str(prompt) if prompt else None
