"""The fixtures of official outputs, and tiny configurations that run every family in milliseconds."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent
COPIES = HERE.parent / "parity"
SHARED = HERE.parents[2] / "shared" / "parity"


def load_parity() -> ModuleType:
    """The module that fills parameters and compares outputs."""
    spec = importlib.util.spec_from_file_location("vizoo_parity", COPIES / "parity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def parity() -> ModuleType:
    return load_parity()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise `fixture_path` by every fixture there is; the originals where they lie beside the checkout."""
    if "fixture_path" in metafunc.fixturenames:
        root = SHARED if SHARED.is_dir() and not os.environ.get("VIZOO_PARITY_COPIES") else COPIES
        paths = sorted(root.rglob("*.json"))
        import vizoo.registry

        built = [p for p in paths if p.stem in vizoo.registry.variants()]
        metafunc.parametrize("fixture_path", built, ids=[p.stem for p in built])
