"""Linear layers and embedding tables, and how every parameter of the transformer starts.

The scheme of Sparse Transformers (arXiv 1904.10509, §6); d is the number of input channels:

| parameter                               | starts as                                  |
|-----------------------------------------|--------------------------------------------|
| token embeddings                        | N(0, 0.125/√D)                             |
| learned positions                       | N(0, 0.125/√(D·n)), n tables are summed    |
| linear layers (query/key/value, up)     | N(0, 0.125/√d)                             |
| last layer of a branch (out, down)      | N(0, 0.125/√d · 1/√(2·depth))              |
| heads (text and image logits)           | 0: every token is equally likely           |
| biases                                  | 0                                          |
| gains of norms                          | 1                                          |

Each module starts its own parameters when it is made, since ZeRO stage 3 partitions them right
afterwards.
"""

from __future__ import annotations

import math

from torch import nn


class Linear(nn.Linear):
    """A linear layer: weights from N(0, (0.125/√d_in · scale)²), biases 0."""

    def __init__(self, d_in: int, d_out: int, scale: float = 1.0) -> None:
        self.std = 0.125 / math.sqrt(d_in) * scale
        super().__init__(d_in, d_out)

    def reset_parameters(self) -> None:
        """Sample the initial weights."""
        nn.init.normal_(self.weight, std=self.std)
        nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """An embedding table, one of `summed` that are added: N(0, 0.125²/(width · summed))."""

    def __init__(self, rows: int, width: int, summed: int = 1) -> None:
        self.std = 0.125 / math.sqrt(width * summed)
        super().__init__(rows, width)

    def reset_parameters(self) -> None:
        """Sample the initial table."""
        nn.init.normal_(self.weight, std=self.std)
