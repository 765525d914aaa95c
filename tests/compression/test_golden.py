"""Files of this and of earlier versions: they decode to the same tokens, on every machine."""

from __future__ import annotations

import base64

import numpy as np
import pytest
import torch
from tiny_model import tiny_model

from dalle1.compression import codec
from dalle1.compression.archive import Archive, CodecModel, compress, decompress
from dalle1.compression.container import CoderName, pack, unpack
from dalle1.compression.frequencies import Shifts, to_frequencies
from dalle1.sampling.decoding import null_caption

RNG = np.random.default_rng(7)
CODES = torch.from_numpy(RNG.integers(16, size=(6, 4, 4)))
WORDS = torch.from_numpy(RNG.integers(270, size=(6, 4)))
GOLDEN: dict[CoderName, str] = {
    "range": (
        "ZDFjAWsAAAB42h2MzQ5AMBCEX0X2SsRfHLyM1HZCE1qp5UC8u63jfN/MPLQFi5UGquqmpYI4eIEXBWx2"
        "ccHDZm4zM45fnkn1BU1GeBkPd4OGLgmLqJto/AwtSoi8aG7Kui2rnPdTocXlGOlZ4/sBRCAmHDgAAAAa"
        "hjG+vY4LrJSzACjwi3nR7NYf6oi/DwxiFRDuLltqEARCWCGxl9fQwFEo2wgkZp4acH+9NbnEBNd9eA8c"
        "AAAAwx1xM2YhwpKvLzW2ST6qMEQTNiX72wRLJIkzRGg+9bRo1tFN"
    ),
    "huffman": (
        "ZDFjAWwAAAB42h2MwQ5AMBBEf0X2SoQSBz8jtV3aRFth60D8u63jvDczD/hoaIMRmlZ1UAHGwBRYAOqd"
        "XQxkCuf1SucvU1ZDBbNmtNPpboKxz8LQIRublsXrIFWOB1ohqm67uilxTwINXQ4pf0t8P5vmJvQ5AAAA"
        "GoYxvq2m2vch+Sht07S0W4+fVILexra57NLs1mqat32l33sp+89EV8+Xj7n7x9L5/n+bXu/xpd5zrHlr"
        "4B0AAADDHXEzc+0a033jvEvr6mLTt/l3r9XnPff7nmtf975p+2ieGRjj"
    ),
}


def model_of_fractions(denominator: int = 64) -> CodecModel:
    """Return a model whose weights are multiples of 1/denominator, the same on every machine."""
    pipeline, rng = tiny_model(), np.random.default_rng(8)
    for parameter in pipeline.transformer.parameters():
        numbers = rng.integers(-32, 33, size=tuple(parameter.shape)) / denominator
        parameter.data.copy_(torch.from_numpy(numbers))
    return CodecModel(pipeline=pipeline, digest="0123")


def captioned_images(model: CodecModel) -> Archive:
    text = null_caption(model.pipeline.transformer).repeat(6, 1)
    text[:, :4] = WORDS
    return Archive(text=text, codes=CODES)


@pytest.mark.parametrize("coder", GOLDEN)
def test_files_of_the_first_version_return_and_are_still_written(coder: CoderName) -> None:
    model, content = model_of_fractions(), base64.b64decode(GOLDEN[coder])
    header, messages = unpack(content, "golden")
    again, expected = decompress(model, header, messages), captioned_images(model)
    assert again.codes is not None
    assert torch.equal(again.codes, CODES)
    assert torch.equal(again.text, expected.text)
    _, written, _ = compress(model, expected, coder, batch_size=4)
    assert pack(header, written) == content


def model_on_boundaries() -> CodecModel:
    """Return a model whose image logits all lie on boundaries of the rounding or on its grid."""
    model = model_of_fractions()
    head = model.pipeline.transformer.image_head
    head.weight.data.zero_()
    head.bias.data.copy_(torch.arange(16) / 128)
    return model


SHIFTED = (
    "ZDFjAmQAAAB42h2LOw6AIBAF77KthvAxFl7G4LIREgUDaKHx7i6WM2/eA3tytMEEUmkDPWCKlWJlEXa7"
    "UvnV2YTuYbEV/VzCTTCNQ1scZU6zjStxWVNGz6yFMkJ2eJwsHV0B+QAN3w+1aSJ3EAAAAHO/ZJUgAAAA"
    "BAAAABQAAAAkAAAANAAAAEQAAABUAAAAZAAAAHQAAACEAAAAlAAAAKQAAAC0AAAAxAAAANQAAADkAAAA"
    "9AAAAAQBAAAUAQAAJAEAADQBAABEAQAAVAEAAGQBAAB0AQAAhAEAAJQBAACkAQAAtAEAAMQBAADUAQAA"
    "5AEAAPQBAADxqVyQFoMabUTh2rfdZY3ztZOZ6w=="
)


def with_noise(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Simulate another machine: noise of 1e-11 in each logit, more than machines cause."""
    rng = np.random.default_rng(seed)

    def noisy(logits: torch.Tensor, shifts: Shifts) -> np.ndarray:
        return to_frequencies(
            logits + torch.from_numpy(1e-11 * rng.normal(size=logits.shape)), shifts
        )

    monkeypatch.setattr(codec, "to_frequencies", noisy)


def test_logits_on_boundaries_of_the_rounding_return_on_other_machines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_on_boundaries()
    archive = model.archive(CODES[:2], None)
    header, messages, _ = compress(model, archive)
    content = pack(header, messages)
    assert content[3] == 2
    for file in (content, base64.b64decode(SHIFTED)):
        header, messages = unpack(file, "golden")
        for seed in range(3):
            with_noise(monkeypatch, seed)
            again = decompress(model, header, messages)
            assert again.codes is not None
            assert torch.equal(again.codes, CODES[:2])
    without = [message._replace(shifts=()) for message in messages]
    with pytest.raises(ValueError, match="batch 0 does not decode"):
        decompress(model, header, without)
