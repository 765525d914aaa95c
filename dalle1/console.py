"""Shared by all commands: argument parsing, presets, one-line errors and progress bars."""

from __future__ import annotations

import ctypes
import io
import os
import re
import select
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

from dalle1.memory_errors import out_of_memory

if TYPE_CHECKING:
    from tqdm import tqdm

Config = TypeVar("Config")

RENAMED_FLAGS = {
    "--pictures": "--images",
    "--crops-per-picture": "--crops-per-image",
    "--validation-pictures": "--validation-images",
    "--soften": "--random-blur",
    "--no-soften": "--no-random-blur",
    "--most": "--limit",
    "--threshold": "--min-similarity",
}
"""Flags of earlier versions → today's."""

_flags: ContextVar[Mapping[str, str]] = ContextVar("_flags", default=MappingProxyType({}))
"""Field of the running command's options → its flag."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # from malloc.h


def prepare_process(keep_memory: bool = True) -> None:
    """Apply the process-wide settings of every command; the library itself changes none.

    Args:
        keep_memory: see `keep_freed_memory`; sampling frees the weights that it packs.
    """
    if keep_memory:
        keep_freed_memory()
    let_no_print_fail()
    # Of images that cannot be read, this package reports which, and why.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    # Under autocast, the parameters of norms stay fp32 on purpose; torch warns about RMSNorm.
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning)
    # DeepSpeed still calls these functions.
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    # Threads wait for each other after every operation: they spin, then sleep. With libgomp's
    # default, those of two busy processes spin while the others wait for their processors.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


class _Output(io.FileIO):
    """A standard stream that drops what cannot be written: the pipe is closed, the disk full."""

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        with suppress(OSError):
            while rest:
                count = super().write(rest)
                if count is None:  # the pipe is full, and does not block
                    select.select([], [self], [])
                rest = rest[count or 0 :]
        return len(data)


def let_no_print_fail() -> None:
    """Replace the standard streams: no work ends because a message cannot be shown.

    Letters that the encoding of the console lacks, and bytes in file names that are no letters, are
    shown as escapes, such as \\udce9.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started the process
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
            continue
        errors = getattr(stream, "errors", None)
        errors = "backslashreplace" if errors in ("strict", "surrogateescape") else errors
        buffer = getattr(stream, "buffer", None)
        raw = getattr(buffer, "raw", buffer)
        if isinstance(raw, io.FileIO) and not isinstance(raw, _Output):
            stream.flush()
            output: Any = _Output(raw.fileno(), "wb", closefd=False)
            stream = io.TextIOWrapper(
                output if raw is buffer else io.BufferedWriter(output),
                stream.encoding,
                errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, stream)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step, which needs as much.

    By default, every large tensor is mapped again: a third of the time of a training on CPUs.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
                mallopt(parameter, 2**31 - 1)
            mallopt(_M_TOP_PAD, 2**28)


@contextmanager
def worker_advice() -> Iterator[None]:
    """Replace torch's error about a killed data-loading process by one that names the option."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise worker_killed(error) from error


def worker_killed(error: Exception) -> ValueError:
    """Return the error for a killed data-loading process."""
    return ValueError(
        f"a process that prepares batches was killed, likely out of memory ({error}); lower "
        "--num-workers, or set it to 0 to prepare batches in the main process"
    )


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Report errors that a user can cause as one line on stderr, with exit code 2."""
    before = _flags.set({})
    try:
        with worker_advice():
            yield
    except (ValueError, OSError) as error:
        _print_error(error)
        raise SystemExit(2) from error
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        smaller = "lower --batch-size, " if "--batch-size" in _flags.get().values() else ""
        why = f"out of memory; end other programs, {smaller}or use a smaller model"
        _print_error(ValueError(f"{why} ({str(error)[:200] or 'of the machine'})"))
        raise SystemExit(2) from error
    except KeyboardInterrupt as interrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from interrupt
    finally:
        _flags.reset(before)


def _print_error(error: Exception) -> None:
    text = str(error).strip()
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror.lower()}; check the path"
    # An error in a worker process comes wrapped in its traceback; its last line is the error.
    if text.startswith("Caught "):
        text = text.splitlines()[-1].partition(": ")[2]
    print(f"error: {_with_flags(' '.join(text.split()))}", file=sys.stderr)


def _with_flags(text: str) -> str:
    """Replace names of fields by those of the command's flags."""
    for name, flag in _flags.get().items():
        # A name such as `data` is also a word; at the start of a message, it is the field.
        where = rf"(?<![\w./'\"-]){name}(?![\w./'\"-])" if "_" in name else rf"^{name}(?= is )"
        text = re.sub(where, flag, text)
    return text


@contextmanager
def notes() -> Iterator[None]:
    """Print warnings as lines that begin with `note:`, without file and line."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        text = f"note: {' '.join(str(message).split())}"
        if "tqdm" in sys.modules:  # it may show a progress bar
            from tqdm import tqdm

            tqdm.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def parse(kind: Any, args: Sequence[str] | None, about: str, **options: Any) -> Any:
    """Parse the command line into dataclasses with tyro.

    Args:
        kind: a dataclass, or a union of them.
        args: the command line; None reads the process's.
        about: what the command does, for --help.
        options: other arguments of `tyro.cli`.

    Raises: ValueError of one line for any mistake; tyro would print a frame of several lines.
    """
    import tyro

    from dalle1.tyro_errors import one_line_tyro_errors

    words, frame = command_line(args), io.StringIO()
    flags = list(_flags_of(kind))
    name_flags(flags, words)
    try:
        with one_line_tyro_errors(words, [flag for _, flag in flags]), redirect_stderr(frame):
            parsed = tyro.cli(kind, args=words, description=about, **options)
    except SystemExit as stop:
        cause: BaseException | None = stop
        while cause is not None and not _from_post_init(cause):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        sys.stderr.write(frame.getvalue())
        raise
    name_flags(list(_flags_of(type(parsed))) or flags, words)  # of one command among several
    expand_home_in(parsed)
    return parsed


def name_flags(flags: Iterable[tuple[str, str]], words: Sequence[str]) -> None:
    """Set the flags that `one_line_errors` prints where messages name fields.

    Args:
        flags: pairs of field and flag; of several flags, those among `words` take precedence.
    """
    given = {word.partition("=")[0].replace("_", "-") for word in words}
    _flags.set(dict(sorted(flags, key=lambda pair: pair[1] in given)))


def _flags_of(kind: Any, prefix: str = "--") -> Iterator[tuple[str, str]]:
    """Yield the fields of a dataclass, or of a union of them, with their flags."""
    import tyro

    for part in get_args(kind) or (kind,):
        if not (isinstance(part, type) and is_dataclass(part)):
            yield from _flags_of(part, prefix) if get_args(part) else ()
            continue
        hints = get_type_hints(part, include_extras=True)
        for field in fields(part):
            flag = prefix + field.name.replace("_", "-")
            positional = tyro.conf.Positional in get_args(hints[field.name])
            yield field.name, field.name.upper() if positional else flag
            yield from _flags_of(hints[field.name], flag + ".")


def command_line(args: Sequence[str] | None) -> list[str]:
    """Return the words of a command line, with today's flags.

    Args:
        args: the command line; None reads the process's.
    """
    words = []
    for word in sys.argv[1:] if args is None else args:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if flag.replace("_", "-") == "--local-rank":  # of the deepspeed launcher; so is LOCAL_RANK
            continue
        flag = RENAMED_FLAGS.get(flag.replace("_", "-"), flag)
        words.append(flag + equals + value)
    return words


def expand_home_in(options: Any) -> None:
    """Expand `~/` in all options but prompts; shells do not do it in `--out=~/runs`."""
    for name, value in vars(options).items():
        if is_dataclass(value):
            expand_home_in(value)
        elif isinstance(value, tuple) and all(isinstance(item, Path) for item in value):
            object.__setattr__(options, name, tuple(Path(expand_home(str(x))) for x in value))
        elif isinstance(value, Path | str) and name != "prompt":
            object.__setattr__(options, name, type(value)(expand_home(str(value))))


def expand_home(path: str) -> str:
    """Return a path with `~/` as the home folder; ValueError where that is unknown."""
    expanded = os.path.expanduser(path) if re.match(r"~[\w.-]*(/|$)", path) else path
    if expanded == path and re.match("~(/|$)", path):
        raise ValueError(f"{path} is in the home folder, which is unknown; set HOME")
    return expanded


def _from_post_init(error: BaseException) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    names = {frame.f_code.co_name for frame, _ in frames}
    return isinstance(error, ValueError) and "__post_init__" in names


def parse_preset(presets: Mapping[str, Config], args: Sequence[str] | None, about: str) -> Config:
    """Parse a preset's name, then flags that override its fields.

    `tyro.extras.overridable_config_cli` prints errors in frames of several lines, lists no flags in
    `--help`, and takes three times as long.

    Args:
        presets: name → dataclass.
        args: the command line; None reads the process's.
        about: what the command does, for --help.
    """
    words = command_line(args)
    names = ", ".join(presets)
    if not words or words[0] in ("-h", "--help"):
        first, default = next(iter(presets.items()))
        about = f"{about}\n\nThe first argument is a preset: {names}. Below: defaults of {first}."
        words = ["--help"]
    elif words[0] not in presets:
        raise ValueError(f"the first argument is {words[0]!r}, expected a preset: {names}")
    else:
        default = presets[words.pop(0)]
    return parse(type(default), words, about, default=default)


@cache
def _bar_type() -> type[tqdm]:
    """Return the class of progress bars; one for all, as tqdm keeps a thread for each class."""
    from tqdm import tqdm

    class Bar(tqdm):
        def display(self, msg: str | None = None, pos: int | None = None) -> bool:
            self.delay = 0  # what was shown, by tqdm.write, too, is ended by a new line
            return super().display(msg, pos)

    return Bar


def bar(**options: Any) -> tqdm:
    """Return a progress bar; in a log file it updates only every 30 seconds."""
    interval = 0.1 if sys.stderr.isatty() else 30.0
    return _bar_type()(dynamic_ncols=True, mininterval=interval, maxinterval=interval, **options)
