"""Captions and codes as messages: the transformer predicts each token, a coder writes it.

B images, L text positions, N = W² codes, D width, V vocabulary.

Encoder and decoder run the same function, one position after another for a whole batch: `code` of
an encoder writes the token it gets, that of a decoder returns the one it reads. The transformer
runs in fp64: other machines, batches and thread counts change its logits by about 1e-13, and
`frequencies` rounds them so that a change of 1e-9 makes no difference. A checksum reports more.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle1.compression.container import CoderName, Message
from dalle1.compression.frequencies import TOTAL, Shifts, to_frequencies
from dalle1.compression.huffman import HuffmanDecoder, HuffmanEncoder
from dalle1.compression.range_coder import RangeDecoder, RangeEncoder
from dalle1.devices import inference
from dalle1.model.transformer import Transformer
from dalle1.sampling.decoding import null_caption
from dalle1.sampling.kv_cache import Caches

ENCODERS: dict[CoderName, type[RangeEncoder] | type[HuffmanEncoder]] = {
    "range": RangeEncoder,
    "huffman": HuffmanEncoder,
}
DECODERS: dict[CoderName, type[RangeDecoder] | type[HuffmanDecoder]] = {
    "range": RangeDecoder,
    "huffman": HuffmanDecoder,
}
OnPosition = Callable[[], None]


class Coder(Protocol):
    """Transfers one token after another between a batch and its message."""

    def code(self, frequencies: np.ndarray, token: int) -> int:
        """Write `token` and return it, or read one and return that."""


class Codec:
    """Compresses batches of captions, of images, or of both, with a transformer in fp64."""

    def __init__(self, model: Transformer, on_position: OnPosition | None = None) -> None:
        """Copy a model, in fp64.

        Args:
            on_position: called after each position of a batch.

        Raises: ValueError on a device without fp64.
        """
        device = model.image_head.weight.device
        if device.type == "mps":
            raise ValueError("device is mps, which has no fp64; use --device cpu")
        self.model = copy.deepcopy(model).double()
        self.device, self.on_position = device, on_position or (lambda: None)
        self.shifts = Shifts()
        self.ideal_bits = 0.0
        """Sum of −log₂ p of all tokens so far, by the frequencies that coders get."""

    def encode(
        self, text: Tensor, codes: Tensor | None, coder: CoderName = "range", captions: bool = True
    ) -> Message:
        """Compress a batch.

        Args:
            text: [B, L], captions with their padding, or empty ones.
            codes: [B, W, W]; None for captions alone.
            captions: whether the captions are part of the message; otherwise they are empty.

        Raises: ValueError where a caption fills all positions, and the model predicts no last one.
        """
        if captions and self.starts and (text[:, -1] < self.model.config.text_vocab).any():
            raise ValueError(
                f"a caption has {text.shape[1]} tokens, expected at most {text.shape[1] - 1}; "
                "shorten it"
            )
        encoder = ENCODERS[coder]()
        text = text.clone()
        flat = None if codes is None else codes.flatten(1).clone()
        shifts = self.transfer(encoder, text, flat, captions=captions)
        return Message(encoder.finish(), checksum(text, flat), shifts)

    def decode(
        self, message: Message, size: int, coder: CoderName, *, images: bool, captions: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the text [B, L] and the codes [B, W, W] of a batch of `size`.

        Args:
            images: whether the message holds codes.
            captions: whether the message holds captions.

        Raises: ValueError where the tokens are not those that were encoded.
        """
        config = self.model.config
        decoder = DECODERS[coder](message.content)
        text = null_caption(self.model).repeat(size, 1)
        codes = torch.zeros(size, config.image_len, dtype=torch.long) if images else None
        self.transfer(decoder, text, codes, captions=captions, shifts=message.shifts)
        if checksum(text, codes) != message.checksum:
            raise ValueError("the probabilities differ from those that it was written with")
        grid = (config.grid_size, config.grid_size)
        return text, None if codes is None else codes.unflatten(1, grid)

    def transfer(
        self,
        coder: Coder,
        text: Tensor,
        codes: Tensor | None,
        *,
        captions: bool = True,
        shifts: Iterable[int] | None = None,
    ) -> tuple[int, ...]:
        """Write text [B, L] and codes [B, N] by an encoder, or fill them by a decoder.

        Args:
            shifts: those of the encoder, for a decoder.

        Returns: the shifts of the message.
        """
        self.shifts = Shifts(shifts)
        if captions:
            self._code_captions(coder, text)
        if codes is not None:
            self._code_codes(coder, text, codes)
        return self.shifts.entries

    @property
    def starts(self) -> bool:
        """Whether streams have start tokens, so that states read the token before their own."""
        return self.model.config.image_start != "none"

    def _code_captions(self, coder: Coder, text: Tensor) -> None:
        """Transfer captions: text [B, L] is read, or written where the coder decodes.

        Token text_vocab stands for the end of a caption. The last position is always padding where
        streams have start tokens.
        """
        vocab = self.model.config.text_vocab
        padding = null_caption(self.model)[0]
        rows = torch.arange(len(text))
        for position in range(text.shape[1] - self.starts):
            logits = self._text_logits(text[rows, : position + 1])
            choices = torch.cat([logits[:, :vocab], logits[:, vocab + position, None]], dim=1)
            tokens = self._code_tokens(coder, choices, text[rows, position].clamp_max(vocab))
            text[rows, position] = torch.where(tokens == vocab, padding[position], tokens)
            self.on_position()
            rows = rows[tokens != vocab]
            if not len(rows):
                break

    def _code_codes(self, coder: Coder, text: Tensor, codes: Tensor) -> None:
        """Transfer codes [B, N] after their captions [B, L]."""
        for position, logits in enumerate(self._code_logits(text, codes)):
            codes[:, position] = self._code_tokens(coder, logits, codes[:, position])
            self.on_position()

    def _code_tokens(self, coder: Coder, logits: Tensor, tokens: Tensor) -> Tensor:
        """Transfer tokens [B] with logits [B, V], and return them."""
        frequencies = to_frequencies(logits, self.shifts)
        each = zip(frequencies, tokens.tolist(), strict=True)
        found = [coder.code(row, token) for row, token in each]
        self.ideal_bits -= float(np.log2(frequencies[range(len(found)), found] / TOTAL).sum())
        return torch.tensor(found)

    def _text_logits(self, text: Tensor) -> Tensor:
        """Return the text logits [B, V] of the last of text [B, n], which is not read."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        # Captions are short: recomputing all positions for each token needs no cache.
        model = self.model
        with inference(self.device):
            x = model.embed_text(text.to(self.device))[:, : text.shape[1] - 1 + self.starts]
            if not x.shape[1]:  # nothing predicts the first token: all are equally likely
                return x.new_zeros(len(x), model.text_tokens)
            return model.text_head(model.run(x, [attend] * model.config.depth)[:, -1])

    def _code_logits(self, text: Tensor, codes: Tensor) -> Iterator[Tensor]:
        """Yield image logits [B, V] of one position after another; codes are read as filled."""
        model, device = self.model, self.device
        text, caches = text.to(device), Caches(model, len(text), 1)
        for index in range(model.config.image_len):
            with inference(device):
                if index == 0:
                    x = model.embed(text, codes[:, :1].to(device))
                    states = model.run(x, caches.prefill)[:, -1:]
                else:
                    position = torch.tensor([index - 1 + self.starts], device=device)
                    caches.seek(position)
                    x = model.embed_codes(codes[:, index - 1, None].to(device), position)
                    states = model.run(x, caches.step, model.config.text_len + position)
                logits = model.image_head(states)[:, 0]
            yield logits


def checksum(text: Tensor, codes: Tensor | None) -> int:
    """Return the CRC-32 of a batch's tokens."""
    tokens = text if codes is None else torch.cat([text, codes], dim=1)
    return zlib.crc32(tokens.numpy().astype("<u4").tobytes())
