"""The codec with a tiny model: round trips, other machines, other models, and damaged files."""

from __future__ import annotations

import json
import math
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import CAPTIONS, tiny_model, write_images

from dalle1.commands import compress as compress_command
from dalle1.commands import decompress as decompress_command
from dalle1.compression import container
from dalle1.compression.archive import CodecModel, compress, decompress
from dalle1.compression.codec import Codec
from dalle1.compression.container import CoderName, Header, Message, pack, unpack
from dalle1.compression.frequencies import Shifts, to_frequencies
from dalle1.evaluation.bits import Pairs, is_counted, token_bits
from dalle1.model.transformer import Transformer
from dalle1.sampling.decoding import null_caption

CODES = torch.randint(16, (5, 4, 4), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def model() -> CodecModel:
    return CodecModel(pipeline=tiny_model(), digest="0123")


@pytest.fixture(scope="module")
def folder(model: CodecModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, and images with captions beside it."""
    path = tmp_path_factory.mktemp("codec")
    model.pipeline.save_pretrained(path / "model")
    write_images(path / "images", 3)
    return path


@pytest.mark.parametrize("coder", ["range", "huffman"])
@pytest.mark.parametrize("captions", [None, CAPTIONS[:5]])
def test_codes_and_captions_return_bit_for_bit(
    model: CodecModel, coder: CoderName, captions: list[str] | None
) -> None:
    archive = model.archive(CODES, captions)
    header, messages, ideal = compress(model, archive, coder, batch_size=2)
    again = decompress(model, *unpack(pack(header, messages), "file"))
    assert again.codes is not None
    assert torch.equal(again.codes, CODES)
    assert torch.equal(again.text, archive.text)
    if captions:
        assert model.captions(again) == captions
    size = 8 * sum(len(message.content) for message in messages)
    assert ideal <= size + 1
    if coder == "range":
        assert size <= ideal + 16 * len(messages)  # a byte or so per message


@pytest.mark.parametrize(
    "sizes",
    [
        {"positions": "rotary", "mlp": "swiglu", "qk_norm": True, "attention": "full"},
        {"pad_targets": False, "image_start": "text", "shared_softmax": True},
        {"depth": 4},  # row, column and conv masks
        {"image_start": "none", "positions": "flat", "sandwich": True, "head_norm": True},
    ],
)
def test_every_architecture_returns(sizes: dict[str, object]) -> None:
    other = CodecModel(pipeline=tiny_model(**sizes), digest="0123")
    archive = other.archive(CODES, CAPTIONS[:5])
    header, messages, _ = compress(other, archive)
    again = decompress(other, header, messages)
    assert again.codes is not None
    assert torch.equal(again.codes, CODES)
    assert torch.equal(again.text, archive.text)


@pytest.mark.parametrize("image_start", ["token", "none"])
def test_the_ideal_size_is_what_evaluate_bits_measures(image_start: str) -> None:
    model = CodecModel(pipeline=tiny_model(image_start=image_start), digest="0123")
    archive = model.archive(CODES, None)
    *_, ideal = compress(model, archive)
    transformer = model.pipeline.transformer
    _, code_bits = token_bits(transformer, Pairs(archive.text, CODES))
    assert ideal == pytest.approx(float(code_bits.sum()), rel=1e-3)  # of rounded probabilities
    captions = model.archive(None, CAPTIONS[:5])
    *_, ideal = compress(model, captions)
    text_bits, _ = token_bits(transformer, Pairs(captions.text, CODES))
    counted = text_bits[is_counted(transformer.config, captions.text)]
    first = 5 * math.log2(transformer.config.text_vocab + 1) * (image_start == "none")
    # The codec skips the padding of other positions, which `token_bits` counts as possible.
    assert first < ideal < float(counted.sum()) + first


def test_captions_alone_return_even_those_that_the_vocabulary_changes(model: CodecModel) -> None:
    lines = [*CAPTIONS, "", "A Red  Cube", "é\u2028\U0001f600", "a " * 40 + "b", "a\tb", " x "]
    archive = model.archive(None, lines)
    header, messages, ideal = compress(model, archive, batch_size=4)
    again = decompress(model, *unpack(pack(header, messages), "file"))
    assert again.codes is None
    assert model.captions(again) == lines
    assert is_counted(model.pipeline.transformer.config, again.text).sum() > len(lines)
    assert ideal > 0


def test_sure_and_impossible_codes_return() -> None:
    """Weights so large that probabilities are 0 and 1 to the last bit."""
    extreme = CodecModel(pipeline=tiny_model(scale=30.0), digest="0123")
    archive = extreme.archive(CODES, CAPTIONS[:5])
    header, messages, ideal = compress(extreme, archive)
    again = decompress(extreme, header, messages)
    assert again.codes is not None
    assert torch.equal(again.codes, CODES)
    assert ideal > 5 * 16 * math.log2(16)


def test_the_ideal_size_of_impossible_codes_is_that_of_their_frequencies() -> None:
    """Imported models hide codes by logits of −1e4, which are 14,427 bits."""
    hidden = CodecModel(pipeline=tiny_model(), digest="0123")
    hidden.pipeline.transformer.image_head.bias.data[3] = -1e4
    _, (message,), ideal = compress(hidden, hidden.archive(CODES, None))
    assert (CODES == 3).any()
    assert ideal == pytest.approx(8 * len(message.content), abs=16)


def test_another_batch_size_gives_the_same_frequencies(model: CodecModel) -> None:
    """In fp64 a message does not depend on the machine's order of summation."""
    codec, text = Codec(model.pipeline.transformer), model.archive(CODES, CAPTIONS[:5]).text
    together = list(codec._code_logits(text, CODES.flatten(1)))
    alone = list(codec._code_logits(text[3:4], CODES[3:4].flatten(1)))
    for one, other in zip(together, alone, strict=True):
        assert one.dtype == torch.float64
        assert torch.allclose(one[3], other[0], rtol=0, atol=1e-12)
        shifts, again = Shifts(), Shifts()
        assert (to_frequencies(one[3:4], shifts) == to_frequencies(other, again)).all()
        assert shifts.entries == again.entries == ()
    with torch.no_grad():
        logits = codec.model.image_head(codec.model.states(text, CODES)[1])
    # The forward pass of a training sums its softmax in fp32.
    assert torch.allclose(torch.stack(together, 1), logits, rtol=0, atol=1e-6)


def test_another_number_of_threads_gives_the_same_frequencies() -> None:
    """Sizes for which one and several threads sum in other orders."""
    sizes = {"width": 128, "codebook_size": 512, "grid_size": 2, "depth": 1}
    transformer = Transformer(replace(tiny_model().transformer.config, **sizes))
    torch.nn.init.normal_(transformer.image_head.weight)
    text, codes = null_caption(transformer).repeat(64, 1), torch.arange(256).view(64, 4)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(torch.stack(list(Codec(transformer)._code_logits(text, codes)), 1))
    finally:
        torch.set_num_threads(threads)
    one, two = (to_frequencies(logits.flatten(0, 1)) for logits in found)
    assert (one == two).all()


def test_a_caption_that_fills_all_positions_is_refused(model: CodecModel) -> None:
    text = torch.zeros(1, 8, dtype=torch.long)
    with pytest.raises(ValueError, match="a caption has 8 tokens, expected at most 7; shorten it"):
        Codec(model.pipeline.transformer).encode(text, None)
    free = tiny_model(image_start="none").transformer
    message = Codec(free).encode(text, None)
    again, _ = Codec(free).decode(message, 1, "range", images=False, captions=True)
    assert torch.equal(again, text)


def test_a_header_that_could_not_be_read_is_not_written(
    model: CodecModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = model.archive(None, ["A" * 500])
    monkeypatch.setattr(container, "MAX_HEADER", 500)
    with pytest.raises(
        ValueError, match=r"changes are \d+ bytes, expected at most 500; use several"
    ):
        compress(model, archive)


def test_another_models_probabilities_are_noticed(model: CodecModel) -> None:
    header, messages, _ = compress(model, model.archive(CODES, None))
    other = CodecModel(pipeline=tiny_model(scale=0.31), digest="4567")
    with pytest.raises(ValueError, match="the model is 4567, expected 0123, which compressed"):
        decompress(other, header, messages)
    same_name = CodecModel(pipeline=other.pipeline, digest="0123")
    with pytest.raises(ValueError, match=r"batch 0 .*; the file is damaged or from"):
        decompress(same_name, header, messages)
    older = replace(header, torch="2.0")
    with pytest.raises(ValueError, match=r"decode .*; it was written by torch 2\.0 on cpu, this"):
        decompress(same_name, older, messages)


def test_damage_at_every_byte_is_one_clear_error(model: CodecModel) -> None:
    header, messages, _ = compress(model, model.archive(CODES, CAPTIONS[:5]), batch_size=2)
    content = pack(header, messages)
    assert unpack(content, "f.d1c") == (header, messages)
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 0x41
        with pytest.raises(ValueError, match=r"f\.d1c (is damaged|is no file|has format)"):
            unpack(bytes(damaged), "f.d1c")
        with pytest.raises(ValueError, match=r"f\.d1c is (damaged or cut short|no file of)"):
            unpack(content[:position], "f.d1c")


@pytest.mark.parametrize("numbers", [[0, 0, 2, 5], [9, 0, 0], [0, 0, 0xFFFFFFFF], [0]])
def test_shifts_of_nonsense_are_refused(model: CodecModel, numbers: list[int]) -> None:
    header, _, _ = compress(model, model.archive(CODES, None))
    head = zlib.compress(header.to_json())
    whole = b"d1c\x02" + struct.pack("<I", len(head)) + head
    whole += struct.pack(f"<{len(numbers)}I", *numbers)
    with pytest.raises(ValueError, match=r"^f is damaged \("):
        unpack(with_checksum(whole), "f")
    with pytest.raises(ValueError, match=r"^f has format version 3, expected one of \(1, 2\); use"):
        unpack(with_checksum(b"d1c\x03" + whole[4:]), "f")


def with_checksum(content: bytes) -> bytes:
    return content + struct.pack("<I", zlib.crc32(content))


@pytest.mark.parametrize(
    "change",
    [
        {"count": 0},
        {"count": 10**9},
        {"count": "5"},
        {"batch_size": 10**9},
        {"content": "films"},
        {"coder": "zip"},
        {"verbatim": {"0": 1}},
        {"verbatim": {"5": "a"}},
        {"verbatim": {"x": "a"}},
        {"verbatim": {"0": "\ud800"}},
        {"colour": "red"},
    ],
)
def test_a_header_of_nonsense_is_refused(model: CodecModel, change: dict[str, object]) -> None:
    header = {
        "model": "0123", "content": "images", "count": 5, "batch_size": 5, "coder": "range",
        "torch": "2", "device": "cpu", **change,
    }  # fmt: skip
    head = zlib.compress(json.dumps(header).encode())
    whole = b"d1c\x01" + struct.pack("<I", len(head)) + head + struct.pack("<II", 0, 0)
    with pytest.raises(ValueError, match=r"^f is damaged \("):
        unpack(with_checksum(whole), "f")


@pytest.mark.parametrize("text", [b"", b"null", b"[]", b"{}", b"\xff", b"[" * 100_000])
def test_a_header_that_is_no_object_is_refused(text: bytes) -> None:
    head = zlib.compress(text)
    with pytest.raises(ValueError, match=r"^f is damaged \("):
        unpack(with_checksum(b"d1c\x01" + struct.pack("<I", len(head)) + head), "f")


def test_messages_of_nonsense_do_not_decode(model: CodecModel) -> None:
    header, messages, _ = compress(model, model.archive(CODES, None))
    for content in (b"", b"\xff" * 100, messages[0].content[:-2]):
        with pytest.raises(ValueError, match="batch 0 does not decode"):
            decompress(model, header, [Message(content, messages[0].checksum)])


def test_the_commands_restore_images_and_captions(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out, model = tmp_path / "a.d1c", tmp_path / "out", str(folder / "model")
    compress_command.main(
        [str(folder / "images"), "--captions", "--model", model, "--out", str(file)]
    )
    assert "3 captioned images" in capsys.readouterr().out
    decompress_command.main([str(file), "--model", model, "--out", str(out)])
    pipeline = CodecModel.load(model).pipeline
    paths = sorted((folder / "images").glob("*.png"))
    expected = torch.stack([pipeline.encode(path) for path in paths])
    assert (np.load(out / "codes.npy") == expected.numpy()).all()
    assert [path.name for path in sorted(out.glob("*.png"))] == ["000.png", "001.png", "002.png"]
    assert (out / "001.txt").read_text().strip() == CAPTIONS[1]
    with pytest.raises(SystemExit) as stop:
        decompress_command.main([str(file), "--model", model, "--out", str(out)])
    assert stop.value.code == 2
    assert "holds files, expected a new folder; use another --out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        decompress_command.main([str(file), "--out", str(tmp_path / "other")])
    assert "which compressed the file; use that --model" in capsys.readouterr().err


def test_the_commands_restore_captions(folder: Path, tmp_path: Path) -> None:
    text, file, model = tmp_path / "c.txt", tmp_path / "c.d1c", str(folder / "model")
    text.write_text("a red cube\n\nA blue STAR\n", encoding="utf-8")
    compress_command.main([str(text), "--text-only", "--model", model, "--out", str(file)])
    decompress_command.main([str(file), "--model", model, "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "captions.txt").read_bytes() == text.read_bytes()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["missing.png"], "missing.png"),
        (["."], "no images in ."),
        (["a.txt", "--text-only", "--captions"], "captions and"),
        (["a.txt", "--text-only"], "a.txt is empty, expected one caption a line"),
        (["b.txt", "--text-only"], "b.txt is not UTF-8, expected text"),
        (["a.png", "--batch-size", "0"], "--batch-size is 0, expected 1 to 4096"),
        (["a.png", "--coder", "zip"], "zip"),
    ],
)
def test_wrong_input_is_one_line(
    words: list[str],
    error: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").touch()
    Path("b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(SystemExit) as stop:
        compress_command.main([*words, "--model", str(folder / "model"), "--out", "x.d1c"])
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip()
    assert error in message
    assert "\n" not in message
    assert not Path("x.d1c").exists()


def test_no_file_of_the_user_is_replaced(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(next((folder / "images").glob("*.png")).read_bytes())
    before = image.read_bytes()
    words = [str(image), "--model", str(folder / "model"), "--out", str(image)]
    with pytest.raises(SystemExit) as stop:
        compress_command.main(words)
    assert stop.value.code == 2
    assert "which compress did not write, so it is kept" in capsys.readouterr().err
    assert image.read_bytes() == before


def test_files_that_are_not_compressed_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG and so forth")
    for name, error in (("a.png", "is no file of `dalle1 compress`"), ("b", "no such file")):
        with pytest.raises(SystemExit) as stop:
            decompress_command.main([str(tmp_path / name), "--out", str(tmp_path / "out")])
        assert stop.value.code == 2
        assert error in capsys.readouterr().err
    assert Header(
        model="", content="images", count=9, batch_size=4, coder="range", torch="", device=""
    ).batches == 3  # fmt: skip
