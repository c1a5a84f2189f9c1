from __future__ import annotations

import pytest
import torch

from vizoo.weights.adapt import adapt_input_channels, resize_bias_table, select_classes

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def test_bias_table_of_the_same_window_is_returned_as_it_is() -> None:
    table = torch.randn(169, 3)
    assert resize_bias_table(table, 169) is table


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_table_is_a_bicubic_image_per_head(dtype: torch.dtype) -> None:
    table = torch.randn(13 * 13, 3, dtype=dtype)
    resized = resize_bias_table(table, 23 * 23)
    assert resized.shape == (529, 3)
    assert resized.dtype == dtype
    precise = dtype if dtype == torch.float64 else torch.float32
    for head in range(3):
        image = table[:, head].to(precise).reshape(1, 1, 13, 13)
        wanted = torch.nn.functional.interpolate(image, size=(23, 23), mode="bicubic", align_corners=False)
        assert torch.equal(resized[:, head], wanted.flatten().to(dtype))


def test_bias_table_keeps_rows_and_columns_apart() -> None:
    rows = torch.arange(13.0).repeat_interleave(13)[:, None]  # grows with the row only
    image = resize_bias_table(rows, 23 * 23).reshape(23, 23)
    assert torch.allclose(image, image[:, :1].expand(23, 23), atol=1e-5)
    assert (image.diff(dim=0) > 0).all()


@pytest.mark.parametrize(
    ("shape", "length", "message"),
    [
        ((170, 3), 529, r"the table has 170, nearest 169"),
        ((169, 3), 528, r"\(2 \* window - 1\)\*\*2 rows; the model needs 528"),
        ((169, 3), 16, r"the model needs 16, nearest 25"),
        ((169, 3), 0, r"the model needs 0, nearest 1"),
        ((169,), 529, r"must be \(offsets, heads\), got shape \(169,\)"),
    ],
)
def test_bias_table_of_no_square_window_is_refused(shape: tuple[int, ...], length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resize_bias_table(torch.zeros(shape), length)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_input_channel_computes_on_gray_what_three_did(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 3, 4, 4, dtype=dtype)
    adapted = adapt_input_channels(weight, 1)
    assert adapted.dtype == dtype
    gray = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    wanted = torch.nn.functional.conv2d(gray.expand(-1, 3, -1, -1), weight.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4}.get(dtype, 0.3)
    assert torch.allclose(torch.nn.functional.conv2d(gray, adapted.double()), wanted, atol=tolerance)


@pytest.mark.parametrize("channels", [2, 4, 6, 7])
def test_more_input_channels_repeat_red_green_and_blue(channels: int) -> None:
    weight = torch.randn(8, 3, 4, 4, dtype=torch.float64)
    adapted = adapt_input_channels(weight, channels)
    assert adapted.shape == (8, channels, 4, 4)
    for channel in range(channels):
        assert torch.allclose(adapted[:, channel], weight[:, channel % 3] * 3 / channels)


def test_three_input_channels_change_nothing() -> None:
    weight = torch.randn(8, 3, 4, 4)
    assert adapt_input_channels(weight, 3) is weight


@pytest.mark.parametrize(
    ("shape", "channels", "message"),
    [
        ((8, 4, 4, 4), 1, r"\(out, 3, rows, columns\), got \(8, 4, 4, 4\)"),
        ((8, 3), 1, r"got \(8, 3\)"),
        ((8, 3, 4, 4), 0, r"in_chans must be at least 1, got 0"),
    ],
)
def test_impossible_input_channels_are_refused(shape: tuple[int, ...], channels: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapt_input_channels(torch.zeros(shape), channels)


def test_classes_are_picked_in_the_order_given() -> None:
    for head in (torch.randn(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)):
        picked = select_classes(head, [5, 0, 0])
        assert torch.equal(picked, torch.stack([head[5], head[0], head[0]]))
        assert picked.dtype == torch.float64


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([6], r"rows must lie in 0\.\.5.*got 6"),
        ([1, -1], r"rows must lie in 0\.\.5.*got -1"),
        ([], r"rows must be a non-empty list"),
    ],
)
def test_impossible_classes_are_refused(rows: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_classes(torch.zeros(6, 4), rows)
