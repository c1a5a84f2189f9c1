"""The published recipe: sizes, crops that are drawn again, colours, labels that follow the image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from vizoo.train.segmentation.transforms import (
    PhotometricDistortion,
    ResizeTransform,
    Sample,
    ScaleCropTransform,
    resize,
)
from vizoo.train.transforms import build_transform


def scene(height: int = 60, width: int = 90) -> Sample:
    """Labels 0 and 1 left and right, 2 in a square; the image is bright in the channel of the label."""
    labels = np.zeros((height, width), np.uint8)
    labels[:, width // 2 :] = 1
    labels[height // 4 : height // 2, width // 4 : width // 2] = 2
    return Sample(np.eye(3, dtype=np.uint8)[labels] * 255, labels)


def agree(sample: Sample) -> float:
    """Share of the pixels whose brightest channel is their label."""
    assert sample.image.dtype == sample.labels.dtype == np.uint8
    assert sample.image.shape == (*sample.labels.shape, 3)
    return float((sample.image.argmax(2) == sample.labels).mean())


def plain(**options: Any) -> ScaleCropTransform:
    return ScaleCropTransform(**{"scale": (120, 60), "crop": 48, "distort": False, **options})


def test_labels_follow_the_image() -> None:
    transform = plain()
    for _ in range(40):
        found = transform(scene())
        assert agree(found) > 0.9
        assert set(np.unique(found.labels)) <= {0, 1, 2}
        assert max(found.labels.shape) <= 48


def test_resizing_is_opencvs() -> None:
    sample = scene(37, 53)
    found = resize(sample, 50, 71)
    assert np.array_equal(found.image, cv2.resize(sample.image, (71, 50), interpolation=cv2.INTER_LINEAR))
    assert np.array_equal(found.labels, cv2.resize(sample.labels, (71, 50), interpolation=cv2.INTER_NEAREST))
    assert resize(sample, 37, 53) is sample


def test_each_side_of_the_scale_is_truncated(monkeypatch: pytest.MonkeyPatch) -> None:
    """At ratio 0.7777 the limits are 1592 and 398 pixels."""
    monkeypatch.setattr("vizoo.train.segmentation.transforms.uniform", lambda low, high: 0.7777)
    transform = ScaleCropTransform(crop=4000, distort=False, hflip=0.0)
    assert transform(scene(512, 683)).labels.shape == (398, 531)
    assert transform(scene(100, 900)).labels.shape == (177, 1592)


def test_ratios_span_their_range() -> None:
    transform = ScaleCropTransform(crop=5000, distort=False, scale=(400, 100))
    heights = [transform(scene(50, 75)).labels.shape[0] for _ in range(150)]
    assert 50 <= min(heights) < 60
    assert 190 < max(heights) <= 200


def test_images_smaller_than_the_crop_stay_smaller() -> None:
    found = plain(ratio=(0.5, 0.5))(scene())
    assert found.labels.shape == (30, 45)
    wide = plain(ratio=(1, 1), crop=(20, 500))(scene())
    assert wide.labels.shape == (20, 90)


@pytest.mark.parametrize(("height", "width"), [(1, 1000), (1000, 1), (3, 5000)])
def test_extreme_shapes_keep_a_pixel(height: int, width: int) -> None:
    for transform in (ScaleCropTransform(), ResizeTransform()):
        found = transform(Sample(np.zeros((height, width, 3), np.uint8), np.zeros((height, width), np.uint8)))
        assert min(found.image.shape) >= 1


def corner() -> Sample:
    """One class but for a corner that few crops of 30 x 30 meet."""
    labels = np.zeros((100, 100), np.uint8)
    labels[65:, 65:] = 1
    return Sample(np.zeros((100, 100, 3), np.uint8), labels)


def varied(**options: Any) -> int:
    transform = plain(scale=(100, 100), ratio=(1, 1), crop=30, **options)
    return sum(len(np.unique(transform(corner()).labels)) > 1 for _ in range(100))


def test_crops_of_one_class_are_drawn_again() -> None:
    once, again = varied(retries=0), varied()
    assert once < 40
    assert again > once + 20
    assert varied(max_share=1) < 40  # every crop is accepted
    assert varied(retries=200) == 100


def test_the_largest_share_is_of_labelled_pixels() -> None:
    transform = plain()
    labels = np.full((10, 10), 255, np.uint8)
    labels[0, :4] = (0, 0, 0, 1)
    assert not transform._is_varied(labels), "three of four is not less than 75 %"
    labels[0, 3:5] = 1
    assert transform._is_varied(labels)
    assert not transform._is_varied(np.full((3, 3), 255, np.uint8))
    assert not transform._is_varied(np.zeros((3, 3), np.uint8))


def test_half_of_the_images_are_flipped() -> None:
    transform = plain(scale=(90, 60), ratio=(1, 1), crop=100)
    flipped = sum(transform(scene()).labels[0, 0] == 1 for _ in range(200))
    assert 70 < flipped < 130


def test_distortion_changes_colours_alone() -> None:
    transform = ScaleCropTransform(scale=(90, 60), ratio=(1, 1), crop=100, hflip=0.0)
    sample = scene()
    found = [transform(sample) for _ in range(30)]
    assert all(np.array_equal(one.labels, sample.labels) for one in found)
    assert len({one.image.tobytes() for one in found}) > 20


def parts(monkeypatch: pytest.MonkeyPatch, coins: list[int], value: float, image: np.ndarray) -> np.ndarray:
    """The distortion with given coins, and `value` for every number drawn."""
    thrown = iter(coins)
    name = "vizoo.train.segmentation.transforms"
    monkeypatch.setattr(f"{name}._coin", lambda: bool(next(thrown)))
    monkeypatch.setattr(f"{name}.uniform", lambda low, high: value)
    monkeypatch.setattr(f"{name}.integer", lambda low, high: int(value))
    found = PhotometricDistortion()(image)
    assert next(thrown, None) is None
    return found


def test_each_step_of_the_distortion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coins: brightness, contrast late, contrast (early), saturation, hue, contrast (late)."""
    image = np.array([[[10, 100, 250], [60, 60, 60]]], np.uint8)
    assert np.array_equal(parts(monkeypatch, [0, 0, 0, 0, 0], 1, image), image)
    assert parts(monkeypatch, [1, 0, 0, 0, 0], 20.7, image)[0].tolist() == [[30, 120, 255], [80, 80, 80]]
    assert parts(monkeypatch, [1, 0, 0, 0, 0], -20, image)[0].tolist() == [[0, 80, 230], [40, 40, 40]]
    for coins in ([0, 0, 1, 0, 0], [0, 1, 0, 0, 1]):
        assert parts(monkeypatch, coins, 1.5, image)[0].tolist() == [[15, 150, 255], [90, 90, 90]]
    gray = parts(monkeypatch, [0, 0, 0, 1, 0], 0.0, image)[0].tolist()
    assert gray == [[250, 250, 250], [60, 60, 60]]
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    turned = parts(monkeypatch, [0, 0, 0, 0, 1], -150, image)
    expected = hsv.copy()
    expected[0, 0, 0] = (int(hsv[0, 0, 0]) - 150) % 180
    expected[0, 1, 0] = 30
    assert np.array_equal(turned, cv2.cvtColor(expected, cv2.COLOR_HSV2RGB))


def test_draws_follow_torchs_generator_alone() -> None:
    transform = ScaleCropTransform(scale=(120, 60), crop=40, extra=[{"type": "Affine", "p": 1.0}])
    for seed in range(5):
        torch.manual_seed(seed)
        first = transform(scene())
        np.random.seed(seed + 1)  # noqa: NPY002 -- it must not matter
        torch.manual_seed(seed)
        again = transform(scene())
        assert np.array_equal(first.image, again.image)
        assert np.array_equal(first.labels, again.labels)


def test_albumentations_take_the_labels_along() -> None:
    extra = [{"type": "Affine", "rotate": (90, 90), "p": 1.0}]
    transform = plain(scale=(60, 60), ratio=(1, 1), crop=60, hflip=0.0, max_share=1, extra=extra)
    found = transform(scene(60, 60))
    assert agree(found) > 0.9
    assert not np.array_equal(found.labels, scene(60, 60).labels)


def test_the_test_resizes_the_image_alone() -> None:
    found = ResizeTransform()(scene(512, 683))
    assert found.image.shape == (512, 683, 3)
    found = ResizeTransform()(scene(60, 90))
    assert found.image.shape == (512, 768, 3)
    assert np.array_equal(found.labels, scene(60, 90).labels)


def test_configs() -> None:
    made: Any = build_transform({"type": ScaleCropTransform, "crop": (32, 40), "distort": {"hue": 0}})
    assert made.crop == (32, 40)
    assert made.distort.hue == 0
    assert max(made(scene()).labels.shape) <= 40


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ScaleCropTransform(scale=(0, 5)), r"scale must be two sides of 1 pixel or more, got \(0, 5\)"),
        (lambda: ScaleCropTransform(crop=0), r"crop must be two sides of 1 pixel or more, got \(0, 0\)"),
        (lambda: ScaleCropTransform(ratio=(2, 1)), r"ratio must be a range .* got \(2, 1\)"),
        (lambda: ScaleCropTransform(max_share=75), r"max_share must lie in \[0, 1\], got 75"),
        (lambda: ScaleCropTransform(hflip=-1), r"hflip must lie in \[0, 1\], got -1"),
        (lambda: ScaleCropTransform(retries=-1), "retries must be 0 or more, got -1"),
        (lambda: ScaleCropTransform(extra=[{"type": "Flop"}]), "albumentations has no transform 'Flop'"),
        (lambda: PhotometricDistortion(contrast=(2, 1)), r"contrast must be a range .* got \(2, 1\)"),
        (lambda: PhotometricDistortion(saturation=(-1, 1)), r"saturation must be a range .* got \(-1, 1\)"),
        (lambda: PhotometricDistortion(hue=181), "brightness must be 0 or more and hue 0 to 180, got 32 and 181"),
        (lambda: ResizeTransform(scale=(5,)), r"scale must be two sides of 1 pixel or more, got \(5,\)"),
    ],
)
def test_refusals(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
