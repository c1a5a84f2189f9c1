"""Data sets of images with a label for every pixel: folders, ADE20K, Cityscapes, and the batches they make."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vizoo.backbones.base import nearest
from vizoo.images import MAX_PIXELS, load_image, walk_images
from vizoo.train.transforms import build_transform, prepare_worker

from .classes import ADE20K as ADE20K_CLASSES
from .classes import CITYSCAPES as CITYSCAPES_CLASSES
from .classes import CITYSCAPES_ALL_IDS, CITYSCAPES_IDS, IGNORE
from .transforms import Sample

INVALID = -1
_INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B")


class Target(TypedDict):
    """What is known of one image: the label of each pixel, 255 where there is none."""

    map: Tensor
    original_size: tuple[int, int]
    path: str


class Item(TypedDict):
    """One sample: `image` (3, H, W), RGB, uint8, and its labels."""

    image: Tensor
    target: Target


def collate(items: Sequence[Item]) -> dict[str, list[Any]]:
    """A batch of lists, since images differ in size.

    Returns:
        `images`, tensors (3, H, W), and `targets`, dicts.
    """
    return {"images": [item["image"] for item in items], "targets": [item["target"] for item in items]}


class SegmentationFolder(Dataset[Item]):
    """Images in one folder, label images of the same names in another.

    A label image is a PNG whose pixel values (of a palette image: indices) are labels. Folders may be nested. The EXIF
    orientation of images is not applied: labels are for pixels as stored.

    Args:
        images: Folder of the images.
        maps: Folder of the label images.
        transform: From a `vizoo.train.segmentation.transforms.Sample` to a `Sample`, or the config of one.
        classes: Name of each label from 0 on, or a text file with a name a line.
        ignore: Value of pixels without a label; 255 in what the data set gives.
        image_end: What image names end in, in place of `map_end`; empty for any suffix.
        map_end: What the names of label images end in.
        max_pixels: Refuse larger images.

    Attributes:
        classes: Name of each label.
        files: Path of each image and of its label image, relative to their folders, as encoded bytes (N, 2).

    Raises:
        FileNotFoundError: A folder or the file of classes is not there, or an image has no label image.
        ValueError: No classes, more than 255, a name twice, or an ignored value outside 0 to 255.
    """

    def __init__(
        self,
        images: str | os.PathLike[str],
        maps: str | os.PathLike[str],
        *,
        transform: Callable[[Sample], Sample] | Mapping[str, Any],
        classes: Sequence[str] | str | os.PathLike[str],
        ignore: int = IGNORE,
        image_end: str = "",
        map_end: str = ".png",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.images, self.maps = Path(images), Path(maps)
        self.transform: Callable[[Sample], Sample] = build_transform(transform)  # type: ignore[arg-type, assignment]
        self.classes = _class_list(classes)
        if not 0 <= ignore <= 255:
            raise ValueError(f"ignore must be a value of an 8-bit image, 0 to 255, got {ignore}")
        self.max_pixels = max_pixels
        self.files = _pairs(self.images, self.maps, image_end, map_end)
        self._labels = self.value_table(ignore)

    def value_table(self, ignore: int) -> np.ndarray:
        """Label of each value of the label images; `INVALID` for values that must not occur."""
        count = len(self.classes)
        table = np.full(256, INVALID, np.int64)
        table[:count] = np.arange(count)
        table[ignore] = IGNORE
        return table

    @property
    def metainfo(self) -> dict[str, Any]:
        """What mmengine hands to metrics: the class names."""
        return {"classes": tuple(self.classes)}

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        """File of one image."""
        return self.images / os.fsdecode(self.files[index, 0])

    def map_path(self, index: int) -> Path:
        """File of one label image."""
        return self.maps / os.fsdecode(self.files[index, 1])

    def sample(self, index: int) -> Sample:
        """One image with its labels, before the transform.

        Raises:
            ValueError: A file is corrupt, the two differ in size, or a value is no label; names the files.
        """
        image = np.asarray(load_image(self.path(index), max_pixels=self.max_pixels, upright=False))
        labels = self._read_map(self.map_path(index))
        if image.shape[:2] != labels.shape:
            raise ValueError(
                f"{self.path(index)} is {image.shape[1]} x {image.shape[0]} pixels, its label image "
                f"{self.map_path(index)} is {labels.shape[1]} x {labels.shape[0]}"
            )
        return Sample(image, labels)

    def _read_map(self, path: Path) -> np.ndarray:
        values = read_values(path)
        inside = (values >= 0) & (values < len(self._labels))
        labels = self._labels[np.where(inside, values, 0)]
        wrong = ~inside | (labels == INVALID)
        if wrong.any():
            raise ValueError(
                f"{path} holds the value {values[wrong][0]}, which is no label of the {len(self.classes)} classes: "
                f"{int(wrong.sum())} of {values.size} pixels have such values"
            )
        return labels.astype(np.uint8)

    def __getitem__(self, index: int) -> Item:
        prepare_worker()
        sample = self.sample(index)
        size = sample.labels.shape[0], sample.labels.shape[1]
        try:
            sample = self.transform(sample)
        except Exception as error:  # any transform may fail in any way; the image it failed on must be named
            raise RuntimeError(
                f"the transform failed on {self.path(index)}: {type(error).__name__}: {error}"
            ) from error
        target: Target = {
            "map": torch.from_numpy(np.ascontiguousarray(sample.labels)),
            "original_size": size,
            "path": str(self.path(index)),
        }
        pixels = sample.image.transpose(2, 0, 1).copy()
        return {"image": torch.from_numpy(pixels), "target": target}


class ADE20K(SegmentationFolder):
    """The ADE20K scene parsing benchmark (`ADEChallengeData2016`), or a set in its layout.

    `root/images/<split>/*.jpg` and `root/annotations/<split>/*.png`. In the label images 0 is "other", which is
    ignored, and classes count from 1.

    Args:
        root: Folder of the data set.
        split: `training` or `validation`.
        transform: As for `SegmentationFolder`.
        classes: The classes from 1 on, or a text file with a name a line; None for the benchmark's 150.
        max_pixels: Refuse larger images.

    Raises:
        FileNotFoundError: A folder is not there, or an image has no label image.
        ValueError: What `SegmentationFolder` refuses.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "training",
        *,
        transform: Callable[[Sample], Sample] | Mapping[str, Any],
        classes: Sequence[str] | str | os.PathLike[str] | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(
            Path(root) / "images" / split,
            Path(root) / "annotations" / split,
            transform=transform,
            classes=ADE20K_CLASSES if classes is None else classes,
            max_pixels=max_pixels,
        )

    def value_table(self, ignore: int) -> np.ndarray:
        """0 is ignored, classes count from 1."""
        table = super().value_table(ignore)
        shifted = np.full_like(table, INVALID)
        shifted[1 : len(self.classes) + 1] = table[: len(self.classes)]
        shifted[[0, ignore]] = IGNORE
        return shifted


class Cityscapes(SegmentationFolder):
    """Cityscapes with fine annotations and its 19 evaluated classes.

    `root/leftImg8bit/<split>/<city>/*_leftImg8bit.png` and `root/gtFine/<split>/<city>/*_gtFine_labelIds.png`; the
    other 15 ids are ignored.

    Args:
        root: Folder of the data set.
        split: `train` or `val`.
        transform: As for `SegmentationFolder`.
        max_pixels: Refuse larger images.

    Raises:
        FileNotFoundError: A folder is not there, or an image has no label image.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        *,
        transform: Callable[[Sample], Sample] | Mapping[str, Any],
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(
            Path(root) / "leftImg8bit" / split,
            Path(root) / "gtFine" / split,
            transform=transform,
            classes=CITYSCAPES_CLASSES,
            image_end="_leftImg8bit.png",
            map_end="_gtFine_labelIds.png",
            max_pixels=max_pixels,
        )

    def value_table(self, ignore: int) -> np.ndarray:
        """The ids of the label images that are evaluated, by class; the others are ignored."""
        table = np.full(256, INVALID, np.int64)
        table[:CITYSCAPES_ALL_IDS] = IGNORE
        table[list(CITYSCAPES_IDS)] = np.arange(len(CITYSCAPES_IDS))
        table[ignore] = IGNORE
        return table


def read_values(path: Path) -> np.ndarray:
    """Pixel values (H, W) of a label image; of a palette image the indices.

    Raises:
        ValueError: The file is no image, corrupt, or one of colours.
    """
    try:
        with Image.open(path) as image:
            mode = image.mode
            values = np.asarray(image)
    except Exception as error:  # decoders of damaged data raise whatever their code ran into
        raise ValueError(f"the label image {path} cannot be read: {type(error).__name__}: {error}") from error
    if mode not in _INDEX_MODES:
        raise ValueError(
            f"the label image {path} is of mode {mode}; labels are the values of an image with one channel or a palette"
        )
    return values.astype(np.int64)


def _class_list(classes: Sequence[str] | str | os.PathLike[str]) -> list[str]:
    if isinstance(classes, (str, os.PathLike)):
        path = Path(classes)
        if not path.is_file():
            raise FileNotFoundError(f"there is no file of class names {path}")
        classes = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    names = list(classes)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"classes must be names that differ, at least one, got {len(names)}: {', '.join(names[:10])}")
    if len(names) > IGNORE:
        raise ValueError(f"there can be {IGNORE} classes, since {IGNORE} stands for no label, got {len(names)}")
    return names


def _pairs(images: Path, maps: Path, image_end: str, map_end: str) -> np.ndarray:
    """Paths of images and their label images, relative, sorted, as bytes (N, 2)."""
    for folder in (images, maps):
        if not folder.is_dir():
            beside = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
            hint = f"; {nearest(folder.name, beside)}" if beside else ""
            raise FileNotFoundError(f"there is no folder {folder}{hint}")
    names = [name for name in _relative(images) if name.endswith(image_end)]
    if not names:
        raise FileNotFoundError(f"{images} holds no image" + (f" *{image_end}" if image_end else ""))
    there = {name for name in _relative(maps) if name.endswith(map_end)}
    found = [(name, _stem(name, image_end) + map_end) for name in names]
    missing = [(name, other) for name, other in found if other not in there]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} images of {images} have no label image in {maps}: "
            f"{missing[0][0]} needs {missing[0][1]}"
        )
    return np.array([(os.fsencode(name), os.fsencode(other)) for name, other in found], np.bytes_)


def _relative(folder: Path) -> list[str]:
    start = len(os.path.join(folder, ""))
    return sorted(path[start:] for path in walk_images(folder))


def _stem(name: str, end: str) -> str:
    return name[: -len(end)] if end else os.path.splitext(name)[0]
