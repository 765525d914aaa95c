"""Noise schedules as scheduler folders of diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dalle1.json_files import parse_json
from dalle1.model_files import check_model_files
from dalle1.storage import write_atomic
from dalle2.diffusion.schedule import ScheduleName
from dalle2.exchange.parts import refuse_values

FILE = "scheduler_config.json"
SCHEDULES: dict[ScheduleName, dict[str, Any]] = {
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "scaled-linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
}
OBJECTIVES = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
MAX_TIMES = 100_000
MAX_NOISE = 0.01
"""Largest variance of noise at level 0 that counts as none."""


def betas(name: ScheduleName, times: int) -> dict[str, Any]:
    """Return a schedule's fields of a scheduler; ours have the same noise at any `times`."""
    own = SCHEDULES[name].items()
    return {key: x if isinstance(x, str) else x * 1000 / times for key, x in own}


def write_scheduler(
    folder: Path, kind: str, name: ScheduleName, times: int, objective: str
) -> None:
    """Write the scheduler whose steps are those of `Schedule.steps`."""
    config = {
        "_class_name": kind,
        "num_train_timesteps": times,
        "prediction_type": OBJECTIVES[objective],
        "clip_sample": False,
        "timestep_spacing": "trailing",
        **betas(name, times),
    }
    write_atomic(folder / FILE, json.dumps(config, indent=2) + "\n")


def write_no_noise(folder: Path) -> None:
    """Write a scheduler that adds no noise."""
    config = {"_class_name": "DDPMScheduler", "trained_betas": [1e-12], "num_train_timesteps": 1}
    write_atomic(folder / FILE, json.dumps(config, indent=2) + "\n")


def read_scheduler(folder: Path) -> dict[str, Any]:
    """Read `schedule`, `times` and `objective`; what a file lacks has diffusers' default.

    Raises: ValueError for a schedule that ours are not.
    """
    check_model_files(folder)
    file = folder / FILE
    found = {
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        **parse_json(file, dict),
    }
    if found.get("_class_name") == "UnCLIPScheduler":
        found["beta_schedule"] = "squaredcos_cap_v2"
    refuse_values(folder, found, {"trained_betas": None, "rescale_betas_zero_snr": False})
    times, kind = found["num_train_timesteps"], found["prediction_type"]
    if type(times) is not int or not 1 <= times <= MAX_TIMES:
        raise ValueError(f"{file} has num_train_timesteps {times!r}, expected 1 to {MAX_TIMES:,}")
    for objective, theirs in OBJECTIVES.items():
        for name in SCHEDULES:
            if kind == theirs and all(found[k] == x for k, x in betas(name, times).items()):
                return {"schedule": name, "times": times, "objective": objective}
    asked = ", ".join(f"{k} {found[k]}" for k in ("beta_schedule", "beta_start", "beta_end"))
    raise ValueError(
        f"{file} has {asked} and prediction_type {kind}, expected one of "
        f"{', '.join(map(str, SCHEDULES.values()))} and one of {', '.join(OBJECTIVES.values())}"
    )


def refuse_noise(folder: Path) -> None:
    """Raise ValueError for a scheduler that adds noise at level 0."""
    check_model_files(folder)
    found = parse_json(folder / FILE, dict)
    trained = found.get("trained_betas")
    first = trained[0] if isinstance(trained, list) and trained else found.get("beta_start", 0.0)
    cosine = found.get("beta_schedule") == SCHEDULES["cosine"]["beta_schedule"] and not trained
    if not cosine and not (isinstance(first, float | int) and 0 <= first <= MAX_NOISE):
        raise ValueError(
            f"{folder / FILE} adds noise of variance {first} to z_i at level 0, expected at most "
            f"{MAX_NOISE}: ours are told of none"
        )
