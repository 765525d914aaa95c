"""Names and texts use the field's words: no retired word of docs/glossary.md is left.

Each rule reads one file and returns one line per retired word. The repository must have none, and
planted files show that every rule can fail.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Words of identifiers (the parts of snake_case and CamelCase) → what to use.
RETIRED_PARTS = {
    "anyone": "any_rank",
    "bets": "probabilities",
    "complaint": "problem, message",
    "complaints": "problems, messages",
    "draw": "sample, generate, render or plot",
    "drawing": "sampling, rendering",
    "drawn": "sampled, rendered",
    "draws": "samples",
    "given": "known",
    "judge": "classifier or reranker",
    "judged": "classified",
    "judges": "classifiers",
    "judging": "classifying",
    "picture": "image",
    "pictures": "images",
    "place": "position, device, folder or cursor",
    "places": "positions, devices, folders or cursors",
    "quicken": "fast_attention",
    "quickened": "fast_attention",
    "room": "max_batch, slack",
    "soften": "random_blur",
    "softened": "blurred",
    "spoiled": "nan_grad_if_nan",
    "streamed": "streaming",
    "trouble": "interrupts",
    "tally": "SkipStats",
    "unusable": "BadSample",
}
# Whole identifiers → what to use.
RETIRED_NAMES = {
    "AS_IT_IS": "NO_CLEANING",
    "COLDEST": "MIN_TEMPERATURE",
    "ClipSize": "ClipArch",
    "Divergence": "NonFiniteGuard",
    "Fits": "FitsInMemory",
    "LeftOut": "SkippedSample",
    "Plain": "DDPEngine",
    "Piece": "ParamShard",
    "Reading": "CleaningConfig",
    "TransformerSize": "TransformerArch",
    "Whole": "LossModule",
    "Zero": "DeepSpeedEngine",
    "begin_with": "load_initial",
    "clear_errors": "one_line_errors",
    "clips": "clip_metrics",
    "counted_on": "base_grid",
    "from_main": "broadcast_from_main",
    "go_to": "seek",
    "in_batches": "batched",
    "join_places": "merge_states",
    "left_out": "skipped",
    "no_caption": "null_caption",
    "own": "folder_benchmarks",
    "restrict": "filter_logits",
    "take_notes": "pop_metadata",
}
# Patterns in docstrings, comments, strings and Markdown → what to use.
RETIRED_TEXT = {
    r"[Pp]ictures?": "image",
    r"[Jj]udg(e|es|ed|ing)": "classifier, reranker; evaluate",
    r"[Dd]raw(s|n|ing|ings)?|[Dd]rew": "sample, generate, render or plot",
    r"[Ll]eft\s+out": "skipped",
    r"([Gg]o|[Gg]oes|[Gg]oing|[Ww]ent|[Gg]one)\s+on": "resume, continue",
    r"be\s+had": "available",
    r"[Bb]ets?": "probability",
    r"[Qq]uicken(s|ed)?|[Ss]often(s|ed)?": "fast attention; random blur",
    r"[Cc]omplaints?": "problem, message",
    r"[Gg]iven\s+codes|given_codes|encode_given": "known codes",
    r"[Rr]ooms?": "memory, space; module",
    r"[Tt]he\s+house": "the repository",
    r"(is|are)\s+none": "name what is missing or wrong",
    r"(?<!in )(?<!takes )(?<!take )(?<!out of )[Pp]laces?": "position, device, folder or cursor",
    r"([Mm]illion|[Bb]illion|\d[BM]?)\s+weights": "parameters",
    r"[Ww]ho\s+sees\s+whom": "attention mask",
    r"borrowed|forerunners?|[Ww]orktrees?": "nothing: it tells how the project was made",
    r"[Tt]he\s+next\s+(two|three)": "name the options",
    r"[Tt]oy-(half|settle)": "toy-128, toy-finetune",
}
RETIRED_VERBS = ("Give", "Gives", "Say", "Says", "Tell", "Tells", "Have", "Has", "Bring", "Brings")
FIELD_STARTS = ("Of", "That", "Whose", "By")
TEXT = {re.compile(rf"(?<![\w-])(?:{words})(?![\w-])"): use for words, use in RETIRED_TEXT.items()}
CAPTION = re.compile(r"""(^|["'`“])(a picture of|a drawing of|draw) """)  # a prompt, quoted

# Files that name retired words on purpose.
EXEMPT = {
    "dalle1/data/codes.py": "reads a key of codes.json",
    "dalle1/data/encoded.py": "writes a key of codes.json",
    "dalle1/data/sources/streaming_loader.py": "reads a name in old checkpoints",
    "dalle1/training/checkpoint.py": "reads the names in old checkpoints",
    "dalle1/training/resume_key.py": "reads the names in old checkpoints",
    "tests/training/test_old_checkpoints.py": "writes the names in old checkpoints",
    "tests/data/test_encoded.py": "writes a key of codes.json",
    "tests/data/test_streaming_shards.py": "writes a name in old checkpoints",
    "docs/glossary.md": "maps the retired words to those in use",
    "tests/test_language.py": "lists the retired words",
    "dalle1/evaluation/classifier.py": "reads a buffer's name of earlier versions",
    "dalle1/evaluation/toybox_prompts.py": "a seed phrase that published results depend on",
    "dalle1/toybox/phrases.py": "phrases of captions: a drawing of …, drawn in pencil",
}


def identifier_problems(name: str) -> Iterator[str]:
    """Yield the retired words of an identifier."""
    if name in RETIRED_NAMES:
        yield f"name {name!r}: use {RETIRED_NAMES[name]}"
        return
    for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name):
        if part.lower() in RETIRED_PARTS:
            yield f"name {name!r}: use {RETIRED_PARTS[part.lower()]}"


def text_problems(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line, from 0, and the retired words of a text."""
    text = CAPTION.sub(lambda match: "-" * len(match[0]), text)
    for pattern, use in TEXT.items():
        for match in pattern.finditer(text):
            words = " ".join(match[0].split())
            yield text[: match.start()].count("\n"), f"text {words!r}: use {use}"


def names(node: ast.AST) -> Iterator[str]:
    """Yield the identifiers that a node defines."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            yield node.name
        case ast.arg():
            yield node.arg
        case ast.Attribute(ctx=ast.Store()):
            yield node.attr


def fields(node: ast.ClassDef) -> Iterator[ast.AST]:
    """Yield the names and the docs of a class' fields."""
    for statement, following in zip(node.body, [*node.body[1:], None]):
        if isinstance(statement, ast.AnnAssign | ast.Assign):
            yield statement
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                yield following


def doc_problems(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield docstrings that start with a retired verb, and field docs that do not stand alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            first = (ast.get_docstring(node) or "-").split()[0]
            if first in RETIRED_VERBS:
                yield (
                    node.body[0].lineno,
                    f"docstring starts with {first!r}: use Return, Compute, …",
                )
        if not isinstance(node, ast.ClassDef):
            continue
        for field in fields(node):
            match field:
                case (
                    ast.AnnAssign(target=ast.Name(id=name))
                    | ast.Assign(targets=[ast.Name(id=name)])
                ):
                    yield from ((field.lineno, problem) for problem in identifier_problems(name))
                case ast.Expr(value=ast.Constant(value=str(doc))):
                    first = (doc or "-").split()[0].rstrip(",:")
                    if first in FIELD_STARTS:
                        yield field.lineno, f"field doc starts with {first!r}: use a noun phrase"


def python_problems(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the retired word, for identifiers, docs, strings and comments."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for name in names(node):
            yield from ((node.lineno, problem) for problem in identifier_problems(name))
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from ((node.lineno + line, text) for line, text in text_problems(node.value))
    yield from doc_problems(tree)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield from ((token.start[0], text) for _, text in text_problems(token.string))


def problems(root: Path, path: Path) -> list[str]:
    """Return one line for each retired word of a file, its name included."""
    source, name = path.read_text(encoding="utf-8"), path.relative_to(root)
    if path.suffix == ".py":
        found = list(python_problems(source))
    else:
        found = [(line + 1, text) for line, text in text_problems(source)]
    found += [(0, text) for text in identifier_problems(path.stem.replace("-", "_"))]
    return [f"{name}:{line}: {text}" for line, text in sorted(set(found))]


def source_files(root: Path) -> list[Path]:
    """Return the files whose words are checked."""
    folders = ("dalle1", "dalle2", "dvae", "tests", "benchmarks", "docs", "recipes")
    found = [*root.glob("*.py"), *root.glob("*.md"), root / "Makefile", root / "pyproject.toml"]
    for folder in folders:
        found += [
            path for kind in ("py", "md", "sh") for path in root.glob(f"{folder}/**/*.{kind}")
        ]
    return sorted(found)


def test_no_retired_word_is_left() -> None:
    skipped = EXEMPT
    found = [
        problem
        for path in source_files(ROOT)
        if path.relative_to(ROOT).as_posix() not in skipped
        for problem in problems(ROOT, path)
    ]
    assert not found, "\n" + "\n".join(found)


def test_every_exception_is_needed() -> None:
    for name in EXEMPT:
        assert problems(ROOT, ROOT / name), f"{name} has no retired word: remove it from EXEMPT"


PLANTED = [
    ("a.py", "def draw_scene(x): ...\n", "a.py:1: name 'draw_scene'"),
    ("a.py", "class LeftOut: ...\n", "a.py:1: name 'LeftOut'"),
    ("a.py", "class PictureFolder: ...\n", "a.py:1: name 'PictureFolder'"),
    ("a.py", "def f(given_codes): ...\n", "a.py:1: name 'given_codes'"),
    ("a.py", "x = 1\nself.places = x\n", "a.py:2: name 'places'"),
    ("a.py", "class A:\n    judge: int\n", "a.py:2: name 'judge'"),
    ("a.py", 'def f():\n    """Give a number."""\n', "a.py:2: docstring starts with 'Give'"),
    ("a.py", '"""Tell what is there."""\n', "a.py:1: docstring starts with 'Tell'"),
    (
        "a.py",
        'class A:\n    x: int\n    """Of the text tower."""\n',
        "a.py:3: field doc starts with",
    ),
    ("a.py", "raise ValueError('a pair is left out')\n", "a.py:1: text 'left out'"),
    ("a.py", "raise ValueError(f'{x} goes on')\n", "a.py:1: text 'goes on'"),
    ("a.py", "x = 1  # of the picture\n", "a.py:1: text 'picture'"),
    (
        "a.py",
        'def f():\n    """Return x.\n\n    It is left\n    out.\n    """\n',
        "a.py:4: text 'left out'",
    ),
    ("trouble.py", "", "trouble.py:0: name 'trouble'"),
    ("own.py", "", "own.py:0: name 'own'"),
    ("a.md", "# Title\n\nThe model draws\nimages.\n", "a.md:3: text 'draws'"),
    ("a.md", "51 million weights\n", "a.md:1: text 'million weights'"),
    ("a.md", "run on a borrowed GPU\n", "a.md:1: text 'borrowed'"),
]


@pytest.mark.parametrize(("name", "source", "expected"), PLANTED)
def test_a_retired_word_is_found(name: str, source: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(source, encoding="utf-8")
    found = problems(tmp_path, tmp_path / name)
    assert len(found) == 1, found
    assert found[0].startswith(expected)


def test_words_in_use_pass(tmp_path: Path) -> None:
    source = '''"""Return images; the classifier runs in place."""
class Known:
    known_codes: int
    """Image tokens that are fixed before sampling."""
    def sample(self, image, position): ...
prompts = ["a picture of a red cube"]
draw = ImageDraw.Draw(image)
# An ongoing run takes place in a folder; forgiven, misplaced, drawback, giveaway.
'''
    (tmp_path / "a.py").write_text(source, encoding="utf-8")
    (tmp_path / "a.md").write_text("Samples and skipped files: 51 million parameters.\n")
    assert problems(tmp_path, tmp_path / "a.py") == []
    assert problems(tmp_path, tmp_path / "a.md") == []
