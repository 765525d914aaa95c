"""Folders as people have them: which files are images, which captions, and what is passed over."""

from __future__ import annotations

import io
import json
import os
import random
from pathlib import Path

import pytest
from PIL import Image

from dalle1.data import ReadOptions
from dalle1.data.cleaning import IMAGE_SUFFIXES, NO_CLEANING, read_image
from dalle1.data.images import save_png
from dalle1.data.skipped import SkippedSample, SkipStats
from dalle1.data.sources.base import is_hidden
from dalle1.data.sources.folder import Folder
from dalle1.data.sources.packed import PackedGroups, PackedStrings


def test_image_suffixes_are_what_pillow_reads() -> None:
    Image.init()
    formats = Image.registered_extensions()
    formats[".mpo"] = "JPEG"  # opened as such
    programs = {"EPS", "WMF"}  # Pillow hands them to other programs
    stubs = {"BUFR", "GRIB", "HDF5", "MPEG", "PDF", "PALM"}
    assert {formats[suffix] for suffix in IMAGE_SUFFIXES} <= set(Image.OPEN) - programs - stubs
    image = Image.effect_noise((24, 24), 60)
    for suffix in IMAGE_SUFFIXES:
        if formats[suffix] in Image.SAVE:
            buffer = io.BytesIO()
            mode = {".pfm": "F", ".xbm": "1"}.get(suffix, "RGB")
            image.convert(mode).save(buffer, formats[suffix])
            assert read_image(buffer.getvalue(), suffix, NO_CLEANING).width >= 24


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("a.jpg", False),
        ("./a.jpg", False),
        ("../a.jpg", False),
        ("a/.b/c.jpg", True),
        ("._a.jpg", True),
        ("__MACOSX/a.jpg", True),
        (".ipynb_checkpoints/a-checkpoint.jpg", True),
        ("x/@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", True),
        ("a..b.jpg", False),
    ],
)
def test_hidden_files(name: str, hidden: bool) -> None:
    assert is_hidden(name) == hidden


def test_a_skipped_sample_may_stand_for_many_files() -> None:
    stats = SkipStats(0.5, report=lambda line: None)
    hidden = SkippedSample("hidden file", "._a.jpg, …", "hidden", 2_000)
    stats.open(10, [hidden, SkippedSample("no caption", "a", "none", 3)])
    assert stats.counts == {"hidden file": 2_000, "no caption": 3}
    with pytest.raises(ValueError, match="11 of 21 samples"):
        stats.open(10, [hidden, SkippedSample("no caption", "a", "none", 11)])


# Files beside images


def write(folder: Path, **files: str | bytes | None) -> Path:
    """Write files by name, `__` for a dot and `___` for a slash; None: a small image."""
    for name, content in files.items():
        path = folder / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.new("RGB", (8, 8), "red").save(path, "JPEG")
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def pairs(source: Folder) -> dict[str, set[str]]:
    """Return the captions of each image, by its name in the folder."""
    return {
        os.path.relpath(source.name(i), source.path): {
            source.caption(i, random.Random(seed)) for seed in range(20)
        }
        for i in range(len(source))
    }


def causes(source: Folder) -> dict[str, int]:
    counts: dict[str, int] = {}
    for sample in source.skipped:
        counts[sample.cause] = counts.get(sample.cause, 0) + sample.count
    return counts


def test_every_image_format_is_seen_and_the_rest_is_counted(tmp_path: Path) -> None:
    write(tmp_path, a__bmp=None, a__txt="a", b__JFIF=None, b__TXT="b", c__tif=None)
    write(
        tmp_path, c__tif__txt="c", c__tif__json='["cc"]', d__heic="x", d__txt="lonely", e__mp4="x"
    )
    source = Folder(tmp_path)
    assert pairs(source) == {"a.bmp": {"a"}, "b.JFIF": {"b"}, "c.tif": {"cc"}}
    assert causes(source) == {"other file": 2, "caption without an image": 1}
    names = {sample.cause: sample.where for sample in source.skipped}
    assert names["other file"] == "d.heic, e.mp4"
    plain = Folder(tmp_path, options=ReadOptions(captions=False))
    assert (len(plain), causes(plain)) == (3, {"other file": 2})


def test_hidden_files_are_passed_over_and_counted(tmp_path: Path) -> None:
    hidden = tmp_path / ".cache"  # the folder's own name does not matter
    write(hidden, a__jpg=None, a__txt="a")
    for name in (".ipynb_checkpoints/a-checkpoint", "._b"):
        (hidden / name).parent.mkdir(exist_ok=True)
        (hidden / f"{name}.jpg").write_bytes(b"\0\5\26\7Mac OS X")
        (hidden / f"{name}.txt").write_text("x")
    (hidden / "__MACOSX").mkdir()
    (hidden / "__MACOSX" / "a.jpg").write_bytes(b"")
    for captions in (True, False):
        source = Folder(hidden, options=ReadOptions(captions=captions))
        assert [os.path.basename(source.name(i)) for i in range(len(source))][:1] == ["a.jpg"]
        assert causes(source)["hidden file"] == 4


def test_odd_files_are_named(tmp_path: Path) -> None:
    write(tmp_path, a__jpg=None, a__txt="a", other___b__jpg=None, other___b__txt="b")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other")
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "gone.txt").write_text("gone")
    os.mkfifo(tmp_path / "pipe.jpg")
    source = Folder(tmp_path)
    assert [os.path.basename(source.name(i)) for i in range(len(source))] == [
        *("a.jpg", "gone.jpg", "b.jpg")
    ]
    assert causes(source) == {"other file": 2, "no caption": 1}
    whys = {sample.where: sample.why for sample in source.skipped}
    assert "linked folders: not followed" in whys["link"]
    with pytest.raises(ValueError, match="No such file"):
        source.image(1)


def test_output_files_are_passed_over_at_every_level(tmp_path: Path) -> None:
    for folder in ("", "sub/"):
        for name, texts in {
            "check/contact.png": {},
            "preview.png": {"settings": "preview"},
            "out/00.png": {"settings": "{}"},
            "out/grid.png": {"settings": "{}"},
            "ranked/grid.png": {},
            "samples/step-10.png": {},
        }.items():
            save_png(Image.new("RGB", (8, 8)), tmp_path / folder / name, texts)
        for name, content in {
            "check/check.json": "{}",
            "out/scores.json": '[{"file": "00.png", "score": 1}]',
            "ranked/scores.json": '{"prompt": "x", "images": []}',
            "log.jsonl": "{}",
            "step-10/state.pt": "",
        }.items():
            (tmp_path / folder / name).parent.mkdir(exist_ok=True)
            (tmp_path / folder / name).write_text(content)
        own = ("a", "samples/b", "out/c", "preview", "step-1/d")
        write(tmp_path / folder, **{f"{x.replace('/', '___')}__jpg": None for x in own})
    source = Folder(tmp_path, options=ReadOptions(captions=False))
    found = {os.path.relpath(source.name(i), tmp_path) for i in range(len(source))}
    assert found == {f"{folder}{x}.jpg" for folder in ("", "sub/") for x in own}
    assert causes(source) == {"output file": 2 * 11}


def test_only_line_ends_separate_captions(tmp_path: Path) -> None:
    text = "a dog\u0085 runs\u2028off\x0b at\x0c dawn\r\na cat\n"
    source = Folder(write(tmp_path, a__jpg=None, a__txt=text))
    assert pairs(source) == {"a.jpg": {"a dog… runs off at dawn", "a cat"}}


# Lists


def listed(folder: Path, content: str | bytes, name: str = "captions.csv") -> Folder:
    write(folder, **{f"{x}__jpg": None for x in "0123"})
    for path in folder.glob("captions.*"):
        path.unlink()
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return Folder(folder)


@pytest.mark.parametrize(
    "content",
    [
        "file, caption\n0.jpg, a\n1.jpg, b\n",
        "File,Caption\n0.jpg,a\n1.jpg,b\n",
        "\ufefffile\tcaption\r\n0.jpg\ta\r\n1.jpg\tb",
        'file;caption\n"0.jpg";"a"\n1.jpg;b\n',
        "id|image_name| comment\n0|0.jpg| a\n1|1.jpg| b\n",
        "file,caption\n0.jpg,a\n1.jpg,b\n".encode("utf-16"),
        "file,caption\n 0.jpg ,a\n1.jpg ,b\n,\n\n",
        "file,caption\n.\\0.jpg,a\n.\\1.jpg,b\n",
        "file,caption\ntrain/0.jpg,a\ntrain/1.jpg,b\n",
        "file,caption\nC:\\me\\0.JPG,a\nC:\\me\\1.JPG,b\n",
        "file,caption,,\n0.jpg,a,,\n1.jpg,b,,\n",
        'caption,file\n"[""a"", null]",0.jpg\n[\'b\'],1.jpg\n',
    ],
)
def test_csv_as_people_write_it(tmp_path: Path, content: str | bytes) -> None:
    source = listed(tmp_path, content)
    assert pairs(source) == {"0.jpg": {"a"}, "1.jpg": {"b"}}
    assert causes(source) == {"image not in the list": 2}


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ('[\n{"file": "0.jpg", "caption": "a"},\n{"file": "1.jpg", "text": ["b"]}]', "jsonl"),
        ('{"path": "0.jpg", "Caption": "a"}\n{"image_path": "1.jpg", "prompt": "b"}', "jsonl"),
        ('{"0.jpg": "a", "1.jpg": ["b", null]}', "json"),
        ('[{"file": "0.jpg", "caption": "a"}, {"file": "1.jpg", "caption": "b"}]', "json"),
        ("image,caption\n0.jpg,a\n1.jpg,b\n", "txt"),
    ],
)
def test_other_lists(tmp_path: Path, content: str, name: str) -> None:
    source = listed(tmp_path, content, f"captions.{name}")
    assert pairs(source) == {"0.jpg": {"a"}, "1.jpg": {"b"}}


def test_unquoted_separators_are_joined_and_reported(tmp_path: Path) -> None:
    source = listed(tmp_path, 'image,caption\n0.jpg,A man , in red , runs .\n1.jpg,"a 5" disc\n')
    assert pairs(source) == {"0.jpg": {"A man , in red , runs ."}, "1.jpg": {'"a 5" disc'}}
    notes = " ".join(source.notes)
    assert "1 captions with ',' and no quotes were joined, as in line 2: 'A man , in red" in notes
    assert "1 stray quotes were read as they are, as in line 3" in notes
    source = listed(tmp_path, "caption,file\na,b,0.jpg\nok,1.jpg\nshort\n")
    assert pairs(source) == {"1.jpg": {"ok"}}
    assert [x.where[-14:] + ": " + x.why for x in source.skipped[:2]] == [
        "captions.csv:2: it has 3 fields, expected 2; put a caption that holds ',' in quotes",
        "captions.csv:4: it has 1 fields, expected 2",
    ]


@pytest.mark.parametrize(
    "rows",
    [
        '0.jpg,"a 5 inch disc\n1.jpg,one\n2.jpg,two\n',
        '0.jpg,"a 5 inch disc\n1.jpg,"one"\n2.jpg,two\n',
        '0.jpg,"a 5 inch disc\n1.jpg,6 inch"\n2.jpg,two\n',
        '0.jpg,"A man\n1.jpg,a dog, brown\n2.jpg,a pipe, of 5"\n3.jpg,x\n',
    ],
)
def test_a_quote_that_takes_in_rows_is_an_error(tmp_path: Path, rows: str) -> None:
    with pytest.raises(ValueError, match=r"captions\.csv:2: a quote is opened"):
        listed(tmp_path, f"file,caption\n{rows}")
    swapped = 'caption,n,file\n"A man,1,0.jpg\na dog, brown,2,1.jpg\na 5",3,2.jpg\n'
    with pytest.raises(ValueError, match=r"captions\.csv:2: a quote is opened"):
        listed(tmp_path, swapped)
    source = listed(tmp_path, 'file,caption\n0.jpg,"two\nlines, and 1"\n')
    assert pairs(source) == {"0.jpg": {"two lines, and 1"}}


def test_blanks_behind_a_quote(tmp_path: Path) -> None:
    rows = '0.jpg,"A man, in red" \n"1.jpg" ,"A ""big"" , dog"\t\n2.jpg,"two\nlines" \r\n3.jpg,"x" '
    found = ["A man, in red", 'A "big" , dog', "two lines", "x"]
    source = listed(tmp_path, f"file,caption\n{rows}")
    assert pairs(source) == {f"{i}.jpg": {text} for i, text in enumerate(found)}
    assert [*source.notes, *source.skipped] == []


def test_no_image_has_the_captions_of_another(tmp_path: Path) -> None:
    source = listed(tmp_path, "file,caption\n0.jpg,dog\n0.JPG,cat\n1.jpg,bird\n2.JPG,x\n2.Jpg,y\n")
    assert pairs(source) == {"0.jpg": {"dog"}, "1.jpg": {"bird"}}
    assert causes(source) == {"no image": 3, "image not in the list": 2}
    rows = "".join(f"train/{i}.jpg,{i}\n" for i in range(5))
    source = listed(tmp_path, f"file,caption\n{rows}")
    assert pairs(source) == {f"{i}.jpg": {f"{i}"} for i in range(4)}
    assert causes(source) == {"no image": 1}
    with pytest.raises(ValueError, match=r"names 'train/0\.jpg', but the file does not"):
        listed(tmp_path, f"file,caption\n{rows}" + "".join(f"x/{i}9.jpg,x\n" for i in range(5)))


def test_a_list_names_images_in_any_way(tmp_path: Path) -> None:
    long = "w " * 70_000
    content = f"file,caption,n\n0.jpg,a, b,1\n1.jpg\n2.jpg,{long},3\nx/../3.jpg,c,4\n"
    write(tmp_path, x___README__md="x")
    source = listed(tmp_path, content)
    assert pairs(source) == {"3.jpg": {"c"}}
    assert causes(source) == {"damaged captions": 2, "caption too long": 1, "other file": 1}
    write(
        tmp_path, meta___metadata__csv="file_name,text\n../images/a.jpg,dog\n", images___a__jpg=None
    )
    (tmp_path / "captions.csv").unlink()
    source = Folder(tmp_path)
    assert pairs(source) == {"images/a.jpg": {"dog"}}
    assert causes(source)["image not in the list"] == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"has the columns none; expected file and caption"),
        ("file,caption\n", r"no pairs in .* by captions.csv, which has no rows"),
        ("file,caption\nfoo/x.jpg,x\n", r"the first skipped is .*no image: .*csv:2 names 'foo/x"),
        ("0.jpg,a\n", r"has the columns '0.jpg', 'a'; expected file and caption"),
        ("file,caption,caption\n0.jpg,a,b", r"the column 'caption' is there twice"),
        ("file,caption\nhttps://a/none.jpg,a", r"names a URL, expected a file"),
        ("file,caption\nnone.jpg,a", r"captions.csv:2 names 'none.jpg', but the file does not"),
        ("file,caption\na/0.jpg,a\nb/0.jpg,b", r"captions.csv:2 names 'a/0.jpg', but"),
        ("f\0i\0", r"captions.csv begins b'f.x00i.x00', expected UTF-8"),
        pytest.param("x" * 200_000, r"captions.csv cannot be read: field larger", id="long line"),
    ],
)
def test_lists_without_pairs_say_what_was_found(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        listed(tmp_path, content)


def test_image_folders_of_hugging_face(tmp_path: Path) -> None:
    for split in ("test", "train"):
        write(tmp_path, **{f"{split}___0__jpg": None, f"{split}___README__md": "x"})
        rows = f"file_name,text\n0.jpg,{split}\n"
        (tmp_path / split / "metadata.csv").write_text(rows)
    source = Folder(tmp_path)
    assert pairs(source) == {"test/0.jpg": {"test"}, "train/0.jpg": {"train"}}
    assert source.notes == ["2 lists are read: test/metadata.csv, train/metadata.csv"]
    row = json.dumps({"file_name": "train/0.jpg", "text": "top"})
    (tmp_path / "metadata.jsonl").write_text(row)
    source = Folder(tmp_path)
    assert pairs(source) == {"train/0.jpg": {"top"}}
    unread = {x.why: x.where for x in source.skipped}[f"in {tmp_path}, a list that is not read"]
    assert unread == "test/metadata.csv, train/metadata.csv"
    (tmp_path / "train" / "0.txt").write_text("beside")  # what was read before lists were
    assert pairs(Folder(tmp_path)) == {"train/0.jpg": {"beside"}}


def test_a_list_may_name_files_elsewhere_and_twice(tmp_path: Path) -> None:
    write(tmp_path, elsewhere__jpg=None, data___É__jpg=None, data____h__jpg=None)
    data = tmp_path / "data"
    (data / "_h.jpg").rename(data / "._h.jpg")
    decomposed = "E\u0301.jpg"
    rows = [("../elsewhere.jpg", "a"), (str(tmp_path / "elsewhere.jpg"), "b"), (decomposed, "c")]
    rows += [("../elsewhere.jpg", "d"), ("./../elsewhere.jpg", "e"), ("._h.jpg", "x")]
    lines = "".join(f"{file},{caption}\n" for file, caption in rows)
    (data / "captions.csv").write_text(f"file,caption\n{lines}", encoding="utf-8")
    source = Folder(data)
    found = [{source.caption(i, random.Random(seed)) for seed in range(40)} for i in range(3)]
    assert found == [{"a", "d", "e"}, {"b"}, {"c"}]
    assert causes(source) == {"hidden file": 2}


def test_parquet_needs_pyarrow(tmp_path: Path) -> None:
    try:
        from pyarrow import parquet, table
    except ImportError:
        with pytest.raises(ValueError, match=r"metadata.parquet needs pyarrow; install it"):
            listed(tmp_path, "", "metadata.parquet")
        return
    write(tmp_path, a__jpg=None)
    rows = {"file_name": ["a.jpg"], "text": ["a"]}
    parquet.write_table(table(rows), tmp_path / "metadata.parquet")
    assert pairs(Folder(tmp_path)) == {"a.jpg": {"a"}}


def test_packed_strings_and_groups() -> None:
    packed, texts = PackedStrings(), ["", "a", "ü🦊", "\udcff", "\ud83d"]
    for text in texts:
        packed.append(text)
    assert list(packed) == texts
    assert packed[-1] == texts[-1]
    with pytest.raises(IndexError):
        packed[5]
    groups = PackedGroups()
    for group, text in ((2, "c"), (0, "a"), (2, "d")):
        groups.append(group, text)
    groups.close(3)
    assert [groups[i] for i in range(3)] == [["a"], [], ["c", "d"]]
