"""What the documents show works: Python blocks and examples run, command lines parse, links lead somewhere."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
DOCUMENTS = [ROOT / name for name in NAMES] + sorted((ROOT / "docs").glob("*.md"))
OPERATORS = sorted((ROOT / "ops").glob("*/README.md"))
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
SHELLS = {"console", "bash", "sh", "shell"}

# Arguments of each example, and what its output must hold. An example without a row fails.
EXAMPLES = {
    "classify.py": (["photo.png"], r"random weights.*(\n +\d+\.\d+%  \w.*){5}"),
    "features.py": (
        [],
        r"p3: stride  8, \(1, 192, 26, 42\).*\n.*\np5: stride 32, \(1, 768, 7, 11\) -> \(1, 128, 7, 11\)",
    ),
    "new_backbone.py": ([], r"logits \(2, 10\)"),
    "own_training_loop.py": ([], r"epoch 3: loss \d\.\d+, held-out accuracy ([5-9]\d\.|100\.)"),
}


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its further words, its text, and the line its text starts on."""

    language: str
    words: tuple[str, ...]
    text: str
    line: int


def blocks(path: Path) -> Iterator[Block]:
    text = path.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        language, *words = match["info"].split() or [""]
        yield Block(language, tuple(words), match["body"], text.count("\n", 0, match.start("body")) + 1)


def python_blocks(path: Path) -> list[Block]:
    return [block for block in blocks(path) if block.language == "python"]


def named(paths: list[Path]) -> list[Any]:
    return [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in paths]


def test_the_documents_that_everything_refers_to_exist() -> None:
    expected = {
        "architecture.md",
        "parity.md",
        "adding-a-backbone.md",
        "adding-an-operator.md",
        "weights.md",
        "training.md",
    }
    assert expected <= {path.name for path in DOCUMENTS}
    assert all(path.read_text(encoding="utf-8").strip() for path in DOCUMENTS)
    assert python_blocks(ROOT / "README.md"), "README.md shows no Python"


@pytest.mark.parametrize("path", named([path for path in [*DOCUMENTS, *OPERATORS] if python_blocks(path)]))
def test_python_in_documents_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a document run in order, in one namespace."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__document__"}
    for block in python_blocks(path):
        if "no-run" in block.words:
            assert block.text.startswith("# Not run"), f"{path.name}:{block.line}: say why: `# Not run: ...`"
            continue
        # The empty lines make the traceback name the document's line.
        code = compile("\n" * (block.line - 1) + block.text, str(path), "exec", dont_inherit=True)
        exec(code, namespace)


def command_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, words behind `vizoo`) of every call of the command line, up to a pipe, a redirection or a comment."""
    for block in blocks(path):
        if block.language not in SHELLS:
            continue
        joined = re.sub(r"\\\n\s*", " ", block.text)
        for number, line in enumerate(joined.splitlines()):
            lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="|&;<>()")
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if set(word) <= set("|&;<>()"):
                    call = [w for i, w in enumerate(words) if i or "=" not in w]
                    if call and call[0].rsplit("/", 1)[-1] == "vizoo":
                        yield block.line + number, call[1:]
                    words = []
                else:
                    words.append(word)


def parse(words: list[str]) -> None:
    """Parse a call as the command line would, without running it."""
    import typer

    from vizoo.cli import app

    command: Any = typer.main.get_command(app)
    context: Any = None
    while True:
        try:
            is_group = hasattr(command, "commands")
            context = command.make_context(command.name, list(words), parent=context)
        except typer.Exit:  # --help and --version end the parsing
            return
        if not is_group:
            return
        rest = [*context._protected_args, *context.args]
        _, command, words = command.resolve_command(context, rest)


CALLS = [(path, line, words) for path in DOCUMENTS for line, words in command_lines(path)]


@pytest.mark.parametrize(
    ("path", "line", "words"), [pytest.param(*call, id=f"{call[0].name}:{call[1]}") for call in CALLS]
)
def test_command_lines_in_documents_parse(
    path: Path, line: int, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parse(words)


@pytest.mark.parametrize("words", [["lst"], ["list", "--no-such-option"], ["describe"]])
def test_a_wrong_command_line_is_found(words: list[str]) -> None:
    with pytest.raises(Exception, match=r"(?i)no such|missing"):
        parse(words)


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", named([*DOCUMENTS, *OPERATORS]))
def test_links_lead_somewhere(path: Path) -> None:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{path.name} links to {target}, which does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", file.read_text(encoding="utf-8")), re.MULTILINE)
            assert anchor in map(slug, headings), f"{path.name} links to {target}, a heading that does not exist"


def test_every_example_has_a_row() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == EXAMPLES.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, expected = EXAMPLES[name]
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(expected, printed), printed


def test_the_example_backbone_joins_the_zoo_by_lying_there(tmp_path: Path) -> None:
    """In a process of its own, since the registry collects families once."""
    shutil.copy(ROOT / "examples" / "new_backbone.py", tmp_path / "pool_mixer.py")
    code = f"""
import torch, vizoo, vizoo.backbones
vizoo.backbones.__path__.append({str(tmp_path)!r})
assert vizoo.list_models(mixer="pooling") == ["pool_mixer_tiny"]
model = vizoo.create_model("pool_mixer_tiny", features_only=True, out_indices=(1, 2), in_chans=1, pool=5)
print([tuple(x.shape) for x in model(torch.zeros(1, 1, 70, 50))])
print(vizoo.describe("pool_mixer_tiny").stages[-1].channels)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["[(1, 64, 9, 7), (1, 128, 5, 4)]", "256"]
