"""Benchmarks of a CLIP on a user's images: classes in folders, captions and foils beside them."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dalle1.clip import Clip
from dalle1.data.sources.file_tree import LISTS, FileTree
from dalle1.data.spec import shards_of
from dalle1.evaluation.clip_metrics import (
    MIN_PROBE_IMAGES,
    binding_accuracy,
    class_embeddings,
    linear_probe_accuracy,
    retrieval_recall,
    zero_shot_accuracy,
)
from dalle1.evaluation.image_sets import (
    LazyImages,
    embed,
    first_line,
    image_paths,
    images_in_files,
    open_images,
    random_subset,
)
from dalle1.evaluation.report import Scores

FOIL = ".foil.txt"


@dataclass(frozen=True)
class LabelledImages:
    """Image files of several classes."""

    paths: list[Path]
    labels: list[int]
    classes: list[str]


def folder_benchmarks(clip: Clip, data: str, templates: Sequence[str], limit: int | None) -> Scores:
    """Yield what can be measured on a folder, or on shards; ValueError where nothing can.

    Args:
        templates: see `class_embeddings`.
        limit: maximum number of images per benchmark, a fixed random choice with equally many of
            each class.
    """
    root = Path(data)
    is_folder = root.is_dir()
    labelled = labelled_images(root, limit) if is_folder else None
    has_captions = not is_folder or bool(shards_of(data)) or _has_captions(root)
    with_foils = [path for path in image_paths(root) if path.with_suffix(FOIL).is_file()]
    if not (labelled or has_captions or with_foils):
        raise ValueError(
            f"nothing to measure in {data}: expected a folder of images for each class, or "
            "images and captions"
        )
    if labelled:
        yield from _class_benchmarks(clip, labelled, templates)
    if has_captions:
        source = open_images(data, captions=True)
        indices = random_subset(range(len(source)), limit)
        captions = [source.find(i).caption(random.Random(i)) for i in indices]
        images = embed(clip, LazyImages(lambda i: source.find(i).image(), indices))
        for key, value in retrieval_recall(images, clip.embed_text(captions), captions):
            yield f"retrieval/{key}", value
    if with_foils:
        paths = random_subset(with_foils, limit)
        captions, foils = ([first_line(p.with_suffix(s)) for p in paths] for s in (".txt", FOIL))
        for key, value in binding_accuracy(clip, images_in_files(paths), captions, foils):
            yield f"binding/{key}", value


def _class_benchmarks(clip: Clip, data: LabelledImages, templates: Sequence[str]) -> Scores:
    images = embed(clip, images_in_files(data.paths))
    texts = class_embeddings(clip, data.classes, templates)
    for key, value in zero_shot_accuracy(images, data.labels, texts):
        yield f"zero-shot/{key}", value
    smallest, name = min((data.labels.count(i), name) for i, name in enumerate(data.classes))
    if smallest < MIN_PROBE_IMAGES:
        needed = f"{MIN_PROBE_IMAGES} of each class, {MIN_PROBE_IMAGES * len(data.classes)} in all"
        warnings.warn(
            f"the linear probe is skipped: it has {smallest} images of {name!r} and needs {needed}",
            stacklevel=2,
        )
        return
    for key, value in linear_probe_accuracy(images, data.labels):
        yield f"linear probe/{key}", value


def labelled_images(root: Path, limit: int | None) -> LabelledImages | None:
    """Choose images from folders of classes; None where there are fewer than two classes."""
    folders: dict[str, list[Path]] = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        name = folder.name.replace("_", " ")
        if paths := image_paths(folder):
            if name in folders:
                raise ValueError(f"two folders in {root} have the class {name!r}: rename one")
            folders[name] = paths
    if len(folders) < 2:
        return None
    per_class = max(1, limit // len(folders)) if limit else None
    entries = [
        (path, label)
        for label, paths in enumerate(folders.values())
        for path in random_subset(paths, per_class)
    ]
    return LabelledImages([path for path, _ in entries], [i for _, i in entries], list(folders))


def _has_captions(root: Path) -> bool:
    tree = FileTree(root)
    return any(tree.kinds) or any(name in LISTS for name in tree.lists)
