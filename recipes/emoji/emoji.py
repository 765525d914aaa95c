"""Render emoji by five artists to WebDataset shards: artwork with names, for a first own dataset.

    recipes/emoji/emoji.sh    # installs the packages that package-lock.json pins, then runs this

Each pair is a concept as one artist designed it: "honeybee, fluent 3d style". OUT/train holds nine
pairs in ten. OUT/heldout holds the others: half of the concepts lack one of their artists, so
every held-out concept and artist occurs in training, but not together. As many held-out pairs as
dalle1 validates on, the last twentieth and at most 512, are also the last shard of OUT/train.

The same packages give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import sys
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

SIZE = 256  # pixels of an image
MARGIN = 8  # white pixels around the artwork
MIN_ARTISTS = 3  # of a concept that one is held out of
FLAGS_AND_COMPONENTS = (None, 2, 9)  # groups of emojibase that are skipped


@dataclass(frozen=True)
class Artist:
    """A set of emoji and its licence."""

    package: str
    credit: str
    licence: str
    url: str


MIT = "https://opensource.org/license/mit"
FLUENT = "Fluent Emoji © Microsoft Corporation"
ARTISTS = {
    "openmoji": Artist(
        "openmoji",
        "OpenMoji, the open-source emoji and icon project, openmoji.org",
        "CC BY-SA 4.0",
        "https://creativecommons.org/licenses/by-sa/4.0/",
    ),
    "fluent 3d": Artist("@lobehub/fluent-emoji-3d", FLUENT, "MIT", MIT),
    "fluent flat": Artist("@iconify-json/fluent-emoji-flat", FLUENT, "MIT", MIT),
    "twemoji": Artist(
        "@iconify-json/twemoji",
        "Twemoji © Twitter, Inc and other contributors",
        "CC BY 4.0",
        "https://creativecommons.org/licenses/by/4.0/",
    ),
    "noto": Artist(
        "@iconify-json/noto",
        "Noto Emoji © Google Inc",
        "Apache 2.0",
        "https://www.apache.org/licenses/LICENSE-2.0",
    ),
}
NAMES = "emojibase-data"  # names and keywords of Unicode's CLDR


@dataclass(frozen=True)
class Concept:
    """An emoji, whoever designed it."""

    code: str  # "1f41d"
    name: str  # "honeybee"
    keywords: tuple[str, ...]  # the rarest first


@dataclass(frozen=True)
class Pair:
    """A concept as one artist designed it."""

    concept: Concept
    artist: str
    held_out: bool
    png: bytes

    @property
    def captions(self) -> list[str]:
        """Name; name and keywords; keywords. Each with the artist."""
        name, keywords = self.concept.name, ", ".join(self.concept.keywords)
        texts = [name, f"{name}, {keywords}", keywords] if keywords else [name]
        return [f"{text}, {self.artist} style" for text in texts]


def fail(message: str) -> NoReturn:
    """Print an error and exit."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_json(path: Path) -> Any:
    """Read a file of a package."""
    if not path.is_file():
        fail(f"{path} does not exist; run recipes/emoji/emoji.sh, which installs the packages")
    return json.loads(path.read_text(encoding="utf-8"))


def normal(code: str) -> str:
    """Write code points alike in all packages: in lower case, without variation selectors."""
    return "-".join(point for point in code.lower().split("-") if point != "fe0f")


def read_concepts(packages: Path, num_keywords: int) -> list[Concept]:
    """Read names and keywords. Skin tones are variants of a concept, and skipped like flags."""
    found = [
        emoji
        for emoji in read_json(packages / NAMES / "en" / "data.json")
        if emoji.get("group") not in FLAGS_AND_COMPONENTS
    ]
    uses = Counter(tag for emoji in found for tag in emoji.get("tags", []))
    concepts = []
    for emoji in found:
        name = emoji["label"].lower()
        tags = sorted({tag for tag in emoji.get("tags", []) if tag.lower() != name})
        rarest = sorted(tags, key=uses.__getitem__)[:num_keywords]
        concepts.append(Concept(normal(emoji["hexcode"]), name, tuple(rarest)))
    return sorted(concepts, key=lambda concept: concept.code)


def read_artwork(packages: Path, artist: str) -> dict[str, Path | str]:
    """Return an artist's emoji by code: an image file, an SVG file, or SVG text."""
    folder = packages / ARTISTS[artist].package
    read_json(folder / "package.json")
    if artist == "openmoji":
        return {normal(path.stem): path for path in (folder / "color" / "svg").glob("*.svg")}
    if artist == "fluent 3d":
        return {normal(path.stem): path for path in (folder / "assets").glob("*.webp")}
    icons, names = read_json(folder / "icons.json"), read_json(folder / "chars.json")
    bodies: Mapping[str, dict[str, Any]] = icons["icons"]
    artwork: dict[str, Path | str] = {}
    for code, name in sorted(names.items()):
        if name in bodies:
            icon = {"width": 16, "height": 16, **icons, **bodies[name]}
            box = f"{icon.get('left', 0)} {icon.get('top', 0)} {icon['width']} {icon['height']}"
            head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" '
            head += 'xmlns:xlink="http://www.w3.org/1999/xlink" width="16" height="16">'
            artwork[normal(code)] = f"{head}{icon['body']}</svg>"
    return artwork


def render(artwork: Path | str) -> Image.Image:
    """Render an emoji on white."""
    side = SIZE - 2 * MARGIN
    if isinstance(artwork, Path) and artwork.suffix != ".svg":
        image = Image.open(artwork).convert("RGBA")
    else:
        svg = artwork.read_text(encoding="utf-8") if isinstance(artwork, Path) else artwork
        image = Image.open(io.BytesIO(rasterised(svg, side))).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("RGB")
    scale = side / max(image.size)
    width, height = (round(scale * length) for length in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", (SIZE, SIZE), "white")
    sheet.paste(image, ((SIZE - width) // 2, (SIZE - height) // 2))
    return sheet


def rasterised(svg: str, side: int) -> bytes:
    """Return a PNG of an SVG."""
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        fail("resvg_py is not installed; run pip install -r recipes/emoji/requirements.txt")
    return bytes(svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True))


def digest(text: str) -> int:
    """Return a number that looks random and depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def held_out_artist(concept: Concept) -> str | None:
    """Return the artist of whom every second concept is held out, at random."""
    lacks_one, artist = digest(concept.code) % 2, digest(f"{concept.code} artist")
    return list(ARTISTS)[artist % len(ARTISTS)] if lacks_one else None


def render_pairs(packages: Path, artists: Sequence[str], num_keywords: int) -> list[Pair]:
    """Render all pairs, and shuffle them. An image that its artist used before is skipped."""
    artwork = {artist: read_artwork(packages, artist) for artist in artists}
    pairs, seen = [], set()
    for concept in read_concepts(packages, num_keywords):
        available = [artist for artist in artists if concept.code in artwork[artist]]
        held_out = held_out_artist(concept) if len(available) >= MIN_ARTISTS else None
        for artist in available:
            buffer = io.BytesIO()
            render(artwork[artist][concept.code]).save(buffer, "PNG")
            png = buffer.getvalue()
            if (key := (artist, hashlib.sha256(png).digest())) not in seen:
                seen.add(key)
                pairs.append(Pair(concept, artist, artist == held_out, png))
    return sorted(pairs, key=lambda pair: digest(f"{pair.concept.code} {pair.artist} order"))


def write_shard(pairs: Sequence[Pair], path: Path) -> None:
    """Write pairs as img2dataset does, but with a caption a line: KEY.png, KEY.txt, KEY.json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, pair in enumerate(pairs):
            artist = ARTISTS[pair.artist]
            fields = {
                "caption": pair.captions[0],
                "concept": pair.concept.name,
                "artist": pair.artist,
                "code": pair.concept.code,
                "held_out": pair.held_out,
                "licence": artist.licence,
                "credit": artist.credit,
                "width": SIZE,
                "height": SIZE,
            }
            text, facts = "\n".join(pair.captions), json.dumps(fields, ensure_ascii=False)
            files = {"png": pair.png, "txt": text.encode(), "json": facts.encode()}
            for suffix, content in files.items():
                member = tarfile.TarInfo(f"{path.stem}{i:04d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_licences(packages: Path, artists: Sequence[str], out: Path) -> None:
    """Write who made the images and under which licence, with the packages' own licence files."""
    lines = ["# Attributions", "", "The artwork belongs to its artists:", ""]
    for name in artists:
        artist = ARTISTS[name]
        version = read_json(packages / artist.package / "package.json")["version"]
        line = f"- **{name}**: {artist.credit}, [{artist.licence}]({artist.url}), rendered from"
        lines.append(f"{line} `{artist.package}` {version}.")
    version = read_json(packages / NAMES / "package.json")["version"]
    lines += ["", f"Names and keywords: Unicode CLDR, from `{NAMES}` {version} (MIT)."]
    for package in [NAMES, *(ARTISTS[name].package for name in artists)]:
        for file in sorted((packages / package).glob("LICENSE*")):
            target = out / "licences" / package.replace("/", "-").lstrip("@")
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / file.name)
    (out / "ATTRIBUTIONS.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def parse(args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"), help="folder to write")
    packages = Path("runs/emoji-packages/node_modules")
    parser.add_argument("--packages", type=Path, default=packages, help="folder of the packages")
    parser.add_argument(
        "--artists", nargs="+", choices=ARTISTS, default=ARTISTS, help="artists; default: all"
    )
    parser.add_argument("--shard-size", type=int, default=1000, help="pairs in a shard")
    parser.add_argument("--keywords", type=int, default=3, help="keywords in a caption")
    options = parser.parse_args(args)
    if not 1 <= options.shard_size <= 10_000:
        parser.error(f"--shard-size is {options.shard_size}, expected 1 to 10,000")
    if options.keywords < 0:
        parser.error(f"--keywords is {options.keywords}, expected 0 or more")
    return options


def main(args: Sequence[str] | None = None) -> None:
    options = parse(args)
    if options.out.exists() and any(options.out.iterdir()):
        fail(f"--out is {options.out}, which holds files already; remove it or name another folder")
    artists = [name for name in ARTISTS if name in options.artists]
    pairs = render_pairs(options.packages, artists, options.keywords)
    train = [pair for pair in pairs if not pair.held_out]
    heldout = [pair for pair in pairs if pair.held_out]
    if not pairs:
        fail(f"{options.packages} holds no emoji; remove it and run recipes/emoji/emoji.sh")
    validation = heldout[: min(len(train) // 19, 512)]  # the last twentieth of OUT/train
    for folder, part in {"train": train, "heldout": heldout}.items():
        starts = range(0, len(part), options.shard_size)
        shards = [part[start : start + options.shard_size] for start in starts]
        if folder == "train" and validation:
            shards.append(validation)
        for number, shard in enumerate(shards):
            write_shard(shard, options.out / folder / f"{number:05d}.tar")
    write_licences(options.packages, artists, options.out)
    counts = Counter(pair.artist for pair in pairs)
    print(", ".join(f"{count} by {artist}" for artist, count in counts.items()))
    print(
        f"{options.out}: {len(train)} training and {len(heldout)} held-out pairs of "
        f"{len({pair.concept for pair in pairs})} concepts"
    )


if __name__ == "__main__":
    main()
