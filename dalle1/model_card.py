"""What is known of a model's origin, and the card that describes it on Hugging Face."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dalle1.config import read_optional
from dalle1.storage import checkpoint_step, write_atomic

INFO_NAME = "model_info.json"
"""File of a model folder with its `ModelInfo`."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """Origin of a model; None where it is not known."""

    license: str | None = None
    """License of the parameters, by its Hugging Face identifier, such as mit or cc-by-nc-sa-4.0."""
    source: str | None = None
    """Origin of the parameters that the training started from: an address or a repository."""
    data: str | None = None
    """Name of the training data."""
    steps: int | None = None
    """Number of optimizer updates."""
    batch_size: int | None = None
    """Pairs per update."""

    @classmethod
    def load(cls, folder: Path) -> ModelInfo:
        """Read the information in a model folder; ValueError where its file is damaged."""
        info = read_optional(cls, folder / INFO_NAME)
        return info if info.steps else replace(info, steps=checkpoint_step(folder))

    def fine_tuned(self, data: str, batch_size: int) -> ModelInfo:
        """Return the information of a model that starts as this one and is trained further.

        Args:
            data: name of the training data, see `dalle1.data.spec.data_name`.
        """
        return replace(self, data=data, batch_size=batch_size, steps=None)

    def save(self, folder: Path) -> None:
        """Write what is known to `folder`; no file where nothing is."""
        if found := {name: value for name, value in asdict(self).items() if value is not None}:
            write_atomic(folder / INFO_NAME, json.dumps(found, indent=1) + "\n")
        else:
            (folder / INFO_NAME).unlink(missing_ok=True)


def model_card(repo: str, info: ModelInfo, image_size: int, has_clip: bool) -> str:
    """Return the model card (README.md) of a model, with Hugging Face's metadata.

    Args:
        repo: name on Hugging Face.
        image_size: side of the images in pixels.
    """
    from huggingface_hub import ModelCardData

    metadata = ModelCardData(
        library_name="dalle1",
        pipeline_tag="text-to-image",
        license=info.license,
        tags=["dalle", "text-to-image"],
    )
    facts = {
        "Image size": f"{image_size} × {image_size} pixels",
        "Reranker": "CLIP, included" if has_clip else "none included",
        "License": info.license,
        "Origin of the parameters": info.source,
        "Training data": info.data,
        "Training": info.steps and f"{info.steps:,} updates"
        + (f" of {info.batch_size:,} pairs" if info.batch_size else ""),
    }  # fmt: skip
    rows = "\n".join(f"| {name} | {value or 'unknown'} |" for name, value in facts.items())
    return f"""---
{metadata.to_yaml()}
---

# {repo.rpartition("/")[2]}

A text-to-image model in the format of [dalle1](https://pypi.org/project/dalle1/), which reproduces
DALL·E v1: an image tokenizer, and a transformer over captions and image codes.

```
dalle1 sample "a red cube" --model {repo}
```

```python
from dalle1 import DallE

model = DallE.from_pretrained("{repo}")
images = model.generate("a red cube", num_images=4)
```

| | |
|---|---|
{rows}
"""
