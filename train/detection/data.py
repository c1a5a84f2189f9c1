"""COCO data sets for detection and instance segmentation, and the batches they make."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vizoo.images import MAX_PIXELS, load_image
from vizoo.train.geometry import integer, uniform
from vizoo.train.transforms import build_transform, prepare_worker

from .annotations import MIN_SIDE, Annotations, load_annotations
from .samples import Sample, tidy
from .transforms import CopyPaste


class Target(TypedDict, total=False):
    """What is known of one image; `masks` only where the data set was told to read them."""

    boxes: Tensor
    labels: Tensor
    masks: Tensor
    image_id: int
    original_size: tuple[int, int]
    path: str


class Item(TypedDict):
    """One sample: `image` (3, H, W), RGB, uint8, and its objects in pixels of that tensor."""

    image: Tensor
    target: Target


def collate(items: Sequence[Item]) -> dict[str, list[Any]]:
    """A batch of lists, since images differ in size and in their number of objects.

    Returns:
        `images`, tensors (3, H, W), and `targets`, dicts.
    """
    return {"images": [item["image"] for item in items], "targets": [item["target"] for item in items]}


class CocoDetection(Dataset[Item]):
    """Images with boxes, and masks on demand, by a COCO instances file.

    Labels are 0 to C - 1, by ascending category id. Dropped, counted and told by `report()`: crowds, objects of area 0,
    with a side below 1 pixel, outside the image, and, with masks, without one. Boxes partly outside are clipped. In
    training, images without an object or with a side below `min_side` are left out; a validation set keeps all, in
    the order of the file. Whatever else is wrong is an error that names the file, the image and the annotation.

    The EXIF orientation of images is not applied: COCO's annotations are in pixels as stored. Gray, CMYK and
    transparent images become RGB.

    Args:
        images: Folder that the file's `file_name`s are relative to.
        annotations: The JSON file.
        transform: From a `vizoo.train.detection.samples.Sample` to a `Sample`, or the config of one.
        masks: Read masks too: polygons, and run-length codes in either form.
        training: Leave out images that training cannot use.
        keep_empty: Train on images without an object too.
        min_side: Least side in pixels of a training image.
        paste: Paste objects of a random other image, `CopyPaste` or its config; None for not.
        max_pixels: Refuse larger images.

    Attributes:
        classes: Name of each label.
        category_ids: COCO's id of each label (C,).
        sizes: Height and width of each image (N, 2).

    Raises:
        FileNotFoundError: No such file or folder, or an image that the file lists is not there.
        ValueError: The file is damaged or contradicts itself, no image is left, or `paste` without `masks`.
    """

    def __init__(
        self,
        images: str | os.PathLike[str],
        annotations: str | os.PathLike[str],
        *,
        transform: Callable[[Sample], Sample] | Mapping[str, Any],
        masks: bool = False,
        training: bool = True,
        keep_empty: bool = False,
        min_side: int = MIN_SIDE,
        paste: CopyPaste | Mapping[str, Any] | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if paste is not None and not masks:
            raise ValueError("copy-paste needs masks: set masks=True")
        self.images = Path(images)
        self.masks, self.max_pixels = masks, max_pixels
        self.transform: Callable[[Sample], Sample] = build_transform(transform)  # type: ignore[arg-type, assignment]
        self.paste: CopyPaste | None = None if paste is None else build_transform(paste)  # type: ignore[arg-type, assignment]
        self.annotations = load_annotations(
            annotations, masks=masks, training=training, keep_empty=keep_empty, min_side=min_side
        )
        if not len(self):
            raise ValueError(f"no image is left to use: {self.report()}")
        _check_files(self.images, self.annotations)

    @property
    def classes(self) -> list[str]:
        """Name of each label."""
        return list(self.annotations.classes)

    @property
    def category_ids(self) -> np.ndarray:
        """COCO's id of each label (C,)."""
        return self.annotations.category_ids

    @property
    def sizes(self) -> np.ndarray:
        """Height and width of each image, as the file states them (N, 2)."""
        return self.annotations.sizes

    @property
    def metainfo(self) -> dict[str, Any]:
        """What mmengine hands to metrics and keeps in checkpoints: the class names, and COCO's ids of them."""
        return {"classes": self.annotations.classes, "category_ids": tuple(self.category_ids.tolist())}

    def report(self) -> str:
        """One line: images, objects, and what was dropped and why."""
        return self.annotations.report()

    def __len__(self) -> int:
        return len(self.annotations.image_ids)

    def path(self, index: int) -> Path:
        """File of one image."""
        return self.images / os.fsdecode(self.annotations.files[index])

    def sample(self, index: int) -> Sample:
        """One image with its objects, before the transform.

        Raises:
            ValueError: The image is corrupt, or not of the size that the JSON file states.
        """
        found, height_width = self.annotations, tuple(self.sizes[index].tolist())
        image = self._image(index, height_width)
        objects = range(found.first[index], found.first[index + 1])
        masks = None
        if found.segments is not None:
            masks = np.zeros((len(objects), *height_width), np.uint8)
            for place, number in enumerate(objects):
                masks[place] = found.segments.mask(number, *height_width)
        rows = slice(objects.start, objects.stop)
        return Sample(image, found.boxes[rows].copy(), found.labels[rows].copy(), masks)

    def _image(self, index: int, size: tuple[int, ...]) -> np.ndarray:
        path, where = self.path(index), f"image {self.annotations.image_ids[index]} of {self.annotations.path}"
        try:
            image = np.asarray(load_image(path, max_pixels=self.max_pixels, upright=False))
        except (OSError, ValueError) as error:
            raise ValueError(f"{where} cannot be read: {error}") from error
        if image.shape[:2] != size:
            raise ValueError(
                f"{where} is {size[1]} x {size[0]} by that file, but {path} is {image.shape[1]} x {image.shape[0]} "
                "pixels (width x height, as stored: the EXIF orientation is not applied)"
            )
        return image

    def __getitem__(self, index: int) -> Item:
        prepare_worker()
        sample = self._augmented(index)
        if self.paste is not None and uniform(0, 1) < self.paste.prob:
            sample = self.paste(sample, self._augmented(integer(0, len(self) - 1)))
        return self._item(sample, index)

    def _augmented(self, index: int) -> Sample:
        sample = self.sample(index)
        try:
            return tidy(self.transform(sample))
        except Exception as error:  # any transform may fail in any way; the image it failed on must be named
            name = f"image {self.annotations.image_ids[index]} ({self.path(index)})"
            raise RuntimeError(f"the transform failed on {name}: {type(error).__name__}: {error}") from error

    def _item(self, sample: Sample, index: int) -> Item:
        height, width = self.sizes[index].tolist()
        target: Target = {
            "boxes": torch.from_numpy(sample.boxes),
            "labels": torch.from_numpy(sample.labels),
            "image_id": int(self.annotations.image_ids[index]),
            "original_size": (height, width),
            "path": str(self.path(index)),
        }
        if sample.masks is not None:
            target["masks"] = torch.from_numpy(np.ascontiguousarray(sample.masks))
        pixels = sample.image.transpose(2, 0, 1).copy()
        return {"image": torch.from_numpy(pixels), "target": target}


def _check_files(folder: Path, annotations: Annotations) -> None:
    """Look for all images at once: a listing of each folder is far quicker than a look at each file."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} of images")
    listed: dict[str, set[str]] = {}
    missing = []
    for name in map(os.fsdecode, annotations.files):
        parent, _, leaf = name.rpartition("/")
        if parent not in listed:
            place = folder / parent
            listed[parent] = set(os.listdir(place)) if place.is_dir() else set()
        if leaf not in listed[parent]:
            missing.append(name)
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(annotations.files)} images of {annotations.path} are not in {folder}, "
            f"the first is {missing[0]}"
        )
