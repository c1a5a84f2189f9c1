"""Average precision of boxes and masks, as COCO defines it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle
from mmengine.dist import all_gather_object, broadcast_object_list, is_main_process
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS

from vizoo.train.checkpoint import write_atomically

from .annotations import read_coco

KINDS = {"box": "bbox", "mask": "segm"}
STATISTICS = (
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR1",
    "AR10",
    "AR100",
    "AR_small",
    "AR_medium",
    "AR_large",
)
"""COCO's twelve, in its order; AR1 is the recall with one detection an image."""

UNDEFINED = -1.0
"""A statistic over objects that the ground truth has none of, as in COCO's own tools."""

_log = logging.getLogger(__name__)


@dataclass
class _Found:
    """What a model found in one image."""

    image_id: int
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    codes: list[dict[str, Any]] | None


@METRICS.register_module()
class CocoAP(BaseMetric):
    """COCO's average precision and recall, in percent, against the ground truth of an annotation file.

    Crowds and the areas of objects are taken from that file. In a distributed run the detections of all processes are
    joined and the images that samplers repeat count once, so the figures are those of one process. A statistic without
    any object in the ground truth is -1, as in COCO's own tools.

    Args:
        annotations: The COCO file that the evaluated data set was built from.
        masks: Evaluate masks too.
        output: Write the detections to this file, in COCO's results format; None for not.

    Attributes:
        per_class: After an evaluation, a row per class: `name`, `objects` (without crowds), `box_AP`, `box_AP50` and,
            with masks, `mask_AP`, `mask_AP50`.
    """

    default_prefix = "val"

    def __init__(
        self,
        annotations: str | os.PathLike[str],
        *,
        masks: bool = False,
        output: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(prefix=None)
        self.prefix = None
        self.results: list[_Found] = []
        self.annotations, self.masks = Path(annotations), masks
        self.output = None if output is None else Path(output)
        self.per_class: list[dict[str, Any]] = []
        self._truth: dict[str, Any] | None = None

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Keep what was found in each image, masks as run-length codes.

        Args:
            data_batch: Not used.
            data_samples: Dicts with `image_id`, `boxes` (n, 4) as x1, y1, x2, y2 in pixels of the original image,
                `scores` (n,), `labels` (n,) from 0 and, with masks, `masks` (n, H, W) of the original size.

        Raises:
            ValueError: Masks are to be evaluated, and the model gives none.
        """
        for sample in data_samples:
            if self.masks and "masks" not in sample:
                raise ValueError("masks are to be evaluated, but the model gives none: set masks=False")
            self.results.append(
                _Found(
                    int(sample["image_id"]),
                    _array(sample["boxes"]).reshape(-1, 4).astype(np.float64),
                    _array(sample["scores"]).astype(np.float64),
                    _array(sample["labels"]).astype(np.int64),
                    encode_masks(_array(sample["masks"])) if self.masks else None,
                )
            )

    def evaluate(self, size: int) -> dict[str, float]:
        """The figures over the whole data set.

        Args:
            size: Images in the data set.

        Returns:
            The twelve of `STATISTICS` as `box_AP` and so on and, with masks, as `mask_AP` and so on, in percent.

        Raises:
            ValueError: Fewer images were seen than the data set holds, or predictions do not fit the annotation file.
        """
        parts = all_gather_object(self.results)
        self.results = []
        unique = {found.image_id: found for part in parts for found in part}
        if len(unique) < size or size == 0:
            raise ValueError(f"the evaluation saw {len(unique)} of {size} images: check the sampler of the data loader")
        outcome: list[Any] = [None, None]
        if is_main_process():
            outcome = [self.compute_metrics(list(unique.values())), self.per_class]
        broadcast_object_list(outcome)
        self.per_class = outcome[1]
        return outcome[0]

    def compute_metrics(self, results: list[_Found]) -> dict[str, float]:
        """All figures from what was found in each image."""
        truth = self._ground_truth()
        ids = [category["id"] for category in truth["categories"]]
        self._check(results, {image["id"] for image in truth["images"]}, len(ids))
        if self.output is not None:
            write_atomically(self.output, json.dumps(_records(results, ids, "all")).encode())
        images = [found.image_id for found in results]
        self.per_class = [
            {"name": category["name"], "objects": _count(truth, category["id"], set(images))}
            for category in truth["categories"]
        ]
        figures: dict[str, float] = {}
        for kind in KINDS if self.masks else ("box",):
            statistics, classes = run_coco(truth, _records(results, ids, kind), KINDS[kind], images)
            figures |= {f"{kind}_{name}": _percent(value) for name, value in zip(STATISTICS, statistics, strict=True)}
            for row, (ap, ap50) in zip(self.per_class, classes, strict=True):
                row |= {f"{kind}_AP": _percent(ap), f"{kind}_AP50": _percent(ap50)}
        return figures

    def _ground_truth(self) -> dict[str, Any]:
        """The annotation file with what COCO's tools need, read once."""
        if self._truth is None:
            document = read_coco(self.annotations)
            # Their matches are marked by annotation ids, of which 0 means none.
            objects = [self._complete(record, number) for number, record in enumerate(document["annotations"], 1)]
            categories = sorted(document["categories"], key=lambda category: int(category["id"]))
            self._truth = {"images": document["images"], "annotations": objects, "categories": categories}
        return self._truth

    def _complete(self, record: dict[str, Any], number: int) -> dict[str, Any]:
        complete = {"iscrowd": 0, **record, "id": number}
        if self.masks and not record.get("segmentation"):
            raise ValueError(
                f"{self.annotations}: annotation {record.get('id')} of image {record.get('image_id')} has no "
                "segmentation, so masks cannot be evaluated: set masks=False"
            )
        complete.setdefault("area", record["bbox"][2] * record["bbox"][3])
        return complete

    def _check(self, results: list[_Found], images: set[int], classes: int) -> None:
        for found in results:
            if found.image_id not in images:
                raise ValueError(f"there is no image {found.image_id} in {self.annotations}")
            if len(found.labels) and not 0 <= found.labels.min() <= found.labels.max() < classes:
                wrong = next(label for label in found.labels.tolist() if not 0 <= label < classes)
                raise ValueError(
                    f"the model gave label {wrong} in image {found.image_id}, but {self.annotations} has the labels "
                    f"0 to {classes - 1}"
                )


def run_coco(
    truth: dict[str, Any], detections: list[dict[str, Any]], kind: str, images: Sequence[int]
) -> tuple[list[float], list[tuple[float, float]]]:
    """COCO's evaluation.

    Args:
        truth: A COCO document.
        detections: Records in COCO's results format.
        kind: `bbox` or `segm`.
        images: Ids of the images to look at.

    Returns:
        The twelve statistics, as shares of 1, and (AP, AP50) of each category.
    """
    ground = COCO(truth)
    evaluation = COCOeval_faster(ground, ground.loadRes(detections), kind, print_function=_log.debug)
    evaluation.params.imgIds = list(images)
    evaluation.run()
    # (thresholds, recalls, classes, areas, limits): all areas, up to 100 detections.
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
    classes = [(_mean(precision[:, :, k]), _mean(precision[0, :, k])) for k in range(precision.shape[2])]
    return [float(value) for value in evaluation.stats[: len(STATISTICS)]], classes


def encode_masks(masks: np.ndarray) -> list[dict[str, Any]]:
    """Compressed run-length codes, whose `counts` are text, of masks (n, H, W)."""
    pixels = np.asfortranarray((masks != 0).transpose(1, 2, 0).astype(np.uint8))
    codes = rle.encode(pixels) if len(masks) else []
    return [{"size": list(code["size"]), "counts": code["counts"].decode()} for code in codes]


def _records(results: list[_Found], category_ids: Sequence[int], kind: str) -> list[dict[str, Any]]:
    """COCO's results format. For masks without the boxes, so that areas are those of the masks."""
    records = []
    for found in results:
        corners = found.boxes
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).tolist()
        for place, (label, score) in enumerate(zip(found.labels.tolist(), found.scores.tolist(), strict=True)):
            record = {"image_id": found.image_id, "category_id": category_ids[label], "score": score}
            if kind != "mask":
                record["bbox"] = boxes[place]
            if kind != "box" and found.codes is not None:
                record["segmentation"] = dict(found.codes[place])
            records.append(record)
    return records


def _count(truth: dict[str, Any], category: int, images: set[int]) -> int:
    return sum(
        record["category_id"] == category and not record["iscrowd"] and record["image_id"] in images
        for record in truth["annotations"]
    )


def _array(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return (values.float() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def _mean(values: np.ndarray) -> float:
    found = values[values > UNDEFINED]
    return float(found.mean()) if found.size else UNDEFINED


def _percent(share: float) -> float:
    return share if share == UNDEFINED else 100.0 * share
