"""Triton kernels of window attention. Nothing is rolled, padded or masked in memory: windows are read where they lie.

Letters: H, W height and width of the map; WH, WW sides of the window and SH, SW its shift; N = WH * WW positions of a
window; D channels of a head. `down` and `across` count the windows of a map.

A position `t` of a window stands at row t // WW, column t % WW of it. `_pixel` takes it to the map: windows start at
the shift and wrap around at the padded size. Positions beyond H or W are keys and values read from `padding`, and
queries that nobody asked for. Logits are kept in base 2, for exp2 is what the hardware has.
A number that is no constant is made float32 first: compilers pass it in float64, which would spread.

Two families of kernels: `whole_*` hold all logits of a window in one tile, loop over windows, and keep the tile of the
bias and of its gradient in registers; `tiled_*` walk over tiles of keys with a running maximum, for larger windows.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
MASKED = tl.constexpr(-144.26950408889634)  # -100 in base 2
NORM_FLOOR_SQUARED = tl.constexpr(1e-24)


@triton.jit
def _pixel(t, wy, wx, H, W, down, across, WH: tl.constexpr, WW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr):
    """Index on the map of positions t of window (wy, wx), and whether they lie on it at all."""
    y = wy * WH + t // WW + SH
    x = wx * WW + t % WW + SW
    y = tl.where(y >= down * WH, y - down * WH, y)
    x = tl.where(x >= across * WW, x - across * WW, x)
    return y * W + x, (t < WH * WW) & (y < H) & (x < W)


@triton.jit
def _region(t, wy, wx, down, across, WH: tl.constexpr, WW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr):
    """Label of the part of the map that position t came from; only the last windows of an axis hold more than one."""
    below = (wy == down - 1) & (t // WW >= WH - SH)
    right = (wx == across - 1) & (t % WW >= WW - SW)
    return 2 * below.to(tl.int32) + right.to(tl.int32)


@triton.jit
def _rows(pointer, offset, real, PITCH: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Loads one vector of D channels for each offset (in vectors of PITCH numbers); zeros where it is not real."""
    channel = tl.arange(0, BLOCK_D)
    pointers = pointer + offset[:, None] * PITCH + channel[None, :]
    if D == BLOCK_D:
        return tl.load(pointers, mask=real[:, None], other=0.0)
    return tl.load(pointers, mask=real[:, None] & (channel < D)[None, :], other=0.0)


@triton.jit
def _put_rows(pointer, value, offset, real, PITCH: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    channel = tl.arange(0, BLOCK_D)
    pointers = pointer + offset[:, None] * PITCH + channel[None, :]
    value = value.to(pointer.dtype.element_ty)
    if D == BLOCK_D:
        tl.store(pointers, value, mask=real[:, None])
    else:
        tl.store(pointers, value, mask=real[:, None] & (channel < D)[None, :])


@triton.jit
def _keys(
    pointer,
    padding,
    part,
    head,
    pixel,
    real,
    t,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    N: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Loads keys (part 1) or values (part 2); positions beyond the map get the padding vector."""
    rows = _rows(pointer + part * HEADS * D, pixel, real, 3 * HEADS * D, D, BLOCK_D)
    if PADDED:
        channel = tl.arange(0, BLOCK_D)
        vector = tl.load(padding + (part * HEADS + head) * D + channel, mask=channel < D, other=0.0)
        beyond = (t < N) & (real == 0)
        rows = tl.where(beyond[:, None], vector.to(rows.dtype)[None, :], rows)
    return rows


@triton.jit
def _inverse_norm(x):
    """1 / max(|x|, 1e-12) of each row, in float32."""
    x = x.to(tl.float32)
    return tl.rsqrt(tl.maximum(tl.sum(x * x, 1), NORM_FLOOR_SQUARED))


@triton.jit
def _tangent(gradient, x, inverse):
    """Gradient of rows x from that of their unit vectors."""
    unit = x.to(tl.float32) * inverse[:, None]
    return (gradient - unit * tl.sum(gradient * unit, 1)[:, None]) * inverse[:, None]


@triton.jit
def _unit(x, inverse):
    return (x.to(tl.float32) * inverse[:, None]).to(x.dtype)


@triton.jit
def _bias_tile(bias, head, rows, cols, N: tl.constexpr, EXACT: tl.constexpr, HAS_BIAS: tl.constexpr):
    """What is added to the logits of any window, in base 2: the bias, and minus infinity for keys past the window."""
    if HAS_BIAS:
        pointers = bias + (head * N + rows[:, None]) * N + cols[None, :]
        if EXACT:
            return tl.load(pointers).to(tl.float32) * LOG2E
        inside = (rows < N)[:, None] & (cols < N)[None, :]
        tile = tl.load(pointers, mask=inside, other=0.0).to(tl.float32) * LOG2E
    else:
        tile = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    if EXACT:
        return tile
    return tl.where((cols < N)[None, :], tile, float("-inf"))


@triton.jit
def _cosines(q, k, inverse_q, inverse_k, COSINE: tl.constexpr, PRECISION: tl.constexpr):
    """q k^T, of unit vectors in cosine attention. The products are of the raw vectors, so that nothing is rounded."""
    product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if COSINE:
        product = product * inverse_q[:, None] * inverse_k[None, :]
    return product


@triton.jit
def _split(window, down, across):
    """Image, row and column of a window."""
    image = window // (down * across)
    place = window % (down * across)
    return image, place // across, place % across


@triton.jit
def _class_size(bottom, right, down, across, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows and columns of windows that belong to a class.

    A shift along an axis (ROWS, COLS: 1 if there is one) sets the last windows apart, for they alone are masked.
    """
    return tl.where(bottom == 1, ROWS, down - ROWS), tl.where(right == 1, COLS, across - COLS)


@triton.jit
def _class_share(program, rounds, images, down, across, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Class of a program (bottom, right), its first window in the class, their number, and the programs of the class.

    Each class has as many programs as make no program take more than `rounds` windows.
    """
    bottom = 0
    right = 0
    if ROWS + COLS > 0:
        for kind in tl.static_range(3):
            rows, cols = _class_size(kind // 2, kind % 2, down, across, ROWS, COLS)
            programs = tl.cdiv(images * rows * cols, rounds)
            passed = (program >= programs) & (2 * bottom + right == kind)
            program -= tl.where(passed, programs, 0)
            bottom = tl.where(passed, (kind + 1) // 2, bottom)
            right = tl.where(passed, (kind + 1) % 2, right)
    rows, cols = _class_size(bottom, right, down, across, ROWS, COLS)
    windows = images * rows * cols
    return bottom, right, program, windows, tl.cdiv(windows, rounds)


@triton.jit
def _class_window(index, bottom, right, down, across, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Image, row and column of the index-th window of a class."""
    rows, cols = _class_size(bottom, right, down, across, ROWS, COLS)
    image, wy, wx = _split(index, rows, cols)
    return image, wy + tl.where(bottom == 1, down - 1, 0), wx + tl.where(right == 1, across - 1, 0)


@triton.jit
def _class_mask(t, bottom, right, WH: tl.constexpr, WW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr):
    """What the mask adds to the logits in each window of a class."""
    below = (t // WW >= WH - SH) & (bottom == 1)
    beside = (t % WW >= WW - SW) & (right == 1)
    region = 2 * below.to(tl.int32) + beside.to(tl.int32)
    return tl.where(region[:, None] == region[None, :], 0.0, MASKED)


@triton.jit(do_not_specialize=["H", "W", "down", "across", "images", "rounds"])
def whole_forward(
    qkv,  # (B, H, W, 3, HEADS, D)
    bias,  # (HEADS, N, N)
    cosine_scale,  # (HEADS,)
    padding,  # (3, HEADS, D)
    out,  # (B, H, W, HEADS, D)
    scale,
    H,
    W,
    down,
    across,
    images,
    rounds,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COSINE: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (head, i) takes up to `rounds` windows of one class for one head."""
    head = tl.program_id(0)
    N: tl.constexpr = WH * WW
    ROWS: tl.constexpr = 1 if SH > 0 else 0
    COLS: tl.constexpr = 1 if SW > 0 else 0
    t = tl.arange(0, BLOCK)
    factor = tl.cast(scale, tl.float32) * LOG2E
    if COSINE:
        factor = tl.load(cosine_scale + head).to(tl.float32) * LOG2E
    bottom, right, first, windows, step = _class_share(tl.program_id(1), rounds, images, down, across, ROWS, COLS)
    shared = _bias_tile(bias, head, t, t, N, N == BLOCK, HAS_BIAS)
    if ROWS + COLS > 0:
        shared += _class_mask(t, bottom, right, WH, WW, SH, SW)
    for window in tl.range(first, windows, step, num_stages=STAGES):
        image, wy, wx = _class_window(window, bottom, right, down, across, ROWS, COLS)
        pixel, real = _pixel(t, wy, wx, H, W, down, across, WH, WW, SH, SW)
        source = qkv + image.to(tl.int64) * H * W * (3 * HEADS * D) + head * D
        q = _rows(source, pixel, real, 3 * HEADS * D, D, BLOCK_D)
        k = _keys(source, padding, 1, head, pixel, real, t, HEADS, D, BLOCK_D, N, PADDED)
        v = _keys(source, padding, 2, head, pixel, real, t, HEADS, D, BLOCK_D, N, PADDED)
        inverse_q = t
        inverse_k = t
        if COSINE:
            inverse_q = _inverse_norm(q)
            inverse_k = _inverse_norm(k)
        logits = _cosines(q, k, inverse_q, inverse_k, COSINE, PRECISION) * factor + shared
        p = tl.exp2(logits - tl.max(logits, 1)[:, None])
        inverse_total = 1.0 / tl.sum(p, 1)
        value = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) * inverse_total[:, None]
        target = out + image.to(tl.int64) * H * W * (HEADS * D) + head * D
        _put_rows(target, value, pixel, real, HEADS * D, D, BLOCK_D)


@triton.jit(do_not_specialize=["H", "W", "down", "across", "images", "rounds"])
def whole_backward(
    grad_out,  # (B, H, W, HEADS, D)
    qkv,  # (B, H, W, 3, HEADS, D)
    bias,  # (HEADS, N, N)
    cosine_scale,  # (HEADS,)
    padding,  # (3, HEADS, D)
    grad_qkv,  # (B, H, W, 3, HEADS, D)
    grad_bias,  # (programs, HEADS, N, N) float32
    grad_cosine,  # (programs, HEADS) float32
    grad_padding,  # (programs, 2, HEADS, D) float32: keys, values
    scale,
    H,
    W,
    down,
    across,
    images,
    rounds,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COSINE: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr,
    PADDING_GRADIENT: tl.constexpr,
):
    """Program (head, i) takes up to `rounds` windows of one class for one head, and sums what they share."""
    head = tl.program_id(0)
    N: tl.constexpr = WH * WW
    ROWS: tl.constexpr = 1 if SH > 0 else 0
    COLS: tl.constexpr = 1 if SW > 0 else 0
    t = tl.arange(0, BLOCK)
    natural = tl.cast(scale, tl.float32)
    if COSINE:
        natural = tl.load(cosine_scale + head).to(tl.float32)
    bias_sum = tl.zeros((BLOCK, BLOCK), tl.float32)
    cosine_sum = tl.zeros((BLOCK,), tl.float32)
    key_sum = tl.zeros((BLOCK_D,), tl.float32)
    value_sum = tl.zeros((BLOCK_D,), tl.float32)
    bottom, right, first, windows, step = _class_share(tl.program_id(1), rounds, images, down, across, ROWS, COLS)
    shared = _bias_tile(bias, head, t, t, N, N == BLOCK, HAS_BIAS)
    if ROWS + COLS > 0:
        shared += _class_mask(t, bottom, right, WH, WW, SH, SW)
    for window in tl.range(first, windows, step, num_stages=STAGES):
        image, wy, wx = _class_window(window, bottom, right, down, across, ROWS, COLS)
        pixel, real = _pixel(t, wy, wx, H, W, down, across, WH, WW, SH, SW)
        source = qkv + image.to(tl.int64) * H * W * (3 * HEADS * D) + head * D
        incoming = grad_out + image.to(tl.int64) * H * W * (HEADS * D) + head * D
        q = _rows(source, pixel, real, 3 * HEADS * D, D, BLOCK_D)
        k = _keys(source, padding, 1, head, pixel, real, t, HEADS, D, BLOCK_D, N, PADDED)
        v = _keys(source, padding, 2, head, pixel, real, t, HEADS, D, BLOCK_D, N, PADDED)
        g = _rows(incoming, pixel, real, HEADS * D, D, BLOCK_D)
        inverse_q = t
        inverse_k = t
        unit_q = q
        unit_k = k
        if COSINE:
            inverse_q = _inverse_norm(q)
            inverse_k = _inverse_norm(k)
            unit_q = _unit(q, inverse_q)
            unit_k = _unit(k, inverse_k)
        cosines = _cosines(q, k, inverse_q, inverse_k, COSINE, PRECISION)
        logits = cosines * (natural * LOG2E) + shared
        p = tl.exp2(logits - tl.max(logits, 1)[:, None])
        p = p * (1.0 / tl.sum(p, 1))[:, None]
        dv = tl.dot(tl.trans(p.to(g.dtype)), g, input_precision=PRECISION)
        dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        if BIAS_GRADIENT:
            bias_sum += ds
        if COSINE:
            cosine_sum += tl.sum(ds * cosines, 1)
        narrow = ds.to(q.dtype)
        dq = tl.dot(narrow, unit_k, input_precision=PRECISION) * natural
        dk = tl.dot(tl.trans(narrow), unit_q, input_precision=PRECISION) * natural
        if COSINE:
            dq = _tangent(dq, q, inverse_q)
            dk = _tangent(dk, k, inverse_k)
        target = grad_qkv + image.to(tl.int64) * H * W * (3 * HEADS * D) + head * D
        _put_rows(target, dq, pixel, real, 3 * HEADS * D, D, BLOCK_D)
        _put_rows(target + HEADS * D, dk, pixel, real, 3 * HEADS * D, D, BLOCK_D)
        _put_rows(target + 2 * HEADS * D, dv, pixel, real, 3 * HEADS * D, D, BLOCK_D)
        if PADDING_GRADIENT:
            beyond = (t < N) & (real == 0)
            key_sum += tl.sum(tl.where(beyond[:, None], dk, 0.0), 0)
            value_sum += tl.sum(tl.where(beyond[:, None], dv, 0.0), 0)
    program = tl.program_id(1)
    if BIAS_GRADIENT:
        pointers = grad_bias + ((program * HEADS + head) * N + t[:, None]) * N + t[None, :]
        tl.store(pointers, bias_sum, mask=(t < N)[:, None] & (t < N)[None, :])
    if COSINE:
        tl.store(grad_cosine + program * HEADS + head, tl.sum(cosine_sum, 0))
    if PADDING_GRADIENT:
        channel = tl.arange(0, BLOCK_D)
        pointers = grad_padding + (program * 2 * HEADS + head) * D + channel
        tl.store(pointers, key_sum, mask=channel < D)
        tl.store(pointers + HEADS * D, value_sum, mask=channel < D)


@triton.jit(do_not_specialize=["H", "W", "down", "across"])
def tiled_forward(
    qkv,  # (B, H, W, 3, HEADS, D)
    bias,  # (HEADS, N, N)
    cosine_scale,  # (HEADS,)
    padding,  # (3, HEADS, D)
    out,  # (B, H, W, HEADS, D)
    lse,  # (B, HEADS, H, W) float32, base 2
    scale,
    H,
    W,
    down,
    across,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COSINE: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (tile, head, window): a tile of queries against all keys of the window."""
    head = tl.program_id(0) % HEADS
    window = tl.program_id(0) // HEADS
    N: tl.constexpr = WH * WW
    EXACT: tl.constexpr = (N % BLOCK_M == 0) and (N % BLOCK_N == 0)
    tq = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    factor = tl.cast(scale, tl.float32) * LOG2E
    if COSINE:
        factor = tl.load(cosine_scale + head).to(tl.float32) * LOG2E
    image, wy, wx = _split(window, down, across)
    source = qkv + image.to(tl.int64) * H * W * (3 * HEADS * D) + head * D
    pixel_q, real_q = _pixel(tq, wy, wx, H, W, down, across, WH, WW, SH, SW)
    region_q = _region(tq, wy, wx, down, across, WH, WW, SH, SW)
    q = _rows(source, pixel_q, real_q, 3 * HEADS * D, D, BLOCK_D)
    inverse_q = tq
    if COSINE:
        inverse_q = _inverse_norm(q)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    value = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in tl.range(0, N, BLOCK_N, num_stages=STAGES):
        tk = start + tl.arange(0, BLOCK_N)
        pixel, real = _pixel(tk, wy, wx, H, W, down, across, WH, WW, SH, SW)
        k = _keys(source, padding, 1, head, pixel, real, tk, HEADS, D, BLOCK_D, N, PADDED)
        v = _keys(source, padding, 2, head, pixel, real, tk, HEADS, D, BLOCK_D, N, PADDED)
        inverse_k = tk
        if COSINE:
            inverse_k = _inverse_norm(k)
        shared = _bias_tile(bias, head, tq, tk, N, EXACT, HAS_BIAS)
        logits = _cosines(q, k, inverse_q, inverse_k, COSINE, PRECISION) * factor + shared
        if SH + SW > 0:
            region = _region(tk, wy, wx, down, across, WH, WW, SH, SW)
            logits += tl.where(region_q[:, None] == region[None, :], 0.0, MASKED)
        higher = tl.maximum(highest, tl.max(logits, 1))
        decay = tl.exp2(highest - higher)
        p = tl.exp2(logits - higher[:, None])
        total = total * decay + tl.sum(p, 1)
        value = tl.dot(p.to(v.dtype), v, value * decay[:, None], input_precision=PRECISION)
        highest = higher
    target = out + image.to(tl.int64) * H * W * (HEADS * D) + head * D
    _put_rows(target, value * (1.0 / total)[:, None], pixel_q, real_q, HEADS * D, D, BLOCK_D)
    tl.store(lse + (image.to(tl.int64) * HEADS + head) * H * W + pixel_q, highest + tl.log2(total), mask=real_q)


@triton.jit
def _tile_gradient(
    q,
    k,
    v,
    g,
    lse_q,
    delta_q,
    inverse_q,
    inverse_k,
    shared,
    region_q,
    region_k,
    natural,
    COSINE: tl.constexpr,
    SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weights, gradient of the logits and cosines of one tile of queries and keys."""
    cosines = _cosines(q, k, inverse_q, inverse_k, COSINE, PRECISION)
    logits = cosines * (natural * LOG2E) + shared
    if SHIFTED:
        logits += tl.where(region_q[:, None] == region_k[None, :], 0.0, MASKED)
    p = tl.exp2(logits - lse_q[:, None])
    dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    return p, p * (dp - delta_q[:, None]), cosines


@triton.jit(do_not_specialize=["H", "W", "down", "across"])
def tiled_backward_queries(
    grad_out,  # (B, H, W, HEADS, D)
    qkv,  # (B, H, W, 3, HEADS, D)
    bias,  # (HEADS, N, N)
    cosine_scale,  # (HEADS,)
    padding,  # (3, HEADS, D)
    out,  # (B, H, W, HEADS, D)
    lse,  # (B, HEADS, H, W) float32, base 2
    delta,  # (B, HEADS, H, W) float32, written here: sum of out * grad_out
    grad_qkv,  # (B, H, W, 3, HEADS, D)
    grad_cosine,  # (windows, tiles, HEADS) float32
    scale,
    H,
    W,
    down,
    across,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COSINE: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (tile, head, window): the gradient of a tile of queries."""
    head = tl.program_id(0) % HEADS
    window = tl.program_id(0) // HEADS
    N: tl.constexpr = WH * WW
    EXACT: tl.constexpr = (N % BLOCK_M == 0) and (N % BLOCK_N == 0)
    tq = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    natural = tl.cast(scale, tl.float32)
    if COSINE:
        natural = tl.load(cosine_scale + head).to(tl.float32)
    image, wy, wx = _split(window, down, across)
    source = qkv + image.to(tl.int64) * H * W * (3 * HEADS * D) + head * D
    outward = image.to(tl.int64) * H * W * (HEADS * D) + head * D
    pixel_q, real_q = _pixel(tq, wy, wx, H, W, down, across, WH, WW, SH, SW)
    region_q = _region(tq, wy, wx, down, across, WH, WW, SH, SW)
    q = _rows(source, pixel_q, real_q, 3 * HEADS * D, D, BLOCK_D)
    g = _rows(grad_out + outward, pixel_q, real_q, HEADS * D, D, BLOCK_D)
    o = _rows(out + outward, pixel_q, real_q, HEADS * D, D, BLOCK_D)
    statistics = (image.to(tl.int64) * HEADS + head) * H * W + pixel_q
    lse_q = tl.load(lse + statistics, mask=real_q, other=float("inf"))
    delta_q = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    tl.store(delta + statistics, delta_q, mask=real_q)
    inverse_q = tq
    if COSINE:
        inverse_q = _inverse_norm(q)
    cosine_sum = tl.zeros((BLOCK_M,), tl.float32)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in tl.range(0, N, BLOCK_N, num_stages=STAGES):
        tk = start + tl.arange(0, BLOCK_N)
        pixel, real = _pixel(tk, wy, wx, H, W, down, across, WH, WW, SH, SW)
        region = _region(tk, wy, wx, down, across, WH, WW, SH, SW)
        k = _keys(source, padding, 1, head, pixel, real, tk, HEADS, D, BLOCK_D, N, PADDED)
        v = _keys(source, padding, 2, head, pixel, real, tk, HEADS, D, BLOCK_D, N, PADDED)
        unit_k = k
        inverse_k = tk
        if COSINE:
            inverse_k = _inverse_norm(k)
            unit_k = _unit(k, inverse_k)
        shared = _bias_tile(bias, head, tq, tk, N, EXACT, HAS_BIAS)
        _, ds, cosines = _tile_gradient(
            q, k, v, g, lse_q, delta_q, inverse_q, inverse_k, shared, region_q, region, natural, COSINE, SH + SW > 0,
            PRECISION,
        )  # fmt: skip
        if COSINE:
            cosine_sum += tl.sum(ds * cosines, 1)
        dq = tl.dot(ds.to(k.dtype), unit_k, dq, input_precision=PRECISION)
    dq = dq * natural
    if COSINE:
        dq = _tangent(dq, q, inverse_q)
        place = (window * tl.num_programs(1) + tl.program_id(1)) * HEADS + head
        tl.store(grad_cosine + place, tl.sum(cosine_sum, 0))
    target = grad_qkv + image.to(tl.int64) * H * W * (3 * HEADS * D) + head * D
    _put_rows(target, dq, pixel_q, real_q, 3 * HEADS * D, D, BLOCK_D)


@triton.jit(do_not_specialize=["H", "W", "down", "across"])
def tiled_backward_keys(
    grad_out,  # (B, H, W, HEADS, D)
    qkv,  # (B, H, W, 3, HEADS, D)
    bias,  # (HEADS, N, N)
    cosine_scale,  # (HEADS,)
    padding,  # (3, HEADS, D)
    lse,  # (B, HEADS, H, W) float32, base 2
    delta,  # (B, HEADS, H, W) float32
    grad_qkv,  # (B, H, W, 3, HEADS, D)
    grad_padding,  # (windows, tiles, 2, HEADS, D) float32: keys, values
    scale,
    H,
    W,
    down,
    across,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COSINE: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    PADDING_GRADIENT: tl.constexpr,
):
    """Program (tile, head, window): the gradient of a tile of keys and values."""
    head = tl.program_id(0) % HEADS
    window = tl.program_id(0) // HEADS
    N: tl.constexpr = WH * WW
    EXACT: tl.constexpr = (N % BLOCK_M == 0) and (N % BLOCK_N == 0)
    tk = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    natural = tl.cast(scale, tl.float32)
    if COSINE:
        natural = tl.load(cosine_scale + head).to(tl.float32)
    image, wy, wx = _split(window, down, across)
    source = qkv + image.to(tl.int64) * H * W * (3 * HEADS * D) + head * D
    incoming = grad_out + image.to(tl.int64) * H * W * (HEADS * D) + head * D
    statistics = (image.to(tl.int64) * HEADS + head) * H * W
    pixel_k, real_k = _pixel(tk, wy, wx, H, W, down, across, WH, WW, SH, SW)
    region_k = _region(tk, wy, wx, down, across, WH, WW, SH, SW)
    k = _keys(source, padding, 1, head, pixel_k, real_k, tk, HEADS, D, BLOCK_D, N, PADDED)
    v = _keys(source, padding, 2, head, pixel_k, real_k, tk, HEADS, D, BLOCK_D, N, PADDED)
    inverse_k = tk
    if COSINE:
        inverse_k = _inverse_norm(k)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in tl.range(0, N, BLOCK_M, num_stages=STAGES):
        tq = start + tl.arange(0, BLOCK_M)
        pixel, real = _pixel(tq, wy, wx, H, W, down, across, WH, WW, SH, SW)
        region = _region(tq, wy, wx, down, across, WH, WW, SH, SW)
        q = _rows(source, pixel, real, 3 * HEADS * D, D, BLOCK_D)
        g = _rows(incoming, pixel, real, HEADS * D, D, BLOCK_D)
        lse_q = tl.load(lse + statistics + pixel, mask=real, other=float("inf"))
        delta_q = tl.load(delta + statistics + pixel, mask=real, other=0.0)
        unit_q = q
        inverse_q = tq
        if COSINE:
            inverse_q = _inverse_norm(q)
            unit_q = _unit(q, inverse_q)
        shared = _bias_tile(bias, head, tq, tk, N, EXACT, HAS_BIAS)
        p, ds, _ = _tile_gradient(
            q, k, v, g, lse_q, delta_q, inverse_q, inverse_k, shared, region, region_k, natural, COSINE, SH + SW > 0,
            PRECISION,
        )  # fmt: skip
        dv = tl.dot(tl.trans(p.to(g.dtype)), g, dv, input_precision=PRECISION)
        dk = tl.dot(tl.trans(ds.to(q.dtype)), unit_q, dk, input_precision=PRECISION)
    dk = dk * natural
    if COSINE:
        dk = _tangent(dk, k, inverse_k)
    target = grad_qkv + image.to(tl.int64) * H * W * (3 * HEADS * D) + head * D
    _put_rows(target + HEADS * D, dk, pixel_k, real_k, 3 * HEADS * D, D, BLOCK_D)
    _put_rows(target + 2 * HEADS * D, dv, pixel_k, real_k, 3 * HEADS * D, D, BLOCK_D)
    if PADDING_GRADIENT:
        beyond = (tk < N) & (real_k == 0)
        channel = tl.arange(0, BLOCK_D)
        place = (window * tl.num_programs(1) + tl.program_id(1)) * 2 * HEADS + head
        pointers = grad_padding + place.to(tl.int64) * D + channel
        tl.store(pointers, tl.sum(tl.where(beyond[:, None], dk, 0.0), 0), mask=channel < D)
        tl.store(pointers + HEADS * D, tl.sum(tl.where(beyond[:, None], dv, 0.0), 0), mask=channel < D)


@triton.jit(do_not_specialize=["H", "W", "down", "across", "windows"])
def tiled_backward_bias(
    grad_out,  # (B, H, W, HEADS, D)
    qkv,  # (B, H, W, 3, HEADS, D)
    bias,  # (HEADS, N, N)
    cosine_scale,  # (HEADS,)
    padding,  # (3, HEADS, D)
    lse,  # (B, HEADS, H, W) float32, base 2
    delta,  # (B, HEADS, H, W) float32
    grad_bias,  # (programs, HEADS, N, N) float32
    scale,
    H,
    W,
    down,
    across,
    windows,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COSINE: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (tile of queries and keys, head, i): the bias gradient of that tile over windows i, i + programs, ..."""
    N: tl.constexpr = WH * WW
    EXACT: tl.constexpr = (N % BLOCK_M == 0) and (N % BLOCK_N == 0)
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS
    program = tl.program_id(1)
    tq = tile // TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    tk = tile % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    shared = _bias_tile(bias, head, tq, tk, N, EXACT, True)
    natural = tl.cast(scale, tl.float32)
    if COSINE:
        natural = tl.load(cosine_scale + head).to(tl.float32)
    bias_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for window in tl.range(program, windows, tl.num_programs(1), num_stages=STAGES):
        image, wy, wx = _split(window, down, across)
        source = qkv + image.to(tl.int64) * H * W * (3 * HEADS * D) + head * D
        incoming = grad_out + image.to(tl.int64) * H * W * (HEADS * D) + head * D
        statistics = (image.to(tl.int64) * HEADS + head) * H * W
        pixel_q, real_q = _pixel(tq, wy, wx, H, W, down, across, WH, WW, SH, SW)
        region_q = _region(tq, wy, wx, down, across, WH, WW, SH, SW)
        pixel_k, real_k = _pixel(tk, wy, wx, H, W, down, across, WH, WW, SH, SW)
        region_k = _region(tk, wy, wx, down, across, WH, WW, SH, SW)
        q = _rows(source, pixel_q, real_q, 3 * HEADS * D, D, BLOCK_D)
        g = _rows(incoming, pixel_q, real_q, HEADS * D, D, BLOCK_D)
        k = _keys(source, padding, 1, head, pixel_k, real_k, tk, HEADS, D, BLOCK_D, N, PADDED)
        v = _keys(source, padding, 2, head, pixel_k, real_k, tk, HEADS, D, BLOCK_D, N, PADDED)
        lse_q = tl.load(lse + statistics + pixel_q, mask=real_q, other=float("inf"))
        delta_q = tl.load(delta + statistics + pixel_q, mask=real_q, other=0.0)
        inverse_q = tq
        inverse_k = tk
        if COSINE:
            inverse_q = _inverse_norm(q)
            inverse_k = _inverse_norm(k)
        _, ds, _ = _tile_gradient(
            q, k, v, g, lse_q, delta_q, inverse_q, inverse_k, shared, region_q, region_k, natural, COSINE,
            SH + SW > 0, PRECISION,
        )  # fmt: skip
        bias_sum += ds
    pointers = grad_bias + ((program * HEADS + head) * N + tq[:, None]) * N + tk[None, :]
    tl.store(pointers, bias_sum, mask=(tq < N)[:, None] & (tk < N)[None, :])
