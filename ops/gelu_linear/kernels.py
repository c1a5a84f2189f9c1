"""The one kernel of `gelu_linear`: the GELU again, and its gradient, in one pass."""

from __future__ import annotations

import triton
import triton.language as tl

INVERSE_ROOT_2 = tl.constexpr(0.7071067811865476)
INVERSE_ROOT_2_PI = tl.constexpr(0.3989422804014327)


@triton.jit(do_not_specialize=["numbers"])
def backward(grad_hidden, x, hidden, grad_x, numbers, BLOCK: tl.constexpr):
    """hidden = gelu(x) and grad_x = grad_hidden * gelu'(x), of BLOCK numbers."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = place < numbers
    value = tl.load(x + place, mask=real, other=0.0).to(tl.float32)
    gradient = tl.load(grad_hidden + place, mask=real, other=0.0).to(tl.float32)
    below = 0.5 + 0.5 * tl.erf(value * INVERSE_ROOT_2)  # the normal distribution's share below the value
    density = INVERSE_ROOT_2_PI * tl.exp(-0.5 * value * value)
    tl.store(hidden + place, (value * below).to(hidden.dtype.element_ty), mask=real)
    tl.store(grad_x + place, (gradient * (below + value * density)).to(grad_x.dtype.element_ty), mask=real)
