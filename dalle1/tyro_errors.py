"""Errors of tyro as one line each; tyro itself prints a frame of several lines.

The hook is not part of tyro's public interface. A tyro without it prints its frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import takewhile
from typing import Any


@contextmanager
def one_line_tyro_errors(words: Sequence[str], flags: Sequence[str]) -> Iterator[None]:
    """Raise a ValueError of one line where tyro rejects the command line.

    Args:
        words: the command line.
        flags: flags to suggest where one is unknown.
    """
    try:
        from tyro._errors import on_parse_error
    except ImportError:
        yield
        return

    def raise_one_line(event: Any) -> None:
        explain = _EXPLAIN.get(type(event).__name__)
        if explain is not None and (text := explain(event, words, flags)):
            raise ValueError(f"{text}; see {event.prog} --help")

    with on_parse_error(raise_one_line):
        yield


def _name(argument: Any) -> str:
    """Return the flag, with its values, or the name of a positional argument."""
    metavar = argument.lowered.metavar or ""
    return metavar if argument.is_positional() else f"{_flag(argument)} {metavar}"


def _flag(argument: Any) -> str:
    return argument.lowered.name_or_flags[0]


def _missing(event: Any, words: Sequence[str], flags: Sequence[str]) -> str:
    names = [_name(context.arg) for context in event.missing_arguments]
    unknown = [word for word in event.unrecognized_tokens if word.startswith("--")]
    text = f"{' and '.join(names)} {'are' if len(names) > 1 else 'is'} missing"
    return text + (f", and {', '.join(unknown)} is unknown" if unknown else "")


def _unknown(event: Any, words: Sequence[str], flags: Sequence[str]) -> str:
    unknown = [word for word in event.tokens if word.startswith("--")]
    similar = [flag for word in unknown for flag in _similar(word, flags)]
    text = ", ".join(unknown or map(repr, event.tokens))
    text += " are unknown" if len(unknown or event.tokens) > 1 else " is unknown"
    return text + (f", expected {' or '.join(dict.fromkeys(similar))}" if similar else "")


def _similar(word: str, flags: Sequence[str]) -> list[str]:
    longer = [flag for flag in flags if flag.startswith(word)]
    return longer[:3] or get_close_matches(word, flags, 3, 0.7)


def _no_value(event: Any, words: Sequence[str], flags: Sequence[str]) -> str | None:
    if event.reason != "too_few_values":
        return None
    return f"{_flag(event.argument)} has no value, expected {event.argument.lowered.metavar}"


def _bad_choice(event: Any, words: Sequence[str], flags: Sequence[str]) -> str:
    return f"{_flag(event.argument)} is {event.value!r}, expected {' or '.join(event.choices)}"


def _bad_value(event: Any, words: Sequence[str], flags: Sequence[str]) -> str | None:
    if event.argument is None:  # the message is that of `__post_init__`
        return None
    names = event.argument.lowered.name_or_flags
    values = ""
    for position, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag.replace("_", "-") in names:
            rest = takewhile(lambda word: not word.startswith("--"), words[position + 1 :])
            values = value if equals else " ".join(rest)
    expected = event.argument.lowered.metavar
    return f"{_flag(event.argument)} is {values!r}, expected {expected}"


_EXPLAIN: Mapping[str, Any] = {
    "MissingArgs": _missing,
    "UnrecognizedArgs": _unknown,
    "BadValue": _no_value,
    "InvalidChoice": _bad_choice,
    "InstantiationFailure": _bad_value,
}
"""Event of tyro → what explains it, or returns None."""
