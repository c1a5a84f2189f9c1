"""Inference modes against plain loops."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vizoo.train.segmentation.inference import (
    MultiScale,
    Sliding,
    Whole,
    build_inference,
    scaled_sides,
    window_starts,
)


def coarse(x: Tensor) -> Tensor:
    """Logits at stride 4 that depend on all that is in view, so that windows differ from the whole."""
    logits = F.avg_pool2d(x, 4, ceil_mode=True)
    return logits * (1 + x.mean()) + torch.arange(logits.shape[-1]) / 50


def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def test_whole_resizes_twice() -> None:
    x = torch.randn(2, 3, 50, 70)
    expected = upsample(upsample(coarse(x), (50, 70)), (101, 33))
    assert torch.equal(Whole()(coarse, x, (101, 33)), expected)
    assert not torch.allclose(expected, upsample(coarse(x), (101, 33)), atol=1e-3), "one resize is something else"


@pytest.mark.parametrize(("height", "width"), [(96, 96), (101, 150), (97, 64), (40, 200), (128, 128)])
def test_sliding_windows(height: int, width: int) -> None:
    x = torch.randn(1, 3, height, width)
    mode = Sliding(crop=(64, 48), stride=(40, 48))
    total, count = np.zeros((3, height, width)), np.zeros((height, width))
    for i in range(max(height - 64 + 40 - 1, 0) // 40 + 1):
        for j in range(max(width - 48 + 48 - 1, 0) // 48 + 1):
            bottom, right = min(i * 40 + 64, height), min(j * 48 + 48, width)
            top, left = max(bottom - 64, 0), max(right - 48, 0)
            part = x[:, :, top:bottom, left:right]
            total[:, top:bottom, left:right] += upsample(coarse(part), (bottom - top, right - left))[0].numpy()
            count[top:bottom, left:right] += 1
    found = mode.at_input_size(coarse, x)[0]
    np.testing.assert_allclose(found.numpy(), total / count, atol=1e-5)
    assert mode(coarse, x, (30, 31)).shape == (1, 3, 30, 31)


def test_windows_reach_the_border() -> None:
    assert window_starts(100, 64, 40) == [0, 36]
    assert window_starts(104, 64, 40) == [0, 40]
    assert window_starts(64, 64, 1) == window_starts(30, 64, 10) == [0]


def test_an_image_inside_one_window_is_read_whole() -> None:
    x = torch.randn(1, 3, 40, 50)
    mode = Sliding(crop=(64, 64), stride=(32, 32))
    assert torch.equal(mode.at_input_size(coarse, x), Whole().at_input_size(coarse, x))


def test_one_scale_gives_the_probabilities_of_the_inner_mode() -> None:
    x, inner = torch.randn(1, 3, 64, 64), Sliding(crop=(48, 48), stride=(16, 16))
    mode = MultiScale(ratios=(1.0,), flip=False, inner=inner)
    torch.testing.assert_close(mode(coarse, x, (60, 70)), inner(coarse, x, (60, 70)).softmax(1))


def test_scales_and_flips_are_averaged() -> None:
    x, parts = torch.randn(1, 3, 64, 96), []
    for size in ((32, 48), (96, 144)):
        scaled = upsample(x, size)
        parts.append(Whole()(coarse, scaled, (50, 80)).softmax(1))
        parts.append(Whole()(coarse, scaled.flip(3), (50, 80)).softmax(1).flip(3))
    found = MultiScale(ratios=(0.5, 1.5))(coarse, x, (50, 80))
    torch.testing.assert_close(found, torch.stack(parts).mean(0))


def test_mirrored_images_have_mirrored_predictions() -> None:
    x, mode = torch.randn(1, 3, 64, 96), MultiScale(ratios=(0.75, 1.0))
    torch.testing.assert_close(mode(coarse, x.flip(3), (64, 96)).flip(3), mode(coarse, x, (64, 96)))


@pytest.mark.parametrize(
    ("sides", "ratio", "scale", "expected"),
    [
        ((480, 640), 1.0, (2048, 512), (512, 683)),
        ((480, 640), 0.5, (2048, 512), (256, 341)),
        ((300, 3000), 1.0, (2048, 512), (205, 2048)),
        ((3000, 300), 1.0, (2048, 512), (2048, 205)),
        ((101, 151), 0.5, None, (51, 76)),
    ],
)
def test_scaled_sides(sides: tuple[int, int], ratio: float, scale: tuple[int, int], expected: tuple[int, int]) -> None:
    assert scaled_sides(sides, ratio, scale) == expected


def test_published_scale_is_that_of_the_file() -> None:
    seen: list[tuple[int, ...]] = []

    def forward(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape[2:]))
        return coarse(x)

    MultiScale(ratios=(0.5, 1.0), flip=False, scale=(2048, 512))(forward, torch.randn(1, 3, 60, 80), (60, 80))
    assert seen == [(256, 341), (512, 683)]


def test_built_from_configs() -> None:
    config = {
        "type": MultiScale,
        "ratios": [1.0, 1.5],
        "inner": {"type": "Sliding", "crop": [64, 64], "stride": [32, 32]},
    }
    expected = MultiScale(ratios=(1.0, 1.5), inner=Sliding(crop=(64, 64), stride=(32, 32)))
    assert build_inference(config) == expected
    assert build_inference(expected) is expected


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Sliding(crop=(16, 64)), r"sides of at least 32, got crop=\(16, 64\)"),
        (lambda: Sliding(crop=(64, 64), stride=(65, 64)), r"strides must lie in 1..crop \(64, 64\), got stride"),
        (lambda: Sliding(crop=(64, 64), stride=(0, 64)), "strides must lie in 1..crop"),
        (lambda: MultiScale(ratios=()), "ratios must be positive and at least one"),
        (lambda: MultiScale(ratios=(1.0, 0.0)), "ratios must be positive"),
    ],
)
def test_impossible_modes(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
