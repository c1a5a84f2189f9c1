"""Layers that at least two families share unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizoo.ops import depthwise_conv, gelu_linear, layer_norm
from vizoo.ops.tracing import DYNAMO_KNOWS_STATICALLY, known


class DropPath(nn.Module):
    """Stochastic depth per sample: in training drops a residual branch and scales the kept ones by 1 / (1 - rate).

    Source: Huang et al., Deep Networks with Stochastic Depth, arXiv 1603.09382.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"the drop path rate must lie in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Any (B, ...) tensor to the same shape."""
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * (mask / keep)

    def extra_repr(self) -> str:
        """The rate, for printing."""
        return f"rate={self.rate:g}"


class LayerNorm(nn.LayerNorm):
    """Norm of the last axis, which under autocast writes what the linear layer behind it reads.

    torch's own gives float32 there, and the next layer's conversion passes over the map once more. The arithmetic is
    float32 in both, the value rounded the same.

    Args:
        channels: Length of the last axis.
        keep_float32: Give float32 under autocast, as torch does; for a norm that no linear layer follows.
        eps: Added to the variance.
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, channels: int, keep_float32: bool = False, eps: float = 1e-5) -> None:
        super().__init__(channels, eps)
        self.keep_float32 = keep_float32

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) to the same shape."""
        return layer_norm(x, self.weight, self.bias, eps=self.eps, dtype=self._dtype(x))

    def _dtype(self, x: Tensor) -> torch.dtype:
        device = x.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return x.dtype
        return torch.float32 if self.keep_float32 else torch.get_autocast_dtype(device)


class Mlp(nn.Module):
    """Two linear layers around an exact (erf) GELU, on the last axis."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) to the same shape."""
        return self.contract(self.fc1(x))

    def contract(self, hidden: Tensor) -> Tensor:
        """What follows the first layer, (..., hidden) to (..., channels)."""
        if is_plain(self.fc2):
            return gelu_linear(hidden, self.fc2.weight, self.fc2.bias)
        return self.fc2(F.gelu(hidden))


def is_plain(layer: nn.Module) -> bool:
    """Whether nobody notices if torch's layer is not called, only its parameters used: no adapter, no hook on it."""
    return type(layer) in (nn.Linear, nn.Conv2d) and not (layer._forward_hooks or layer._forward_pre_hooks)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm of a map (B, C, H, W), whose count of batches, on which nothing depends, is in no checkpoint."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("num_batches_tracked", self.num_batches_tracked, persistent=False)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any, **kwargs: Any
    ) -> None:
        # To a state dict that states no version torch would add the count.
        super()._load_from_state_dict(state_dict, prefix, {**local_metadata, "version": 2}, *args, **kwargs)


def convolve(conv: nn.Conv2d, x: Tensor, residual: bool = False, activation: Literal["silu"] | None = None) -> Tensor:
    """A depthwise convolution of a map (B, H, W, C), which `residual` adds the map itself to, then an activation."""
    if is_plain(conv):
        return depthwise_conv(x, conv.weight, conv.bias, residual=residual, activation=activation)
    out = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    out = x + out if residual else out
    return F.silu(out) if activation == "silu" else out


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Zero-pad an image (B, C, H, W) at the bottom and right until `multiple` divides both sides."""
    height, width = x.shape[2:]
    return zero_pad(x, 0, round_up(width, multiple) - width, 0, round_up(height, multiple) - height)


def zero_pad(x: Tensor, *pads: int) -> Tensor:
    """`F.pad`, without the copy that it makes where there is nothing to pad."""
    asking_guards = torch.compiler.is_dynamo_compiling() and not DYNAMO_KNOWS_STATICALLY
    if not asking_guards and all(known(pad == 0) for pad in pads):
        return x
    return F.pad(x, pads)


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """The upper left part of a map: (B, H, W, C) to (B, height, width, C)."""
    # Padding takes less than nothing, too; slicing would ask a compiler which of two free sizes is larger.
    return zero_pad(x, 0, 0, 0, width - x.shape[2], 0, height - x.shape[1])


def round_up(size: int, multiple: int) -> int:
    """The next multiple. Written so that a padded size simplifies to it where sizes are symbolic."""
    return (size + multiple - 1) // multiple * multiple


def smaller(a: int, b: int) -> int:
    """`min` that decides nothing where sizes are symbolic."""
    # Dynamo makes a symbolic min of the plain one, and in older torch breaks the graph at the other.
    return min(a, b) if torch.compiler.is_dynamo_compiling() else cast(int, torch.sym_min(a, b))


def larger(a: int, b: int) -> int:
    """`max` that decides nothing where sizes are symbolic."""
    # Dynamo makes a symbolic max of the plain one, and in older torch breaks the graph at the other.
    return max(a, b) if torch.compiler.is_dynamo_compiling() else cast(int, torch.sym_max(a, b))


def as_linear(weight: Tensor) -> Tensor:
    """Weight of a point-wise convolution (out, in, 1, 1) as that of a linear layer, which stays as it is."""
    return weight.flatten(1)


def resize_grid(table: Tensor, old: Sequence[int], new: Sequence[int], mode: str = "bicubic") -> Tensor:
    """Resize a table of positions to another grid.

    Args:
        table: (1, rows * columns, C).
        old: Its rows and columns.
        new: Those wanted.
        mode: Interpolation, as torch names it.

    Returns:
        (1, L, C) in the dtype of `table`.
    """
    image = table.unflatten(1, tuple(old)).permute(0, 3, 1, 2).to(torch.promote_types(table.dtype, torch.float32))
    image = F.interpolate(image, size=tuple(new), mode=mode, align_corners=False)
    return image.flatten(2).mT.to(table.dtype)
