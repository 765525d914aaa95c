"""Lists of images and captions as people write them: CSV, JSON lines, JSON, parquet."""

from __future__ import annotations

import ast
import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from dalle1.data.cleaning import CAPTION_KEYS, IMAGE_SUFFIXES, as_captions
from dalle1.data.skipped import BadSample
from dalle1.json_files import parse_json

FILE_KEYS = (
    *("file", "filename", "image", "path", "filepath", "imagefile", "imagepath", "imagename"),
    *("imagefilename", "img", "imgpath", "imgname"),
)
TEXT_KEYS = (*CAPTION_KEYS, "description", "title", "comment", "sentence")
"""Columns that hold file and captions, the first that is there; without `_`, `-` and blanks."""
DOCUMENTED = {"file", "file_name", "caption", "text"}
SEPARATORS = ",;\t|"

Row = tuple[str, list[str]]
"""An image's file and its captions."""
Rows = Iterator[tuple[str, Row | BadSample]]
"""Where a row is, and its content or what is wrong with it."""
Report = Callable[[str], None]
"""Receives what a user should know of how a list was read, a sentence each."""


def read_list(path: Path, report: Report) -> Rows:
    """Yield the rows of a list.

    Raises: ValueError where it cannot be read, or its quotes take rows in.
    """
    try:
        if path.suffix.lower() == ".parquet":
            yield from _parquet_rows(path, report)
            return
        with _open_text(path) as file:
            if path.suffix.lower() in (".csv", ".tsv", ".txt"):
                yield from _csv_rows(path, file, report)
            else:
                yield from _json_rows(path, file)
    except (OSError, UnicodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _open_text(path: Path) -> IO[str]:
    with path.open("rb") as file:
        begin = file.read(512)
    if begin.startswith((b"\xff\xfe", b"\xfe\xff")):
        return path.open(encoding="utf-16", newline="")
    if b"\0" in begin:
        raise ValueError(f"{path} begins {begin[:12]!r}, expected UTF-8, or UTF-16 with its mark")
    # Bytes that are not UTF-8 become surrogates, so that one bad row does not cost the others.
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def pick_columns(names: Sequence[str]) -> tuple[int, int] | None:
    """Return the numbers of the columns of files and of captions; None where one is missing.

    Raises: ValueError where the column is there twice.
    """
    plain = [re.sub(r"[\s_\-\ufeff\u200b]", "", str(name)).lower() for name in names]
    picked = []
    for keys in (FILE_KEYS, TEXT_KEYS):
        key = next((key for key in keys if key in plain), None)
        if key is None:
            return None
        if plain.count(key) > 1 and len(set(names)) < len(names):
            raise ValueError(f"the column {key!r} is there twice, expected once")
        picked.append(plain.index(key))
    return picked[0], picked[1]


def _columns(path: Path, names: Sequence[str], report: Report) -> tuple[int, int]:
    try:
        columns = pick_columns(names)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if columns is None:
        found = ", ".join(repr(name[:40]) for name in names[:8]) or "none"
        raise ValueError(
            f"{path} has the columns {found}; expected file and caption, named in its first line"
        )
    used = [names[i].strip() for i in columns]
    if not DOCUMENTED.issuperset(used):
        report(f"{path.name}: the columns {used[0]!r} and {used[1]!r} are used")
    return columns


class _Lines:
    """Lines of a file, with those of the current row."""

    def __init__(self, file: IO[str]) -> None:
        self.file, self.number = file, 0
        self.row: list[str] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self.file)
        self.number += 1
        self.row.append(line)
        return line


def _csv_rows(path: Path, file: IO[str], report: Report) -> Rows:
    lines = _Lines(file)
    header = next((line for line in lines if line.strip()), "")
    separators = {
        sep: next(csv.reader([header], delimiter=sep, skipinitialspace=True), [])
        for sep in SEPARATORS
    }
    fitting = [sep for sep, names in separators.items() if pick_columns([*dict.fromkeys(names)])]
    sep = (fitting or sorted(SEPARATORS, key=header.count, reverse=True))[0]
    names = separators[sep]
    columns = _columns(path, names, report)
    table = _Table(path, sep, len(names), columns)
    reader = csv.reader(lines, delimiter=sep, skipinitialspace=True, strict=True)
    while True:
        lines.row, number = [], lines.number + 1
        try:
            fields = table.checked(next(reader), lines.row, number)
        except StopIteration:
            break
        except csv.Error as error:
            fields = table.repaired(lines.row, number, error)
        if isinstance(fields, BadSample):
            yield f"{path}:{number}", fields
        elif any(field.strip() for field in fields):
            yield f"{path}:{number}", as_row(fields[columns[0]], _cell(fields[columns[1]]))
    table.report(report)


class _Table:
    """The form of a CSV's rows: repairs what is unambiguous, and counts it."""

    def __init__(self, path: Path, sep: str, width: int, columns: tuple[int, int]) -> None:
        self.path, self.sep, self.width, self.columns = path, sep, width, columns
        end = re.escape(sep)
        quoted = rf'((?:^|{end})[ \t]*)("(?:[^"]|"")*")[ \t]+(?={end}|[\r\n]|$)'
        self.blanks = re.compile(quoted)
        """Quoted fields with blanks behind the quote."""
        self.repairs: dict[str, tuple[int, int, str]] = {}  # count, first line, first caption

    def checked(self, fields: list[str], row: list[str], number: int) -> list[str] | BadSample:
        """Return the fields of a row. ValueError where a caption takes in other rows."""
        for i, line in enumerate(row[1:], 1):
            parts = line.split(self.sep)
            if len(parts) >= self.width and self._name(parts):
                raise ValueError(
                    f"{self.path}:{number}: a quote is opened that takes in line {number + i}, "
                    f"{line[:60]!r}; close it, or double a quote that belongs to the caption"
                )
        return self._fitted(fields, row, number)

    def repaired(self, row: list[str], number: int, error: csv.Error) -> list[str] | BadSample:
        """Return the fields of a row whose quotes are wrong: followed by blanks, or stray."""
        limit = csv.field_size_limit()
        if len(row) == 1 and len(row[0]) > limit:
            why = f"more than {limit:,} characters"
            return BadSample("caption too long", why, self._name(row[0].split(self.sep)))
        fixed = io.StringIO(self.blanks.sub(r"\1\2", "".join(row)), newline="")
        try:
            reader = csv.reader(fixed, delimiter=self.sep, skipinitialspace=True, strict=True)
            fields = [*reader]
        except csv.Error:
            fields = []
        if len(fields) == 1 and len(fields[0]) == self.width:
            return self.checked(fields[0], row, number)
        return self._literal(row, number, error)

    def _literal(self, row: list[str], number: int, error: csv.Error) -> list[str] | BadSample:
        if len(row) > 1:
            raise ValueError(
                f"{self.path}:{number}: a quote is opened in {row[0][:60]!r} and not closed by "
                f"line {number + len(row) - 1} ({error}); close it, or double it in a caption"
            )
        fields = [field.strip() for field in row[0].rstrip("\r\n").split(self.sep)]
        if len(fields) != self.width:
            why = f"its quotes cannot be read: {error}"
            return BadSample("damaged captions", why, self._name(fields))
        self._count("stray quotes were read as they are", number, fields)
        return fields

    def _fitted(self, fields: list[str], row: list[str], number: int) -> list[str] | BadSample:
        width, sep = self.width, self.sep
        if len(fields) > width and not any(field.strip() for field in fields[width:]):
            return fields[:width]  # separators at the end, as spreadsheets write them
        if len(fields) > width and self.columns[1] == width - 1 and '"' not in row[0]:
            joined = row[0].rstrip("\r\n").split(sep, width - 1)
            self._count(f"captions with {sep!r} and no quotes were joined", number, joined)
            return joined
        if fields and (len(fields) > width or len(fields) <= max(self.columns)):
            why = f"it has {len(fields)} fields, expected {width}"
            more = f"; put a caption that holds {sep!r} in quotes" if len(fields) > width else ""
            return BadSample("damaged captions", why + more, self._name(fields))
        return fields

    def _name(self, fields: list[str]) -> str:
        """Return the file that a row of too few or too many fields names, if that is clear."""
        column, caption = self.columns
        # Separators without quotes are in the caption: the file is counted from the other end.
        found = fields[column if column < caption else column - self.width :][:1]
        name = found[0].strip().strip('"') if found else ""
        return name if name.lower().endswith(IMAGE_SUFFIXES) else ""

    def _count(self, what: str, number: int, fields: list[str]) -> None:
        count, line, text = self.repairs.get(what, (0, number, fields[self.columns[1]]))
        self.repairs[what] = count + 1, line, text

    def report(self, report: Report) -> None:
        for what, (count, line, text) in self.repairs.items():
            report(f"{self.path.name}: {count:,} {what}, as in line {line}: {text.strip()[:60]!r}")


def _cell(text: str) -> Any:
    """Return the captions of a cell: a list in JSON, or as Python writes it, is several."""
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        try:
            found = parse_json(text)
        except ValueError:
            try:
                found = ast.literal_eval(text)
                found = found if repr(found) == text else None  # else joined strings: ['a' 'b']
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                found = None
        if isinstance(found, list) and all(x is None or isinstance(x, str) for x in found):
            return found
    return text


def _json_rows(path: Path, file: IO[str]) -> Rows:
    begin = ""
    while begin.isspace() or not begin:
        if not (begin := file.read(1)):
            return
    file.seek(0)
    if path.suffix.lower() == ".json" or begin == "[":
        try:
            found = parse_json(file.read())
        except ValueError as error:
            if path.suffix.lower() == ".json":
                raise ValueError(f"{path} holds no captions: {error}") from error
            found = None
        if isinstance(found, dict):
            found = [{"file": name, "caption": text} for name, text in found.items()]
        if isinstance(found, list):
            yield from ((f"{path}: entry {i}", _object_row(x)) for i, x in enumerate(found, 1))
            return
        file.seek(0)
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                row = _object_row(parse_json(line))
            except ValueError as error:
                row = BadSample("damaged captions", f"{line.strip()[:40]!r}: {error}")
            yield f"{path}:{number}", row


def _object_row(found: Any) -> Row | BadSample:
    if not isinstance(found, dict):
        why = f"expected an object with file and caption, got {str(found)[:40]!r}"
        return BadSample("damaged captions", why)
    plain = {re.sub(r"[\s_\-]", "", key).lower(): value for key, value in reversed(found.items())}
    name, text = (
        next((plain[key] for key in keys if plain.get(key)), None)
        for keys in (FILE_KEYS, TEXT_KEYS)
    )
    if name is None:
        keys = ", ".join(repr(key[:40]) for key in [*found][:8]) or "none"
        return BadSample("no image", f"it has the keys {keys}; expected file and caption")
    return as_row(name, text)


def _parquet_rows(path: Path, report: Report) -> Rows:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"{path} needs pyarrow; install it (pip install pyarrow)") from error
    try:
        table = parquet.ParquetFile(path)
        names = table.schema_arrow.names
        used = [names[i] for i in _columns(path, names, report)]
        number = 0
        for batch in table.iter_batches(columns=used):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", as_row(*(row[name] for name in used))
    except ArrowException as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def as_row(name: object, text: object) -> Row | BadSample:
    """Return a row, or what is wrong with it."""
    if not isinstance(name, str) or not name.strip():
        named = "no file" if name in (None, "") else f"{str(name)[:60]!r}, expected a file"
        return BadSample("no image", f"it names {named}")
    try:
        captions = as_captions(text or [])
    except ValueError as error:
        return BadSample("damaged captions", f"{error}", name)
    if _holds_bytes([name, *captions]):
        return BadSample("caption not UTF-8", "it holds bytes that are not UTF-8", name)
    return name, captions


def _holds_bytes(texts: Iterable[str]) -> bool:
    return any(not text.isascii() and re.search("[\udc80-\udcff]", text) for text in texts)
