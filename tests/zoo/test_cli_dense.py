"""Whole detectors and segmenters on the command line: predicting with them, and their published weights."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

import vizoo
from vizoo.backbones import swin
from vizoo.backbones.base import Variant
from vizoo.cli import main
from vizoo.images import load_image
from vizoo.registry import _official_files, variants
from vizoo.train import dense_weights
from vizoo.train import run as training
from vizoo.train.dense_models import build_model
from vizoo.train.dense_weights import DenseWeights, find_dense
from vizoo.train.segmentation.data import read_values
from vizoo.weights.cache import path_of
from vizoo.weights.record import Weights

# pycocotools' compiled part is older than numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

TINY = "swin_test_dense"
DETECTOR, SEGMENTER = f"mask_rcnn.{TINY}.coco", f"upernet.{TINY}.ade20k"


def record(name: str, task: str, model: dict[str, Any], **facts: Any) -> DenseWeights:
    weights = Weights(
        url=f"http://127.0.0.1:9/{name}.pth",
        license="MIT",
        repository="nobody/nothing",
        commit="0123456789",
        container="state_dict",
        input_size=(3, 64, 96),
        params=1_250_000,
        macs=2e9,
        **facts,
    )
    return DenseWeights(name=name, task=task, model=model, weights=weights)


TABLE = (
    record(
        DETECTOR,
        "detect",
        {"type": "MaskRCNN", "channels": 32, "box": {"hidden": (32,)}, "mask": {"hidden": (16,)}},
        num_classes=80,
        labels="coco",
        metrics={"box_ap": 12.5, "mask_ap": 11.0},
    ),
    record(
        SEGMENTER,
        "segment",
        {"type": "Segmenter", "decode_head": {"type": "UPerHead", "channels": 16}, "num_classes": 150},
        num_classes=150,
        labels="ade20k",
        metrics={"miou": 33.25},
    ),
)


@dataclass(frozen=True)
class Run:
    """What a call of the command line left behind."""

    code: int
    out: str
    err: str

    def fails(self, pattern: str, code: int = 1) -> None:
        """One line says what is wrong."""
        assert self.code == code, self
        *_, last = self.err.splitlines()
        assert last.startswith("error: ")
        assert re.search(pattern, last), last


Vizoo = Callable[..., Run]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Vizoo:
    def call(*words: object) -> Run:
        return Run(main([str(word) for word in words]), *capsys.readouterr())

    return call


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Path]]:
    """A tiny backbone in the registry, whole models on it in the table, and the files that their authors publish."""
    config = swin.SwinConfig(**swin.FAMILY.tiny)
    monkeypatch.setitem(swin.VARIANTS, TINY, Variant(config=config, num_classes=0, weights={}))
    monkeypatch.setattr(dense_weights, "_TABLE", TABLE)
    for cached in (variants, _official_files, vizoo.describe):
        cached.cache_clear()
    found = {}
    for entry in TABLE:
        found[entry.name] = tmp_path / f"{entry.task}.pth"
        model = build_model({**entry.model, "backbone": {"name": TINY}}, entry.task)
        torch.save({"state_dict": official(model.state_dict())}, found[entry.name])
    yield found
    monkeypatch.undo()
    for cached in (variants, _official_files, vizoo.describe):
        cached.cache_clear()


def official(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names are read as well as official ones."""
    return {
        key: value + 0.1 * torch.randn(value.shape) if value.is_floating_point() else value
        for key, value in state.items()
    }


@pytest.fixture
def installed(files: dict[str, Path], run: Vizoo) -> dict[str, Path]:
    """The same files, in the cache."""
    for name, path in files.items():
        assert run("weights", "import", name, path).code == 0
    return files


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "found"


# predict.


def test_detect_a_folder(run: Vizoo, installed: dict[str, Path], photos: Path, output: Path) -> None:
    result = run("predict", photos, "-t", "detect", "-w", DETECTOR, "-o", output, "--threshold", 0)
    assert result.code == 0, result
    for name, size in {"a.png": (60, 40), "b.png": (20, 33), "deeper/c.png": (64, 64)}.items():
        assert load_image(output / "drawn" / name).size == size
        assert str(output / "drawn" / name) in result.out
    assert result.err.endswith(f"results are in {output}\n")
    assert sorted(path.name for path in output.iterdir()) == ["detections.json", "drawn"]
    truth = COCO(output / "detections.json")
    assert [image["file_name"] for image in truth.dataset["images"]] == [
        str(photos / name) for name in ("a.png", "b.jpg", "deeper/c.png")
    ]
    assert len(truth.getCatIds()) == 80
    assert {entry["image_id"] for entry in truth.dataset["annotations"]} == {1, 2, 3}
    for annotation in truth.loadAnns(truth.getAnnIds(imgIds=2)):
        assert truth.annToMask(annotation).shape == (33, 20)
        assert truth.annToMask(annotation).sum() == annotation["area"]
    assert truth.loadRes(truth.dataset["annotations"]).getAnnIds()  # which changes what it is given


def test_detect_as_json(run: Vizoo, installed: dict[str, Path], photos: Path, output: Path) -> None:
    result = run("predict", photos / "a.png", "-t", "detect", "-w", DETECTOR, "-o", output, "--json")
    assert result.code == 0, result
    document = json.loads(result.out)
    assert document == json.loads((output / "detections.json").read_text())
    assert document.keys() == {"images", "annotations", "categories"}
    (image,) = document["images"]
    expected = {"id": 1, "file_name": str(photos / "a.png"), "width": 60, "height": 40}
    assert image == {**expected, "drawing": str(output / "drawn" / "a.png")}
    assert all(annotation["score"] > 0.3 for annotation in document["annotations"])


def test_segment_a_folder(run: Vizoo, installed: dict[str, Path], photos: Path, output: Path) -> None:
    result = run("predict", photos, "-t", "segment", "-w", SEGMENTER, "-o", output)
    assert result.code == 0, result
    names = (output / "classes.txt").read_text().splitlines()
    assert len(names) == 150
    for name, shape in {"a.png": (40, 60), "b.png": (33, 20), "deeper/c.png": (64, 64)}.items():
        labels = read_values(output / "labels" / name)
        assert labels.shape == shape
        share, first = np.bincount(labels.ravel()).max() / labels.size, names[np.bincount(labels.ravel()).argmax()]
        assert f"{share:.1%} {first}" in result.out
        assert (output / "drawn" / name).is_file()


def test_segment_as_json(run: Vizoo, installed: dict[str, Path], photos: Path, output: Path) -> None:
    words = ("predict", photos, "-t", "segment", "-w", SEGMENTER, "-o", output, "--json", "--batch-size", 3)
    found = json.loads(run(*words).out)
    assert [Path(entry["path"]).name for entry in found] == ["a.png", "b.jpg", "c.png"]
    assert all(sum(entry["classes"].values()) == pytest.approx(1) for entry in found)
    assert all(Path(entry[key]).is_file() for entry in found for key in ("drawing", "labels"))


@pytest.mark.parametrize(("task", "name"), [("detect", DETECTOR), ("segment", SEGMENTER)])
def test_fuse_reaches_the_backbone(
    run: Vizoo,
    installed: dict[str, Path],
    photos: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    name: str,
) -> None:
    fused: list[vizoo.Backbone] = []
    monkeypatch.setattr(vizoo.Backbone, "fuse", lambda model: fused.append(model))
    result = run("predict", photos / "a.png", "-t", task, "-w", name, "-o", output, "--fuse")
    assert result.code == 0, result
    assert [type(model).__name__ for model in fused] == ["Swin"]


def test_results_of_images_with_one_name_are_kept_apart(
    run: Vizoo, installed: dict[str, Path], photos: Path, output: Path
) -> None:
    for name in ("A.jpg", "deeper/a.png"):
        load_image(photos / "a.png").save(photos / name)
    images = (photos / "a.png", photos / "A.jpg", photos / "deeper/a.png", photos / "a.png")
    assert run("predict", *images, "-t", "segment", "-w", SEGMENTER, "-o", output).code == 0
    assert sorted(path.name for path in (output / "labels").iterdir()) == ["A-2.png", "a-3.png", "a.png"]


def test_results_are_not_overwritten_unasked(
    run: Vizoo, installed: dict[str, Path], photos: Path, output: Path
) -> None:
    words = ("predict", photos / "a.png", "-t", "detect", "-w", DETECTOR, "-o", output)
    assert run(*words).code == 0
    (output / "drawn" / "a.png").write_text("mine")
    run(*words).fails(r"2 of 2 results are there already, the first is .*detections\.json: .*--force")
    assert (output / "drawn" / "a.png").read_text() == "mine"
    assert run(*words, "--force").code == 0
    assert load_image(output / "drawn" / "a.png").size == (60, 40)
    assert not list(output.rglob(".*"))


def test_a_bad_image_among_others_costs_only_itself(
    run: Vizoo, installed: dict[str, Path], photos: Path, output: Path
) -> None:
    (photos / "b.jpg").write_bytes(b"nonsense")
    result = run("predict", photos, "-t", "detect", "-w", DETECTOR, "-o", output)
    result.fails("^error: 1 of 3 images could not be read$")
    assert re.search(r"^error: .*b\.jpg is not an image", result.err, re.MULTILINE)
    assert len(json.loads((output / "detections.json").read_text())["images"]) == 2
    run("predict", photos / "b.jpg", "-t", "detect", "-w", DETECTOR, "-o", output / "x").fails(r"b\.jpg is not an imag")
    assert not (output / "x").exists()


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["-t", "detect"], r"pass a checkpoint \(--checkpoint\), or the name of published weights \(--weights\)"),
        (["-t", "detect", "-w", SEGMENTER], "is a model to segment, not to detect: pass --task segment"),
        (["-t", "detect", "-w", DETECTOR + "x"], f"unknown weights .*; did you mean '{DETECTOR}'"),
        (["-t", "detect", "-c", "none.pth"], r"there is no checkpoint at none\.pth"),
        (["-t", "detect", "-w", DETECTOR, "--threshold", "1"], r"threshold must lie in \[0, 1\), got 1"),
        (["-t", "detect", "-m", TINY], "--model is for --task classify, not for --task detect"),
        (["-t", "segment", "--top", "3"], "--top is for --task classify, not for --task segment"),
        (["-t", "segment", "--threshold", "0.5"], "--threshold is for --task detect, not for --task segment"),
        (["-w", DETECTOR], "--weights is for --task detect or segment, not for --task classify"),
        (["-o", "x"], "--output is for --task detect or segment, not for --task classify"),
        (["--force"], "--force is for --task detect or segment"),
    ],
)
def test_mistakes(
    run: Vizoo, files: dict[str, Path], photos: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], pattern: str
) -> None:
    monkeypatch.chdir(photos)
    monkeypatch.setenv("VIZOO_OFFLINE", "1")
    if words[-2:] == ["--threshold", "1"]:
        words = [*words, "-c", str(files[DETECTOR])]
    run("predict", photos / "a.png", *words).fails(pattern)
    assert not (photos / "predictions").exists()


def test_wrong_usage(run: Vizoo, photos: Path) -> None:
    run("predict", photos, "-t", "detct").fails("'detct' is not one of 'classify', 'detect', 'segment'", code=2)
    run("predict", photos, "-t", "detect", "--threshold", "2").fails("--threshold", code=2)


# list, describe, weights and test.


def test_list_and_describe(run: Vizoo, files: dict[str, Path]) -> None:
    result = run("list", "--task", "detect")
    assert re.search(rf"^ {DETECTOR} +1\.2 +2 +64x96 +box_ap 12\.5, mask_ap 11 +MIT", result.out, re.MULTILINE)
    assert SEGMENTER not in result.out
    assert result.err == "1 models to detect\n"
    (row,) = json.loads(run("list", "-t", "segment", "--family", "swin", "--json").out)
    assert (row["name"], row["metrics"], row["family"]) == (SEGMENTER, {"miou": 33.25}, "swin")
    run("list", "mask_rnn", "-t", "detect").fails(f"no model to detect matches 'mask_rnn'; .*'?{DETECTOR}")
    described = run("describe", SEGMENTER).out
    for text in ("segment", TINY, "1.25 M", "2 GMACs at 64x96", "miou 33.25", "150 (ade20k)", "nobody/nothing 0123456"):
        assert text in described
    assert json.loads(run("describe", DETECTOR, "--json").out)["model"]["type"] == "MaskRCNN"
    run("describe", DETECTOR + "_3x").fails(f"unknown weights .*; did you mean '{DETECTOR}'")


def test_weights_know_the_names(run: Vizoo, installed: dict[str, Path]) -> None:
    found = {entry["name"]: entry for entry in json.loads(run("weights", "list", "--cached", "--json").out)}
    assert found.keys() == installed.keys()
    assert run("weights", "path", DETECTOR).out.strip() == found[DETECTOR]["path"]
    assert Path(found[DETECTOR]["path"]).read_bytes() == installed[DETECTOR].read_bytes()
    assert run("weights", "download", DETECTOR).out.strip() == found[DETECTOR]["path"]
    verified = run("weights", "verify")
    assert verified.code == 0
    assert re.search(rf"{re.escape(SEGMENTER)} +unverified", verified.out)


def test_what_does_not_load_into_the_model_is_not_imported(run: Vizoo, files: dict[str, Path]) -> None:
    run("weights", "import", DETECTOR, files[SEGMENTER]).fails(
        f"the file does not hold {DETECTOR}: .* does not fit .*missing: neck"
    )
    assert not path_of(find_dense(DETECTOR).weights).exists()
    assert not list(path_of(find_dense(DETECTOR).weights).parent.glob("*.import"))


def test_test_takes_names_and_files(
    run: Vizoo, installed: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[str | None] = []
    address = "https://example.org/model.pth"

    def evaluate(config: str, checkpoint: str | None, *_: Any, **__: Any) -> dict[str, float]:
        seen.append(checkpoint)
        return {"box_AP": 1.0}

    monkeypatch.setattr(training, "evaluate", evaluate)
    for words in ([], [DETECTOR], [installed[DETECTOR]], ["none.pth"], [address]):
        assert run("test", "some_config", *words, "--json").code == 0
    cached = path_of(find_dense(DETECTOR).weights)
    assert seen == [None, str(cached), str(installed[DETECTOR]), "none.pth", address]
    run("test", "some_config", DETECTOR + "_3x").fails(f"unknown weights .*; did you mean '{DETECTOR}'")


CONFIG = f"""
from mmengine.config import read_base

with read_base():
    from vizoo.configs.coco.mask_rcnn_1x import *

model.update({", ".join(f"{key}={value!r}" for key, value in TABLE[0].model.items() if key != "type")})
model["backbone"].update(name="{TINY}")
val_dataloader.update(num_workers=0, pin_memory=False)
"""


def test_predictions_are_the_ones_that_are_evaluated(
    run: Vizoo, installed: dict[str, Path], photos: Path, output: Path, tmp_path: Path
) -> None:
    assert run("predict", photos, "-t", "detect", "-w", DETECTOR, "-o", output, "--threshold", 0.05).code == 0
    predicted = json.loads((output / "detections.json").read_text())
    assert len(predicted["annotations"]) > 10
    for image in predicted["images"]:
        image["file_name"] = str(Path(image["file_name"]).relative_to(photos))
    (tmp_path / "truth.json").write_text(json.dumps(predicted))
    (tmp_path / "tiny.py").write_text(CONFIG)
    settings = [
        f"val_dataloader.dataset.images={photos}",
        f"val_dataloader.dataset.annotations={tmp_path / 'truth.json'}",
        f"val_evaluator.0.annotations={tmp_path / 'truth.json'}",
        f"val_evaluator.0.output={tmp_path / 'evaluated.json'}",
    ]
    words = [word for setting in settings for word in ("-s", setting)]
    tested = run("test", tmp_path / "tiny.py", DETECTOR, *words, "--work-dir", tmp_path / "tested", "--json")
    assert tested.code == 0, tested
    assert json.loads(tested.out)["box_AP"] > 80  # boxes without extent match nothing
    kept = ("image_id", "category_id", "bbox", "score", "segmentation")
    evaluated = json.loads((tmp_path / "evaluated.json").read_text())
    assert evaluated == [{key: entry[key] for key in kept} for entry in predicted["annotations"]]


def test_help_imports_no_training_code() -> None:
    code = "import sys, vizoo.cli; print([m for m in sys.modules if m.startswith(('vizoo.train', 'mmengine', 'cv2'))])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
