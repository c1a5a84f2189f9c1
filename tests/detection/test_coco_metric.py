"""COCO's figures against pycocotools', with crowds, ties, small objects and images without any."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vizoo.train.detection import metrics
from vizoo.train.detection.data import CocoDetection
from vizoo.train.detection.metrics import STATISTICS, CocoAP
from vizoo.train.detection.transforms import DetectionTransform
from vizoo.train.shapes import CLASSES, write_coco

# pycocotools' compiled part is older than numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

Prediction = dict[str, Any]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> CocoDetection:
    """40 images with objects below and above 32 x 32 pixels, and crowds."""
    folder = tmp_path_factory.mktemp("shapes")
    path = write_coco(folder, 40, size=112, seed=0)
    data = CocoDetection(folder / "train", path, transform=DetectionTransform(), masks=True, training=False)
    assert data.annotations.dropped["crowd"] >= 1
    return data


def guesses(data: CocoDetection, seed: int = 0) -> list[Prediction]:
    """Objects shifted, mislabelled, doubled and missed; scores with ties."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(len(data)):
        sample = data.sample(index)
        height, width = sample.size
        assert sample.masks is not None
        places = np.repeat(np.arange(len(sample.labels)), rng.integers(0, 4, len(sample.labels)))
        shifts = rng.integers(-6, 7, (len(places), 2))
        masks = [np.roll(sample.masks[place], shift, (0, 1)) for place, shift in zip(places, shifts, strict=True)]
        boxes = sample.boxes[places] + np.tile(shifts[:, ::-1], 2) + rng.normal(0, 1, (len(places), 4))
        labels = np.where(rng.random(len(places)) < 0.8, sample.labels[places], rng.integers(0, 6, len(places)))
        found.append(
            {
                "boxes": torch.from_numpy(boxes.astype(np.float32)),
                "scores": torch.from_numpy(np.round(rng.random(len(places)), 1).astype(np.float32)),
                "labels": torch.from_numpy(labels),
                "masks": torch.from_numpy(np.array(masks, bool).reshape(-1, height, width)),
                "image_id": int(data.annotations.image_ids[index]),
                "original_size": (height, width),
            }
        )
    return found


def evaluate(metric: CocoAP, found: list[Prediction], size: int | None = None) -> dict[str, float]:
    for start in range(0, len(found), 3):
        metric.process(None, found[start : start + 3])
    return metric.evaluate(len(found) if size is None else size)


def official(path: Path, results: list[dict[str, Any]], kind: str) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def share(value: float) -> float:
    return value if value == -1 else value / 100


@pytest.mark.parametrize("seed", range(3))
def test_equals_pycocotools(shapes: CocoDetection, tmp_path: Path, seed: int) -> None:
    metric = CocoAP(shapes.annotations.path, masks=True, output=tmp_path / "results.json")
    found = evaluate(metric, guesses(shapes, seed))
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results[0]) == {"image_id", "category_id", "score", "bbox", "segmentation"}
    outlines = [{key: value for key, value in record.items() if key != "bbox"} for record in results]
    assert set(found) == {f"{kind}_{name}" for kind in ("box", "mask") for name in STATISTICS}
    for kind, records, name in (("bbox", results, "box"), ("segm", outlines, "mask")):
        theirs = official(shapes.annotations.path, records, kind)
        mine = [share(found[f"{name}_{statistic}"]) for statistic in STATISTICS]
        assert mine == pytest.approx(theirs.stats.tolist(), abs=1e-6)
        assert 0.05 < mine[0] < 0.95
        for place, row in enumerate(metric.per_class):
            precision = theirs.eval["precision"][:, :, place, 0, -1]
            assert share(row[f"{name}_AP"]) == pytest.approx(precision.mean(), abs=1e-6)
            assert share(row[f"{name}_AP50"]) == pytest.approx(precision[0].mean(), abs=1e-6)


def test_boxes_alone(shapes: CocoDetection, tmp_path: Path) -> None:
    metric = CocoAP(shapes.annotations.path, output=tmp_path / "deep" / "results.json")
    predictions = [{key: value for key, value in found.items() if key != "masks"} for found in guesses(shapes)]
    found = evaluate(metric, predictions)
    assert set(found) == {f"box_{name}" for name in STATISTICS}
    results = json.loads((tmp_path / "deep" / "results.json").read_text())
    assert "segmentation" not in results[0]
    theirs = official(shapes.annotations.path, results, "bbox").stats.tolist()
    assert [share(value) for value in found.values()] == pytest.approx(theirs, abs=1e-6)
    assert metric.per_class[0].keys() == {"name", "objects", "box_AP", "box_AP50"}


def perfect(data: CocoDetection) -> list[Prediction]:
    found = []
    for index in range(len(data)):
        target = data[index]["target"]
        assert target["boxes"].shape[1] == 4
        scores = torch.ones(len(target["labels"]))
        keys = ("boxes", "labels", "masks", "image_id", "original_size")
        found.append({**{key: target[key] for key in keys}, "scores": scores})  # type: ignore[literal-required]
    return found


def test_the_truth_scores_all(shapes: CocoDetection) -> None:
    metric = CocoAP(shapes.annotations.path, masks=True)
    figures = evaluate(metric, perfect(shapes))
    for kind in ("box", "mask"):
        assert figures[f"{kind}_AP"] == pytest.approx(100)
        assert figures[f"{kind}_AP75"] == pytest.approx(100)
        assert figures[f"{kind}_AR100"] == pytest.approx(100)
        assert figures[f"{kind}_AP_large"] == -1, "there is no object of 96 x 96 pixels"
    assert [row["name"] for row in metric.per_class] == list(CLASSES)
    assert sum(row["objects"] for row in metric.per_class) == len(shapes.annotations.ids)


def nothing(data: CocoDetection) -> list[Prediction]:
    empty = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long)}
    masks = torch.zeros(0, 112, 112, dtype=torch.bool)
    return [{**empty, "masks": masks, "image_id": int(number)} for number in data.annotations.image_ids]


def test_no_detections_give_zeros(shapes: CocoDetection, tmp_path: Path) -> None:
    metric = CocoAP(shapes.annotations.path, masks=True, output=tmp_path / "results.json")
    figures = evaluate(metric, nothing(shapes))
    assert set(figures.values()) <= {0.0, -1.0}
    assert figures["box_AP"] == figures["mask_AP50"] == figures["box_AR1"] == 0
    assert json.loads((tmp_path / "results.json").read_text()) == []


def test_half_precision_and_arrays(shapes: CocoDetection) -> None:
    metric = CocoAP(shapes.annotations.path)
    found = perfect(shapes)
    for place, prediction in enumerate(found):
        prediction["scores"] = prediction["scores"].bfloat16()
        if place % 2:
            prediction.update(boxes=prediction["boxes"].numpy(), labels=prediction["labels"].numpy())
    assert evaluate(metric, found)["box_AP"] == pytest.approx(100)


def test_repeats_of_padded_samplers_count_once(shapes: CocoDetection, monkeypatch: pytest.MonkeyPatch) -> None:
    found = guesses(shapes)
    expected = evaluate(CocoAP(shapes.annotations.path, masks=True), found)
    parts = []
    for indices in (range(0, 40, 2), [*range(1, 40, 2), 0]):
        process = CocoAP(shapes.annotations.path, masks=True)
        process.process(None, [found[index] for index in indices])
        parts.append(process.results)
    monkeypatch.setattr(metrics, "all_gather_object", lambda mine: parts)
    assert CocoAP(shapes.annotations.path, masks=True).evaluate(40) == pytest.approx(expected)


def test_a_second_evaluation_starts_at_nothing(shapes: CocoDetection) -> None:
    metric = CocoAP(shapes.annotations.path)
    assert evaluate(metric, perfect(shapes))["box_AP"] == pytest.approx(100)
    assert evaluate(metric, nothing(shapes))["box_AP"] == 0
    assert evaluate(metric, perfect(shapes))["box_AP"] == pytest.approx(100)


def test_a_part_of_the_images(shapes: CocoDetection) -> None:
    metric = CocoAP(shapes.annotations.path)
    assert evaluate(metric, perfect(shapes)[:5])["box_AR100"] == pytest.approx(100)
    assert sum(row["objects"] for row in metric.per_class) == shapes.annotations.first[5]


def test_mmengines_evaluator_takes_it(shapes: CocoDetection) -> None:
    evaluator = Evaluator([{"type": "CocoAP", "annotations": str(shapes.annotations.path)}])
    evaluator.dataset_meta = shapes.metainfo
    evaluator.process(data_samples=perfect(shapes), data_batch=None)
    assert evaluator.evaluate(40)["box_AP"] == pytest.approx(100)


def small(folder: Path, **changes: Any) -> Path:
    annotation = {"id": 0, "image_id": 1, "category_id": 5, "bbox": [1, 1, 9, 9], **changes}
    document = {
        "images": [{"id": 1, "file_name": "x.jpg", "height": 20, "width": 20}],
        "annotations": [annotation],
        "categories": [{"id": 5, "name": "cup"}],
    }
    path = folder / "truth.json"
    path.write_text(json.dumps(document))
    return path


def guess(image_id: int = 1, label: int = 0) -> list[Prediction]:
    boxes = torch.tensor([[1.0, 1, 10, 10]])
    return [{"boxes": boxes, "scores": torch.ones(1), "labels": torch.tensor([label]), "image_id": image_id}]


def test_files_without_areas_crowds_and_with_an_id_0(tmp_path: Path) -> None:
    assert evaluate(CocoAP(small(tmp_path)), guess())["box_AP"] == pytest.approx(100)


def test_refusals(tmp_path: Path, shapes: CocoDetection) -> None:
    path = small(tmp_path)
    with pytest.raises(ValueError, match=r"there is no image 2 in .*truth.json"):
        evaluate(CocoAP(path), guess(image_id=2))
    with pytest.raises(ValueError, match=r"label 1 in image 1, but .*truth.json has the labels 0 to 0"):
        evaluate(CocoAP(path), guess(label=1))
    with pytest.raises(ValueError, match="the evaluation saw 1 of 2 images"):
        evaluate(CocoAP(path), guess(), size=2)
    with pytest.raises(ValueError, match="masks are to be evaluated, but the model gives none"):
        evaluate(CocoAP(path, masks=True), guess())
    masks = torch.ones(1, 20, 20, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"truth.json: annotation 0 of image 1 has no segmentation"):
        evaluate(CocoAP(path, masks=True), [{**guess()[0], "masks": masks}])
    with pytest.raises(FileNotFoundError, match=r"there is no annotation file .*none.json"):
        evaluate(CocoAP(tmp_path / "none.json"), guess())
