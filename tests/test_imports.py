"""Who may import whom, what an import must not bring along, and what no file may contain."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDERS = {"zoo": "vizoo", **{name: f"vizoo.{name}" for name in ("backbones", "configs", "ops", "train", "weights")}}

# What each folder may import of the others, as prefixes of import names.
ALLOWED = {
    "ops": (),
    "weights": (),
    "backbones": ("vizoo.ops", "vizoo.weights.record"),
    "zoo": ("vizoo.backbones", "vizoo.ops", "vizoo.weights"),
    "train": ("vizoo", "vizoo.backbones", "vizoo.ops", "vizoo.weights"),
    "configs": ("vizoo", "vizoo.train", "vizoo.backbones", "vizoo.weights"),
}
# The command line is the application: inside its functions it may use everything.
APPLICATION = ("zoo/cli/", "zoo/__main__.py")
HEAVY = ("triton", "mmengine", "albumentations", "torchvision", "timm", "cv2", "sklearn", "typer")
IMPORT_LIMIT = 60  # seconds: a guard against hanging, not a measurement


def sources(root: Path) -> Iterator[tuple[str, Path]]:
    """(folder, file) of every Python file of the package."""
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            if "__pycache__" not in path.parts:
                yield folder, path


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(import name, line) of every import; `from vizoo import ops` counts as vizoo.ops, relative ones as their dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def climbs_out(path: Path, folder: Path, tree: ast.AST) -> bool:
    """Whether a relative import leaves the folder."""
    depth = len(path.relative_to(folder).parts)
    return any(isinstance(node, ast.ImportFrom) and node.level > depth for node in ast.walk(tree))


def owner(name: str) -> str:
    """The folder that an import name belongs to."""
    second = name.split(".")[1] if "." in name else ""
    return second if second in FOLDERS else "zoo"


def allowed(folder: str, name: str) -> bool:
    target = owner(name)
    if target == folder:
        return True
    if target == "zoo":
        return "vizoo" in ALLOWED[folder]
    return any(name == prefix or name.startswith(prefix + ".") for prefix in ALLOWED[folder] if prefix != "vizoo")


def deferred_lines(tree: ast.AST) -> set[int]:
    """Lines inside functions or `if TYPE_CHECKING:`, which do not run on import."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        checking = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        if checking or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def test_folders_import_only_what_lies_below_them(root: Path) -> None:
    wrong = []
    for folder, path in sources(root):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        where = path.relative_to(root).as_posix()
        if climbs_out(path, root / folder, tree):
            wrong.append(f"{where}: a relative import leaves the folder; import by absolute name")
        deferred = deferred_lines(tree) if where.startswith(APPLICATION) else set()
        for name, line in imported(tree):
            if name.split(".")[0] == "vizoo" and not allowed(folder, name) and line not in deferred:
                wrong.append(f"{where}:{line}: {folder}/ must not import {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("folder", "name", "verdict"),
    [
        ("ops", "vizoo.ops.dispatch", True),
        ("ops", "vizoo.backbones.base", False),
        ("ops", "vizoo.create_model", False),
        ("weights", "vizoo.registry.resolve", False),
        ("backbones", "vizoo.weights.record.Weights", True),
        ("backbones", "vizoo.weights.store", False),
        ("zoo", "vizoo.train.entry", False),
        ("train", "vizoo.create_model", True),
        ("train", "vizoo.configs.demo", False),
        ("configs", "vizoo.train.data", True),
    ],
)
def test_the_rule_itself(folder: str, name: str, verdict: bool) -> None:
    assert allowed(folder, name) is verdict


def test_nothing_imports_a_folder_by_its_own_name(root: Path) -> None:
    wrong = []
    for folder in [*FOLDERS, "tests", "benchmarks", "examples"]:
        for path in sorted((root / folder).rglob("*.py")):
            for name, line in imported(ast.parse(path.read_text(encoding="utf-8"))):
                if name.split(".")[0] in FOLDERS:
                    wrong.append(
                        f"{path.relative_to(root)}:{line}: import {FOLDERS[name.split('.')[0]]} instead of {name}"
                    )
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", ["vizoo", "vizoo.ops", "vizoo.weights"])
def test_import_brings_no_heavy_library(module: str) -> None:
    code = f"import sys, {module}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=IMPORT_LIMIT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_import_has_no_side_effects() -> None:
    code = """
import logging, os, random, warnings, torch
def state():
    return (dict(os.environ), list(warnings.filters), logging.getLogger().level, list(logging.getLogger().handlers),
            random.getstate(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state().tolist())
before = state()
import vizoo, vizoo.ops, vizoo.weights
assert state() == before, "importing vizoo changed a global"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=IMPORT_LIMIT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""


def texts(root: Path) -> Iterator[tuple[Path, str]]:
    """Every text file of the repository."""
    kept = [*FOLDERS, "tests", "benchmarks", "docs", "examples", ".ci"]
    files = [path for folder in kept for path in (root / folder).rglob("*") if path.is_file()]
    files += [path for path in root.iterdir() if path.is_file()]
    for path in sorted(files):
        if "__pycache__" not in path.parts and path.suffix in {
            "",
            ".py",
            ".md",
            ".cfg",
            ".toml",
            ".json",
            ".html",
            ".csv",
            ".yml",
        }:
            yield path, path.read_text(encoding="utf-8")


def test_no_file_names_a_folder_of_some_machine(root: Path) -> None:
    # The brackets keep this very line from matching itself.
    machine = re.compile(r"(?<![\w.])/(w[o]rk|r[o]ot|t[m]p|h[o]me/\w+|U[s]ers/\w+)/")
    found = [
        f"{path.relative_to(root)}:{number}: {line.strip()[:100]}"
        for path, text in texts(root)
        for number, line in enumerate(text.splitlines(), 1)
        if machine.search(line)
    ]
    assert not found, "\n".join(found)
