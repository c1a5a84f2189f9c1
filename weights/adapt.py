"""Checkpoint tensors for another window, other input channels or other classes. Pure functions, dtype preserving."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_bias_table(table: Tensor, length: int) -> Tensor:
    """Resize a table of relative position biases to another window, by bicubic interpolation per head.

    Args:
        table: Biases of a square window, (S * S, heads) with S = 2 * window - 1, rows in row-major order of the offset.
        length: Rows of the new table, again the square of an odd number.

    Returns:
        (length, heads); the table itself when it already has that length.

    Raises:
        ValueError: If the table has another rank, or either length is not the square of an odd number.
    """
    if table.ndim != 2:
        raise ValueError(f"a bias table must be (offsets, heads), got shape {tuple(table.shape)}")
    old, new = _side(len(table), "the table has"), _side(length, "the model needs")
    if old == new:
        return table
    return _in_float(table, lambda values: _resize_square(values, old, new))


def resize_bias_image(table: Tensor, sides: Sequence[int]) -> Tensor:
    """Resize a table of relative position biases that is laid out as an image per head, by bicubic interpolation.

    Args:
        table: Biases by offset, (heads, 2 * rows - 1, 2 * columns - 1) for a neighborhood of rows x columns positions.
        sides: The last two sizes of the new table, odd as well.

    Returns:
        (heads, *sides); the table itself when it already has these sides.

    Raises:
        ValueError: If the table has another rank, or a side is even.
    """
    if table.ndim != 3:
        raise ValueError(f"a bias image must be (heads, rows, columns), got shape {tuple(table.shape)}")
    size = tuple(sides)
    if len(size) != 2 or any(side < 1 or side % 2 == 0 for side in (*table.shape[1:], *size)):
        raise ValueError(
            "bias images resize between odd sides, 2 * positions - 1 each; "
            f"the table has {tuple(table.shape[1:])}, the model needs {size}"
        )
    if table.shape[1:] == size:
        return table
    return _in_float(table, lambda x: F.interpolate(x[None], size=size, mode="bicubic", align_corners=False)[0])


def adapt_input_channels(weight: Tensor, in_chans: int) -> Tensor:
    """Make an RGB stem take another number of channels, keeping the scale of its output, as timm does.

    One channel takes the sum over red, green and blue, which is exact for a gray image stored as RGB; any other
    number repeats the three in turn and rescales by 3 / in_chans.

    Args:
        weight: Convolution weight of an RGB stem, (out, 3, rows, columns).
        in_chans: Input channels wanted.

    Returns:
        (out, in_chans, rows, columns); the weight itself when `in_chans` is 3.

    Raises:
        ValueError: If the weight is not that of an RGB stem or `in_chans` is below 1.
    """
    if weight.ndim != 4 or weight.shape[1] != 3:
        raise ValueError(f"input channels adapt from a weight (out, 3, rows, columns), got {tuple(weight.shape)}")
    if in_chans < 1:
        raise ValueError(f"in_chans must be at least 1, got {in_chans}")
    if in_chans == 3:
        return weight
    if in_chans == 1:
        return _in_float(weight, lambda values: values.sum(1, keepdim=True))
    source = torch.arange(in_chans, device=weight.device) % 3
    return _in_float(weight, lambda values: values[:, source] * (3 / in_chans))


def select_classes(parameter: Tensor, rows: Sequence[int]) -> Tensor:
    """Pick classes of a classification head, such as the 1,000 ImageNet-1K classes out of 21,841.

    Args:
        parameter: The head's weight (classes, features) or its bias (classes,).
        rows: The class that each new class takes its row from; repeats are allowed.

    Returns:
        (len(rows), ...).

    Raises:
        ValueError: If there are no rows, or one lies outside the head.
    """
    index = torch.as_tensor(rows, dtype=torch.long, device=parameter.device)
    if index.ndim != 1 or not len(index):
        raise ValueError(f"rows must be a non-empty list of class numbers, got shape {tuple(index.shape)}")
    outside = index[(index < 0) | (index >= len(parameter))]
    if len(outside):
        raise ValueError(f"rows must lie in 0..{len(parameter) - 1}, the classes of this head, got {outside[0].item()}")
    return parameter[index]


def _side(length: int, what: str) -> int:
    """Side S of a square table of `length` = S * S offsets; S is odd, since a window w has 2w - 1 offsets per axis."""
    side = isqrt(max(length, 0))
    if side * side != length or side % 2 == 0:
        nearest = (max(side, 1) // 2 * 2 + 1) ** 2
        raise ValueError(
            f"bias tables resize between square windows of (2 * window - 1)**2 rows; {what} {length}, nearest {nearest}"
        )
    return side


def _resize_square(table: Tensor, old: int, new: int) -> Tensor:
    image = table.T.reshape(1, -1, old, old)  # (1, heads, S, S)
    image = F.interpolate(image, size=(new, new), mode="bicubic", align_corners=False)
    return image.reshape(-1, new * new).T.contiguous()


def _in_float(tensor: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute in at least float32 and return to the dtype of `tensor`: sums of half precision weights would round."""
    return compute(tensor.to(torch.promote_types(tensor.dtype, torch.float32))).to(tensor.dtype)
