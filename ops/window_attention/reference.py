"""Shifted-window attention in plain torch: the definition, and what runs on a CPU.

Letters: B images; H, W height and width of the map, Hp, Wp after padding to whole windows; n windows of a map,
N = rows * columns positions of a window; h heads of d channels.

Everything is index arithmetic on positions, so that it also traces with a symbolic H, W, window and shift.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED = -100.0
"""Added to the logit of two positions that the cyclic shift made neighbours. Finite, as in the official code."""

NORM_FLOOR = 1e-12
"""Smallest divisor when a vector is normalised for cosine attention."""


def known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition holds for every size the trace stands for. Never adds a guard."""
    if isinstance(condition, bool) and not torch.compiler.is_compiling():  # Dynamo calls a symbolic truth a bool
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # pulls in sympy: only when tracing

    return statically_known_true(condition)


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
    """Computes what `vizoo.ops.window_attention` defines: gathers the windows, then `scaled_dot_product_attention`."""
    B, H, W, _, h, d = qkv.shape
    n, N = _window_count(H, W, window), window[0] * window[1]
    row, col = _rolled_positions(n, H, W, window, qkv.device)
    tokens = _gather(qkv, row, col, padding, window, shift)
    q, k, v = tokens.view(B * n, N, 3, h, d).permute(2, 0, 3, 1, 4)  # each (B * n, h, N, d)
    if cosine_scale is not None:
        q, k, scale = _unit(q) * cosine_scale.to(q.dtype)[:, None, None], _unit(k), 1.0
    logits = None if bias is None else bias.to(q.dtype)[None]
    if not (known(shift[0] == 0) and known(shift[1] == 0)):
        label = 3 * _region(row, H, window[0], shift[0]) + _region(col, W, window[1], shift[1])
        mask = _mask(label).to(q.dtype)[:, None]
        logits = mask.expand(n, h, N, N) if logits is None else logits + mask
        logits = logits.repeat(B, 1, 1, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=logits, scale=scale)
    return _scatter(out.transpose(1, 2).reshape(B, n * N, h, d), H, W, window, shift)


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


def _gather(
    qkv: Tensor, row: Tensor, col: Tensor, padding: Tensor | None, window: tuple[int, int], shift: tuple[int, int]
) -> Tensor:
    """Windows of the padded, rolled map: (B, n * N, 3, h, d)."""
    B, H, W, _, h, d = qkv.shape
    Hp, Wp = _windows(H, window[0]) * window[0], _windows(W, window[1]) * window[1]
    y, x = _unrolled(row.flatten(), shift[0], Hp), _unrolled(col.flatten(), shift[1], Wp)
    tokens = qkv.reshape(B, H * W, 3, h, d)
    if known(Hp == H) and known(Wp == W):
        return tokens.index_select(1, y * W + x)
    tokens = tokens.index_select(1, y.clamp(max=H - 1) * W + x.clamp(max=W - 1))
    inside = ((y < H) & (x < W))[:, None, None, None]
    return torch.where(inside, tokens, tokens.new_zeros(()) if padding is None else padding.to(tokens.dtype))


def _unrolled(position: Tensor, shift: int, size: int) -> Tensor:
    position = position + shift
    return position - (position >= size) * size  # cheaper than the remainder


def _scatter(windows: Tensor, H: int, W: int, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Puts the positions of all windows (B, n * N, h, d) back in their place on the map: (B, H, W, h, d)."""
    rows, cols = window
    B, _, h, d = windows.shape
    y = ((torch.arange(H, device=windows.device) - shift[0]) % (_windows(H, rows) * rows))[:, None]
    x = ((torch.arange(W, device=windows.device) - shift[1]) % (_windows(W, cols) * cols))[None, :]
    number = y // rows * _windows(W, cols) + x // cols
    index = number * (rows * cols) + y % rows * cols + x % cols
    return windows.index_select(1, index.view(H * W)).view(B, H, W, h, d)


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
