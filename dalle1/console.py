"""What every command shares: how it is read, a preset first, clear errors, a progress bar."""

from __future__ import annotations

import ctypes
import io
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

Config = TypeVar("Config")

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # from malloc.h


def prepare_process() -> None:
    """Apply the process-wide settings of every command; the library itself changes none."""
    keep_freed_memory()
    # Under autocast, parameters of norms stay fp32, as they should; torch warns of RMSNorm's.
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning)
    # DeepSpeed still calls these functions.
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step, which needs as much again.

    By default, every large tensor is mapped and faulted in anew: a third of a CPU training's time.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
                mallopt(parameter, 2**31 - 1)
            mallopt(_M_TOP_PAD, 2**28)


@contextmanager
def worker_advice() -> Iterator[None]:
    """Where torch tells, at any moment, that such a process was killed, say what to lower."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise worker_killed(error) from error


def worker_killed(error: Exception) -> ValueError:
    """Say what to lower where a process that prepares batches was killed."""
    return ValueError(
        f"a process that prepares batches was killed, likely for want of memory ({error}); give a "
        "lower --num-workers, or 0 to prepare them in the main process"
    )


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can cause into one line on stderr and exit code 2."""
    try:
        with worker_advice():
            yield
    except (ValueError, OSError) as error:
        # An error in a worker process comes wrapped in its traceback; its last line is the error.
        text = str(error).strip()
        if text.startswith("Caught "):
            text = text.splitlines()[-1].partition(": ")[2]
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as interrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from interrupt


@contextmanager
def notes() -> Iterator[None]:
    """Print warnings as lines that begin with `note:`, without the place in the code."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
        yield


def parse(kind: Any, args: Sequence[str] | None, about: str, **options: Any) -> Any:
    """Read the command line into dataclasses, by tyro.

    Args:
        kind: a dataclass, or a union of them.
        args: the command line; None reads the process's.
        about: what the command does, for --help.
        options: more for `tyro.cli`.

    Raises: ValueError, as it is, where `__post_init__` refuses a setting; tyro would frame it.
    """
    import tyro

    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(kind, args=args, description=about, **options)
    except SystemExit as stop:
        refusal: BaseException | None = stop
        while refusal is not None and not _is_of_a_setting(refusal):
            refusal = refusal.__context__
        if refusal is not None:
            said.truncate(0)
            raise refusal from None
        raise
    finally:
        sys.stderr.write(said.getvalue())


def _is_of_a_setting(error: BaseException) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    names = {frame.f_code.co_name for frame, _ in frames}
    return isinstance(error, ValueError) and "__post_init__" in names


def parse_preset(presets: Mapping[str, Config], args: Sequence[str] | None, about: str) -> Config:
    """Read a preset's name, then flags that override its fields.

    Not by `tyro.extras.overridable_config_cli`: there, an unknown preset or a refused value is a
    frame of several lines, `--help` lists no flags, and parsing takes three times as long.

    Args:
        presets: name → dataclass.
        args: the command line; None reads the process's.
        about: what the command does, for --help.
    """
    words = list(sys.argv[1:] if args is None else args)
    # The command deepspeed adds it to every process's; the environment says the same.
    words = [word for word in words if not word.startswith("--local_rank=")]
    names = ", ".join(presets)
    if not words or words[0] in ("-h", "--help"):
        about = f"{about}\n\nThe first word is a preset: {names}. Below, {next(iter(presets))}'s."
        words, default = ["--help"], next(iter(presets.values()))
    elif words[0] not in presets:
        raise ValueError(f"no preset {words[0]!r}; there are: {names}")
    else:
        default = presets[words.pop(0)]
    return parse(type(default), words, about, default=default)


def bar(**options: Any) -> tqdm:
    """Make a progress bar; in a file it moves every half minute only."""
    from tqdm import tqdm

    interval = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(dynamic_ncols=True, mininterval=interval, maxinterval=interval, **options)
