"""What is fuzzed: one sound example of everything that a command reads, built once."""

from __future__ import annotations

import contextlib
import io
import shutil
import tarfile
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import pytest
import torch
from foreign_models import dalle_pytorch_file, mindalle_folder, rudalle_files, rudolph_files
from PIL import Image
from tiny_model import CAPTIONS, save_unclip, save_whole_model, write_images
from tiny_unclip import tiny_stable_unclip

from dalle1.compression.container import pack, unpack
from dalle1.compression.frequencies import SHIFTS
from dalle1.data.cleaning import IMAGE_SUFFIXES
from dalle2.exchange.stable_unclip import write_stable_unclip
from fuzz.harness import run_main


def run_quietly(words: list[str]) -> None:
    """Run a command without its output."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run_main(words)


MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "I;16", "I", "F", "CMYK", "YCbCr", "LAB", "HSV")

HEADERS = {
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 36\n%%EndComments\nshowpage\n%%EOF\n",
    "psd": b"8BPS\0\1"
    + bytes(6)
    + b"\0\3\0\0\0\x24\0\0\0\x28\0\x08\0\x03"
    + bytes(14)
    + bytes(4400),
    "sun": b"\x59\xa6\x6a\x95"
    + bytes.fromhex("000000280000002400000018000010e0000000010000000000000000"),
    "fits": b"SIMPLE  =                    T".ljust(80)
    + b"BITPIX  =                    8".ljust(80)
    + b"NAXIS   =                    2".ljust(80)
    + b"NAXIS1  =                   40".ljust(80)
    + b"NAXIS2  =                   36".ljust(80)
    + b"END".ljust(2480)
    + bytes(2880),
    "xpm": b'/* XPM */\nstatic char *a[] = {\n"2 2 1 1",\n"a c #ff0000",\n"aa",\n"aa"\n};\n',
    "fli": bytes.fromhex("0001000011af010028002400080003000000") + bytes(200),
    "qoi": b"qoif" + bytes.fromhex("00000028000000240300") + bytes([0xC0] * 30) + bytes(7) + b"\1",
    "cur": b"\0\0\2\0\1\0" + bytes(200),
    "dcx": b"\xb1\x68\xde\x3a" + bytes(200),
    "gbr": b"\0\0\0\x1c\0\0\0\2\0\0\0\x28\0\0\0\x24\0\0\0\1GIMP" + bytes(2000),
    "pixar": b"\200\350\000\000" + bytes(2000),
    "xv": b"P7 332\n#END_OF_COMMENTS\n40 36 255\n" + bytes(1440),
    "fpx": b"\320\317\021\340\241\261\032\341" + bytes(2000),
    "wmf": b"\xd7\xcd\xc6\x9a\0\0" + bytes(100),
    "mpeg": b"\0\0\1\xb3\x02\x80\x24" + bytes(100),
    "grib": b"GRIB\0\0\0\1" + bytes(100),
    "bufr": b"BUFR" + bytes(100),
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "mcidas": b"\0" * 8 + b"\0\0\0\4\0\0\0\4" + bytes(600),
    "iptc": b"\x1c\x03\x3c\0\2\1\0" + bytes(100),
    "pcd": bytes(2048) + b"PCD_" + bytes(2000),
    "webp": b"RIFF\xff\xff\xff\x7fWEBPVP8L" + bytes(40),
    "ftex": b"FTEX" + bytes(100),
    "tiff": b"II+\0\x08\0\0\0" + bytes(100),
}
"""Formats that Pillow reads and does not write, or has several ways to read: their beginnings."""


class World:
    """Sound examples, below a folder; each is made when it is first needed."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def model(self) -> Path:
        """A model of DALL·E 1 with a CLIP and a classifier."""
        save_whole_model(self.root / "model")
        return self.root / "model"

    @cached_property
    def unclip(self) -> Path:
        """A model of DALL·E 2."""
        save_unclip(self.root / "unclip")
        return self.root / "unclip"

    @cached_property
    def images(self) -> Path:
        """A folder of images with captions beside them."""
        write_images(self.root / "images", 3)
        return self.root / "images"

    @cached_property
    def image_files(self) -> list[bytes]:
        """Images of all formats and modes that Pillow writes, and beginnings of all others."""
        noise = Image.effect_noise((40, 36), 80)
        found = [*HEADERS.values()]
        Image.init()
        for name in sorted(Image.SAVE):
            for mode in MODES:
                file = io.BytesIO()
                with contextlib.suppress(Exception):  # a format has some of the modes
                    image = noise.convert("L").convert(mode) if mode != "I;16" else (
                        noise.convert("I").point(lambda v: v * 200).convert("I;16")
                    )  # fmt: skip
                    image.save(file, name)
                    found.append(file.getvalue())
        frames = [noise.convert("RGB"), noise.convert("RGB").rotate(90)]
        for name in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
            file = io.BytesIO()
            with contextlib.suppress(Exception):
                frames[0].save(file, name, save_all=True, append_images=frames[1:])
                found.append(file.getvalue())
        exif = Image.Exif()
        exif[0x0112] = 6
        for name in ("JPEG", "PNG", "TIFF", "WEBP"):
            file = io.BytesIO()
            frames[0].save(file, name, exif=exif)
            found.append(file.getvalue())
        return sorted({each for each in found if each})

    @cached_property
    def shard(self) -> Path:
        """A shard of three pairs."""
        path = self.root / "pairs.tar"
        with tarfile.open(path, "w") as tar:
            for file in sorted(self.images.iterdir()):
                tar.add(file, file.name)
        return path

    @cached_property
    def codes(self) -> Path:
        """Codes of images, as `dalle1 encode` writes them."""
        out = self.root / "codes"
        words = ["--dvae", str(self.model), "--data", str(self.images), "--out", str(out)]
        run_quietly(["encode", *words, "--num-workers", "0", "--device", "cpu"])
        return out

    @cached_property
    def training(self) -> Path:
        """A training of a transformer, of two steps, with its checkpoint."""
        out = self.root / "training"
        run_quietly([*self.training_command(self.codes), "--steps", "2", "--out", str(out)])
        return out

    def training_command(self, data: Path) -> list[str]:
        """Return the command of that training, without --steps and --out."""
        return [
            *("train", "transformer", "toy", "--dvae", str(self.model), "--data", str(data)),
            *("--model.width", "8", "--model.depth", "2", "--model.heads", "2"),
            *("--model.text-len", "8", "--model.text-vocab", "270", "--vocab-captions", "4"),
            *("--prompts", "a red cube", "--batch-size", "2", "--num-workers", "0"),
            *("--device", "cpu", "--precision", "fp32", "--save-every", "2", "--keep", "2"),
            *("--schedule-steps", "4", "--warmup-steps", "1", "--log-every", "1"),
        ]

    @cached_property
    def archives(self) -> Mapping[str, bytes]:
        """Files of `dalle1 compress`: images, captioned images, captions, by both coders."""
        found = {}
        captions = self.root / "captions.txt"
        captions.write_text("\n".join(CAPTIONS) + "\n", encoding="utf-8")
        ways = {"images": [], "captioned": ["--captions"], "captions": ["--text-only"]}
        for what, flags in ways.items():
            for coder in ("range", "huffman"):
                out = self.root / "archive.d1c"
                data = captions if what == "captions" else self.images
                common = ["--model", str(self.model), "--device", "cpu", "--coder", coder]
                run_quietly(["compress", str(data), *flags, *common, "--out", str(out)])
                found[f"{what} {coder}"] = out.read_bytes()
                if what == "images" and coder == "range":
                    header, messages = unpack(out.read_bytes(), out.name)
                    last = SHIFTS * 10**6 + 1  # of a token that does not exist: it changes nothing
                    found["shifts"] = pack(header, [m._replace(shifts=(last,)) for m in messages])
                out.unlink()
        return found

    @cached_property
    def foreign(self) -> Mapping[str, list[Path]]:
        """The files of each importer's command, with those of the packages that are installed."""
        found: dict[str, list[Path]] = {}
        makers: dict[str, Callable[[Path], list[Path]]] = {
            "import rudalle": lambda folder: rudalle_files(folder)[0],
            "import rudolph": lambda folder: rudolph_files(folder)[0],
            "import vqgan": lambda folder: [rudalle_files(folder)[0][1]],
            "import dalle-pytorch": lambda folder: [dalle_pytorch_file(folder)[0], _words(folder)],
            "import mindalle": lambda folder: [mindalle_folder(folder)[0]],
            "import stable-unclip": _pipeline,
            "import vae": lambda folder: [_pipeline(folder)[0] / "vae"],
        }
        for name, make in makers.items():
            folder = self.root / name.replace(" ", "-")
            folder.mkdir()
            torch.manual_seed(0)
            try:
                found[name] = make(folder)
            except (pytest.skip.Exception, ImportError) as skipped:
                print(f"{name} is not fuzzed: {skipped}")
        return found

    def copy(self, source: Path, to: Path) -> Path:
        """Copy a file or a folder into an input's own folder."""
        if source.is_dir():
            shutil.copytree(source, to, symlinks=True)
        else:
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, to)
        return to


def _pipeline(folder: Path) -> list[Path]:
    """Write a pipeline of diffusers, and return its folder."""
    write_stable_unclip(tiny_stable_unclip(), folder / "pipeline")
    return [folder / "pipeline"]


def _words(folder: Path) -> Path:
    """Write a vocabulary of tokenizers with 97 tokens, and return its file."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = [chr(code) for code in range(33, 33 + 94)]
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "a b", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "words.json"))
    return folder / "words.json"


SUFFIXES = (*IMAGE_SUFFIXES, ".eps", ".txt", "")
