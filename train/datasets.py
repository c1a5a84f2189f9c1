"""Classification data: folders in ImageNet's layout, and the handwritten digits that scikit-learn ships."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vizoo.backbones.base import nearest
from vizoo.images import MAX_PIXELS, SUFFIXES, load_image, walk_images
from vizoo.labels import DIGITS

from .transforms import Transform, build_transform

SPLITS = ("train", "val")


class Item(TypedDict):
    """One sample: `inputs` (C, H, W) and its `label`; torch's default collate makes a batch of it."""

    inputs: Tensor
    label: int


class SizedIndex(NamedTuple):
    """Number of a sample, and the side that its transform is to give it; `MultiScaleBatches` deals these out."""

    sample: int
    size: int


class ImageFolder(Dataset[Item]):
    """Images sorted into one folder per class: `root/split/class/.../name.jpg`, ImageNet's layout.

    Classes are numbered in the sorted order of their folders' names. Files may lie deeper; names that begin with a dot
    are skipped. A file that cannot be read while training is an error that names it, never a silent gap.

    Args:
        root: Folder of the data set.
        split: Folder inside it; empty when the class folders lie in `root` itself.
        transform: From a PIL RGB image to a tensor, or the config of one.
        classes: The classes to expect, in the order of their labels; None takes the folders found.
        reference: Another split whose classes to expect: `train` for a validation set.
        max_pixels: Refuse larger images.

    Attributes:
        classes: Name of each label.
        files: Path of each image, relative to `folder`, as encoded bytes: an array that workers share.
        labels: Label of each image (N,).

    Raises:
        FileNotFoundError: No such folder, no class folder in it, or a class folder without an image.
        ValueError: The folders are not the expected classes, or both `classes` and `reference` were given.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        *,
        transform: Transform | Mapping[str, Any],
        classes: Sequence[str] | None = None,
        reference: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if classes is not None and reference is not None:
            raise ValueError("give `classes` or `reference`, not both: each says which classes to expect")
        self.root, self.split = Path(root), split
        self.transform = build_transform(transform)
        self.max_pixels = max_pixels
        found = _class_folders(self.root, split)
        expected = _class_folders(self.root, reference) if reference is not None else classes
        if expected is not None:
            _compare(found, expected, self.folder)
        self.classes = list(found if expected is None else expected)
        self.files, self.labels = _list_files(self.folder, self.classes)

    @property
    def folder(self) -> Path:
        """The folder that holds the class folders."""
        return self.root / self.split

    @property
    def metainfo(self) -> dict[str, Any]:
        """What mmengine hands to metrics: the class names."""
        return {"classes": tuple(self.classes)}

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        """File of one sample."""
        return self.folder / os.fsdecode(self.files[index])

    def image(self, index: int) -> Image.Image:
        """One image as PIL RGB, before the transform."""
        return load_image(self.path(index), max_pixels=self.max_pixels)

    def __getitem__(self, index: int | SizedIndex) -> Item:
        index, transform = _chosen(index, self.transform)
        return _item(transform, self.image(index), self.labels[index], self.path(index))


class Digits(Dataset[Item]):
    """1797 handwritten digits of 8 x 8 pixels (the UCI set that scikit-learn ships), split by a fixed seed.

    Args:
        split: `train`, or `val` for the held-out digits.
        transform: From a PIL image to a tensor, or the config of one.
        held_out: Share of each class that is held out.
        seed: Seed of the split; the same in both sets, so that they have no digit in common.
        mode: Mode of the images handed to the transform, `RGB` or `L`.

    Attributes:
        classes: Name of each label.
        pixels: The images (N, 8, 8), 8-bit.
        labels: Label of each image (N,).
        indices: Place of each image in scikit-learn's set (N,), ascending.

    Raises:
        ValueError: An unknown split or mode, or a share outside (0, 1).
    """

    def __init__(
        self,
        split: str = "train",
        *,
        transform: Transform | Mapping[str, Any],
        held_out: float = 0.2,
        seed: int = 0,
        mode: str = "RGB",
    ) -> None:
        from sklearn.datasets import load_digits

        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r} of the digits; {nearest(split, SPLITS)}")
        if mode not in ("RGB", "L"):
            raise ValueError(f"mode must be 'RGB' or 'L', got {mode!r}")
        if not 0 < held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1, got {held_out}")
        self.split, self.mode = split, mode
        self.transform = build_transform(transform)
        digits = load_digits()
        self.indices = _split(digits.target, held_out, seed)[SPLITS.index(split)]
        self.pixels = np.rint(digits.images[self.indices] * (255 / 16)).astype(np.uint8)
        self.labels = digits.target[self.indices].astype(np.int64)
        self.classes = list(DIGITS)

    @property
    def metainfo(self) -> dict[str, Any]:
        """What mmengine hands to metrics: the class names."""
        return {"classes": tuple(self.classes)}

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """One digit as a PIL image, before the transform."""
        return Image.fromarray(self.pixels[index]).convert(self.mode)

    def __getitem__(self, index: int | SizedIndex) -> Item:
        index, transform = _chosen(index, self.transform)
        return _item(transform, self.image(index), self.labels[index], f"digit {self.indices[index]}")


def _chosen(index: int | SizedIndex, transform: Transform) -> tuple[int, Transform]:
    """Number of a sample, and the transform that gives it the size of its batch."""
    if not isinstance(index, SizedIndex):
        return index, transform
    at = getattr(transform, "at", None)
    if at is None:
        raise TypeError(
            f"batches of several sizes need a transform with a method `at(size)`, such as RecipeTrainTransform, "
            f"got {type(transform).__name__}"
        )
    return index.sample, at(index.size)


def _item(transform: Transform, image: Image.Image, label: np.integer[Any], source: object) -> Item:
    try:
        inputs = transform(image)
    except Exception as error:  # any transform may fail in any way; the image it failed on must be named
        raise RuntimeError(f"the transform failed on {source}: {type(error).__name__}: {error}") from error
    return {"inputs": inputs, "label": int(label)}


def _class_folders(root: Path, split: str) -> list[str]:
    folder = root / split
    if not folder.is_dir():
        beside = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        hint = f"; {nearest(folder.name, beside)}" if beside else ""
        raise FileNotFoundError(f"there is no folder {folder}{hint}")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise FileNotFoundError(f"{folder} holds no class folder; the layout is root/split/class/image.jpg")
    return names


def _compare(found: Sequence[str], expected: Sequence[str], folder: Path) -> None:
    if len(set(expected)) != len(expected):
        raise ValueError("the expected classes name one class twice")
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of the {len(expected)} expected classes: {_some(missing)}")
    if extra:
        raise ValueError(f"{folder} has {len(extra)} classes that are not expected: {_some(extra)}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def _list_files(folder: Path, classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Relative paths, as bytes, and labels; arrays, since a list would be copied into every worker bit by bit."""
    files: list[bytes] = []
    counts: list[int] = []
    start = len(os.path.join(folder, ""))
    for name in classes:
        paths = sorted(os.fsencode(path[start:]) for path in walk_images(os.path.join(folder, name)))
        if not paths:
            raise FileNotFoundError(
                f"the class folder {folder / name} holds no image; known suffixes: {', '.join(SUFFIXES)}"
            )
        files += paths
        counts.append(len(paths))
    return np.array(files), np.repeat(np.arange(len(classes)), counts)


def _split(target: np.ndarray, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and the held-out samples, the same share of every class."""
    generator = np.random.default_rng(seed)
    held: list[np.ndarray] = []
    for label in np.unique(target):
        members = generator.permutation(np.flatnonzero(target == label))
        held.append(members[: max(1, round(len(members) * held_out))])
    chosen = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(target)), chosen), chosen
