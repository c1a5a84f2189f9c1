"""Small sets of textured shapes over photographs: the same scenes as COCO files and in ADE20K's layout.

Scenes are real work for a detector: shapes of six classes, turned, of many sizes, hiding each other; textures and
backgrounds are cut from photographs that scikit-image and scikit-learn ship. Training and held-out scenes share no
photograph. Nothing is downloaded, and a scene depends on nothing but (seed, split, index, size).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from faster_coco_eval.core import mask as rle
from PIL import Image

from vizoo.backbones.base import nearest

from .checkpoint import write_atomically

CLASSES = ("rectangle", "ellipse", "triangle", "star", "ring", "cross")
MAP_CLASSES = ("background", *CLASSES)
SPLITS = ("train", "val")
MIN_SIZE = 32

MAX_OBJECTS = 5
DIAMETER = (0.28, 0.6)
"""Range of an object's diameter, as a share of the image's shorter side."""

MIN_VISIBLE = 0.5
"""Least share of an object that others leave visible."""

TYPICAL_HUE, HUE_SPREAD = 0.85, 0.03
"""Share of the objects that have a hue about that of their class, and its standard deviation, of the circle of hues.

As with real things, the colour says much about the class and the shape says all: a model learns in minutes.
"""

COLOUR_LEFT, TINTED = 0.3, 0.7
"""Share of its colour that a background keeps, and share of the tint in an object's texture."""

CROWD_SHARE = 0.04
_PHOTOS = {
    "train": (
        "astronaut",
        "rocket",
        "gravel",
        "grass",
        "coins",
        "moon",
        "cell",
        "hubble_deep_field",
        "stereo_motorcycle",
        "china.jpg",
        "flower.jpg",
    ),
    "val": ("chelsea", "brick", "retina", "immunohistochemistry", "coffee"),
}
_PHOTO_SIDE = 420

Array = np.ndarray


@dataclass(frozen=True)
class Scene:
    """One image and its truth, all from the same geometry.

    Attributes:
        image: RGB (H, W, 3), uint8.
        boxes: x1, y1, x2, y2 around what is visible of each object (n, 4), float32.
        labels: Places in `CLASSES` (n,), int64.
        masks: Visible pixels (n, H, W), uint8.
        crowd: Whether the object is a crowd, several small shapes in one (n,), bool.
        polygons: Outlines of each object that nothing hides and that has no hole; else None.
        map: Place in `MAP_CLASSES` of each pixel (H, W), uint8.
    """

    image: Array
    boxes: Array
    labels: Array
    masks: Array
    crowd: Array
    polygons: list[list[list[float]] | None]
    map: Array


@dataclass
class _Shape:
    label: int
    outlines: list[Array]
    mask: Array
    crowd: bool = False


def make_scene(index: int, *, size: int = 160, seed: int = 0, split: str = "train") -> Scene:
    """One scene.

    Args:
        index: Number of the scene.
        size: Longer side of the image in pixels; scenes are square, wide or tall.
        seed: Seed of the set.
        split: `train` or `val`, which share no photograph.

    Raises:
        ValueError: An unknown split, or a size below `MIN_SIZE`.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of the shapes; {nearest(split, SPLITS)}")
    if size < MIN_SIZE:
        raise ValueError(f"size must be {MIN_SIZE} pixels or more, got {size}")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    short = size * 3 // 4
    height, width = [(size, size), (short, size), (size, short)][rng.integers(3)]
    photos = _photos(split)
    image = _paled(_cut(photos[rng.integers(len(photos))], height, width, rng))
    shapes = _place(height, width, rng)
    for shape in shapes:
        texture = _texture(photos[rng.integers(len(photos))], image, shape, rng)
        image[shape.mask > 0] = texture[shape.mask > 0]
    return _scene(cv2.GaussianBlur(image, (3, 3), 0.5), shapes)


def _scene(image: Array, shapes: list[_Shape]) -> Scene:
    """Take from each object what later ones hide."""
    height, width = image.shape[:2]
    visible = np.zeros((len(shapes), height, width), np.uint8)
    polygons: list[list[list[float]] | None] = [None] * len(shapes)
    cover = np.zeros((height, width), bool)
    label_map = np.zeros((height, width), np.uint8)
    for place in range(len(shapes) - 1, -1, -1):
        shape = shapes[place]
        visible[place] = (shape.mask > 0) & ~cover
        whole = np.array_equal(visible[place], shape.mask)
        if whole and not shape.crowd and len(shape.outlines) == 1:
            polygons[place] = [outline.ravel().tolist() for outline in shape.outlines]
        label_map[visible[place] > 0] = shape.label + 1
        cover |= shape.mask > 0
    return Scene(
        image,
        np.array([_box(mask) for mask in visible], np.float32),
        np.array([shape.label for shape in shapes], np.int64),
        visible,
        np.array([shape.crowd for shape in shapes], bool),
        polygons,
        label_map,
    )


def _place(height: int, width: int, rng: np.random.Generator) -> list[_Shape]:
    """Draw objects, one over the other, until there are enough; at least one."""
    shapes: list[_Shape] = []
    if rng.random() < CROWD_SHARE:
        shapes.append(_crowd(height, width, rng))
    for _ in range(int(rng.integers(1, MAX_OBJECTS + 1))):
        shape = _draw(height, width, rng)
        if all(_stays_visible(below, [*shapes[number + 1 :], shape]) for number, below in enumerate(shapes)):
            shapes.append(shape)
    return shapes


def _stays_visible(below: _Shape, above: list[_Shape]) -> bool:
    cover = np.max([shape.mask for shape in above], axis=0)
    return bool((below.mask & ~cover & 1).sum() >= MIN_VISIBLE * below.mask.sum())


def _draw(height: int, width: int, rng: np.random.Generator) -> _Shape:
    label = int(rng.integers(len(CLASSES)))
    diameter = min(height, width) * rng.uniform(*DIAMETER)
    centre = np.array([rng.uniform(0.15, 0.85) * width, rng.uniform(0.15, 0.85) * height])
    outlines = _turned(_OUTLINES[CLASSES[label]](rng), diameter / 2, rng.uniform(0, 2 * np.pi), centre)
    return _Shape(label, outlines, _fill(outlines, height, width))


def _crowd(height: int, width: int, rng: np.random.Generator) -> _Shape:
    """Many small shapes of one class side by side, annotated as one."""
    label = int(rng.integers(len(CLASSES)))
    radius = min(height, width) * 0.05
    corner = rng.uniform(0.1, 0.5, 2) * (width, height)
    outlines, mask = [], np.zeros((height, width), np.uint8)
    for cell in np.ndindex(3, 4):
        own = _turned(_OUTLINES[CLASSES[label]](rng), radius, rng.uniform(0, 6), corner + np.array(cell) * radius * 2.4)
        outlines += own
        mask |= _fill(own, height, width)
    return _Shape(label, outlines, mask, crowd=True)


def _turned(outlines: list[Array], radius: float, angle: float, centre: Array) -> list[Array]:
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return [np.round(outline @ turn * radius + centre, 2) for outline in outlines]


def _fill(outlines: list[Array], height: int, width: int) -> Array:
    """Pixels of an outline (height, width), without those of a second one inside, by COCO's own rasteriser.

    Parts outside the image are cut off as that rasteriser does, so reading the polygons gives the same pixels again.
    """
    codes = rle.frPyObjects([outline.ravel().tolist() for outline in outlines], height, width)
    outer, *holes = (rle.decode(code) for code in codes)
    for hole in holes:
        outer = outer & ~hole
    return outer & 1


def _circle(points: int, radius: float = 1.0) -> Array:
    angles = np.arange(points) * (2 * np.pi / points)
    return np.stack([np.cos(angles), np.sin(angles)], 1) * radius


def _rectangle(rng: np.random.Generator) -> list[Array]:
    half = np.array([0.85, 0.85 * rng.uniform(0.5, 1.0)])
    return [np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half]


def _ellipse(rng: np.random.Generator) -> list[Array]:
    return [_circle(32) * np.array([1.0, rng.uniform(0.55, 1.0)])]


def _triangle(rng: np.random.Generator) -> list[Array]:
    return [_circle(3) * np.array([1.0, rng.uniform(0.8, 1.1)])]


def _star(rng: np.random.Generator) -> list[Array]:
    outline = _circle(10)
    outline[1::2] *= rng.uniform(0.38, 0.48)
    return [outline]


def _ring(rng: np.random.Generator) -> list[Array]:
    return [_circle(32), _circle(32, rng.uniform(0.5, 0.65))]


def _cross(rng: np.random.Generator) -> list[Array]:
    arm = rng.uniform(0.26, 0.36)
    quarter = np.array([[arm, -1.0], [arm, -arm], [1.0, -arm]])
    turns = [quarter]
    for _ in range(3):
        turns.append(np.stack([-turns[-1][:, 1], turns[-1][:, 0]], 1))
    return [np.concatenate(turns)]


_OUTLINES: dict[str, Callable[[np.random.Generator], list[Array]]] = {
    "rectangle": _rectangle,
    "ellipse": _ellipse,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}


def _box(mask: Array) -> tuple[int, int, int, int]:
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@cache
def _photos(split: str) -> tuple[Array, ...]:
    return tuple(_photo(name) for name in _PHOTOS[split])


def _photo(name: str) -> Array:
    """A photograph as RGB, its shorter side `_PHOTO_SIDE` pixels or less."""
    import skimage.data
    from sklearn.datasets import load_sample_image

    found = load_sample_image(name) if name.endswith(".jpg") else getattr(skimage.data, name)()
    photo = np.asarray(found[0] if isinstance(found, tuple) else found)
    photo = np.repeat(photo[:, :, None], 3, 2) if photo.ndim == 2 else photo[:, :, :3]
    scale = min(1.0, _PHOTO_SIDE / min(photo.shape[:2]))
    resized: Array = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return resized


def _cut(photo: Array, height: int, width: int, rng: np.random.Generator) -> Array:
    """A piece of a photograph, of random place and scale, mirrored or not."""
    limit = min(photo.shape[0] / height, photo.shape[1] / width)
    scale = limit * rng.uniform(0.35, 1.0)
    rows, columns = max(1, int(height * scale)), max(1, int(width * scale))
    top = int(rng.integers(photo.shape[0] - rows + 1))
    left = int(rng.integers(photo.shape[1] - columns + 1))
    piece = photo[top : top + rows, left : left + columns, :]
    if rng.random() < 0.5:
        piece = piece[:, ::-1]
    resized: Array = cv2.resize(np.ascontiguousarray(piece), (width, height), interpolation=cv2.INTER_LINEAR)
    return resized


def _paled(image: Array) -> Array:
    """A background with little of its colour, so that what lies on it stands out."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, None].astype(np.float32)
    paled: Array = (gray + COLOUR_LEFT * (image - gray)).astype(np.uint8)
    return paled


def _texture(photo: Array, image: Array, shape: _Shape, rng: np.random.Generator) -> Array:
    """A piece of a photograph in a tint that stands out from what `shape` will hide."""
    below = image[shape.mask > 0].mean(0)
    tints = _tints(shape.label, rng)
    tint = tints[np.abs(tints - below).sum(1).argmax()]
    height, width = shape.mask.shape
    piece = _cut(photo, height, width, rng).astype(np.float32)
    blended: Array = np.clip((1 - TINTED) * piece + TINTED * tint, 0, 255).astype(np.uint8)
    return blended


def _tints(label: int, rng: np.random.Generator) -> Array:
    """Four colours (4, 3), mostly about the hue of the class, sometimes of any hue."""
    centre = label / len(CLASSES) if rng.random() < TYPICAL_HUE else rng.random()
    hue = (centre + rng.normal(0, HUE_SPREAD, 4)) % 1
    colours = np.stack([hue * 180, rng.uniform(130, 255, 4), rng.uniform(100, 255, 4)], 1).astype(np.uint8)
    tints: Array = cv2.cvtColor(colours[None], cv2.COLOR_HSV2RGB)[0].astype(np.float64)
    return tints


def write_coco(folder: str | Path, count: int, *, size: int = 160, seed: int = 0, split: str = "train") -> Path:
    """Write scenes as a COCO set: `folder/<split>/000000.jpg`, ..., `folder/annotations/instances_<split>.json`.

    Objects that nothing hides are polygons, the others run-length codes, compressed or not in turn; crowds are there.

    Returns:
        The JSON file, which is written last.

    Raises:
        ValueError: A count below 1, or what `make_scene` refuses.
    """
    folder = Path(folder)
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for index in range(_checked(count)):
        scene = make_scene(index, size=size, seed=seed, split=split)
        name = f"{index:06d}.jpg"
        _write_image(folder / split / name, scene.image)
        height, width = scene.map.shape
        images.append({"id": index + 1, "file_name": name, "height": height, "width": width})
        objects += _records(scene, index + 1, len(objects) + 1)
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    path = folder / "annotations" / f"instances_{split}.json"
    document = {"images": images, "annotations": objects, "categories": categories}
    write_atomically(path, json.dumps(document).encode())
    return path


def _records(scene: Scene, image_id: int, first_id: int) -> list[dict[str, Any]]:
    records = []
    for place, label in enumerate(scene.labels.tolist()):
        x1, y1, x2, y2 = scene.boxes[place].tolist()
        number = first_id + place
        plain = bool(scene.crowd[place]) or number % 2 == 0
        polygons = scene.polygons[place]
        record = {"id": number, "image_id": image_id, "category_id": label + 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        record |= {"area": int(scene.masks[place].sum()), "iscrowd": int(scene.crowd[place])}
        record["segmentation"] = polygons if polygons is not None else _runs(scene.masks[place], plain)
        records.append(record)
    return records


def _runs(mask: Array, plain: bool) -> dict[str, Any]:
    """A mask's run-length code, as numbers or as text."""
    if not plain:
        code = rle.encode(np.asfortranarray(mask))
        return {"size": list(mask.shape), "counts": code["counts"].decode()}
    pixels = mask.T.ravel()
    changes = np.flatnonzero(np.diff(pixels)) + 1
    ends = np.concatenate([[0] if pixels[0] == 0 else [0, 0], changes, [pixels.size]])
    return {"size": list(mask.shape), "counts": np.diff(ends).tolist()}


def write_ade(folder: str | Path, count: int, *, size: int = 160, seed: int = 0, split: str = "train") -> Path:
    """Write scenes in ADE20K's layout: `images/training/000000.jpg`, `annotations/training/000000.png`.

    In the label images 0 would be "other", as there; `MAP_CLASSES` are numbered from 1. The held-out scenes go to
    `validation`.

    Returns:
        The folder.

    Raises:
        ValueError: A count below 1, or what `make_scene` refuses.
    """
    folder = Path(folder)
    for index in range(_checked(count)):
        scene = make_scene(index, size=size, seed=seed, split=split)
        part = {"train": "training", "val": "validation"}[split]
        _write_image(folder / "images" / part / f"{index:06d}.jpg", scene.image)
        _write_image(folder / "annotations" / part / f"{index:06d}.png", scene.map + 1)
    return folder


def _checked(count: int) -> int:
    if count < 1:
        raise ValueError(f"count must be 1 or more, got {count}")
    return count


def _write_image(path: Path, image: Array) -> None:
    """Encode an image, RGB or one channel, in the format of its suffix and put it in place whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part.{path.name}")
    Image.fromarray(image).save(part, quality=92)
    part.replace(path)
