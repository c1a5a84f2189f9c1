"""Reading image files, whatever their orientation, mode or depth, into 8-bit RGB."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
MAX_PIXELS = 100_000_000
"""Pixels that `load_image` decodes at most: 300 MB as RGB."""

BLEND_MODES = ("RGBA", "LA", "PA", "RGBa", "La")


def load_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS, upright: bool = True) -> Image.Image:
    """Read one image file as 8-bit RGB, turned the way its EXIF orientation says.

    Gray images get three equal channels; 16-bit gray is scaled to 8 bits (65535 becomes 255), not clipped; transparent
    pixels are laid over white; an animation gives its first frame.

    Args:
        path: The file.
        max_pixels: Refuse larger images before decoding them: a small file may unpack to many gigabytes. Pillow's own
            limit, `PIL.Image.MAX_IMAGE_PIXELS` times two, holds as well.
        upright: Turn the image by its EXIF orientation; False leaves it as stored, as COCO's annotations expect.

    Raises:
        FileNotFoundError: There is no such file.
        IsADirectoryError: The path is a folder.
        ValueError: The file is empty, not an image, corrupt, truncated, of a depth without a known range, or too large.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not an image; vizoo.images.find_images lists the images in it")
    if not path.exists():
        raise FileNotFoundError(f"there is no image file {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes), not an image")
    # Pillow warns of odd metadata and of large images: the first does no harm, the second is an error here.
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _open(file, path, max_pixels)
        return _decode(image, path, upright)


def _open(file: BinaryIO, path: Path, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(file)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large: {error}") from error
    except Exception as error:  # parsers of damaged headers raise whatever their code ran into
        raise ValueError(f"{path} is not an image of a known format, or its header is corrupt") from error
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(
            f"{path} is too large: {width} x {height} = {width * height} pixels, the limit is max_pixels={max_pixels}"
        )
    return image


def _decode(image: Image.Image, path: Path, upright: bool) -> Image.Image:
    try:
        image.load()
    except Exception as error:  # decoders of damaged data raise whatever their code ran into
        raise ValueError(f"{path} is corrupt or truncated: {error}") from error
    try:
        return to_rgb(_upright(image) if upright else image)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block states no orientation, and the pixels are sound
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any Pillow mode to 8-bit RGB: 16 bits scaled, transparency laid over white.

    Raises:
        ValueError: A mode whose values have no fixed range (float, 32-bit integers beyond 16 bits).
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _gray_from_deep(image).convert("RGB")
    if image.mode in BLEND_MODES or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _gray_from_deep(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    # Some Pillow versions and formats hand 16-bit gray over in 32-bit integers.
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"mode {image.mode!r} with values from {values.min()} to {values.max()} has no fixed range: "
            "scale the image to 8 or 16 bits"
        )
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def find_images(path: str | os.PathLike[str]) -> list[Path]:
    """Image files below a folder, at any depth, sorted by path; the file itself for a file.

    Names that begin with a dot are skipped: macOS leaves `._x.jpg` files, which are no images, beside the real ones.

    Raises:
        FileNotFoundError: The path does not exist, or no file below it has a suffix of `SUFFIXES`.
    """
    root = Path(path)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise FileNotFoundError(f"there is no file or folder {root}")
    found = sorted(Path(file) for file in walk_images(root))
    if not found:
        raise FileNotFoundError(f"{root} holds no image; known suffixes: {', '.join(SUFFIXES)}")
    return found


def walk_images(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Paths of the image files below a folder, in no particular order; fast enough for ImageNet's 1.3 million."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from walk_images(entry.path)
            elif entry.name.lower().endswith(SUFFIXES):
                yield entry.path
