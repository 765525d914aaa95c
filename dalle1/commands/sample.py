"""Sample images for a prompt: many candidates, reranked by CLIP (paper §2.6).

    dalle1 sample "an avocado armchair"

writes outputs/an-avocado-armchair/grid.png, 00.png, 01.png … (best first) and scores.json.
torchrun --nproc-per-node N -m dalle1 sample … splits the candidates among N processes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle1.commands import diffusion_flags
from dalle1.commands.idle_processors import IdleProcessors
from dalle1.commands.parser import HelpFormatter, Parser
from dalle1.config import image_counts
from dalle1.console import bar, command_line, expand_home_in, name_flags, one_line_errors
from dalle1.json_files import parse_json
from dalle1.outputs import GRID, SCORES, check_writable, preview_path, slug, to_json, write

if TYPE_CHECKING:
    from torch import Tensor

    from dalle1 import Candidate, DallE
    from dalle1.sampling.generation import GenerationConfig
    from dalle2.pipeline import Unclip

SETTINGS = (
    "model",
    "clip",
    "num_candidates",
    "num_images",
    "seed",
    "temperature",
    "top_k",
    "top_p",
    "typical",
    "guidance",
    "negative_prompt",
    "rerank",
    "resample",
    "resample_every",
    "precision",
    "image",
    "keep_rows",
    "mask",
)
DEFAULT_OUT = Path("outputs")


def add_sampling_flags(add: Callable[..., Any]) -> None:
    """Add the prompts, and what decides how candidates are sampled and ranked."""
    add(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help="one or more texts to sample images for",
    )
    add("--prompts-file", type=Path, help="text file with more prompts, one per line")
    add("--plain", action="store_true", help="sample as in the paper, from the unchanged "
        "distribution, and read brackets as text; without it, (word:1.4) weights a word, and "
        "flags that are absent take the model's own defaults, "
        "from the generation.json in its folder")  # fmt: skip
    add("--num-candidates", type=int, help="number of images to sample per prompt (plain: 16, or "
        "--num-images if that is more)")  # fmt: skip
    add("--num-images", type=int, help="number of images to save per prompt, the best (default: 4, "
        "or --num-candidates if that is less)")  # fmt: skip
    add("--rerank", choices=("clip", "likelihood", "none"), help="ranking of candidates: "
        "by CLIP, by the gain in likelihood from the prompt, or none "
        "(plain: clip if the model has one)")  # fmt: skip
    add(
        "--resample",
        choices=("clip", "likelihood", "none"),
        help="replace unlikely candidates by "
        "copies of others while they are sampled, weighted by clip or likelihood (plain: none)",
    )
    add("--resample-every", type=int, metavar="ROWS", help="rows between resamplings (plain: 4)")
    add("--seed", type=int, default=0, help="random seed; the same seed samples the same images")
    add("--temperature", type=float, help="sampling temperature; 0 takes the most likely code "
        "(plain: 1)")  # fmt: skip
    add("--top-k", type=int, help="sample from the k most likely codes (plain: 0, from all)")
    add("--top-p", type=float, help="nucleus sampling: total probability of the codes kept "
        "(plain: 1)")  # fmt: skip
    add("--typical", type=float, help="typical sampling: total probability of the codes kept "
        "(plain: 1)")  # fmt: skip
    add("--guidance", type=float, help="classifier-free guidance scale: "
        "above 1, images follow the prompt more closely, in up to twice the time; the model must "
        "be trained with --caption-dropout (plain: 1)")  # fmt: skip
    add(
        "--negative-prompt", default="", metavar="TEXT", help="text that --guidance leads away from"
    )


def add_other_flags(add: Callable[..., Any]) -> None:
    """Add the flags of image completion, output, models and devices."""
    add("--image", type=Path, help="image to complete or change")
    add(
        "--keep-rows",
        type=int,
        metavar="N",
        help="number of code rows of --image to keep, from the top",
    )
    add("--mask", type=Path, help="image of the same size: its white parts are sampled again, "
        "or those that are erased to transparency")  # fmt: skip
    add("--batch-size", type=batch_size, default="auto", help="candidates per batch; auto: as many "
        "as fit in memory")  # fmt: skip
    add("--json", action="store_true", help="print one line of JSON per prompt: the files, their "
        "scores and the settings")  # fmt: skip
    add("--preview", action="store_true", help="write preview.png after each row of codes")
    add(
        "--out",
        type=Path,
        help="output folder; by default, a folder in outputs/ named after the prompt; "
        "FOLDER-2 where it holds files of yours, or FOLDER is named after two prompts",
    )
    add(
        "--model",
        default="bundled",
        help="folder of a trained model, its name on Hugging Face (user/name), bundled, or unclip",
    )
    add("--clip", help="CLIP that reranks: a folder, a Hugging Face name, or none; "
        "by default, the model's own")  # fmt: skip
    add("--device", default="auto", help="device; auto: cuda, else mps, else cpu")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="precision of the transformer; auto: bf16 where the hardware supports it")  # fmt: skip


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line.

    By argparse rather than tyro: --help then takes 0.04 s, as neither torch nor tyro is imported.
    """
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    add_sampling_flags(parser.add_argument)
    diffusion_flags.add_diffusion_flags(parser.add_argument)
    add_other_flags(parser.add_argument)
    words = command_line(args)
    # Prompts may follow flags; what follows `--` is a prompt whatever it begins with.
    parse = parser.parse_args if "--" in words else parser.parse_intermixed_args
    options = parse(words)
    expand_home_in(options)
    name_flags([(name, f"--{name.replace('_', '-')}") for name in vars(options)], words)
    image_counts(options.num_images, options.num_candidates)  # before the model is loaded
    has_region = options.keep_rows is not None or options.mask is not None
    has_both = options.keep_rows is not None and options.mask is not None
    if has_both or has_region != (options.image is not None):
        raise ValueError("--image needs either --keep-rows or --mask, and they need --image")
    if len(options.prompts) > 1 and not any(" " in prompt for prompt in options.prompts):
        note(f"{len(options.prompts)} prompts of one word; put quotes around a prompt of several")
    if options.prompts_file:
        options.prompts += read_prompts(options.prompts_file)
    options.prompts = visible_prompts(options.prompts)
    return options


def visible_prompts(prompts: Sequence[str]) -> list[str]:
    """Return the prompts without white space around them, half characters replaced.

    Raises: ValueError where one shows nothing, or the list is empty.
    """
    from dalle1.data.cleaning import visible  # imports torch, so after all other checks

    if len(texts := visible(prompts)) < max(1, len(prompts)):
        raise ValueError("the prompt is empty; expected a text such as: an avocado armchair")
    return texts


def note(text: str) -> None:
    """Print a note, once in a run of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)


def batch_size(text: str) -> int | None:
    """Read --batch-size: a number, or auto, which is None."""
    return None if text in ("auto", "None") else int(text)


def read_prompts(path: Path) -> list[str]:
    """Read one prompt per line; empty lines are ignored."""
    try:
        lines = path.read_bytes().decode("utf-8-sig", "surrogatepass").splitlines()
        return [line for line in lines if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason}); convert it") from error


def encode_known(model: DallE | Unclip, options: argparse.Namespace) -> Tensor | None:
    """Encode the part of --image that is kept; None without --image."""
    if options.image is None:
        return None
    from dalle1.data.images import load_image_file, read_image_file

    with names_flag("--mask", options.mask):
        mask = load_image_file(options.mask) if options.mask else None
    with names_flag("--image", options.image):
        image = read_image_file(options.image)
    return model.encode_known(image, keep_rows=options.keep_rows, mask=mask)


@contextmanager
def names_flag(flag: str, path: Path) -> Iterator[None]:
    """Name the flag in the error about a file that is no image."""
    try:
        yield
    except (ValueError, OSError) as error:
        why = getattr(error, "strerror", None) or str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{flag} is {path}, expected an image; {why}") from error


def previews(model: DallE | Unclip, folder: Path) -> Callable[[Tensor, int], None]:
    """Return a callback that writes the images so far, grey where codes are missing."""
    from dalle1.data.images import grid, save_png

    path = preview_path(folder)

    def write_preview(codes: Tensor, rows: int) -> None:
        width = model.image_tokenizer.grid_size
        images = model.decode(codes[:16].clamp_min(0).unflatten(1, (width, width)))
        for image in images:
            image.paste("grey", (0, image.height * rows // width, image.width, image.height))
        try:
            save_png(grid(images, 4), path, {"settings": "preview"})
        except OSError as error:
            warnings.warn(f"cannot write {path} ({error.strerror})", stacklevel=2)

    return write_preview


@contextmanager
def processes() -> Iterator[tuple[int, int]]:
    """Yield this process's rank and the number of processes, from torchrun or 0 and 1."""
    rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    if world == 1:
        yield 0, 1
        return
    from dalle1.training import distributed

    distributed.init_process_group("gloo")
    try:
        yield rank, world
    except RuntimeError as error:
        if distributed.is_lost_connection(error):
            raise ValueError(f"{distributed.lost_connection(error)}, and start again") from error
        raise
    finally:
        distributed.shutdown()


def gathered(
    model: DallE | Unclip, candidates: list[Candidate], rank: int, world: int
) -> list[Candidate]:
    """Gather all candidates in process 0, best first, or as sampled without a reranker."""
    if world == 1:
        return candidates
    import torch.distributed as dist

    parts: list[Any] | None = [None] * world if rank == 0 else None
    dist.gather_object(candidates, parts)
    everyone = [c for part in parts or [] for c in part]
    everyone.sort(key=lambda c: (-(c.score or 0.0), c.index))
    by_clip = any(c.probability is not None for c in everyone)
    return model.with_probabilities(everyone) if by_clip else everyone


def sample(
    model: DallE | Unclip, options: argparse.Namespace, share: tuple[int, int], threads: int
) -> None:
    """Sample, rank and write the images of all prompts, with at most so many threads."""
    from torch import get_num_threads, set_num_threads

    rank, world = share
    root, count = options.out or DEFAULT_OUT, len(options.prompts)
    width, known = model.image_tokenizer.grid_size, encode_known(model, options)
    first_row = 0 if known is None else int((known < 0).nonzero()[0]) // width
    each = len(range(1 if is_deterministic(options) else options.num_candidates)[rank::world])
    preview = previews(model, root) if options.preview and rank == 0 else None
    image_threads = min(2, get_num_threads()) if threads == 1 else threads
    set_num_threads(step_threads := diffusion_flags.threads_for(model, each, threads))
    taken: set[Path] = set()
    work, unit = diffusion_flags.progress_of(model, options, first_row)
    with bar(
        total=count * each * work,
        desc=options.prompts[0][:40] if count == 1 else f"{count} prompts",
        unit=unit, unit_scale=True, delay=0.1, disable=rank > 0,  # hidden if options are rejected
    ) as progress, diffusion_flags.steps_shown(model, progress):  # fmt: skip

        def on_row(codes: Tensor, rows: int) -> None:
            progress.update(len(codes) * width if unit == "position" else 0)
            if preview:
                preview(codes, rows)
            # Images are decoded then. On one thread, convolutions would be rounded differently.
            set_num_threads(image_threads if rows == width else step_threads)

        names = (*vars(model.generation), "seed", "batch_size")
        sampled = model.sample(
            options.prompts,
            known_codes=known,
            share=share,
            on_row=on_row,
            **{name: getattr(options, name) for name in names},
            **diffusion_flags.diffusion_options(model, options),
        )
        for prompt, candidates in zip(options.prompts, sampled, strict=True):
            best = gathered(model, candidates, rank, world)
            if rank == 0:
                settings = settings_of(options, model)
                is_named = options.out is not None and count == 1
                folder = root if is_named else root / slug(prompt)
                best = model.finished(best[: options.num_images], options.upsampler_steps)
                folder = write(folder, prompt, best, settings, is_named=is_named, taken=taken)
                line = f"{prompt!r}: {folder / GRID}"
                if options.json:
                    line = as_json(folder, prompt, settings)
                progress.write(line, file=sys.stdout)


def as_json(folder: Path, prompt: str, settings: Mapping[str, object]) -> str:
    """Return what was written to `folder` as one line of JSON: paths, scores and settings."""
    images = parse_json(folder / SCORES, list)
    for image in images:
        image["file"] = str(folder / image["file"])
    report = {"prompt": prompt, "grid": str(folder / GRID), "images": images}
    return json.dumps({**report, "settings": {name: to_json(x) for name, x in settings.items()}})


def set_defaults(options: argparse.Namespace, defaults: GenerationConfig) -> None:
    """Set the flags that are absent to the defaults, which have a field for each."""
    given = {name: getattr(options, name) for name in vars(defaults)}
    chosen = defaults.updated(**given)
    vars(options).update(vars(chosen))
    options.num_images, options.num_candidates = image_counts(
        options.num_images, given["num_candidates"], chosen.num_candidates
    )


def is_deterministic(options: argparse.Namespace) -> bool:
    """Whether all candidates of a prompt are alike, so that only one is sampled."""
    from dalle1.sampling.filters import Sampling

    return Sampling(temperature=options.temperature, top_k=options.top_k).is_deterministic


def settings_of(options: argparse.Namespace, model: DallE | Unclip) -> dict[str, object]:
    """Return the settings that images are stored with: what was used, not what was asked."""
    settings = {name: getattr(options, name) for name in SETTINGS}
    settings |= diffusion_flags.decoder_settings(model, options)
    has_clip, is_one = model.clip is not None, is_deterministic(options)
    return settings | {
        "num_candidates": 1 if is_one else options.num_candidates,
        "num_images": 1 if is_one else options.num_images,
        "precision": model.precision,
        "rerank": options.rerank or ("clip" if has_clip else "none"),
        "clip": options.clip or ("the model's own" if has_clip else "none"),
    }


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors(), warnings.catch_warnings():
        options = parse(args)
        if os.environ.get("RANK", "0") == "0":
            check_writable(options.out or DEFAULT_OUT, map(slug, options.prompts))

        idle = IdleProcessors()
        from dalle1.sampling.generation import GenerationConfig
        from dalle2.loading import load_pipeline

        warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
        with processes() as (rank, world):
            device = options.device
            if world > 1 and device == "auto" and (local := one_gpu_each()):
                device = local
            model = load_pipeline(
                options.model, clip=options.clip, device=device, precision=options.precision
            )
            if options.plain:
                model.generation = GenerationConfig()
            set_defaults(options, model.generation)
            sample(model, options, (rank, world), idle.threads())


def one_gpu_each() -> str | None:
    """Return this process's own GPU; None without CUDA."""
    import torch

    return f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else None
