"""Triton kernels of channel attention. Each image and group, a `pair`, has a D x D matrix of weights between channels.

Letters: N positions of an image, GROUPS of D channels. `products` and `combine` sum over positions and turn the sums
into weights or into the gradient of the logits; `forward` and `backward` apply those to positions. Rows of the
matrices are channels of keys (and of the output), columns channels of values (and of queries).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _places(row, rows, PITCH: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offset of each number of vectors that lie PITCH numbers apart, and whether it exists."""
    channel = tl.arange(0, BLOCK_D)
    offset = row[:, None] * PITCH + channel[None, :]
    real = (row < rows)[:, None]
    if D != BLOCK_D:
        real = real & (channel < D)[None, :]
    return offset, real


@triton.jit
def _matrix(pointer, pair, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The float32 matrix of a pair, zeros beyond it."""
    offset, real = _places(tl.arange(0, BLOCK_D), D, D, D, BLOCK_D)
    return tl.load(pointer + pair.to(tl.int64) * (D * D) + offset, mask=real, other=0.0)


@triton.jit
def _finish(total, weights, result, offset, real, scale, D: tl.constexpr, GRADIENT: tl.constexpr):
    """Writes rows of the weights; or of the logits' gradient, where the sums are the gradient of the weights."""
    if GRADIENT:
        weight = tl.load(weights + offset, mask=real, other=0.0)
        value = tl.cast(scale, tl.float32) * weight * (total - tl.sum(weight * total, 1)[:, None])
    else:
        inside = tl.arange(0, total.shape[1]) < D
        logits = tl.where(inside[None, :], total * tl.cast(scale, tl.float32), float("-inf"))
        value = tl.exp(logits - tl.max(logits, 1)[:, None])
        value = value / tl.sum(value, 1)[:, None]
    tl.store(result + offset, value, mask=real)


@triton.jit(do_not_specialize=["N", "chunks", "length"])
def products(
    qkv,
    grad_out,
    weights,
    result,
    N,
    chunks,
    length,
    scale,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    GRADIENT: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums k^T v (or grad_out^T q) over one of the chunks of `length` positions that an image is cut into.

    If the image is one chunk (WHOLE), the result is what `_finish` makes of the sum; else the sums, one for each chunk.
    """
    C: tl.constexpr = GROUPS * D
    program = tl.program_id(0)
    group, chunk, image = program % GROUPS, program // GROUPS % chunks, program // GROUPS // chunks
    pair = (image * GROUPS + group).to(tl.int64)
    queries = qkv + image.to(tl.int64) * N * (3 * C) + group * D
    left, right = queries + C, queries + 2 * C
    if GRADIENT:
        left, right = grad_out + image.to(tl.int64) * N * C + group * D, queries
    LEFT_PITCH: tl.constexpr = C if GRADIENT else 3 * C
    total = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    last = tl.minimum((chunk + 1) * length, N)
    for start in range(chunk * length, last, ROWS):
        row = start + tl.arange(0, ROWS)
        offset, real = _places(row, last, LEFT_PITCH, D, BLOCK_D)
        a = tl.load(left + offset, mask=real, other=0.0)
        offset, real = _places(row, last, 3 * C, D, BLOCK_D)
        b = tl.load(right + offset, mask=real, other=0.0)
        total += tl.dot(tl.trans(a), b, input_precision=PRECISION)
    offset, real = _places(tl.arange(0, BLOCK_D), D, D, D, BLOCK_D)
    if WHOLE:
        _finish(total, weights, result, pair * (D * D) + offset, real, scale, D, GRADIENT)
    else:
        tl.store(result + (pair * chunks + chunk) * (D * D) + offset, total, mask=real)


@triton.jit(do_not_specialize=["chunks"])
def combine(
    parts,
    weights,
    result,
    chunks,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """Adds up what `products` left of the chunks, PARTS of them at a time, and finishes; one row a program."""
    line = tl.program_id(0).to(tl.int64)
    first = (line // D * chunks * D + line % D) * D
    total = tl.zeros((PARTS, BLOCK_D), tl.float32)
    for start in range(0, chunks, PARTS):
        offset, real = _places(start + tl.arange(0, PARTS), chunks, D * D, D, BLOCK_D)
        total += tl.load(parts + first + offset, mask=real, other=0.0)
    offset, real = _places(tl.arange(0, 1), 1, D, D, BLOCK_D)
    _finish(tl.sum(total, 0)[None, :], weights, result, line * D + offset, real, scale, D, GRADIENT)


@triton.jit
def _share(tiles, GROUPS: tl.constexpr):
    """Group, tile of positions, and image of this program; groups of the same positions run side by side."""
    program = tl.program_id(0)
    return program % GROUPS, program // GROUPS % tiles, program // GROUPS // tiles


@triton.jit(do_not_specialize=["N", "tiles"])
def forward(
    qkv,
    weights,
    out,
    N,
    tiles,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output of ROWS positions: q A^T."""
    C: tl.constexpr = GROUPS * D
    group, tile, image = _share(tiles, GROUPS)
    row = tile * ROWS + tl.arange(0, ROWS)
    offset, real = _places(row, N, 3 * C, D, BLOCK_D)
    q = tl.load(qkv + image.to(tl.int64) * N * (3 * C) + group * D + offset, mask=real, other=0.0)
    weight = _matrix(weights, image * GROUPS + group, D, BLOCK_D).to(q.dtype)
    value = tl.dot(q, tl.trans(weight), input_precision=PRECISION)
    offset, real = _places(row, N, C, D, BLOCK_D)
    out += image.to(tl.int64) * N * C + group * D
    tl.store(out + offset, value.to(q.dtype), mask=real)


@triton.jit(do_not_specialize=["N", "tiles"])
def backward(
    grad_out,
    qkv,
    weights,
    grad_logits,
    grad_qkv,
    N,
    tiles,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of ROWS positions: grad_out A of queries, v dS^T of keys, k dS of values."""
    C: tl.constexpr = GROUPS * D
    group, tile, image = _share(tiles, GROUPS)
    pair = image * GROUPS + group
    row = tile * ROWS + tl.arange(0, ROWS)
    offset, real = _places(row, N, C, D, BLOCK_D)
    g = tl.load(grad_out + image.to(tl.int64) * N * C + group * D + offset, mask=real, other=0.0)
    offset, real = _places(row, N, 3 * C, D, BLOCK_D)
    base = image.to(tl.int64) * N * (3 * C) + group * D
    k = tl.load(qkv + base + C + offset, mask=real, other=0.0)
    v = tl.load(qkv + base + 2 * C + offset, mask=real, other=0.0)
    weight = _matrix(weights, pair, D, BLOCK_D).to(g.dtype)
    ds = _matrix(grad_logits, pair, D, BLOCK_D)
    # Sums over positions, for which float16 is too narrow: it gets them as shares of the largest.
    largest = 1.0
    if g.dtype == tl.float16:
        largest = tl.max(tl.max(tl.abs(ds), 1), 0)
        largest = tl.where(largest > 0, largest, 1.0)
        ds = ds / largest
    dq = tl.dot(g, weight, input_precision=PRECISION)
    high = ds.to(g.dtype)
    dk = tl.dot(v, tl.trans(high), input_precision=PRECISION)
    dv = tl.dot(k, high, input_precision=PRECISION)
    if g.dtype != tl.float32:  # the part that rounding lost: each number is a sum over all positions
        low = (ds - high.to(tl.float32)).to(g.dtype)
        dk = tl.dot(v, tl.trans(low), dk)
        dv = tl.dot(k, low, dv)
    dk, dv = dk * largest, dv * largest
    grad_qkv += base
    tl.store(grad_qkv + offset, dq.to(g.dtype), mask=real)
    tl.store(grad_qkv + C + offset, dk.to(g.dtype), mask=real)
    tl.store(grad_qkv + 2 * C + offset, dv.to(g.dtype), mask=real)
