"""Images and captions of a whole file: batches, and the model that both sides need."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dalle1.compression.codec import Codec, OnPosition
from dalle1.compression.container import CoderName, Content, Header, Message
from dalle1.hub import find_model
from dalle1.image_tokenizer import image_tokenizer_file
from dalle1.model.transformer import Transformer
from dalle1.pipeline import VOCABULARY_NAME, DallE
from dalle1.sampling.decoding import null_caption


@dataclass(kw_only=True)
class Archive:
    """What a file holds."""

    text: Tensor
    """[count, L], captions with their padding; empty ones for images without captions."""
    codes: Tensor | None = None
    """[count, W, W]; None for captions alone."""
    has_captions: bool = True
    verbatim: dict[str, str] = field(default_factory=dict)
    """Captions that the vocabulary would change, by their index."""

    @property
    def content(self) -> Content:
        """The kind of content, as in the file's header."""
        if self.codes is None:
            return "captions"
        return "captioned images" if self.has_captions else "images"


@dataclass(frozen=True, kw_only=True)
class CodecModel:
    """A model, with what identifies it in a file."""

    pipeline: DallE
    digest: str

    @classmethod
    def load(cls, model: str | Path, device: str = "auto") -> CodecModel:
        """Load a model folder, or "bundled"; ValueError where a part is missing or damaged."""
        folder = find_model(model)
        pipeline = DallE.from_pretrained(folder, clip="none", device=device)
        found = hashlib.sha256()
        vocabulary = folder / VOCABULARY_NAME
        for path in (Transformer.file_in(folder), image_tokenizer_file(folder), vocabulary):
            found.update(hashlib.sha256(path.read_bytes()).digest())
        return cls(pipeline=pipeline, digest=found.hexdigest()[:16])

    def archive(self, codes: Tensor | None, captions: Sequence[str] | None) -> Archive:
        """Return what a file of these codes, captions or both holds."""
        transformer, tokenizer = self.pipeline.transformer, self.pipeline.tokenizer
        if captions is None:
            assert codes is not None
            text = null_caption(transformer).repeat(len(codes), 1)
            return Archive(text=text, codes=codes, has_captions=False)
        text = tokenizer.encode(captions, transformer.config.text_len)
        padding = null_caption(transformer).expand_as(text)  # a caption is coded up to its first
        text = padding.where((text >= transformer.config.text_vocab).cumsum(1) > 0, text)
        pairs = enumerate(zip(captions, tokenizer.decode(text), strict=True))
        changed = {str(i): caption for i, (caption, decoded) in pairs if decoded != caption}
        return Archive(text=text, codes=codes, verbatim=changed)

    def captions(self, archive: Archive) -> list[str]:
        """Return the captions of a file, as they were before."""
        decoded = self.pipeline.tokenizer.decode(archive.text)
        return [archive.verbatim.get(str(i), caption) for i, caption in enumerate(decoded)]


def compress(
    model: CodecModel,
    archive: Archive,
    coder: CoderName = "range",
    batch_size: int = 64,
    on_position: OnPosition | None = None,
) -> tuple[Header, list[Message], float]:
    """Compress an archive; also return the bits that an ideal coder would take."""
    codec = Codec(model.pipeline.transformer, on_position)
    header = Header(
        model=model.digest,
        content=archive.content,
        count=len(archive.text),
        batch_size=batch_size,
        coder=coder,
        torch=str(torch.__version__),
        device=codec.device.type,
        verbatim=archive.verbatim,
    )
    texts = archive.text.split(batch_size)
    codes = [None] * len(texts) if archive.codes is None else archive.codes.split(batch_size)
    messages = [
        codec.encode(text, part, coder, archive.has_captions)
        for text, part in zip(texts, codes, strict=True)
    ]
    return header, messages, codec.ideal_bits


def decompress(
    model: CodecModel,
    header: Header,
    messages: Sequence[Message],
    on_position: OnPosition | None = None,
) -> Archive:
    """Return what `compress` was called with.

    Raises: ValueError where another model wrote the messages, or they do not decode to the same
    tokens on this machine.
    """
    if header.model != model.digest:
        raise ValueError(
            f"the model is {model.digest}, expected {header.model}, which compressed the file; "
            "use that --model"
        )
    codec = Codec(model.pipeline.transformer, on_position)
    images, captions = header.content != "captions", header.content != "images"
    texts, codes = [], []
    for number, message in enumerate(messages):
        size = min(header.batch_size, header.count - number * header.batch_size)
        try:
            text, part = codec.decode(message, size, header.coder, images=images, captions=captions)
        except ValueError as error:
            raise ValueError(
                f"batch {number} does not decode ({error}); {_remedy(header, codec.device.type)}"
            ) from error
        texts.append(text)
        codes += [] if part is None else [part]
    return Archive(
        text=torch.cat(texts),
        codes=torch.cat(codes) if images else None,
        has_captions=captions,
        verbatim=header.verbatim,
    )


def _remedy(header: Header, device: str) -> str:
    made, here = (header.torch, header.device), (str(torch.__version__), device)
    if made == here:  # so the file has another model's messages, or another machine's
        return "the file is damaged or from another kind of machine; copy it again"
    written = "it was written by torch {} on {}".format(*made)
    return f"{written}, this is torch {here[0]} on {here[1]}; use that version and --device"
