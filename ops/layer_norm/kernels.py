"""Triton kernels of layer normalisation. A program holds ROWS whole rows of C channels at a time, in float32.

Both recompute mean and deviation: the row is at hand, and nothing but the input has to be kept for the backward pass.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _places(row, rows, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offset of each number of the given rows, and whether it exists."""
    channel = tl.arange(0, BLOCK_C)
    return row.to(tl.int64)[:, None] * C + channel[None, :], (row < rows)[:, None] & (channel < C)[None, :]


@triton.jit
def _vector(pointer, C: tl.constexpr, BLOCK_C: tl.constexpr):
    channel = tl.arange(0, BLOCK_C)
    return tl.load(pointer + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _normal(x, offset, real, eps, C: tl.constexpr):
    """Rows of x with mean 0 and deviation 1, zeros beyond them; and 1 / deviation."""
    x = tl.load(x + offset, mask=real, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / C
    x = tl.where(real, x - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / C + tl.cast(eps, tl.float32))
    return x * inverse[:, None], inverse


@triton.jit(do_not_specialize=["rows"])
def forward(x, weight, bias, out, rows, eps, C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr):
    """Rows normalised, scaled and moved, in the dtype of `out`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offset, real = _places(row, rows, C, BLOCK_C)
    normal, _ = _normal(x, offset, real, eps, C)
    value = normal * _vector(weight, C, BLOCK_C) + _vector(bias, C, BLOCK_C)
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["rows"])
def backward(
    grad_out,
    x,
    weight,
    grad_x,
    parts,
    rows,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    X_GRADIENT: tl.constexpr,
    PARAMETER_GRADIENT: tl.constexpr,
):
    """Gradient of x, and each program's part of those of weight and bias: (2, programs, C)."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    channel = tl.arange(0, BLOCK_C)
    scale = _vector(weight, C, BLOCK_C)
    by_weight = tl.zeros((ROWS, BLOCK_C), tl.float32)
    by_bias = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)
        offset, real = _places(row, rows, C, BLOCK_C)
        gradient = tl.load(grad_out + offset, mask=real, other=0.0).to(tl.float32)
        normal, inverse = _normal(x, offset, real, eps, C)
        if X_GRADIENT:
            scaled = gradient * scale
            level = tl.sum(scaled, 1) / C
            along = tl.sum(scaled * normal, 1) / C
            value = (scaled - level[:, None] - normal * along[:, None]) * inverse[:, None]
            tl.store(grad_x + offset, value.to(grad_x.dtype.element_ty), mask=real)
        if PARAMETER_GRADIENT:
            by_weight += gradient * normal
            by_bias += gradient
    if PARAMETER_GRADIENT:
        tl.store(parts + program * C + channel, tl.sum(by_weight, 0), mask=channel < C)
        tl.store(parts + (programs + program) * C + channel, tl.sum(by_bias, 0), mask=channel < C)
