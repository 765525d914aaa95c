"""An LSTM over the same stream as the transformer's: caption, then codes.

B batch, L text positions, N = W² codes, D width, V codebook size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle1.evaluation.bits import Pairs
from dalle1.model.transformer import TransformerConfig


class LSTM(nn.Module):
    """Predicts each token of caption and image from those before it, by a recurrent state.

    Start token, text and codes share one embedding table; text and codes have a head each.
    """

    def __init__(self, config: TransformerConfig, width: int, layers: int = 2) -> None:
        super().__init__()
        self.config = config
        self.text_tokens = config.text_vocab + config.text_len
        tokens = self.text_tokens + config.codebook_size
        self.embedding = nn.Embedding(tokens + 1, width)  # the last is the start token
        self.layers = nn.LSTM(width, width, layers, batch_first=True)
        self.text_head = nn.Linear(width, self.text_tokens)
        self.image_head = nn.Linear(width, config.codebook_size)

    @classmethod
    def with_parameters(cls, config: TransformerConfig, count: int, layers: int = 2) -> LSTM:
        """Return the widest LSTM of at most `count` parameters.

        Raises: ValueError where even one channel has more.
        """
        low, high = 0, math.isqrt(count)
        while low < high:
            width = (low + high + 1) // 2
            with torch.device("meta"):
                parameters = cls(config, width, layers).parameters()
            fits = sum(parameter.numel() for parameter in parameters) <= count
            low, high = (width, high) if fits else (low, width - 1)
        if low == 0:
            raise ValueError(f"parameters is {count}, expected more for these vocabularies")
        return cls(config, low, layers)

    def losses(self, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Return −ln p of every token: [B, L] of the text, [B, N] of the image."""
        codes = codes.flatten(1)
        start = text.new_full((len(text), 1), self.embedding.num_embeddings - 1)
        stream = torch.cat([start, text, codes + self.text_tokens], dim=1)[:, :-1]
        states, _ = self.layers(self.embedding(stream))
        text_states, image_states = states.split([text.shape[1], codes.shape[1]], dim=1)
        heads = (self.text_head, text_states, text), (self.image_head, image_states, codes)
        text_losses, image_losses = (
            F.cross_entropy(head(x).transpose(1, 2), targets, reduction="none")
            for head, x, targets in heads
        )
        return text_losses, image_losses

    @torch.no_grad()
    def sample(self, text: Tensor, seed: int) -> Tensor:
        """Sample codes after text [B, L]: [B, W, W]."""
        generator = torch.Generator().manual_seed(seed)
        start = text.new_full((len(text), 1), self.embedding.num_embeddings - 1)
        states, memory = self.layers(self.embedding(torch.cat([start, text], dim=1)))
        codes: list[Tensor] = []
        for _ in range(self.config.image_len):
            probabilities = self.image_head(states[:, -1]).softmax(-1)
            codes.append(torch.multinomial(probabilities, 1, generator=generator))
            states, memory = self.layers(self.embedding(codes[-1] + self.text_tokens), memory)
        grid = (self.config.grid_size, self.config.grid_size)
        return torch.cat(codes, dim=1).unflatten(1, grid)


def train_lstm(
    model: LSTM,
    pairs: Pairs,
    steps: int,
    batch_size: int,
    learning_rate: float,
    on_step: Callable[[float], None] = lambda loss: None,
) -> None:
    """Train by AdamW with a warm-up of a tenth and a cosine; the loss weighs text by 1/8.

    Args:
        on_step: called after each update with its loss per code, in nats.
    """
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.99))
    warm_up = max(1, steps // 10)

    def schedule(step: int) -> float:
        rest = (step - warm_up) / max(1, steps - warm_up)
        return min((step + 1) / warm_up, (1 + math.cos(math.pi * max(0.0, rest))) / 2)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(pairs.text), (batch_size,), generator=generator)
        text_losses, image_losses = model.losses(pairs.text[chosen], pairs.codes[chosen].long())
        loss = text_losses.mean() / 8 + image_losses.mean() * 7 / 8
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        on_step(float(image_losses.detach().mean()))
