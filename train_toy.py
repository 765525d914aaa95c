"""Train the bundled model from nothing: scenes, dVAE, codes, transformer, CLIP, classifier.

    python train_toy.py --out runs/toy

Every start says how far each stage is, and goes on there; stop it whenever you like. What is drawn
with is then in OUT/model. The stages are the commands that anyone would give, in the same order.
dVAE and transformer have two each: the dVAE then settles on the codes that carry something, and the
transformer has learned from pictures of half the side before.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from dalle1.console import one_line_errors, parse, parse_preset
from dalle1.data.encoded import INDEX_NAME, fingerprint
from dalle1.image_tokenizer import image_tokenizer_file
from dalle1.storage import same_tensors
from dalle1.tasks.clip import CLIP_PRESETS
from dalle1.tasks.dvae import DVAE_PRESETS
from dalle1.tasks.toybox_classifier import CLASSIFIER_PRESETS
from dalle1.tasks.transformer import TRANSFORMER_PRESETS

ROOT = Path(__file__).resolve().parent
SHARD = 1_000  # scenes in a file

Name = Literal[
    "scenes", "dvae", "settle", "half-codes", "codes", "half", "transformer", "clip", "classifier"
]
SECOND = {"settle": ("dvae", "toy-finetune"), "half": ("transformer", "toy-128")}
"""The script and the preset of a stage that shares its script with another."""
FOLLOWS: dict[Name, tuple[Name, ...]] = {
    "settle": ("dvae",),
    "half-codes": ("settle",),
    "codes": ("settle",),
    "half": ("settle", "half-codes"),
    "transformer": ("settle", "codes", "half"),
}
"""What each stage is made from, where that may go on; in order."""
CODES: tuple[Name, ...] = ("half-codes", "codes")
"""What the same dVAE gives again, should it be gone."""
GROWN: tuple[tuple[Name, Name], ...] = (("dvae", "settle"), ("half", "transformer"))
"""Trainings of one model, the second from where the first ends."""


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """What `train_toy.py` takes."""

    out: Path = Path("runs/toy")
    """Folder of all stages. What is there already is gone on with."""
    only: tuple[Name, ...] = ()
    """Stages to run, rather than all and the joining of what they give."""
    processes: int = 1
    """That train the transformer together, by torchrun, rather than one with all cores."""
    scenes: int = 40_000
    """Drawn once, 29 kB each, for all stages but the classifier."""
    dvae: str = ""
    """More flags of train_dvae.py, as in --dvae="--steps 20000"."""
    settle: str = ""
    """More flags of train_dvae.py for its second part, which lets go of codes nobody needs."""
    half: str = ""
    """More flags of train_transformer.py for pictures of half the side."""
    transformer: str = ""
    """More flags of train_transformer.py for whole ones."""
    clip: str = ""
    """More flags of train_clip.py."""
    classifier: str = ""
    """More flags of dalle1 train classifier."""

    def __post_init__(self) -> None:
        if self.scenes < 1 or self.processes < 1:
            raise ValueError(
                f"scenes is {self.scenes} and processes {self.processes}, expected at least 1"
            )


@dataclass(frozen=True)
class Stage:
    """One command, which goes on by itself where it was stopped."""

    name: Name
    command: list[str]
    done: Callable[[], int]
    total: int
    unit: str

    def __str__(self) -> str:
        done = self.done()
        state = "done" if done >= self.total else "to do" if not done else "under way"
        return f"  {self.name:12} {self.unit} {done:,} of {self.total:,}: {state}"


def stages(config: ToyConfig) -> list[Stage]:
    """Give all stages in order."""
    out = {name: config.out / name for name in get_args(Name)}
    scenes, dvae = ["--data", str(out["scenes"])], ["--dvae", str(out["settle"])]
    shards = -(-config.scenes // SHARD)
    draw = ["-m", "dalle1.commands.toybox", "--num-scenes", str(config.scenes), "--captions", "8"]
    draw += ["--shard-size", str(SHARD), "--processes", str(min(shards, os.cpu_count() or 1))]

    recipes: dict[Name, Any] = {}

    def training(name: Name, presets: Mapping[str, Any], more: str, *flags: str) -> Stage:
        script, preset = SECOND.get(name, (name, "toy"))
        words = [preset, *flags, "--out", str(out[name]), *shlex.split(more)]
        recipes[name] = parse_preset(presets, words, "")
        command = [str(ROOT / f"train_{script}.py"), *words]
        if script == "classifier":
            command = ["-m", "dalle1.tasks.toybox_classifier", *words]
        if script == "transformer" and config.processes > 1:  # others compare a batch's samples
            together = ["-m", "torch.distributed.run", "--standalone"]
            command = [*together, f"--nproc-per-node={config.processes}", *command]
        return Stage(name, command, lambda: step_of(out[name]), recipes[name].steps, "step")

    def shards_in(name: Name) -> Callable[[], int]:
        return lambda: len(list(out[name].glob("*.tar")))

    def encoding(name: Name, *flags: str) -> Stage:
        command = ["-m", "dalle1.data.encoded", *dvae, *scenes, "--shard-size", str(SHARD), *flags]
        return Stage(name, [*command, "--out", str(out[name])], shards_in(name), shards, "shard")

    def data(name: Name) -> list[str]:
        return [*dvae, "--data", str(out[name])]

    half = training("half", TRANSFORMER_PRESETS, config.half, *data("half-codes"))
    init = ["--init", str(out["half"])]
    every = [
        Stage("scenes", [*draw, "--out", str(out["scenes"])], shards_in("scenes"), shards, "shard"),
        training("dvae", DVAE_PRESETS, config.dvae, *scenes),
        training("settle", DVAE_PRESETS, config.settle, *scenes, "--init", str(out["dvae"])),
        encoding("half-codes", "--image-size", str(recipes["half"].image_size)),
        encoding("codes"),
        half,
        training("transformer", TRANSFORMER_PRESETS, config.transformer, *data("codes"), *init),
        training("clip", CLIP_PRESETS, config.clip, *scenes),
        training("classifier", CLASSIFIER_PRESETS, config.classifier),
    ]
    for first, second in GROWN:
        sizes, wanted = asdict(recipes[first].model), asdict(recipes[second].model)
        if other := [f"{k} is {wanted[k]}, not {sizes[k]}" for k in sizes if sizes[k] != wanted[k]]:
            raise ValueError(
                f"{second} goes on from {first}, but its model differs: {', '.join(other)}; give "
                f"--{first} and --{second} the same --model flags"
            )
    return every


def step_of(out: Path) -> int:
    """Give the step of the latest checkpoint of a training."""
    latest = out / "latest"
    return int(latest.resolve().name.removeprefix("step-")) if latest.exists() else 0


def check_order(out: Path, todo: Sequence[Stage], of: Mapping[Name, Stage]) -> None:
    """Refuse to go on from what is unfinished, or with what other stages gave: ValueError."""
    names = {stage.name for stage in todo}
    unfinished = {name for name, stage in of.items() if stage.done() < stage.total}
    for name, before in ((name, b) for name, all_before in FOLLOWS.items() for b in all_before):
        if name in names and before in unfinished - names:
            raise ValueError(
                f"{name} needs all of {before}; in {out} there is: {str(of[before]).strip()}. Add "
                f"{before} to --only, or leave --only out"
            )
    old: dict[Name, None] = {}
    why: dict[str, None] = {}
    for name in (name for name in FOLLOWS if of[name].done()):
        goes_on = [b for b in FOLLOWS[name] if b in unfinished and b not in CODES]
        other = "settle" in FOLLOWS[name] and not goes_on and other_dvae(out, name)
        if goes_on or other or any(before in old for before in FOLLOWS[name]):
            old[name] = None
            why.update({" ".join(str(of[before]).split()): None for before in goes_on})
            why.update({f"{name} has another dVAE than settle": None} if other else {})
    if old and names & {"dvae", *FOLLOWS}:
        raise ValueError(
            f"in {out}, {', '.join(old)}: made from other stages than this command's "
            f"({'; '.join(why)}). Give the flags that all was made with, or another --out; what is "
            "moved away is made anew"
        )


def other_dvae(out: Path, name: Name) -> bool:
    """Tell whether codes, or a transformer, are of another dVAE than the one that settled."""
    settled = out / "settle"
    if name not in CODES:
        files = (image_tokenizer_file(folder) for folder in (settled, out / name))
        return not same_tensors(*files)
    index = out / name / INDEX_NAME
    return index.is_file() and json.loads(index.read_text())["dvae"] != fingerprint(settled)


def run(command: Sequence[str]) -> int:
    """Run a command of Python's to its end; a signal to stop is its own to obey.

    Returns its exit code; 128 and the signal's number if one came meanwhile, or ended it.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    started: list[subprocess.Popen[bytes]] = []
    caught: list[int] = []

    def forward(number: int, _: object) -> None:
        caught.append(number)
        # A terminal sends Ctrl-C to the command itself, too.
        if number == signal.SIGTERM and started:
            started[0].terminate()

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        environment = {**os.environ, "PYTHONPATH": path}
        started.append(subprocess.Popen([sys.executable, *command], env=environment))
        if caught:
            started[0].terminate()
        code = started[0].wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + caught[0] if caught else code if code >= 0 else 128 - code


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        config = parse(ToyConfig, args, __doc__.splitlines()[0])
        every = {stage.name: stage for stage in stages(config)}
        todo = [stage for name, stage in every.items() if not config.only or name in config.only]
        check_order(config.out, todo, every)
        print(f"In {config.out}:", *todo, sep="\n", flush=True)
        for stage in todo:
            if stage.done() >= stage.total:
                continue
            print(f"\n{stage.name}: python {shlex.join(stage.command)}", flush=True)
            code = run(stage.command)
            if code or stage.done() < stage.total:
                print(f"Stopped.\n{stage}", file=sys.stderr)
                if code == 0 or code > 128:
                    print("The same command goes on.", file=sys.stderr)
                raise SystemExit(code or 128 + signal.SIGTERM)
        if not config.only:
            join(config.out)


def join(out: Path) -> None:
    """Put what the trainings gave into OUT/model."""
    from dalle1.export import main as join_model

    parts = {"--model": "transformer", "--clip": "clip", "--out": "model"}
    join_model([word for flag, name in parts.items() for word in (flag, str(out / name))])
    shutil.copy(out / "classifier" / "latest" / "classifier.safetensors", out / "model")


if __name__ == "__main__":
    main()
