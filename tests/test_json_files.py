"""JSON is parsed, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from dalle1.json_files import parse_json


@pytest.mark.parametrize("content", ['{"a": [1, "é"]}', '\ufeff{"a": [1, "é"]}'])
def test_texts_bytes_and_files_are_read(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content.encode())
    for source in (content, content.encode(), path):
        assert parse_json(source, dict) == {"a": [1, "é"]}
    assert parse_json("1e3") == 1000


DAMAGED: list[tuple[bytes, type, str]] = [
    (b"", object, "is not JSON: Expecting value"),
    (b'{"a": 1', object, "is not JSON: Expecting ',' delimiter"),
    (b'{"a": 1}{', object, "is not JSON: Extra data"),
    (b"9" * 5000, object, "is not JSON: Exceeds the limit"),
    (b"[" * 100_000, object, "is nested too deeply, expected JSON of fewer levels"),
    (b'{"a":' * 100_000, dict, "is nested too deeply, expected JSON of fewer levels"),
    (b'"\xff"', object, r"is not UTF-8 \(byte 1\), expected JSON"),
    ("{}".encode("utf-16"), object, r"is not UTF-8 \(byte 0\), expected JSON"),
    (b"[1]", dict, "is a list, expected an object"),
    (b"{}", list, "is an object, expected a list"),
    (b"null", dict, "is None, expected an object"),
    (b'"text"', dict, "is a text, expected an object"),
]


@pytest.mark.parametrize(("content", "expected", "message"), DAMAGED)
def test_damage_is_one_line(content: bytes, expected: type, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path} {message}"):
        parse_json(path, expected)
    with pytest.raises(ValueError, match=f"^it {message}") as found:
        parse_json(content, expected)
    assert "\n" not in str(found.value)


def test_a_missing_file_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        parse_json(tmp_path / "none.json")
