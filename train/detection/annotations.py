"""COCO annotation files: read, checked, and kept as arrays, which data loader workers share instead of copying."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from vizoo.backbones.base import nearest

from .outlines import Segments, read_polygons, read_runs

SECTIONS = ("images", "annotations", "categories")
MIN_SIDE = 32
"""Images with a shorter side are left out of training, as the published recipes do."""

DROPS = {
    "crowd": "crowds",
    "outside": "outside the image",
    "small": "boxes narrower or lower than 1 pixel",
    "area": "areas of 0",
    "mask": "without a mask",
}


def read_coco(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of a COCO instances file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no JSON, or no COCO file of instances.
    """
    path = Path(path)
    if not path.is_file():
        beside = [entry.name for entry in path.parent.glob("*.json")] if path.parent.is_dir() else []
        hint = f"; {nearest(path.name, beside)}" if beside else ""
        raise FileNotFoundError(f"there is no annotation file {path}{hint}")
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not whole JSON: {error}") from error
    missing = [key for key in SECTIONS if not isinstance(document, dict) or not isinstance(document.get(key), list)]
    if missing:
        raise ValueError(f"{path} is no COCO file of instances: it lacks the list {missing[0]!r}")
    return document


@dataclass(frozen=True)
class Annotations:
    """What a data set needs of a COCO file; the objects of image i are `first[i]` to `first[i + 1]`.

    Attributes:
        path: The file.
        classes: Names, by ascending category id; a label is a place in it.
        category_ids: Category id of each label (C,).
        image_ids: Id of each image (N,).
        files: Path of each image as the file states it, as encoded bytes (N,).
        sizes: Height and width of each image (N, 2).
        first: (N + 1,).
        boxes: x1, y1, x2, y2 of each object in pixels, clipped to its image (M, 4), float32.
        labels: (M,).
        ids: Annotation id of each object (M,).
        segments: Outlines of the objects; None where masks are not wanted.
        dropped: How many objects were dropped, by reason (keys of `DROPS`).
        left_out: How many images were left out, by reason.
    """

    path: Path
    classes: tuple[str, ...]
    category_ids: np.ndarray
    image_ids: np.ndarray
    files: np.ndarray
    sizes: np.ndarray
    first: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    segments: Segments | None
    dropped: Mapping[str, int]
    left_out: Mapping[str, int]

    def report(self) -> str:
        """One line: what is there, and what was dropped."""
        found = f"{self.path.name}: {len(self.image_ids)} images, {len(self.ids)} objects, {len(self.classes)} classes"
        dropped = [f"{count} {DROPS[reason]}" for reason, count in self.dropped.items()]
        left = [f"{count} {reason}" for reason, count in self.left_out.items()]
        return found + _listed("objects dropped", dropped) + _listed("images left out", left)


def load_annotations(
    path: str | os.PathLike[str], *, masks: bool, training: bool, keep_empty: bool, min_side: int
) -> Annotations:
    """Read and check a COCO file.

    Args:
        path: The file.
        masks: Keep the outlines of the objects too; an object without one is dropped.
        training: Leave out images that training cannot use.
        keep_empty: Train on images without an object too.
        min_side: Leave out images with a shorter side, in pixels, from training.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or contradicts itself; names the file, the image and the annotation.
    """
    document, path = read_coco(path), Path(path)
    category_ids, classes = _categories(document["categories"], path)
    images = _images(document["images"], path)
    reader = _ObjectReader(path, images, {int(number): label for label, number in enumerate(category_ids)}, masks)
    objects = sorted(filter(None, map(reader.read, document["annotations"])), key=lambda found: found.row)
    counts = np.bincount([found.row for found in objects], minlength=len(images))
    kept, left_out = _usable(images, counts, training, keep_empty, min_side)
    chosen = [found for found in objects if kept[found.row]]
    rows = list(compress(images, kept))
    return Annotations(
        path=path,
        classes=classes,
        category_ids=category_ids,
        image_ids=np.array([row.id for row in rows], np.int64),
        files=np.array([os.fsencode(row.file) for row in rows], np.bytes_),
        sizes=np.array([(row.height, row.width) for row in rows], np.int64).reshape(-1, 2),
        first=np.concatenate([[0], np.cumsum(counts[kept])]).astype(np.int64),
        boxes=np.array([found.box for found in chosen], np.float32).reshape(-1, 4),
        labels=np.array([found.label for found in chosen], np.int64),
        ids=np.array([found.id for found in chosen], np.int64),
        segments=Segments([found.outline for found in chosen]) if masks else None,
        dropped=dict(reader.dropped),
        left_out=left_out,
    )


@dataclass(frozen=True, slots=True)
class _Image:
    id: int
    file: str
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class _Object:
    row: int
    label: int
    id: int
    box: tuple[float, float, float, float]
    outline: Any


def _categories(records: list[dict[str, Any]], path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    try:
        names = {int(record["id"]): str(record["name"]) for record in records}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: every category needs a whole number `id` and a `name`, one has not: {error}"
        ) from error
    if len(names) != len(records) or not names:
        raise ValueError(f"{path}: {len(records)} categories with {len(names)} different ids; each needs its own")
    ids = sorted(names)
    return np.array(ids, np.int64), tuple(names[number] for number in ids)


def _images(records: list[dict[str, Any]], path: Path) -> list[_Image]:
    images = [_image(record, path) for record in records]
    ids = Counter(image.id for image in images)
    twice = next((number for number, count in ids.items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"{path}: two images have the id {twice}")
    return images


def _image(record: dict[str, Any], path: Path) -> _Image:
    try:
        image = _Image(int(record["id"]), str(record["file_name"]), int(record["height"]), int(record["width"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: an image needs id, file_name, height and width, {record!r} has not") from error
    if min(image.height, image.width) < 1:
        raise ValueError(
            f"{path}: image {image.id} ({image.file}) is {image.width} x {image.height}; each side must be 1 or more"
        )
    return image


def _usable(
    images: list[_Image], counts: np.ndarray, training: bool, keep_empty: bool, min_side: int
) -> tuple[np.ndarray, dict[str, int]]:
    """Which images stay, and how many do not, by reason."""
    kept = np.ones(len(images), bool)
    if not training:
        return kept, {}
    large = np.array([min(image.height, image.width) >= min_side for image in images], bool)
    filled = np.ones_like(large) if keep_empty else counts > 0
    reasons = {f"below {min_side} pixels": int((~large).sum()), "without objects": int((large & ~filled).sum())}
    return large & filled, {reason: count for reason, count in reasons.items() if count}


class _ObjectReader:
    """Turns annotations into objects, and counts those it drops."""

    def __init__(self, path: Path, images: list[_Image], labels: dict[int, int], masks: bool) -> None:
        self.path, self.images, self.labels, self.masks = path, images, labels, masks
        self.rows = {image.id: row for row, image in enumerate(images)}
        self.dropped: Counter[str] = Counter()

    def read(self, record: dict[str, Any]) -> _Object | None:
        """One object; None for a dropped one."""
        try:
            number, image_id, category = int(record["id"]), int(record["image_id"]), int(record["category_id"])
            x, y, w, h = (float(value) for value in record["bbox"])
            area = float(record.get("area", w * h))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.path}: annotation {record.get('id')!r} needs whole numbers image_id and category_id and a bbox "
                f"of 4 numbers, but: {type(error).__name__}: {error}"
            ) from error
        row, label = self.rows.get(image_id), self.labels.get(category)
        if row is None:
            raise ValueError(f"{self.path}: annotation {number} is of image {image_id}, which the file does not list")
        if label is None:
            raise self._error(number, row, f"category {category} is none of the file's {len(self.labels)} categories")
        if not math.isfinite(x + y + w + h):
            raise self._error(number, row, f"the box {record['bbox']} is not finite")
        image = self.images[row]
        box = max(x, 0.0), max(y, 0.0), min(x + w, float(image.width)), min(y + h, float(image.height))
        reason = _reason_to_drop(record, box, w, h, area)
        outline = None if reason or not self.masks else self._outline(record, number, row)
        if reason is None and self.masks and outline is None:
            reason = "mask"
        if reason is not None:
            self.dropped[reason] += 1
            return None
        return _Object(row, label, number, box, outline)

    def _error(self, number: int, row: int, text: str) -> ValueError:
        image = self.images[row]
        return ValueError(f"{self.path}: annotation {number} of image {image.id} ({image.file}): {text}")

    def _outline(self, record: dict[str, Any], number: int, row: int) -> list[list[float]] | np.ndarray | None:
        segmentation, image = record.get("segmentation"), self.images[row]
        try:
            if isinstance(segmentation, Mapping):
                return read_runs(segmentation, image.height, image.width)
            return read_polygons(segmentation or [])
        except (KeyError, TypeError, ValueError) as error:
            raise self._error(number, row, f"the segmentation is malformed: {error}") from error


def _reason_to_drop(record: dict[str, Any], box: Sequence[float], w: float, h: float, area: float) -> str | None:
    if record.get("iscrowd", 0):
        return "crowd"
    if box[2] <= box[0] or box[3] <= box[1]:
        return "small" if w < 1 or h < 1 else "outside"
    if w < 1 or h < 1:
        return "small"
    return "area" if area <= 0 else None


def _listed(title: str, entries: list[str]) -> str:
    return f"; {title}: {', '.join(entries)}" if entries else ""
