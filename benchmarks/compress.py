"""Compare the image codec with PNG, JPEG and WebP, and arithmetic coding with Huffman coding.

    python benchmarks/compress.py --data toybox --images 100
    python benchmarks/compress.py --data runs/photographs --split encode --no-captions

JPEG and WebP have, for each image, the lowest quality whose PSNR is at least that of the codec, or
their lowest quality if even that has more. All images are one file of the codec. Decoding measures
its throughput, and checks that all codes return.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle1.compression.archive import CodecModel, decompress
from dalle1.compression.codec import Codec, checksum
from dalle1.compression.container import Header, Message, pack
from dalle1.compression.huffman import HuffmanEncoder
from dalle1.compression.range_coder import RangeEncoder
from dalle1.data import Example, ReadOptions, first_examples, open_source
from dalle1.data.crops import centre_square
from dalle1.data.images import to_float, to_pil, to_tensor


class BothEncoders:
    """Encodes the same tokens by both coders, at the cost of one pass of the transformer."""

    def __init__(self) -> None:
        self.range, self.huffman = RangeEncoder(), HuffmanEncoder()

    def code(self, frequencies: np.ndarray, token: int) -> int:
        self.huffman.code(frequencies, token)
        return self.range.code(frequencies, token)


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Return the peak signal-to-noise ratio in dB of RGB bytes."""
    a, b = (np.asarray(image, dtype=np.float64) for image in (one, other))
    return float(10 * np.log10(255**2 / max(np.square(a - b).mean(), 1e-12)))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smallest(image: Image.Image, kind: str, wanted: float) -> tuple[int, float]:
    """Return bytes and PSNR of the lowest quality that reaches `wanted` dB."""
    low, high = 0, 100  # PSNR rises with quality, nearly always
    while low < high:
        quality = (low + high) // 2
        content = saved(image, kind, quality=quality, **OPTIONS[kind])
        if psnr(image, Image.open(io.BytesIO(content)).convert("RGB")) >= wanted:
            high = quality
        else:
            low = quality + 1
    content = saved(image, kind, quality=high, **OPTIONS[kind])
    return len(content), psnr(image, Image.open(io.BytesIO(content)).convert("RGB"))


OPTIONS: dict[str, dict[str, object]] = {"JPEG": {"optimize": True}, "WEBP": {"method": 6}}


def read(model: CodecModel, data: str, split: str, count: int) -> tuple[list[str], Tensor]:
    """Return captions, and images in bytes, of a split."""
    captions: list[str] = []
    size = model.pipeline.image_tokenizer.image_size

    def prepare(sample: object, rng: object) -> Example:
        captions.append(sample.caption(rng))  # type: ignore[attr-defined]
        image = sample.image()  # type: ignore[attr-defined]
        return {"images": to_tensor(centre_square(image, size))}

    source = open_source(data, split, ReadOptions(size=size))
    return captions, first_examples(source, prepare, count)["images"]


def report(model: CodecModel, captions: list[str] | None, images: Tensor) -> Iterator[str]:
    """Yield the lines of the table."""
    pipeline, count = model.pipeline, len(images)
    codes = torch.cat([pipeline.image_tokenizer.encode(to_float(x)[None]) for x in images])
    archive = model.archive(codes, captions)
    originals = to_pil(to_float(images))
    wanted = [psnr(a, b) for a, b in zip(originals, pipeline.decode(codes), strict=True)]
    codec, both, start = Codec(pipeline.transformer), BothEncoders(), time.perf_counter()
    flat = codes.flatten(1)
    caption_bits = 0.0
    if captions:
        codec.transfer(RangeEncoder(), archive.text.clone(), None)
        caption_bits, codec.ideal_bits = codec.ideal_bits, 0.0
    shifts = codec.transfer(both, archive.text.clone(), flat.clone(), captions=False)
    encoding = time.perf_counter() - start
    message = Message(both.range.finish(), checksum(archive.text, flat), shifts)
    ideal, sizes = codec.ideal_bits, (8 * len(message.content), 8 * len(both.huffman.finish()))
    header = Header(
        model=model.digest, content="images", count=count, batch_size=count, coder="range",
        torch=str(torch.__version__), device="cpu",
    )  # fmt: skip
    total = flat.numel()
    yield f"images {count}, PSNR {np.mean(wanted):.2f} dB"
    yield "bits per code: ideal {:.4f}, arithmetic {:.4f}, Huffman {:.4f}".format(
        *(bits / total for bits in (ideal, *sizes))
    )
    yield f"bits per caption: {caption_bits / count:.2f}"
    whole = len(pack(header, [message]))
    yield f"codec: {(whole + caption_bits / 8) / count:.1f} bytes per image, captions included"
    yield f"PNG: {np.mean([len(saved(x, 'PNG', optimize=True)) for x in originals]):.0f} bytes"
    for kind in OPTIONS:
        found = [smallest(x, kind, dB) for x, dB in zip(originals, wanted, strict=True)]
        yield "{}: {:.0f} bytes at {:.2f} dB".format(kind, *np.mean(found, axis=0))
    yield f"encoding, by both coders: {encoding / count:.2f} s per image"
    if captions is None:
        start = time.perf_counter()
        again = decompress(model, header, [message])
        assert again.codes is not None
        assert torch.equal(again.codes, codes)
        yield f"decoding: {(time.perf_counter() - start) / count:.2f} s per image, all codes equal"


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled", help="folder of the model, or bundled")
    parser.add_argument("--data", default="toybox", help="dataset, as in training")
    parser.add_argument("--split", default="validation", help="encode is all of your own data")
    parser.add_argument("--images", type=int, default=100, help="number of held-out images")
    parser.add_argument("--no-captions", action="store_true", help="predict codes without captions")
    options = parser.parse_args(args)
    model = CodecModel.load(options.model)
    captions, images = read(model, options.data, options.split, options.images)
    for line in report(model, None if options.no_captions else captions, images):
        print(line, flush=True)


if __name__ == "__main__":
    main()
