"""`--fuse` of `vizoo test`, `predict` and `benchmark`: no batch norm runs, and the figures stay what they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import vizoo
from vizoo.benchmark import benchmark
from vizoo.cli import main
from vizoo.train.run import fuse_backbone, train

DESIGN: dict[str, Any] = {"img_size": 32, "embed_dims": (12, 16, 20, 24), "depths": (1, 1, 1, 1)}
QUICK: dict[str, Any] = {"device": "cpu", "batch_size": 2, "steps": 1, "warmup": 1}
Vizoo = Callable[..., Any]


@pytest.fixture(scope="module")
def trained(small_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of an epoch of a tiny CAS-ViT, which is full of batch norms."""
    path = small_config.with_name("norms.py")
    backbone = {"name": "rcvit_xs", "pretrained": False, "num_classes": 4, **DESIGN}
    path.write_text(small_config.read_text() + f"model['backbone'] = {backbone}\ncustom_hooks = []\n")
    return train(path, ["train_cfg.max_epochs=1"], work_dir=tmp_path_factory.mktemp("norms") / "a", quiet=True)


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Batch norms that have run."""
    found: list[nn.Module] = []
    forward = nn.BatchNorm2d.forward
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda norm, x: found.append(norm) or forward(norm, x))
    return found


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Vizoo:
    """Call the command line; what it printed as JSON."""

    def call(*words: object) -> Any:
        code = main([str(word) for word in words])
        shown = capsys.readouterr()
        assert code == 0, shown.err
        return json.loads(shown.out)

    return call


def both(run: Vizoo, norms: list[nn.Module], *words: object) -> tuple[Any, Any]:
    """What a command prints without and with `--fuse`, of which only the former runs the batch norms."""
    plain = run(*words)
    count = len(norms)
    fused = run(*words, "--fuse")
    assert count > 0
    # Those that stay apart: in front of a convolution that pads, and the final one.
    assert len(norms) - count < count / 4
    return plain, fused


def test_test(
    run: Vizoo, norms: list[nn.Module], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain, fused = both(run, norms, "test", trained / "config.py", trained / "best.pth", "--json")
    assert fused == pytest.approx(plain, abs=1e-4)


def test_predict(run: Vizoo, norms: list[nn.Module], trained: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    words = ("predict", tmp_path / "a.png", "-c", trained / "best.pth", "--json")
    plain, fused = both(run, norms, *words)
    for before, after in zip(plain[0]["predictions"], fused[0]["predictions"], strict=True):
        assert after == pytest.approx(before, abs=1e-5)


def test_benchmark(norms: list[nn.Module]) -> None:
    model = vizoo.create_model("rcvit_xs", **DESIGN)
    found = benchmark(model, fuse=True, **QUICK)
    assert (found.fused, found.error) == (True, "")
    assert not benchmark(vizoo.create_model("rcvit_xs", **DESIGN), **QUICK).fused
    with pytest.raises(ValueError, match="a fused model cannot be trained: measure mode='inference'"):
        benchmark(model, mode="training", fuse=True, **QUICK)
    with pytest.raises(TypeError, match=r"only a vizoo\.Backbone can be fused, got Linear"):
        benchmark(nn.Linear(3, 3), fuse=True, **QUICK)


def test_benchmark_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["benchmark", "rcvit_xs", "--fuse", "--img-size", "32", "--device", "cpu", "--batch-size", "1"]
    assert main([*words, "--steps", "1", "--warmup", "1"]) == 0
    assert "eager, fused" in capsys.readouterr().out
    assert main([*words, "--mode", "both"]) == 1
    assert "a fused model cannot be trained: --fuse is for --mode inference, not both" in capsys.readouterr().err


def test_a_backbone_of_others_is_not_fused() -> None:
    with pytest.raises(TypeError, match=r"only a vizoo\.Backbone can be fused, got Linear"):
        fuse_backbone(nn.ModuleDict({"backbone": nn.Linear(3, 3)}))
    with pytest.raises(TypeError, match="got NoneType"):
        fuse_backbone(torch.nn.Identity())
