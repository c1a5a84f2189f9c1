"""Triton kernels of depthwise convolution. A program holds a tile of ROWS x COLUMNS pixels x BLOCK_C channels.

The rows of all images are taken for those of one tall map, `rows` in number: tiles go over the borders of images, which
only the place of a row in its image, H rows high, tells.
The taps of a pixel read the map where they fall: neighbours and taps share it through the caches.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pixels(tile, rows, H, W, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where a tile begins in memory; of each of its pixels the offset from there, the row in its image, the column.

    Pixels beyond the map are placed so far out that no tap of theirs falls on it.
    """
    FAR: tl.constexpr = -8
    across = tl.cdiv(W, COLUMNS)
    first = tile // across * ROWS
    pixel = tl.arange(0, ROWS * COLUMNS)
    row, column = pixel // COLUMNS, tile % across * COLUMNS + pixel % COLUMNS
    base = first.to(tl.int64) * (W * C)
    y = tl.where(first + row < rows, (first + row) % H, FAR)
    return base, (row * W + column) * C, y, tl.where(column < W, column, FAR)


@triton.jit
def _at(pointer, offset, y, x, down, right, H, W, channel, C: tl.constexpr):
    """Numbers of the pixels so many rows down and columns to the right, in float32; zeros outside of the image."""
    real = (y + down >= 0) & (y + down < H) & (x + right >= 0) & (x + right < W)
    real = real[:, None] & (channel < C)[None, :]
    pointer += (down * W + right) * C  # the same for all pixels: places among them are computed once for all taps
    return tl.load(pointer + (offset[:, None] + channel[None, :]), mask=real, other=0.0).to(tl.float32)


@triton.jit
def _vector(pointer, channel, C: tl.constexpr):
    return tl.load(pointer + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _filter(weight, tap, channel, C: tl.constexpr, TAPS: tl.constexpr):
    """Weights of one tap, from (C, TAPS); few, and read again by all programs, so that the cache has them."""
    return tl.load(weight + channel * TAPS + tap, mask=channel < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _row(weight, tap, channel, C: tl.constexpr):
    return (
        _filter(weight, tap, channel, C, 9),
        _filter(weight, tap + 1, channel, C, 9),
        _filter(weight, tap + 2, channel, C, 9),
    )


@triton.jit(do_not_specialize=["rows", "H", "W"])
def forward(
    x,
    weight,
    bias,
    out,
    rows,
    H,
    W,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KERNEL: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FLIP: tl.constexpr,
):
    """One tile of the convolution; with the filters turned by 180 degrees (FLIP) that of x's gradient."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    TAPS: tl.constexpr = KERNEL * KERNEL
    program = tl.program_id(0)
    channel = program % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    base, offset, y, column = _pixels(program // BLOCKS, rows, H, W, C, ROWS, COLUMNS)
    total = tl.zeros((ROWS * COLUMNS, BLOCK_C), tl.float32)
    for tap in tl.static_range(TAPS):
        down, right = tap // KERNEL - KERNEL // 2, tap % KERNEL - KERNEL // 2
        value = _at(x + base, offset, y, column, down, right, H, W, channel, C)
        total += value * _filter(weight, TAPS - 1 - tap if FLIP else tap, channel, C, TAPS)
        if RESIDUAL and tap == TAPS // 2:
            total += value
    if bias is not None:
        total += _vector(bias, channel, C)
    real = ((y >= 0) & (column >= 0))[:, None] & (channel < C)[None, :]
    place = offset[:, None] + channel[None, :]
    tl.store(out + base + place, total.to(out.dtype.element_ty), mask=real)


@triton.jit
def _three(pointer, offset, y, x, down, H, W, channel, C: tl.constexpr, here, total, w0, w1, w2, sum0, sum1, sum2):
    """Takes a row of three taps into the gradients of x and of their weights; also returns what the middle one read."""
    g0 = _at(pointer, offset, y, x, down, 1, H, W, channel, C)
    g1 = _at(pointer, offset, y, x, down, 0, H, W, channel, C)
    g2 = _at(pointer, offset, y, x, down, -1, H, W, channel, C)
    total = total + w0 * g0
    total = total + w1 * g1
    total = total + w2 * g2
    return total, sum0 + here * g0, sum1 + here * g1, sum2 + here * g2, g1


@triton.jit
def _part(parts, values, tap, channel, C: tl.constexpr, TAPS: tl.constexpr):
    """Writes a program's sum for a tap, laid out as the weight is."""
    tl.store(parts + channel * TAPS + tap, tl.sum(values, 0), mask=channel < C)


@triton.jit(do_not_specialize=["rows", "H", "W"])
def backward(
    grad_out,
    x,
    weight,
    grad_x,
    parts,
    rows,
    H,
    W,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    X_GRADIENT: tl.constexpr,
):
    """Gradient of x for 3 x 3 filters, and each program's part of those of weight and bias: (programs, 9 C + C)."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program, programs = tl.program_id(0) // BLOCKS, tl.num_programs(0) // BLOCKS
    channel = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    w0, w1, w2 = _row(weight, 0, channel, C)
    w3, w4, w5 = _row(weight, 3, channel, C)
    w6, w7, w8 = _row(weight, 6, channel, C)
    none = tl.zeros((ROWS * COLUMNS, BLOCK_C), tl.float32)
    s0, s1, s2, s3, s4, s5, s6, s7, s8, by_bias = none, none, none, none, none, none, none, none, none, none
    for tile in range(program, tl.cdiv(rows, ROWS) * tl.cdiv(W, COLUMNS), programs):
        base, offset, y, column = _pixels(tile, rows, H, W, C, ROWS, COLUMNS)
        g, here = grad_out + base, _at(x + base, offset, y, column, 0, 0, H, W, channel, C)
        total, s0, s1, s2, _ = _three(g, offset, y, column, 1, H, W, channel, C, here, none, w0, w1, w2, s0, s1, s2)
        total, s3, s4, s5, own = _three(g, offset, y, column, 0, H, W, channel, C, here, total, w3, w4, w5, s3, s4, s5)
        total, s6, s7, s8, _ = _three(g, offset, y, column, -1, H, W, channel, C, here, total, w6, w7, w8, s6, s7, s8)
        by_bias += own
        if X_GRADIENT:
            if RESIDUAL:
                total += own
            real = ((y >= 0) & (column >= 0))[:, None] & (channel < C)[None, :]
            place = offset[:, None] + channel[None, :]
            tl.store(grad_x + base + place, total.to(grad_x.dtype.element_ty), mask=real)
    parts += program * (10 * C)
    _part(parts, s0, 0, channel, C, 9)
    _part(parts, s1, 1, channel, C, 9)
    _part(parts, s2, 2, channel, C, 9)
    _part(parts, s3, 3, channel, C, 9)
    _part(parts, s4, 4, channel, C, 9)
    _part(parts, s5, 5, channel, C, 9)
    _part(parts, s6, 6, channel, C, 9)
    _part(parts, s7, 7, channel, C, 9)
    _part(parts, s8, 8, channel, C, 9)
    _part(parts + 9 * C, by_bias, 0, channel, C, 1)


@triton.jit(do_not_specialize=["rows", "H", "W"])
def weight_gradient(
    grad_out,
    x,
    parts,
    rows,
    H,
    W,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KERNEL: tl.constexpr,
):
    """Each program's part of the gradients of three taps in a row of filters and of bias: (programs, KERNEL**2 C + C).

    Programs of the same tiles run side by side, so that all but the first find the maps in the cache.
    """
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    THREES: tl.constexpr = (KERNEL + 2) // 3
    TAPS: tl.constexpr = KERNEL * KERNEL
    share = tl.program_id(0) // (THREES * KERNEL)
    row, left = tl.program_id(0) // THREES % KERNEL, tl.program_id(0) % THREES * 3
    program, programs = share // BLOCKS, tl.num_programs(0) // (THREES * KERNEL * BLOCKS)
    channel = share % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    down, right = KERNEL // 2 - row, KERNEL // 2 - left
    none = tl.zeros((ROWS * COLUMNS, BLOCK_C), tl.float32)
    s0, s1, s2, by_bias = none, none, none, none
    for tile in range(program, tl.cdiv(rows, ROWS) * tl.cdiv(W, COLUMNS), programs):
        base, offset, y, column = _pixels(tile, rows, H, W, C, ROWS, COLUMNS)
        g, here = grad_out + base, _at(x + base, offset, y, column, 0, 0, H, W, channel, C)
        g0 = _at(g, offset, y, column, down, right, H, W, channel, C)
        g1 = _at(g, offset, y, column, down, right - 1, H, W, channel, C)
        g2 = _at(g, offset, y, column, down, right - 2, H, W, channel, C)
        s0, s1, s2 = s0 + here * g0, s1 + here * g1, s2 + here * g2
        # One of the three is the middle of the row; in the middle row it reads the pixel itself.
        if KERNEL // 2 % 3 == 0:
            by_bias += g0
        elif KERNEL // 2 % 3 == 1:
            by_bias += g1
        else:
            by_bias += g2
    parts += program * ((TAPS + 1) * C)
    _part(parts, s0, row * KERNEL + left, channel, C, TAPS)
    if left + 1 < KERNEL:
        _part(parts, s1, row * KERNEL + left + 1, channel, C, TAPS)
    if left + 2 < KERNEL:
        _part(parts, s2, row * KERNEL + left + 2, channel, C, TAPS)
    if (row == KERNEL // 2) & (left == KERNEL // 2 // 3 * 3):
        _part(parts + TAPS * C, by_bias, 0, channel, C, 1)
