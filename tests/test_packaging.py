"""The package as users get it: listed in full, whole in a wheel, found by type checkers, at home in other processes."""

from __future__ import annotations

import configparser
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest
import torch

import vizoo

FOLDERS = {"vizoo": "zoo", **{f"vizoo.{name}": name for name in ("backbones", "configs", "ops", "train", "weights")}}
METADATA = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")

# Runs with the unpacked wheel and the installed dependencies, without the .pth files that make the checkout importable.
IN_WHEEL = """
import importlib.resources
import vizoo
assert vizoo.__file__.startswith({wheel!r}), vizoo.__file__
names = vizoo.list_models("swin*")
assert "swin_tiny_patch4_window7_224" in names
model = vizoo.create_model(names[0], depths=(1, 1, 1, 1), embed_dim=12, num_heads=(1, 2, 4, 8), num_classes=3)
configs = importlib.resources.files("vizoo.configs")
runs = sorted(str(path) for path in configs.glob("*/*.py") if not path.name.startswith("_"))
from mmengine.config import Config
assert "model" in Config.fromfile(runs[0])
print(len(names), "models,", len(runs), "configs")
"""


def python_folders(folder: Path) -> list[Path]:
    """The folder and those below it that hold Python files, without what tools leave behind."""
    found = {path.parent for path in folder.rglob("*.py") if "__pycache__" not in path.parts}
    return sorted(found)


def declared(root: Path) -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(root / "setup.cfg", encoding="utf-8")
    return config


def test_setup_cfg_lists_every_package(root: Path) -> None:
    expected = set()
    for package, folder in FOLDERS.items():
        for path in python_folders(root / folder):
            assert (path / "__init__.py").exists(), f"{path} holds Python files but no __init__.py"
            expected.add(".".join([package, *path.relative_to(root / folder).parts]))
    listed = declared(root)["options"]["packages"].split()
    assert len(listed) == len(set(listed))
    assert set(listed) == expected


def test_setup_cfg_maps_the_folders(root: Path) -> None:
    lines = declared(root)["options"]["package_dir"].strip().splitlines()
    assert {key.strip(): value.strip() for key, value in (line.split("=") for line in lines)} == FOLDERS


def test_links_for_type_checkers_match_the_folders(root: Path) -> None:
    expected = {path.name: f"../../zoo/{path.name}" for path in (root / "zoo").iterdir() if path.name != "__pycache__"}
    expected |= {name: f"../../{name}" for name in FOLDERS.values() if name != "zoo"}
    links = {path.name: os.readlink(path) for path in (root / "typings" / "vizoo").iterdir()}
    assert links == expected, "run `make links`"


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a copy so that the checkout stays clean."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS.values():
        shutil.copytree(root / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in METADATA:
        shutil.copy(root / name, source / name)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation"]
    built = subprocess.run([*command, "--wheel-dir", str(out), str(source)], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("vizoo-*.whl")
    return path


def test_wheel_holds_the_packages_and_nothing_else(root: Path, wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"vizoo"}
    for package, folder in FOLDERS.items():
        for path in (root / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert "/".join([*package.split("."), *path.relative_to(root / folder).parts]) in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    unpacked = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(unpacked)
    # -I ignores PYTHONPATH and the current folder, -S the .pth files.
    start = (
        f"import sys; sys.path[:0] = [{str(unpacked)!r}]; sys.path += {[p for p in sys.path if 'site-packages' in p]!r}"
    )
    code = start + IN_WHEEL.format(wheel=str(unpacked))
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "models," in done.stdout


def test_console_script_is_declared() -> None:
    scripts = {entry.name: entry.value for entry in metadata.distribution("vizoo").entry_points}
    assert scripts["vizoo"] == "vizoo.cli:main"


def test_module_runs_as_a_command(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "vizoo", "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "describe" in done.stdout


def small_model() -> vizoo.Backbone:
    overrides = {"depths": (1, 1, 1, 1), "embed_dim": 12, "num_heads": (1, 2, 4, 8)}
    return vizoo.create_model("swin_tiny_patch4_window7_224", num_classes=3, **overrides).eval()


def test_pickled_model_computes_the_same() -> None:
    model, x = small_model(), torch.randn(1, 3, 40, 64)
    copy = pickle.loads(pickle.dumps(model))
    assert type(copy) is type(model)
    assert copy.config == model.config
    torch.testing.assert_close(copy(x), model(x), rtol=0, atol=0)


def test_spawned_worker_runs_a_model_it_was_sent() -> None:
    model, x = small_model().requires_grad_(False), torch.randn(1, 3, 40, 64)
    with ProcessPoolExecutor(1, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        returned = pool.submit(model, x).result(timeout=120)
        torch.testing.assert_close(returned, model(x))
