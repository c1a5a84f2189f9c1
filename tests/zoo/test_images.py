from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vizoo.images import find_images, load_image, to_rgb

Pixels = np.ndarray


@pytest.fixture
def ramp() -> Pixels:
    """A small picture with different rows and columns (6, 10, 3)."""
    y, x = np.mgrid[0:6, 0:10]
    return np.stack([x * 25, y * 50, (x + y) * 15], axis=2).astype(np.uint8)


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_rgb_is_read_unchanged(tmp_path: Path, ramp: Pixels) -> None:
    image = load_image(save(Image.fromarray(ramp), tmp_path / "a.png"))
    assert image.mode == "RGB"
    assert np.array_equal(image, ramp)
    assert np.array_equal(load_image(str(tmp_path / "a.png")), ramp)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, ramp: Pixels, orientation: int) -> None:
    # What a camera stores when it is held so that the upright picture is `ramp`.
    stored = {
        1: ramp,
        2: ramp[:, ::-1],
        3: ramp[::-1, ::-1],
        4: ramp[::-1],
        5: ramp.transpose(1, 0, 2),
        6: np.rot90(ramp),
        7: ramp[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(ramp, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(Image.fromarray(np.ascontiguousarray(stored)), tmp_path / "a.png", exif=exif)
    assert np.array_equal(load_image(path), ramp)


def test_gray_gets_equal_channels(tmp_path: Path, ramp: Pixels) -> None:
    gray = ramp[..., 0]
    loaded = np.asarray(load_image(save(Image.fromarray(gray), tmp_path / "a.png")))
    assert np.array_equal(loaded, np.stack([gray] * 3, axis=2))


def test_one_bit_and_palette(tmp_path: Path, ramp: Pixels) -> None:
    image = Image.fromarray(ramp)
    bits = load_image(save(image.convert("1"), tmp_path / "bits.png"))
    assert set(np.unique(bits)) <= {0, 255}
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(load_image(save(palette, tmp_path / "palette.png")), palette.convert("RGB"))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257], [32768, 65278, 65407, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        loaded = np.asarray(load_image(save(Image.fromarray(values), tmp_path / name)))
        assert loaded[..., 0].tolist() == [[0, 0, 1, 1], [128, 254, 255, 255]]
        assert np.array_equal(loaded[..., 0], loaded[..., 2])


def test_big_endian_sixteen_bits() -> None:
    stored = np.array([[0, 32768, 65535]], dtype=">u2")
    image = Image.frombytes("I;16B", (3, 1), stored.tobytes())
    assert np.asarray(to_rgb(image))[..., 0].tolist() == [[0, 128, 255]]


def test_sixteen_bits_in_wide_integers() -> None:
    image = Image.fromarray(np.array([[0, 65535]], dtype=np.int32))
    assert np.asarray(to_rgb(image))[..., 1].tolist() == [[0, 255]]


@pytest.mark.parametrize("values", [np.array([[0.0, 1.0]], np.float32), np.array([[0, 70000]], np.int32)])
def test_values_without_a_range_are_refused(tmp_path: Path, values: Pixels) -> None:
    path = save(Image.fromarray(values), tmp_path / "deep.tif")
    with pytest.raises(ValueError, match=r"deep\.tif: mode '[IF]' with values from .* has no fixed range"):
        load_image(path)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_over_white(tmp_path: Path, mode: str) -> None:
    image = Image.new(mode, (3, 1))
    ink = (0, 0, 0) if mode == "RGBA" else (0,)
    for x, alpha in enumerate((0, 128, 255)):
        image.putpixel((x, 0), (*ink, alpha))
    loaded = np.asarray(load_image(save(image, tmp_path / "a.png")))
    assert loaded[0, :, 0].tolist() == [255, 127, 0]


def test_a_transparent_palette_and_colour_lie_over_white(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    path = save(palette, tmp_path / "a.png", transparency=0)
    assert np.asarray(load_image(path)).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    keyed = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    path = save(keyed, tmp_path / "b.png", transparency=(1, 2, 3))
    assert np.asarray(load_image(path)).tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_cmyk(tmp_path: Path) -> None:
    path = save(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), tmp_path / "a.jpg", quality=100)
    red, green, blue = np.asarray(load_image(path)).mean((0, 1))
    assert red < 5
    assert min(green, blue) > 250


def test_one_pixel(tmp_path: Path) -> None:
    path = save(Image.new("RGB", (1, 1), (1, 2, 3)), tmp_path / "a.png")
    assert np.asarray(load_image(path)).tolist() == [[[1, 2, 3]]]


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    path = save(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(path).getpixel((0, 0)) == (255, 0, 0)


def test_missing_folder_and_empty(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no image file .*gone\.png"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(IsADirectoryError, match="is a folder, not an image"):
        load_image(tmp_path)
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match=r"empty\.png is empty \(0 bytes\)"):
        load_image(tmp_path / "empty.png")


def test_not_an_image(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not pixels")
    with pytest.raises(ValueError, match=r"text\.jpg is not an image of a known format"):
        load_image(tmp_path / "text.jpg")


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "gif", "webp", "bmp"])
def test_truncated_at_every_length(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    whole = io.BytesIO()
    Image.fromarray(noise).save(whole, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
    data = whole.getvalue()
    path = tmp_path / f"cut.{suffix}"
    for share in (0.02, 0.1, 0.5, 0.9):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ValueError, match=rf"cut\.{suffix} is (corrupt or truncated|not an image)"):
            load_image(path)


def test_corrupt_data_inside_a_sound_header(tmp_path: Path, ramp: Pixels) -> None:
    path = save(Image.fromarray(ramp), tmp_path / "bad.png")
    data = bytearray(path.read_bytes())
    start = data.index(b"IDAT") + 4
    data[start + 2 : start + 12] = bytes(10)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"bad\.png is corrupt or truncated"):
        load_image(path)


def test_damaged_exif_is_ignored(tmp_path: Path, ramp: Pixels) -> None:
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x12\x01"
    path = save(Image.fromarray(ramp), tmp_path / "a.png", exif=exif)
    assert np.array_equal(load_image(path), ramp)


def bomb(width: int, height: int) -> bytes:
    """A PNG header that promises a huge image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_too_large(tmp_path: Path, ramp: Pixels) -> None:
    path = save(Image.fromarray(ramp), tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png is too large: 10 x 6 = 60 pixels, the limit is max_pixels=59"):
        load_image(path, max_pixels=59)
    assert load_image(path, max_pixels=60).size == (10, 6)
    path.write_bytes(bomb(12000, 10000))
    with pytest.raises(ValueError, match="12000 x 10000 = 120000000 pixels, the limit is max_pixels=100000000"):
        load_image(path)
    path.write_bytes(bomb(60000, 60000))
    with pytest.raises(ValueError, match=r"a\.png is too large: Image size \(3600000000 pixels\) exceeds limit"):
        load_image(path, max_pixels=10**12)


def test_no_warning_leaks_and_no_filter_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(bomb(12000, 10000))  # Pillow warns of this size
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="corrupt or truncated"):
            load_image(path, max_pixels=10**9)
    assert not seen
    assert warnings.filters == before


def test_find_images(tmp_path: Path, ramp: Pixels) -> None:
    image = Image.fromarray(ramp)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.PNG", "a.jpg", "deep/er/c.webp", "._a.jpg"):
        save(image, tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    save(image, tmp_path / ".cache" / "thumb.png")
    assert find_images(tmp_path) == [tmp_path / name for name in ("a.jpg", "b.PNG", "deep/er/c.webp")]
    assert find_images(tmp_path / "a.jpg") == [tmp_path / "a.jpg"]


def test_find_images_without_any(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no image; known suffixes: \.bmp"):
        find_images(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder .*gone"):
        find_images(tmp_path / "gone")
