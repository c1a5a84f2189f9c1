"""Allocates what the kernels of gated linear attention write and launches them. Imports triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from vizoo.ops import gpu
from vizoo.ops.registration import bound, launchable, register_flops

from . import kernels, tiles
from .function import FLOPS

register_flops(FLOPS)

OPERANDS = {torch.bfloat16: tl.bfloat16}
"""Dtypes whose products have factors of the same dtype. Scaled keys and states may leave the range of float16."""


class _Call:
    """What all kernels of one call share, worked out once: small models in eager mode are bound by the host."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        reverse_decay: Tensor | None,
        scale: float,
        reverse: bool,
        normalizer: float | None,
        choose: Callable[[int, int, bool], tiles.Tile],
    ) -> None:
        self.batch, self.tokens = q.shape[:2]
        # Kernels are compiled for these, so a tracer has to settle on them; batch and tokens may stay of any size.
        self.heads, self.dk, self.dv = int(q.shape[2]), int(q.shape[3]), int(v.shape[3])
        self.q, self.k, self.v, self.decay = _dense(q), _dense(k), _dense(v), _dense(decay)
        self.reverse_decay = None if reverse_decay is None else _dense(reverse_decay)
        if self.reverse_decay is not None and self.reverse_decay.stride() != self.decay.stride():
            self.decay, self.reverse_decay = self.decay.contiguous(), self.reverse_decay.contiguous()
        self.directions = 1 if reverse_decay is None else 2
        operand = OPERANDS.get(q.dtype, tl.float32)
        self.half = operand != tl.float32
        self.kept_dtype = q.dtype if self.half else torch.float32  # states are factors, too
        self.tile = choose(self.dk, self.dv, self.half)
        self.rows = self.tile.rows
        self.tiles = (self.tokens + self.rows - 1) // self.rows
        self.factors = scale, 1.0 if normalizer is None else 1.0 / normalizer
        self.order = {"DIRECTIONS": self.directions, "REVERSE": int(reverse)}
        self.sizes = {"HEADS": self.heads, "DK": self.dk, "DV": self.dv}
        self.constants = {
            **self.sizes,
            **self.order,
            "BLOCK_K": tiles.power_of_two(self.dk),
            "BLOCK_V": tiles.power_of_two(self.dv),
            "NORMALIZED": normalizer is not None,
            "OPERAND": operand,
            "ROWS": self.rows,
        }
        self.levels = {"LEVELS": self.rows.bit_length() - 1}
        self.inputs = self.q, self.k, self.v, self.decay, self.reverse_decay
        self.strides = [stride for each in (self.q, self.k, self.v, self.decay) for stride in each.stride()[:3]]

    def state_like(self, *count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(batch, count, directions, heads, dk, dv)."""
        shape = (self.batch, *count, self.directions, self.heads, self.dk, self.dv)
        return self.q.new_empty(shape, dtype=dtype)

    def walked(
        self, left: Tensor, right: Tensor, start: Tensor | None, end: bool, gradient: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The state that each tile finds (or gradients, of what each leaves), and if asked for the one at the end."""
        kept = self.state_like(self.tiles, dtype=self.kept_dtype)
        length = self.length(self.directions)
        if length >= self.tokens:
            last = self.state_like() if end else None
            self._states(left, right, start, kept, last, None, 1, length, gradient)
            return kept, last
        starts, last = self.joined(left, right, start, length, gradient)
        self._states(left, right, starts, kept, None, None, starts.shape[1], length, gradient)
        return kept, last

    def length(self, directions: int) -> int:
        """Of the chunks that sequences are cut in, if programs take one of so many directions each."""
        walks = self.batch * self.heads * directions
        return tiles.chunk(self.tokens, walks, self.rows, gpu.multiprocessors(self.q.device))

    def joined(
        self, left: Tensor, right: Tensor, start: Tensor | None, length: int, gradient: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The state that each chunk finds, and the one at the end."""
        chunks = (self.tokens + length - 1) // length
        parts = self.state_like(chunks)
        decays, last = parts.new_empty(parts.shape[:-1]), self.state_like()
        self._states(left, right, None, None, parts, decays, chunks, length, gradient)
        blocks = self.batch * self.directions * self.heads * -(-self.dk * self.dv // tiles.SCANNED)
        launchable(kernels.scan)[(blocks,)](
            parts, decays, start, last, chunks,
            **self.sizes, **self.order, BLOCK=tiles.SCANNED, GRADIENT=int(gradient), num_warps=tiles.SCANNED // 64,
        )  # fmt: skip
        return parts, last

    def _states(
        self,
        left: Tensor,
        right: Tensor,
        starts: Tensor | None,
        kept: Tensor | None,
        ends: Tensor | None,
        decays: Tensor | None,
        chunks: int,
        length: int,
        gradient: bool,
    ) -> None:
        kernel, options = _launched(kernels.states, tiles.states(self.dk, self.dv, self.half, self.rows))
        kernel[(self.batch * chunks * self.directions * self.heads,)](
            left, right, self.decay, self.reverse_decay, starts, kept, ends, decays, self.tokens, chunks, length,
            *self.factors, *left.stride()[:3], *right.stride()[:3], *self.decay.stride()[:3],
            GRADIENT=int(gradient), **self.constants, **options,
        )  # fmt: skip


def _launched(kernel: Any, tile: tiles.Tile) -> tuple[Any, dict[str, int]]:
    """A kernel as it is to be launched, and how."""
    return launchable(kernel), {"num_warps": tile.warps, "num_stages": tile.stages, **bound(tile.registers)}


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    reverse_decay: Tensor | None,
    initial: Tensor | None,
    scale: float,
    reverse: bool,
    normalizer: float | None,
) -> tuple[Tensor, Tensor]:
    """Output, and of one direction the last state in float32."""
    call = _Call(q, k, v, decay, reverse_decay, scale, reverse, normalizer, tiles.outputs)
    out = q.new_empty(v.shape)
    one = reverse_decay is None
    if not out.numel():
        return out, _unchanged(call, initial) if one else q.new_empty(0, dtype=torch.float32)
    with gpu.on(q.device):
        length, starts, ends = call.length(1), _wide(initial), None
        if length < call.tokens:
            starts, last = call.joined(call.k, call.v, starts, length)
        elif one:
            last = ends = call.state_like()
        # What the first of two directions leaves for the second one. Never `out` itself: tracers, which see a kernel's
        # changes by the names of its arguments, would take it for two tensors.
        part = None if one else torch.empty_like(out, dtype=torch.float32)
        chunks = (call.tokens + length - 1) // length
        kernel, options = _launched(kernels.outputs, call.tile)
        kernel[(call.batch * chunks * call.heads,)](
            *call.inputs, starts, part, out, ends, call.tokens, chunks, length, *call.factors, *call.strides,
            **call.levels, **call.constants, STAGES=call.tile.stages, **options,
        )  # fmt: skip
    return out, last.squeeze(1) if one else q.new_empty(0, dtype=torch.float32)


def backward(
    grad_out: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    reverse_decay: Tensor | None,
    initial: Tensor | None,
    scale: float,
    reverse: bool,
    normalizer: float | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, both decays and the initial state; None where there is no such input."""
    call = _Call(q, k, v, decay, reverse_decay, scale, reverse, normalizer, tiles.gradients)
    grad_out = grad_out.contiguous()
    grad_q, grad_k, grad_v, grad_decay = (each.new_empty(each.shape) for each in (q, k, v, decay))
    grad_reverse = None if reverse_decay is None else reverse_decay.new_empty(reverse_decay.shape)
    grad_initial: Tensor | None = None
    if grad_out.numel():
        with gpu.on(q.device):
            kept, _ = call.walked(call.k, call.v, _wide(initial), end=False)
            after, grad_initial = call.walked(call.q, grad_out, _wide(grad_state), initial is not None, gradient=True)
            kernel, options = _launched(kernels.gradients, call.tile)
            kernel[(call.batch * call.tiles * call.heads,)](
                grad_out, *call.inputs, kept, after, grad_q, grad_k, grad_v, grad_decay, grad_reverse,
                call.tokens, *call.factors, *call.strides,
                **call.levels, **call.constants, **options,
            )  # fmt: skip
    elif initial is not None:
        grad_initial = _unchanged(call, grad_state)
    if initial is None or grad_initial is None:
        return grad_q, grad_k, grad_v, grad_decay, grad_reverse, None
    return grad_q, grad_k, grad_v, grad_decay, grad_reverse, grad_initial.view(initial.shape).to(initial.dtype)


def _dense(x: Tensor) -> Tensor:
    """With numbers of the last axis side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _wide(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.to(torch.float32).contiguous()


def _unchanged(call: _Call, state: Tensor | None) -> Tensor:
    """What no token has changed."""
    like = call.state_like().squeeze(1)
    return torch.zeros_like(like) if state is None else state.to(torch.float32, copy=True)
