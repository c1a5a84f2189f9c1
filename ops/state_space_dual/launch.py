"""Allocates what the kernels of state space duality write and launches them. Imports triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vizoo.ops import gpu
from vizoo.ops.registration import launchable, register_flops

from . import kernels, tiles
from .function import FLOPS, output_shape

register_flops(FLOPS)


class _Call:
    """What all kernels of one call share, worked out once: small models in eager mode are bound by the host."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor | None,
        C: Tensor | None,
        D: Tensor | None,
        bias: Tensor | None,
        states: int,
        causal: bool,
        softplus: bool,
        limit: Sequence[float] | None,
    ) -> None:
        self.batch, self.L, *_ = output_shape(x, A, B, states)
        # Kernels are compiled for these, so a tracer has to settle on them; batch and length may stay of any size.
        self.heads, self.P, self.N = (int(size) for size in (*output_shape(x, A, B, states)[2:], states))
        self.causal, self.packed = causal, B is None
        self.x, self.dt = _dense(x), _dense(dt)
        self.A, self.D, self.bias = (None if each is None else each.contiguous() for each in (A, D, bias))
        inner = self.heads * self.P
        if B is None or C is None:
            self.B = self.C = self.x
            self.group, self.B_at, self.C_at = self.heads, inner, inner + self.N
            self.x_strides = *self.x.stride()[:2], self.P
            self.map_strides = *self.x.stride()[:2], 0
        else:
            self.B, self.C = _dense(B), _dense(C)
            if self.B.stride() != self.C.stride():
                self.B, self.C = self.B.contiguous(), self.C.contiguous()
            self.group, self.B_at, self.C_at = self.heads // int(B.shape[2]), 0, 0
            self.x_strides, self.map_strides = self.x.stride()[:3], self.B.stride()[:3]
        self.pairs = self.batch * self.heads
        self.processors = gpu.multiprocessors(x.device)
        self.limit = (0.0, 0.0) if limit is None else tuple(limit)
        self.constants = {
            "HEADS": self.heads,
            "GROUP": self.group,
            "P": self.P,
            "N": self.N,
            "BLOCK_P": tiles.power_of_two(self.P),
            "BLOCK_N": tiles.power_of_two(self.N),
            "CAUSAL": causal,
            "SOFTPLUS": softplus,
            "LIMITED": limit is not None,
            "PRECISION": gpu.exact_products() if x.dtype == torch.float32 else "tf32",  # halves have but one precision
        }
        self.skip = {"SKIP": 0 if self.D is None else self.D.ndim}
        self.maps_at = {"B_AT": self.B_at, "C_AT": self.C_at}

    def tile(self, choose: Any) -> tiles.Tile:
        return choose(self.P, self.N, self.x.element_size(), self.causal)

    def state_like(self, *chunks: int) -> Tensor:
        return self.x.new_empty((self.batch, *chunks, self.heads, self.P, self.N), dtype=torch.float32)


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    bias: Tensor | None,
    initial: Tensor | None,
    states: int,
    causal: bool,
    softplus: bool,
    limit: Sequence[float] | None,
) -> tuple[Tensor, Tensor]:
    """Output, and the last state in float32."""
    call = _Call(x, dt, A, B, C, D, bias, states, causal, softplus, limit)
    out = x.new_empty((call.batch, call.L, call.heads, call.P))
    initial = None if initial is None else initial.contiguous()
    if not out.numel():
        state = torch.zeros_like(call.state_like()) if initial is None else initial.to(torch.float32, copy=True)
        return out, state
    tile = call.tile(tiles.outputs)
    with gpu.on(x.device):
        if causal:
            length = tiles.chunk(call.L, call.pairs, tile.rows, call.processors)
            whole = length >= call.L
        else:
            length = call.L
            whole = tiles.whole(call.L, call.pairs, call.processors)
        if whole:
            begin, last = initial, call.state_like()
        elif causal:
            begin, decays = _collected(call, call.x, call.B, length)
            last = _scanned(call, begin, decays, initial)
        else:
            begin = last = _summed(call, call.x, call.B, initial)
            length = tiles.stretch(tile.rows)
        chunks = -(-call.L // length)
        launchable(kernels.outputs)[(call.pairs * chunks,)](
            call.x, call.dt, call.A, call.B, call.C, call.D, call.bias, begin, out, last if whole else None,
            call.L, chunks, length, *call.limit, *call.x_strides, *call.map_strides, *call.dt.stride()[:2],
            **call.maps_at, **call.skip, ROWS=tile.rows, WHOLE=whole, **call.constants,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out, last


def backward(
    grad_out: Tensor,
    grad_state: Tensor | None,
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    bias: Tensor | None,
    initial: Tensor | None,
    states: int,
    causal: bool,
    softplus: bool,
    limit: Sequence[float] | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, bias and the initial state; None where there is no such input."""
    call = _Call(x, dt, A, B, C, D, bias, states, causal, softplus, limit)
    tile = call.tile(tiles.gradients)
    count = -(-call.L // tile.rows)
    grad_out = grad_out.contiguous()
    grad_state = None if grad_state is None else grad_state.contiguous()
    grad_x, grad_dt = (each.new_empty(each.shape) for each in (x, dt))
    grad_B, grad_C = (None if each is None else each.new_empty(each.shape) for each in (B, C))
    per_head = 2 + (0 if D is None else 1 if D.ndim == 1 else call.P)
    parts = x.new_empty((call.batch * count, call.heads, per_head), dtype=torch.float32)
    if grad_out.numel():
        with gpu.on(x.device):
            if causal:
                before, decays = _collected(call, call.x, call.B, tile.rows, rows=tile.rows)
                _scanned(call, before, decays, None if initial is None else initial.contiguous())
                after, _ = _collected(call, grad_out, call.C, tile.rows, gradient=True, rows=tile.rows)
                grad_initial = _scanned(call, after, decays, grad_state, reverse=True)
            else:
                before, after = state, _summed(call, grad_out, call.C, grad_state, gradient=True)
                grad_initial = after
            launchable(kernels.gradients)[(call.batch * count * (call.heads // call.group),)](
                grad_out, call.x, call.dt, call.A, call.B, call.C, call.D, call.bias, before, after,
                grad_x, grad_dt, grad_B, grad_C, parts, call.L, count, *call.limit,
                *call.x_strides, *call.map_strides, *call.dt.stride()[:2],
                **call.maps_at, **call.skip, ROWS=tile.rows, PACKED=call.packed, **call.constants,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    else:
        grad_initial = torch.zeros_like(state) if grad_state is None else grad_state.to(torch.float32, copy=True)
    total = parts.sum(0)
    return (
        grad_x,
        grad_dt,
        total[:, 0].to(A.dtype, copy=True),  # not a view of what others share
        grad_B,
        grad_C,
        None if D is None else total[:, 2:].reshape(D.shape).to(D.dtype, copy=True),
        None if bias is None else total[:, 1].to(bias.dtype, copy=True),
        None if initial is None else grad_initial.to(initial.dtype),
    )


def _dense(x: Tensor) -> Tensor:
    """With numbers of the last axis side by side, and heads one after the other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _collected(
    call: _Call, left: Tensor, right: Tensor, length: int, gradient: bool = False, rows: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """What each chunk adds to a state (or to its gradient), and what is left of the state after it.

    Chunks that are known to be of so many rows need no larger tile.
    """
    tile = tiles.collect(call.x.element_size())
    if rows is not None:
        tile = tile._replace(rows=min(rows, tile.rows))
    chunks = -(-call.L // length)
    parts = call.state_like(chunks)
    decays = None
    if call.causal and not gradient:
        decays = parts.new_empty((call.batch, chunks, call.heads))
    left_strides = left.stride()[:3] if gradient else call.x_strides
    launchable(kernels.collect)[(call.pairs * chunks,)](
        left, right, call.dt, call.A, call.bias, parts, decays, call.L, chunks, length, *call.limit,
        *left_strides, *call.map_strides, *call.dt.stride()[:2], RIGHT_AT=call.C_at if gradient else call.B_at,
        ROWS=tile.rows, GRADIENT=gradient, **call.constants, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return parts, decays


def _scanned(
    call: _Call, parts: Tensor, decays: Tensor | None, initial: Tensor | None, reverse: bool = False
) -> Tensor:
    """The last state; puts into `parts` what chunks begin with, or in reverse the gradient of what they end with."""
    last = call.state_like()
    size = call.P * call.N
    launchable(kernels.scan)[(call.pairs * -(-size // tiles.SCANNED),)](
        parts, decays, initial, last, parts.shape[1],
        SIZE=size, HEADS=call.heads, BLOCK=tiles.SCANNED, REVERSE=reverse, num_warps=tiles.SCANNED // 64,
    )  # fmt: skip
    return last


def _summed(call: _Call, left: Tensor, right: Tensor, added: Tensor | None, gradient: bool = False) -> Tensor:
    """The one state or its gradient. Torch adds the chunks' sums up: one order, no atomics."""
    rows = tiles.collect(call.x.element_size()).rows
    length = tiles.chunk(call.L, call.pairs, rows, call.processors)
    parts, _ = _collected(call, left, right, length, gradient)
    total = parts.squeeze(1) if length >= call.L else parts.sum(1)
    return total if added is None else total + added.to(torch.float32)
