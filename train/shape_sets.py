"""The generated shapes as data sets that write themselves on first use: nothing needs to be prepared for a config."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .checkpoint import write_atomically
from .detection.data import CocoDetection
from .segmentation.data import ADE20K
from .shapes import MAP_CLASSES, SPLITS, write_ade, write_coco

DESCRIPTION = "shapes.json"
_ADE_SPLITS = {"train": "training", "val": "validation"}


def annotation_file(root: str | os.PathLike[str], split: str = "val") -> Path:
    """Where `ShapesDetection` keeps the objects of a split; evaluation reads them from there."""
    return Path(root) / "annotations" / f"instances_{split}.json"


class ShapesDetection(CocoDetection):
    """Scenes of `vizoo.train.shapes` with boxes and masks, as COCO files that are written on first use.

    Args:
        root: Folder of the set, both splits.
        split: `train`, or `val` of held-out scenes over other photographs.
        scenes: Scenes of `train` and of `val`.
        size: Longer side of the images in pixels.
        seed: Seed of the scenes.
        transform: As for `CocoDetection`.
        masks: Read masks too.

    Raises:
        ValueError: The folder holds something else, or an unknown split.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        *,
        scenes: Sequence[int],
        size: int,
        seed: int = 0,
        transform: Callable[[Any], Any] | Mapping[str, Any],
        masks: bool = True,
    ) -> None:
        folder = ensure_set(root, write_coco, scenes=scenes, size=size, seed=seed)
        annotations = annotation_file(folder, _known(split))
        super().__init__(folder / split, annotations, transform=transform, masks=masks, training=split == "train")


class ShapesSegmentation(ADE20K):
    """The same scenes with a label for every pixel, in ADE20K's layout, written on first use.

    Args:
        root: As for `ShapesDetection`, but another folder.
        split: As for `ShapesDetection`.
        scenes: As for `ShapesDetection`.
        size: As for `ShapesDetection`.
        seed: As for `ShapesDetection`.
        transform: As for `SegmentationFolder`.

    Raises:
        ValueError: As for `ShapesDetection`.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        *,
        scenes: Sequence[int],
        size: int,
        seed: int = 0,
        transform: Callable[[Any], Any] | Mapping[str, Any],
    ) -> None:
        folder = ensure_set(root, write_ade, scenes=scenes, size=size, seed=seed)
        super().__init__(folder, _ADE_SPLITS[_known(split)], transform=transform, classes=MAP_CLASSES)


def ensure_set(
    root: str | os.PathLike[str], write: Callable[..., Path], *, scenes: Sequence[int], size: int, seed: int = 0
) -> Path:
    """A set of generated scenes, written unless it is there already.

    It is written beside its place and then renamed: a folder `root` is whole, whatever was interrupted, and of several
    processes that write it one wins.

    Args:
        root: Folder of the set.
        write: `write_coco` or `write_ade`.
        scenes: Scenes of `train` and of `val`.
        size: Longer side of the images in pixels.
        seed: Seed of the scenes.

    Returns:
        The folder.

    Raises:
        ValueError: The folder holds something else, or not two numbers of scenes.
    """
    root = Path(root)
    if len(scenes) != len(SPLITS):
        raise ValueError(f"scenes must be the number of training and of held-out scenes, got {tuple(scenes)}")
    wanted = {"layout": write.__name__.removeprefix("write_"), "scenes": list(scenes), "size": size, "seed": seed}
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        _write_set(root, write, wanted)
    found = _described(root)
    if found != wanted:
        what = f"shapes of {found}" if found else "something else"
        raise ValueError(f"{root} holds {what}, not shapes of {wanted}: choose another folder, or remove that one")
    return root


def _write_set(root: Path, write: Callable[..., Path], wanted: Mapping[str, Any]) -> None:
    part = root.with_name(f".{root.name}.{os.getpid()}.part")
    try:
        for split, count in zip(SPLITS, wanted["scenes"], strict=True):
            write(part, count, size=wanted["size"], seed=wanted["seed"], split=split)
        write_atomically(part / DESCRIPTION, json.dumps(wanted).encode())
        try:
            part.rename(root)
        except OSError:
            if not (root / DESCRIPTION).is_file():  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _described(root: Path) -> dict[str, Any] | None:
    path = root / DESCRIPTION
    return json.loads(path.read_text()) if path.is_file() else None


def _known(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return split
