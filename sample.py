"""Draw pictures for a prompt: many candidates, reranked by CLIP, the best kept (paper §2.6).

    python sample.py "an avocado armchair"

writes outputs/an-avocado-armchair/grid.png, 00.png, 01.png … (best first) and scores.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dalle1.cli import bar, clear_errors

if TYPE_CHECKING:
    from dalle1 import Candidate, DallE

SCORES = "scores.json"
SETTINGS = (
    "model",
    "clip",
    "num_candidates",
    "num_images",
    "seed",
    "temperature",
    "top_k",
    "top_p",
)


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, like all others here."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see python sample.py --help")


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line. Nothing heavy is imported before, so that --help comes at once."""
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("prompts", nargs="+", metavar="PROMPT", help="what to draw; several at once are welcome")
    add("--num-candidates", type=int, default=16, help="pictures drawn for each prompt")
    add("--num-images", type=int, default=4, help="how many of them, the best, are kept")
    add("--seed", type=int, default=0, help="the same seed gives the same pictures")
    add(
        "--temperature", type=float, default=1.0, help="below 1 safer, above 1 wilder; 0: likeliest"
    )
    add("--top-k", type=int, default=0, help="draw from the k likeliest codes; 0: from all")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest codes of this share")
    add("--batch-size", type=int, default=64, help="candidates drawn at once")
    add("--out", type=Path, help="folder to write to; outputs/PROMPT-AS-SLUG if not given")
    add("--model", default="bundled", help="folder of a trained model, or bundled")
    add("--clip", help="CLIP that reranks: a folder, a Hugging Face name, or none; "
        "the model's own if not given")  # fmt: skip
    add("--device", default="auto", help="auto is cuda, else mps, else cpu")
    options = parser.parse_args(args)
    if not all(p.strip() for p in options.prompts):
        raise ValueError("the prompt is empty; say what to draw, such as: an avocado armchair")
    if not 1 <= options.num_images <= options.num_candidates:
        raise ValueError(
            f"--num-images is {options.num_images}, expected 1 to --num-candidates, "
            f"{options.num_candidates}"
        )
    return options


def slug(prompt: str) -> str:
    """Turn a prompt into a folder's name."""
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:80] or "prompt"


def folder_names(prompts: Sequence[str]) -> list[str]:
    """Give each prompt a folder of its own, also where two make the same slug."""
    names: list[str] = []
    for name in map(slug, prompts):
        numbers = (f"-{i}" if i > 1 else "" for i in range(1, len(prompts) + 1))
        names.append(next(name + n for n in numbers if name + n not in names))
    return names


def writable(folder: Path) -> Path:
    """Make sure, before anything is drawn, that pictures can be written to `folder`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"cannot write to {folder} ({error.strerror}); give another --out"
        ) from error
    return folder


def forget_earlier(folder: Path) -> None:
    """Remove the pictures of an earlier draw into the same folder, and nothing else."""
    try:
        earlier = [str(entry["file"]) for entry in json.loads((folder / SCORES).read_text())]
    except (OSError, ValueError, TypeError, KeyError):
        return
    for name in earlier:
        if re.fullmatch(r"\d{2,}\.png", name):
            (folder / name).unlink(missing_ok=True)


def write(folder: Path, prompt: str, kept: list[Candidate], options: argparse.Namespace) -> None:
    """Write the pictures, best first, with prompt and settings in each, a grid and the scores."""
    from PIL.PngImagePlugin import PngInfo

    from dalle1.data.images import grid

    forget_earlier(folder)
    settings = {name: getattr(options, name) for name in SETTINGS}
    scores = []
    for rank, candidate in enumerate(kept):
        name = f"{rank:02d}.png"
        info = PngInfo()
        info.add_itxt("prompt", prompt)
        info.add_itxt("settings", json.dumps({**settings, "candidate": candidate.index}))
        candidate.image.save(folder / name, pnginfo=info)
        scores.append(
            {
                "file": name,
                "score": candidate.score,
                "probability": candidate.probability,
                "candidate": candidate.index,
                "seed": candidate.seed,
            }
        )
    (folder / SCORES).write_text(json.dumps(scores, indent=1) + "\n")
    info = PngInfo()
    info.add_itxt("prompt", prompt)
    info.add_itxt("settings", json.dumps(settings))
    columns = min(len(kept), 4 if len(kept) <= 16 else 8)
    grid([c.image for c in kept], columns).save(folder / "grid.png", pnginfo=info)


def draw(model: DallE, prompt: str, folder: Path, options: argparse.Namespace) -> None:
    """Draw, rank and write one prompt's pictures."""
    codes = options.num_candidates * model.dvae.grid_size**2
    # The delay keeps the bar away where a setting is refused before the first row.
    with bar(total=codes, desc=prompt[:40], unit="code", unit_scale=True, delay=0.1) as progress:
        candidates = model.candidates(
            prompt,
            num_candidates=options.num_candidates,
            seed=options.seed,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            batch_size=options.batch_size,
            on_row=progress.update,
        )
    write(folder, prompt, candidates[: options.num_images], options)
    print(f"{prompt!r}: {folder / 'grid.png'}")


def main(args: Sequence[str] | None = None) -> None:
    with clear_errors(), warnings.catch_warnings():
        options = parse(args)
        folders = folder_names(options.prompts)
        root = options.out or Path("outputs")
        several = len(options.prompts) > 1 or options.out is None
        outs = [writable(root / f if several else root) for f in folders]

        from dalle1 import DallE

        warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
        model = DallE.from_pretrained(options.model, clip=options.clip, device=options.device)
        for prompt, folder in zip(options.prompts, outs, strict=True):
            draw(model, prompt, folder, options)


if __name__ == "__main__":
    main()
