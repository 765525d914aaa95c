"""What a CLIP does without a model that draws.

python -m dalle1.clip rank "a red cube" pictures/*.png --out ranked
python -m dalle1.clip filter --data SHARDS --out KEPT --min-similarity 0.28
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import tyro

from dalle1.clip import filtering as filter
from dalle1.clip import reranking as rank
from dalle1.console import notes, one_line_errors, parse


def main(args: Sequence[str] | None = None) -> None:
    """Read the command line and run one command."""
    command = (
        Annotated[rank.RankOptions, tyro.conf.subcommand("rank")]
        | Annotated[filter.FilterOptions, tyro.conf.subcommand("filter")]
    )
    with one_line_errors(), notes():
        options = parse(command, args, __doc__)
        if isinstance(options, rank.RankOptions):
            rank.run(options)
        elif filter.filter_shards(options)["damaged"]:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
