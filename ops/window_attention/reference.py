"""Shifted-window attention in plain torch: the definition, and what runs on a CPU.

Letters: B images; H, W height and width of the map, Hp, Wp after padding to whole windows; n windows of a map,
N = rows * columns positions of a window; h heads of d channels.

Everything is index arithmetic on positions, so that it also traces with a symbolic H, W, window and shift.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vizoo.ops.tracing import known

MASKED = -100.0
"""Added to the logit of two positions that the cyclic shift made neighbours. Finite, as in the official code."""

NORM_FLOOR = 1e-12
"""Smallest divisor when a vector is normalised for cosine attention."""


def window_attention_reference(
    qkv: Tensor,
    bias: Tensor | None,
    cosine_scale: Tensor | None,
    padding: Tensor | None,
    *,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
) -> Tensor:
    """Computes what `vizoo.ops.window_attention` defines: gathers the windows, attends in them, puts them back."""
    B, H, W, _, h, d = qkv.shape
    n, N = _window_count(H, W, window), window[0] * window[1]
    tables = _cached_tables if _is_concrete(H, W, *window, *shift) else _tables
    source, target, inside, label = tables(n, H, W, window, shift, qkv.device)
    tokens = _gather(qkv, source, inside, padding)
    q, k, v = tokens.view(B * n, N, 3, h, d).permute(2, 0, 3, 1, 4)  # each (B * n, h, N, d)
    if cosine_scale is not None:
        q, k, scale = _unit(q) * cosine_scale.to(q.dtype)[:, None, None], _unit(k), 1.0
    logits = None if bias is None else bias.to(q.dtype)[None]
    if not (known(shift[0] == 0) and known(shift[1] == 0)):
        mask = _mask(label).to(q.dtype)[:, None]
        logits = mask.expand(n, h, N, N) if logits is None else logits + mask
    out = _attend(q * scale, k, v, logits).transpose(1, 2).reshape(B, n * N, h, d)
    return out.index_select(1, target).view(B, H, W, h, d)


def _attend(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None) -> Tensor:
    """softmax(q k^T + added) v of windows (B * n, h, N, d); `added` is (1, h, N, N), or (n, h, N, N) by window."""
    if q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64):
        # torch's fused attention gains nothing from a second thread on windows; its parts do.
        logits = q @ k.transpose(-2, -1)
        if added is not None:
            logits = (logits.unflatten(0, (-1, added.shape[0])) + added).flatten(0, 1)
        return logits.softmax(-1) @ v
    if added is not None and not known(added.shape[0] == 1):
        added = added.repeat(q.shape[0] // added.shape[0], 1, 1, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=1.0)


def _is_concrete(*sizes: int) -> bool:
    """Whether sizes are plain numbers outside of any trace."""
    return not torch.compiler.is_compiling() and all(type(size) is int for size in sizes)


def _tables(
    n: int, H: int, W: int, window: tuple[int, int], shift: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Where each position of a window comes from and goes to.

    Returns:
        Index on the map (n * N,) of each position, index in the windows (H * W,) of each pixel, which positions lie on
        the map (n * N,), None if all do, and the label of the region that a position came from (n, N).
    """
    row, col = _rolled_positions(n, H, W, window, device)
    Hp, Wp = _windows(H, window[0]) * window[0], _windows(W, window[1]) * window[1]
    y, x = _unrolled(row.flatten(), shift[0], Hp), _unrolled(col.flatten(), shift[1], Wp)
    label = 3 * _region(row, H, window[0], shift[0]) + _region(col, W, window[1], shift[1])
    target = _target(H, W, window, shift, device)
    if known(Hp == H) and known(Wp == W):
        return y * W + x, target, None, label
    return y.clamp(max=H - 1) * W + x.clamp(max=W - 1), target, (y < H) & (x < W), label


@lru_cache(maxsize=64)  # a model has two for each stage; made anew they take a twentieth of a small image's time
def _cached_tables(
    n: int, H: int, W: int, window: tuple[int, int], shift: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    with torch.inference_mode(False):  # tensors made in inference mode could not serve a later training step
        return _tables(n, H, W, window, shift, device)


def _windows(size: int, window: int) -> int:
    return (size + window - 1) // window


def _window_count(H: int, W: int, window: tuple[int, int]) -> int:
    """Windows of a map. One to spare if tracing cannot tell whether there are several: a size of 1 would be a guard."""
    count = _windows(H, window[0]) * _windows(W, window[1])
    return count if known(count == 1) or known(count > 1) else count + 1


def _rolled_positions(n: int, H: int, W: int, window: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column on the rolled map of each position of each window, a spare one repeating the last: (n, N) each."""
    rows, cols = window
    across = _windows(W, cols)
    number = torch.arange(n, device=device)[:, None].clamp(max=_windows(H, rows) * across - 1)
    place = torch.arange(rows * cols, device=device)[None, :]
    return number // across * rows + place // cols, number % across * cols + place % cols


def _gather(qkv: Tensor, source: Tensor, inside: Tensor | None, padding: Tensor | None) -> Tensor:
    """Windows of the padded, rolled map: (B, n * N, 3, h, d)."""
    B, H, W, _, h, d = qkv.shape
    tokens = qkv.reshape(B, H * W, 3, h, d).index_select(1, source)
    if inside is None:
        return tokens
    beyond = tokens.new_zeros(()) if padding is None else padding.to(tokens.dtype)
    return torch.where(inside[:, None, None, None], tokens, beyond)


def _unrolled(position: Tensor, shift: int, size: int) -> Tensor:
    position = position + shift
    return position - (position >= size) * size  # cheaper than the remainder


def _rolled(position: Tensor, shift: int, size: int) -> Tensor:
    """Where a position of a padded axis lies once the axis is rolled back by a shift."""
    position = position - shift
    # Not the remainder: Inductor loses its bounds and, on a CPU, fails to index with it.
    return position + (position < 0) * size


def _target(H: int, W: int, window: tuple[int, int], shift: tuple[int, int], device: torch.device) -> Tensor:
    """Index in the windows, one after the other, of each pixel of the map: (H * W,)."""
    rows, cols = window
    y = _rolled(torch.arange(H, device=device), shift[0], _windows(H, rows) * rows)[:, None]
    x = _rolled(torch.arange(W, device=device), shift[1], _windows(W, cols) * cols)[None, :]
    number = y // rows * _windows(W, cols) + x // cols
    return (number * (rows * cols) + y % rows * cols + x % cols).view(H * W)


def _region(position: Tensor, size: int, window: int, shift: int) -> Tensor:
    """Which of [0, Hp - rows), [Hp - rows, Hp - shift), [Hp - shift, Hp) a position of an axis lies in: 0, 1, 2."""
    padded = _windows(size, window) * window
    return (position >= padded - window).int() + (position >= padded - shift).int()


def _mask(label: Tensor) -> Tensor:
    """MASKED for two positions of a window whose labels differ, else 0: (n, N) -> (n, N, N)."""
    return (label[:, :, None] != label[:, None, :]) * MASKED


def _unit(x: Tensor) -> Tensor:
    """Vectors of length one, worked out in float32 at least: half precision cannot hold the floor of the norm."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=NORM_FLOOR).to(x.dtype)
