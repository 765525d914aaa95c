"""PowerSGD restores its state, and is refused where it cannot work; see also test_engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from function_task import FunctionTask
from torch import Tensor, nn
from two_processes import config_for, stream

from dalle1.training import distributed
from dalle1.training.engines import make_engine, powersgd
from dalle1.training.engines.powersgd import RANDOM, PowerSGD


class Root(nn.Linear):
    """A module that registers a hook as DDP does."""

    def register_comm_hook(self, state: object, hook: object) -> None:
        self.hook = state, hook


def powered(tmp_path: Path, **changes: Any) -> PowerSGD:
    how = {"gradient_compression": "powersgd", "rank": 2, **changes}
    return PowerSGD(Root(2, 2), config_for(tmp_path, **how))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero": 1}, "gradient_compression is powersgd, which needs whole gradients"),
        ({"deepspeed": Path("a.json")}, "remove --zero, --deepspeed and --precision fp16"),
        ({"precision": "fp16"}, "of one scale"),
        ({"rank": 0}, "rank is 0, expected at least 1"),
        ({"gradient_compression": "svd"}, "gradient_compression is 'svd', expected"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config_for(tmp_path, **{"gradient_compression": "powersgd", **changes})


def test_one_process_is_refused(tmp_path: Path) -> None:
    task: Any = FunctionTask(nn.Linear(2, 2), None, stream)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="compresses what several processes exchange, and there"):
        make_engine(task, config_for(tmp_path, gradient_compression="powersgd"))


def test_errors_of_other_processes_become_their_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the sum over the processes, which the next update receives, stays the same."""
    stored: dict[str, Tensor] = {RANDOM: powered(tmp_path)._random()}
    stored[RANDOM][0] = 7
    errors = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    for rank, error in enumerate(errors):
        stored[f"powersgd/error/0/{rank}"] = error
    stored |= {"powersgd/p/0": torch.ones(4), "powersgd/q/0": torch.zeros(4)}
    other = {"weights/a": torch.zeros(1)}
    for world, expected in ((2, errors.mean(0)), (3, errors[1])):
        monkeypatch.setattr(distributed, "world_size", lambda world=world: world)
        monkeypatch.setattr(distributed, "rank", lambda: 1)
        compression = powered(tmp_path)
        assert compression.load({**stored, **other}.keys(), stored.__getitem__) == stored.keys()
        torch.testing.assert_close(compression.state.error_dict, {0: expected})
        assert compression.state.p_memory_dict[0].equal(torch.ones(4))
        assert compression.state.iter == 7
    assert powered(tmp_path).load(other.keys(), other.__getitem__) == set()


def test_random_numbers_continue(tmp_path: Path) -> None:
    one, other = powered(tmp_path), powered(tmp_path, seed=5)
    one.state.rng.randint(10, size=7)
    stored = {RANDOM: one._random()}
    other.load(stored.keys(), stored.__getitem__)
    assert other.state.rng.randint(1 << 30) == one.state.rng.randint(1 << 30)


def test_it_starts_after_the_warm_up(tmp_path: Path) -> None:
    assert powered(tmp_path, warmup_steps=40).state.start_powerSGD_iter == 40
    assert powered(tmp_path, warmup_steps=0).state.start_powerSGD_iter == powersgd.MIN_START
