"""Triton kernels of depthwise convolution.

With 3 x 3 filters a program walks down a strip of pairs of pixels x BLOCK_C channels: it loads each row once, with the
neighbours of the pairs, and takes it into the sums of the rows that it reaches.
With larger filters, whose sums do not fit, a program holds a tile of ROWS x COLUMNS pixels x BLOCK_C channels. The rows
of all images are taken for those of one tall map, `rows` in number: tiles go over the borders of images, which only the
place of a row in its image, H rows high, tells. The taps of a pixel read the map where they fall: neighbours and taps
share it through the caches.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


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
def _sigmoid(u):
    """By a reciprocal root, which takes three instructions less than a division."""
    root = tl.rsqrt(1.0 + tl.exp2(u * -LOG2E))
    return root * root


@triton.jit
def _silu(u):
    return u * _sigmoid(u)


@triton.jit
def _silu_slope(u):
    s = _sigmoid(u)
    return s + u * s * (1.0 - s)


@triton.jit(do_not_specialize=["rows", "H", "W"])
def forward(
    x,
    weight,
    bias,
    grad_out,
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
    SILU: tl.constexpr,
):
    """One tile of the convolution with large filters; turned by 180 degrees (FLIP) that of x's gradient.

    SILU writes SiLU of the sums; with `grad_out`, the gradient of what that writes, theirs is written.
    """
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
    if SILU:
        total = _silu(total)
    if grad_out is not None:
        total = tl.load(grad_out + base + place, mask=real, other=0.0) * _silu_slope(total)
    tl.store(out + base + place, total.to(out.dtype.element_ty), mask=real)


@triton.jit
def _part(parts, values, tap, channel, C: tl.constexpr, TAPS: tl.constexpr):
    """Writes a program's sum for a tap, laid out as the weight is."""
    tl.store(parts + channel * TAPS + tap, tl.sum(values, 0), mask=channel < C)


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


@triton.jit
def _strip(strip, images, H, W, steps, channel, C: tl.constexpr, PAIRS: tl.constexpr):
    """First row of a strip and the one after the last; of its pairs of pixels the offsets in that row, and the columns.

    Columns are out of the map where there is no pair. The pairs of all images are taken for those of one wide map:
    strips go over the borders of images, pairs do not.
    """
    wide = (W + 1) // 2
    across = tl.cdiv(images * wide, PAIRS)
    first = strip // across * steps
    pair = strip % across * PAIRS + tl.arange(0, PAIRS)
    image, column = pair // wide, pair % wide * 2
    offset = ((image * H + first) * W + column).to(tl.int64) * C
    column = tl.where(pair < images * wide, column, W + 1)
    return first, tl.minimum(first + steps, H), offset[:, None] + channel[None, :], column[:, None]


@triton.jit
def _two(row, offset, column, exists, W, real, C: tl.constexpr):
    """Numbers of pairs of pixels in a row; zeros outside of the image."""
    real = real & exists
    return (
        tl.load(row + offset, mask=real & (column < W), other=0.0),
        tl.load(row + C + offset, mask=real & (column + 1 < W), other=0.0),
    )


@triton.jit
def _four(row, offset, column, exists, W, real, C: tl.constexpr):
    """Numbers of pairs of pixels in a row, and of those to the left and right of them; zeros outside of the image."""
    b, c = _two(row, offset, column, exists, W, real, C)
    real = real & exists
    a = tl.load(row - C + offset, mask=real & (column > 0) & (column < W), other=0.0)
    return a, b, c, tl.load(row + 2 * C + offset, mask=real & (column + 2 < W), other=0.0)


@triton.jit
def _floats(a, b, c, d):
    return a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32)


@triton.jit
def _three(weight, tap, channel, C: tl.constexpr, FLIP: tl.constexpr):
    """Weights of a row of 3 x 3 filters, from the left to the right of where they reach."""
    return (
        _filter(weight, 8 - tap if FLIP else tap, channel, C, 9),
        _filter(weight, 7 - tap if FLIP else tap + 1, channel, C, 9),
        _filter(weight, 6 - tap if FLIP else tap + 2, channel, C, 9),
    )


@triton.jit
def _taken(left, right, a, b, c, d, w0, w1, w2):
    """Sums of pairs of pixels with a row of taps taken into them."""
    left, right = left + a * w0, right + b * w0
    left, right = left + b * w1, right + c * w1
    return left + c * w2, right + d * w2


@triton.jit
def _met(s0, s1, s2, left, right, a, b, inner, c, d):
    """Sums of a row of taps with the products of pairs of pixels taken into them.

    What the right pixel meets to its left, `inner`, is b unless there is no right pixel: an infinity would meet a zero.
    """
    s0, s1, s2 = s0 + left * a, s1 + left * b, s2 + left * c
    return s0 + right * inner, s1 + right * c, s2 + right * d


@triton.jit
def _put(row, offset, column, W, real, C: tl.constexpr, left, right):
    """Writes pairs of pixels in a row."""
    tl.store(row + offset, left.to(row.dtype.element_ty), mask=real & (column < W))
    tl.store(row + C + offset, right.to(row.dtype.element_ty), mask=real & (column + 1 < W))


@triton.jit(do_not_specialize=["images", "H", "W", "steps"])
def forward_three(
    x,
    weight,
    bias,
    grad_out,
    out,
    images,
    H,
    W,
    steps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PAIRS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FLIP: tl.constexpr,
    SILU: tl.constexpr,
):
    """One strip of the convolution with 3 x 3 filters; with the filters turned (FLIP) that of x's gradient.

    Each row is loaded while the one above is taken into the sums of the three rows that it reaches. SILU and `grad_out`
    are as for `forward`.
    """
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    strip, channel = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    first, last, offset, column = _strip(strip, images, H, W, steps, channel, C, PAIRS)
    real = (channel < C)[None, :]
    above_a, above_b, above_c, above_d = _four(x - W * C, offset, column, first > 0, W, real, C)
    a, b, c, d = _four(x, offset, column, True, W, real, C)
    x += W * C
    next_a, next_b, next_c, next_d = _four(x, offset, column, first + 1 < H, W, real, C)
    w0, w1, w2 = _three(weight, 0, channel, C, FLIP)
    w3, w4, w5 = _three(weight, 3, channel, C, FLIP)
    w6, w7, w8 = _three(weight, 6, channel, C, FLIP)
    if RESIDUAL:
        w4 += 1.0
    start = tl.zeros((PAIRS, BLOCK_C), tl.float32)
    if bias is not None:
        start += _vector(bias, channel, C)
    a, b, c, d = _floats(a, b, c, d)
    above_a, above_b, above_c, above_d = _floats(above_a, above_b, above_c, above_d)
    left, right = _taken(start, start, above_a, above_b, above_c, above_d, w0, w1, w2)
    left, right = _taken(left, right, a, b, c, d, w3, w4, w5)
    next_left, next_right = _taken(start, start, a, b, c, d, w0, w1, w2)
    for row in range(first, last):
        a, b, c, d = _floats(next_a, next_b, next_c, next_d)
        x += W * C
        next_a, next_b, next_c, next_d = _four(x, offset, column, (row + 1 < last) & (row + 2 < H), W, real, C)
        left, right = _taken(left, right, a, b, c, d, w6, w7, w8)
        if SILU:
            left, right = _silu(left), _silu(right)
        if grad_out is not None:
            g, h = _two(grad_out, offset, column, True, W, real, C)
            left, right = g * _silu_slope(left), h * _silu_slope(right)
            grad_out += W * C
        _put(out, offset, column, W, real, C, left, right)
        out += W * C
        left, right = _taken(next_left, next_right, a, b, c, d, w3, w4, w5)
        next_left, next_right = _taken(start, start, a, b, c, d, w0, w1, w2)


@triton.jit(do_not_specialize=["images", "H", "W", "steps"])
def backward(
    grad_out,
    x,
    weight,
    grad_x,
    parts,
    images,
    H,
    W,
    steps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PAIRS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    X_GRADIENT: tl.constexpr,
):
    """Gradient of x for 3 x 3 filters, and each program's part of those of weight and bias: (programs, 9 C + C).

    Each row of `grad_out` is taken into the sums of the three rows of `grad_x` that it reaches, and meets those of `x`.
    Taps are numbered as in the turned filter.
    """
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program, programs = tl.program_id(0) // BLOCKS, tl.num_programs(0) // BLOCKS
    channel = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    real = (channel < C)[None, :]
    w0, w1, w2 = _three(weight, 0, channel, C, True)
    w3, w4, w5 = _three(weight, 3, channel, C, True)
    w6, w7, w8 = _three(weight, 6, channel, C, True)
    if RESIDUAL:
        w4 += 1.0
    none = tl.zeros((PAIRS, BLOCK_C), tl.float32)
    s0, s1, s2, s3, s4, s5, s6, s7, s8, by_bias = none, none, none, none, none, none, none, none, none, none
    for strip in range(program, tl.cdiv(H, steps) * tl.cdiv(images * ((W + 1) // 2), PAIRS), programs):
        first, last, offset, column = _strip(strip, images, H, W, steps, channel, C, PAIRS)
        g, own, out = grad_out, x, grad_x
        above_a, above_b, above_c, above_d = _four(g - W * C, offset, column, first > 0, W, real, C)
        u, v = _two(own, offset, column, True, W, real, C)
        a, b, c, d = _four(g, offset, column, True, W, real, C)
        g += W * C
        own += W * C
        next_a, next_b, next_c, next_d = _four(g, offset, column, first + 1 < H, W, real, C)
        next_u, next_v = _two(own, offset, column, first + 1 < last, W, real, C)
        a, b, c, d = _floats(a, b, c, d)
        above_a, above_b, above_c, above_d = _floats(above_a, above_b, above_c, above_d)
        u, v, inner = u.to(tl.float32), v.to(tl.float32), tl.where(column + 1 < W, above_b, 0.0)
        s0, s1, s2 = _met(s0, s1, s2, u, v, above_a, above_b, inner, above_c, above_d)
        left, right = _taken(none, none, above_a, above_b, above_c, above_d, w0, w1, w2)
        left, right = _taken(left, right, a, b, c, d, w3, w4, w5)
        for row in range(first, last):
            below_a, below_b, below_c, below_d = _floats(next_a, next_b, next_c, next_d)
            below_u, below_v = next_u.to(tl.float32), next_v.to(tl.float32)
            g += W * C
            own += W * C
            next_a, next_b, next_c, next_d = _four(g, offset, column, (row + 1 < last) & (row + 2 < H), W, real, C)
            next_u, next_v = _two(own, offset, column, row + 2 < last, W, real, C)
            by_bias += b + c
            inner = tl.where(column + 1 < W, b, 0.0)
            s3, s4, s5 = _met(s3, s4, s5, u, v, a, b, inner, c, d)
            if row + 1 < last:
                s0, s1, s2 = _met(s0, s1, s2, below_u, below_v, a, b, inner, c, d)
            inner = tl.where(column + 1 < W, below_b, 0.0)
            s6, s7, s8 = _met(s6, s7, s8, u, v, below_a, below_b, inner, below_c, below_d)
            if X_GRADIENT:
                left, right = _taken(left, right, below_a, below_b, below_c, below_d, w6, w7, w8)
                _put(out, offset, column, W, real, C, left, right)
                out += W * C
                left, right = _taken(none, none, a, b, c, d, w0, w1, w2)
                left, right = _taken(left, right, below_a, below_b, below_c, below_d, w3, w4, w5)
            a, b, c, d, u, v = below_a, below_b, below_c, below_d, below_u, below_v
    parts += program * (10 * C)
    _part(parts, s8, 0, channel, C, 9)
    _part(parts, s7, 1, channel, C, 9)
    _part(parts, s6, 2, channel, C, 9)
    _part(parts, s5, 3, channel, C, 9)
    _part(parts, s4, 4, channel, C, 9)
    _part(parts, s3, 5, channel, C, 9)
    _part(parts, s2, 6, channel, C, 9)
    _part(parts, s1, 7, channel, C, 9)
    _part(parts, s0, 8, channel, C, 9)
    _part(parts + 9 * C, by_bias, 0, channel, C, 1)
