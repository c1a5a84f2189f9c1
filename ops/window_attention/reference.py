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
    if isinstance(condition, bool):
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
    rows = _window_positions(H, window[0], shift[0], qkv.device)  # (Hp / rows, rows)
    cols = _window_positions(W, window[1], shift[1], qkv.device)
    N = window[0] * window[1]
    tokens = _gather(qkv, rows, cols, padding).view(-1, N, 3, h, d)
    q, k, v = tokens.permute(2, 0, 3, 1, 4)  # each (B * n, h, N, d)
    if cosine_scale is not None:
        q, k, scale = _unit(q) * cosine_scale.to(q.dtype)[:, None, None], _unit(k), 1.0
    logits = None if bias is None else bias.to(q.dtype)[None]
    if not (known(shift[0] == 0) and known(shift[1] == 0)):
        mask = _region_mask(rows.shape, cols.shape, shift, q)[:, None]
        logits = mask.expand(-1, h, -1, -1) if logits is None else logits + mask
        logits = logits.repeat(B, 1, 1, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=logits, scale=scale)
    return _scatter(out.transpose(1, 2), B, (H, W), window, shift)


def _window_positions(size: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Index of the padded axis that stands at each place of each window: (windows, window)."""
    padded = (size + window - 1) // window * window
    return ((torch.arange(padded, device=device) + shift) % padded).view(-1, window)


def _gather(qkv: Tensor, rows: Tensor, cols: Tensor, padding: Tensor | None) -> Tensor:
    """Windows of the padded, rolled map: (B, n * N, 3, h, d)."""
    B, H, W, _, h, d = qkv.shape
    y, x = rows[:, None, :, None], cols[None, :, None, :]
    index = y.clamp(max=H - 1) * W + x.clamp(max=W - 1)  # (Hp / rows, Wp / columns, rows, columns)
    tokens = qkv.reshape(B, H * W, 3, h, d).index_select(1, index.flatten())
    if known(rows.numel() == H) and known(cols.numel() == W):
        return tokens
    inside = ((y < H) & (x < W)).view(1, -1, 1, 1, 1)
    beyond = tokens.new_zeros(()) if padding is None else padding.to(tokens.dtype)
    return torch.where(inside, tokens, beyond)


def _scatter(windows: Tensor, B: int, size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Puts windows (B * n, N, h, d) back in their place on the map: (B, H, W, h, d)."""
    (H, W), (h, d) = size, windows.shape[2:]
    y = _rolled_positions(H, window[0], shift[0], windows.device)[:, None]
    x = _rolled_positions(W, window[1], shift[1], windows.device)[None, :]
    across = (W + window[1] - 1) // window[1]
    index = (y // window[0] * across + x // window[1]) * (window[0] * window[1])
    index = index + y % window[0] * window[1] + x % window[1]
    return windows.reshape(B, -1, h, d).index_select(1, index.flatten()).view(B, H, W, h, d)


def _rolled_positions(size: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Where each position of an axis stands after padding and rolling: (size,)."""
    padded = (size + window - 1) // window * window
    return (torch.arange(size, device=device) - shift) % padded


def _region_mask(rows: torch.Size, cols: torch.Size, shift: tuple[int, int], like: Tensor) -> Tensor:
    """MASKED where two positions of a window come from different regions of the rolled map, else 0: (n, N, N)."""
    row_part, col_part = _region(rows, shift[0], like.device), _region(cols, shift[1], like.device)
    label = (3 * row_part[:, None, :, None] + col_part[None, :, None, :]).view(-1, rows[1] * cols[1])
    return (label[:, :, None] != label[:, None, :]).to(like.dtype) * MASKED


def _region(shape: torch.Size, shift: int, device: torch.device) -> Tensor:
    """Which of [0, Hp - rows), [Hp - rows, Hp - shift), [Hp - shift, Hp) a position lies in: (windows, window)."""
    count, window = shape
    position = torch.arange(count * window, device=device)
    part = (position >= (count - 1) * window).int() + (position >= count * window - shift).int()
    return part.view(count, window)


def _unit(x: Tensor) -> Tensor:
    """Vectors of length one, worked out in float32 at least: half precision cannot hold the floor of the norm."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=NORM_FLOOR).to(x.dtype)
