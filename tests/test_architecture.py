"""The architecture's rules: which module may import which, what loads late, how long files may be.

Each rule is a function from the root of a source tree to a list of problems. This repository must
have no problem. Below, a tiny tree breaks each rule and must have one: every rule can fail.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launch import ROOT
from source_rules import (
    MAX_FILE_LINES,
    MAX_FUNCTION_LINES,
    check_cycles,
    check_deepspeed_has_one_door,
    check_dvae_stands_alone,
    check_json_has_one_door,
    check_names,
    check_packages,
    check_sizes,
    check_toybox_stands_alone,
    imports_of,
    modules,
)

# Lowest first. A module imports from its own layer and from those below; "x.*" is x and all in it.
LAYERS = [
    [
        *("dalle1.config", "dalle1.json_files", "dalle1.model_files", "dalle1.tensor_files"),
        *("dalle1.empty_modules", "dalle1.memory_errors"),
        *("dalle1.storage", "dalle1.console", "dalle1.tyro_errors"),
    ],
    ["dalle1.devices", "dalle1.hub", "dalle1.locking", "dalle1.model_card"],
    ["dvae.*", "dalle1.vqgan.*"],
    ["dalle1.image_tokenizer"],
    ["dalle1.toybox.*", "dalle1.text.*", "dalle1.model.*"],
    ["dalle1.clip.*", "dalle1.data.*"],
    ["dalle1.sampling.*"],
    ["dalle1.importers.*"],
    ["dalle2", "dalle2.bundled", "dalle2.diffusion.*"],
    ["dalle2.blocks", "dalle2.latents"],
    ["dalle2.ldm_autoencoder"],
    ["dalle2.autoencoder", "dalle2.conditioning"],
    ["dalle2.unet", "dalle2.text_encoders"],
    [
        *("dalle2.decoder", "dalle2.embedded", "dalle2.prior"),
        *("dalle2.prior_metrics", "dalle2.progress"),
    ],
    ["dalle2.ar_prior", "dalle2.clip_guidance", "dalle2.options", "dalle2.upsampler"],
    ["dalle2.compatibility"],
    ["dalle1.training", "dalle1.training.checkpoint", "dalle1.training.heartbeat"],
    ["dalle1.training.schedules", "dalle1.training.scaling"],
    ["dalle1.training.config", "dalle1.training.distributed", "dalle1.training.shared_folder"],
    ["dalle1.training.task"],
    [
        *("dalle1.training.fine_tuning", "dalle1.training.optimizers"),
        *("dalle1.training.resblocks", "dalle1.training.resume_key"),
    ],
    ["dalle1.training.logging"],
    ["dalle1.training.engines.*"],
    ["dalle1.training.trainer"],
    ["dalle1.training.interrupts"],
    ["dalle1.training.loop"],
    ["dalle1.pipeline"],
    ["dalle2.pipeline"],
    ["dalle2.exchange.*"],
    ["dalle2.loading", "dalle2.manipulation"],
    ["dalle1", "dalle1.evaluation.*", "dalle1.outputs"],
    ["dalle1.compression.*", "dalle1.baselines.*", "dalle1.scaling.*"],
    ["dalle1.tasks.crops"],
    ["dalle1.tasks.*"],
    ["dalle2.tasks.diffusion", "dalle2.tasks.embedded"],
    ["dalle2.tasks.*"],
    ["dalle1.activation_memory", "dalle1.export", "dalle1.planner"],
    ["dalle1.web.*"],
    ["dalle1.commands.*"],
    ["dalle1.cli"],
    ["dalle1.completion"],
    ["dalle1.__main__"],
]
SCRIPTS = len(LAYERS)  # the top-level scripts stand on all the layers
LAZY = {"deepspeed", "diffusers", "ftfy", "transformers", "webdataset", "gradio", "wandb"}


def layer_of(name: str, known: dict[str, Path]) -> int | None:
    """Return a module's layer, counted from the lowest; None for one that the table leaves out."""
    for layer, patterns in enumerate(LAYERS):
        for pattern in patterns:
            package = pattern.removesuffix(".*")
            if name == package or (package != pattern and name.startswith(package + ".")):
                return layer
    return SCRIPTS if name in known and "." not in name else None


def check_layers(root: Path) -> list[str]:
    """Imports run from higher layers to lower ones, and every module has a layer."""
    known = modules(root)
    problems = []
    for name in known:
        layer = layer_of(name, known)
        if layer is None:
            problems.append(f"{name} is in no layer: add it to LAYERS in test_architecture.py")
            continue
        for target, line, _ in imports_of(name, known):
            target_layer = layer_of(target, known)
            if target_layer is not None and target_layer > layer:
                problems.append(f"{name}:{line} imports {target}, which stands above it")
    return problems


CHECKS = [
    check_layers,
    check_packages,
    check_cycles,
    check_dvae_stands_alone,
    check_toybox_stands_alone,
    check_deepspeed_has_one_door,
    check_json_has_one_door,
    check_names,
    check_sizes,
]
Check = Callable[[Path], list[str]]


@pytest.mark.parametrize("check", CHECKS)
def test_every_rule_holds(check: Check) -> None:
    problems = check(ROOT)
    assert not problems, "\n" + "\n".join(problems)


def plant(root: Path, files: dict[str, str]) -> Path:
    """Write a small source tree."""
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return root


LONG_FUNCTION = "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES

VIOLATIONS: list[tuple[Check, dict[str, str], str]] = [
    (
        check_layers,
        {"dalle1/text.py": "import dalle1.pipeline\n", "dalle1/pipeline.py": ""},
        "dalle1.text:1 imports dalle1.pipeline, which stands above it",
    ),
    (
        check_layers,
        {"dalle1/clip.py": "def f():\n    from dalle1 import tasks\n", "dalle1/tasks.py": ""},
        "dalle1.clip:2 imports dalle1.tasks, which stands above it",
    ),
    (
        check_layers,
        {"dalle1/data/encoded.py": "from ..training.loop import train\n"},
        "dalle1.data.encoded:1 imports dalle1.training.loop, which stands above it",
    ),
    (
        check_layers,
        {"dalle1/data/__init__.py": "from ..pipeline import DallE\n"},
        "dalle1.data:1 imports dalle1.pipeline, which stands above it",
    ),
    (
        check_layers,
        {"dalle1/text.py": "import importlib\nimportlib.import_module('dalle1.tasks')\n"},
        "dalle1.text:2 imports dalle1.tasks, which stands above it",
    ),
    (
        check_layers,
        {"dalle1/model.py": "from dalle1 import DallE\n", "dalle1/__init__.py": ""},
        "dalle1.model:1 imports dalle1, which stands above it",
    ),
    (
        check_layers,
        {"dalle1/pipeline.py": "from sample import main\n", "sample.py": ""},
        "dalle1.pipeline:1 imports sample, which stands above it",
    ),
    (
        check_layers,
        {"dalle1/novelty.py": ""},
        "dalle1.novelty is in no layer: add it to LAYERS in test_architecture.py",
    ),
    (
        check_packages,
        {"dalle1/__init__.py": "", "dalle1/data/folder.py": ""},
        "dalle1/data has no __init__.py",
    ),
    (
        check_cycles,
        {"dalle1/clip.py": "import dalle1.model", "dalle1/model.py": "from . import clip"},
        "modules import each other in a circle: ",
    ),
    (
        check_cycles,
        {
            "dalle1/training/loop.py": (
                "from typing import TYPE_CHECKING\n"
                "if TYPE_CHECKING:\n    from dalle1.training.trainer import Trainer\n"
            ),
            "dalle1/training/trainer.py": "from dalle1.training.loop import fit\n",
        },
        "modules import each other in a circle: ",
    ),
    (
        check_layers,
        {"dalle1/training/task.py": "import dalle1.training.loop", "dalle1/training/loop.py": ""},
        "dalle1.training.task:1 imports dalle1.training.loop, which stands above it",
    ),
    (
        check_dvae_stands_alone,
        {"dvae/model.py": "import torch.nn\nfrom dalle1.text import encode\n"},
        "dvae.model:2 imports dalle1.text, but dvae stands alone",
    ),
    (
        check_dvae_stands_alone,
        {"dvae/model.py": "def f():\n    import tyro\n"},
        "dvae.model:2 imports tyro, but dvae stands alone",
    ),
    (
        check_toybox_stands_alone,
        {"dalle1/toybox/scene.py": "def f():\n    from dalle1.storage import claim\n"},
        "dalle1.toybox.scene:2 imports dalle1.storage, but dalle1.toybox stands alone",
    ),
    (
        check_deepspeed_has_one_door,
        {
            "dalle1/training/engines/deepspeed.py": "import deepspeed\n",
            "dalle1/training/loop.py": "def f():\n    from deepspeed.ops import adam\n",
        },
        "dalle1.training.loop:2 imports deepspeed: only dalle1.training.engines.deepspeed may",
    ),
    (
        check_json_has_one_door,
        {
            "dalle1/json_files.py": "import json\njson.loads('1')\n",
            "sample.py": "import json\njson.dumps(1)\njson.load(open('a'))\n",
        },
        "sample:3 calls json.load: use dalle1.json_files.parse_json",
    ),
    (
        check_names,
        {"dalle1/utils/tensors.py": ""},
        "dalle1/utils: name it after what is inside",
    ),
    (
        check_names,
        {"docs/misc.md": ""},
        "docs/misc.md: name it after what is inside",
    ),
    (
        check_sizes,
        {"tests/test_long.py": LONG_FUNCTION, "benchmarks/long.py": LONG_FUNCTION},
        "benchmarks/long.py:1 f has 51 lines, more than 50: split it",
    ),
    (
        check_sizes,
        {"sample.py": "x = 1\n" * (MAX_FILE_LINES + 1)},
        "sample.py has 401 lines, more than 400: split it",
    ),
]


@pytest.mark.parametrize(("check", "files", "problem"), VIOLATIONS)
def test_a_broken_rule_is_noticed(
    check: Check, files: dict[str, str], problem: str, tmp_path: Path
) -> None:
    problems = check(plant(tmp_path, files))
    assert len(problems) == 1
    assert problems[0].startswith(problem)


def test_what_is_allowed_passes(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "sample.py": "from dalle1 import DallE\nimport tyro\n",
            "dalle1/__init__.py": "def __getattr__(name):\n    from dalle1 import pipeline\n",
            "dalle1/pipeline.py": "import dalle1.clip\nimport dvae\n",
            "dalle1/clip.py": "from .text import encode\n",
            "dalle1/text.py": "import torch\n",
            "dalle1/data/__init__.py": "from dalle1.data.folder import Folder\n",
            "dalle1/data/folder.py": (
                "from typing import TYPE_CHECKING\n"
                "if TYPE_CHECKING:\n    from dalle1.text import encode\n"
            ),
            "dvae/__init__.py": "from .model import DVAE\n",
            "dvae/model.py": "import math\nimport torch\nfrom einops import rearrange\n",
            ".venv/utils/long.py": "x = 1\n" * (MAX_FILE_LINES + 1),
        },
    )
    assert [check(tmp_path) for check in CHECKS] == [[]] * len(CHECKS)


IMPORT_AND_LOOK = """
import json, sys, torch
look = lambda: [torch.is_grad_enabled(), str(torch.get_default_dtype()), torch.get_num_threads()]
state, before, seed = look(), set(sys.modules), torch.initial_seed()
import dalle1
print(json.dumps({
    "loaded": sorted(set(sys.modules) - before),
    "before": [*state, seed],
    "after": [*look(), torch.initial_seed()],
}))
"""


@pytest.mark.skipif(not (ROOT / "dalle1/__init__.py").exists(), reason="there is no dalle1 yet")
def test_importing_dalle1_is_light_and_leaves_torch_alone() -> None:
    command = [sys.executable, "-c", IMPORT_AND_LOOK]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    seen = json.loads(answer.stdout)
    assert sorted(LAZY & {name.split(".")[0] for name in seen["loaded"]}) == []
    assert seen["after"] == seen["before"]
