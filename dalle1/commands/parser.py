"""The parser of `dalle1 sample`."""

from __future__ import annotations

import argparse
from typing import NoReturn


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """A formatter that appends the defaults, except of flags that are off or unset."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unset = action.default is None or action.default is False
        return action.help if unset else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser that raises its errors, for one line instead of the usage text."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see dalle1 sample --help")
