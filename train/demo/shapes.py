"""The demo's detector and segmenter: generated shapes, and everything their chapters tell."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from mmengine.config import Config
from mmengine.registry import MODELS
from torchvision.ops import box_iou

from vizoo.train.checkpoint import read_checkpoint
from vizoo.train.detection.annotations import read_coco
from vizoo.train.log import CONFUSION, PER_CLASS, read_log
from vizoo.train.run import evaluate
from vizoo.train.settings import load_config
from vizoo.train.shape_sets import ShapesDetection, ShapesSegmentation
from vizoo.train.trainer import CONFIG as SAVED_CONFIG

from .findings import (
    DetectionFindings,
    LabelledScene,
    Objects,
    Scene,
    SegmentationFindings,
    Tally,
)
from .phases import Clock
from .words import design_in_words, recipe_in_words, shapes_in_words

DETECT, SEGMENT = "demo/shapes_detect", "demo/shapes_segment"
DETECTIONS = "detections.json"
SHOWN = 10
SURE = 0.5
MATCH = 0.5
"""Least score of a detection that is shown and counted, and least IoU with the object that it finds."""


def detection_findings(folder: Path, checkpoint: Path, goal: float, clock: Clock, quiet: bool) -> DetectionFindings:
    """Everything the detector's chapter tells, from the folder of a finished run.

    Figures, counts and pictures are of the same detections: those that the evaluation judged and wrote.

    Args:
        folder: The run.
        checkpoint: Its last checkpoint.
        goal: Box AP50 in percent to reach on the held-out scenes.
        clock: Told how long things take.
        quiet: Show nothing.
    """
    config = load_config(folder / SAVED_CONFIG)
    written = folder / "test" / DETECTIONS
    with clock.phase("detect, evaluation"):
        settings = [f"val_evaluator.0.output={written}"]
        figures = evaluate(folder / SAVED_CONFIG, checkpoint, settings, work_dir=folder / "test", quiet=quiet)
    held_out = ShapesDetection(**_arguments(config))
    truth, detections = read_coco(config.val_evaluator[0].annotations), json.loads(written.read_text())
    sure = [record for record in detections if record["score"] >= SURE]
    backbone = dict(config.model.backbone)
    return DetectionFindings(
        config=DETECT,
        model=backbone.pop("name"),
        design=design_in_words(backbone),
        parameters=_parameters(checkpoint),
        classes=held_out.classes,
        seed=config.randomness.seed,
        goal=goal,
        figures=figures,
        history=read_log(folder),
        recipe=recipe_in_words(DETECT, config, shapes_in_words(config)),
        per_class=json.loads((folder / "test" / PER_CLASS).read_text())["rows"],
        images=len(held_out),
        score=SURE,
        tally=tally(truth, sure),
        scenes=[_scene(held_out, index, sure) for index in _drawn(len(held_out), config.randomness.seed)],
    )


def segmentation_findings(
    folder: Path, checkpoint: Path, goal: float, clock: Clock, quiet: bool
) -> SegmentationFindings:
    """Everything the segmenter's chapter tells, from the folder of a finished run.

    Args:
        folder: The run.
        checkpoint: Its last checkpoint.
        goal: mIoU in percent to reach on the held-out scenes.
        clock: Told how long things take.
        quiet: Show nothing.
    """
    config = load_config(folder / SAVED_CONFIG)
    with clock.phase("segment, evaluation"):
        figures = evaluate(folder / SAVED_CONFIG, checkpoint, work_dir=folder / "test", quiet=quiet)
        confusion = json.loads((folder / "test" / CONFUSION).read_text())["matrix"]
    held_out = ShapesSegmentation(**_arguments(config))
    with clock.phase("segment, prediction"):
        scenes = _labelled(config, checkpoint, held_out)
    backbone = dict(config.model.backbone)
    return SegmentationFindings(
        config=SEGMENT,
        model=backbone.pop("name"),
        design=design_in_words(backbone),
        parameters=_parameters(checkpoint),
        classes=held_out.classes,
        seed=config.randomness.seed,
        goal=goal,
        figures=figures,
        history=read_log(folder),
        recipe=recipe_in_words(SEGMENT, config, shapes_in_words(config)),
        confusion=confusion,
        images=len(held_out),
        scenes=scenes,
    )


def tally(truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]]) -> Tally:
    """Count what was found: the surest detection takes the object of its class that it covers best.

    A detection that lies in a crowd for the most part is neither right nor wrong.

    Args:
        truth: A COCO document.
        detections: Records in COCO's results format, those that are to count.
    """
    objects, records = _by_image(truth["annotations"]), _by_image(detections)
    found = invented = 0
    for image, some in records.items():
        ours = [o for o in objects.get(image, []) if not o["iscrowd"]]
        crowds = _corners(o for o in objects.get(image, []) if o["iscrowd"])
        overlap = box_iou(_corners(some), _corners(ours)) if ours else torch.zeros(len(some), 0)
        free = torch.ones(len(ours), dtype=torch.bool)
        for place in np.argsort([-record["score"] for record in some], kind="stable"):
            same = torch.tensor([o["category_id"] == some[place]["category_id"] for o in ours], dtype=torch.bool)
            shares = overlap[place] * (free & same)
            if len(ours) and shares.max() >= MATCH:
                free[shares.argmax()] = False
                found += 1
            else:
                invented += not _lies_in(_corners([some[place]])[0], crowds)
    return Tally(len(_counted(truth)), found, invented)


def _lies_in(box: torch.Tensor, crowds: torch.Tensor) -> bool:
    """Whether half of a box (4,) or more lies in one of the crowds (n, 4)."""
    low, high = torch.maximum(box[:2], crowds[:, :2]), torch.minimum(box[2:], crowds[:, 2:])
    shared = (high - low).clamp(min=0).prod(1)
    return bool((shared >= 0.5 * (box[2:] - box[:2]).prod()).any())


def _counted(truth: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [record for record in truth["annotations"] if not record["iscrowd"]]


def _by_image(records: Iterable[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    found: dict[int, list[Mapping[str, Any]]] = {}
    for record in records:
        found.setdefault(record["image_id"], []).append(record)
    return found


def _corners(records: Iterable[Mapping[str, Any]]) -> torch.Tensor:
    """Boxes of records, x, y, width, height there, as corners (n, 4)."""
    boxes = torch.tensor([record["bbox"] for record in records], dtype=torch.float64).view(-1, 4)
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def _arguments(config: Config) -> dict[str, Any]:
    """Those of the validation set of the run."""
    arguments = dict(config.val_dataloader.dataset)
    arguments.pop("type")
    return arguments


def _parameters(checkpoint: Path) -> int:
    """Numbers that a model has learnt; batch norm's averages are none."""
    state = read_checkpoint(checkpoint)["state_dict"]
    averaged = ("running_mean", "running_var", "num_batches_tracked")
    return sum(tensor.numel() for name, tensor in state.items() if not name.endswith(averaged))


def _drawn(count: int, seed: int) -> list[int]:
    """Places of the images to show, drawn at random."""
    return sorted(np.random.default_rng(seed).permutation(count)[:SHOWN].tolist())


def _scene(held_out: ShapesDetection, index: int, detections: Sequence[Mapping[str, Any]]) -> Scene:
    sample, image_id = held_out.sample(index), int(held_out.annotations.image_ids[index])
    assert sample.masks is not None, "the config reads masks"
    own = [record for record in detections if record["image_id"] == image_id]
    masks = [rle.decode(record["segmentation"]) > 0 for record in own]
    labels = {category: label for label, category in enumerate(held_out.category_ids.tolist())}
    found = Objects(
        boxes=_corners(own).numpy(),
        labels=np.array([labels[record["category_id"]] for record in own], np.int64),
        masks=np.array(masks).reshape(-1, *sample.size),
        scores=np.array([record["score"] for record in own]),
    )
    truth = Objects(boxes=sample.boxes, labels=sample.labels, masks=sample.masks > 0)
    return Scene(image=sample.image, truth=truth, found=found)


def _labelled(config: Config, checkpoint: Path, held_out: ShapesSegmentation) -> list[LabelledScene]:
    """What the segmenter says to some held-out images, each alone."""
    model = MODELS.build(config.model)
    model.load_checkpoint(checkpoint)
    model.eval()
    scenes = []
    for index in _drawn(len(held_out), config.randomness.seed):
        item, sample = held_out[index], held_out.sample(index)
        (prediction,) = model([item["image"]], [item["target"]], mode="predict")
        scenes.append(
            LabelledScene(image=sample.image, truth=sample.labels, found=prediction["label_map"].cpu().numpy())
        )
    return scenes
