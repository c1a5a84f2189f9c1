"""State space duality (Mamba-2): a recurrence with one decay a head, as matrix products; and its form without order."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from vizoo.ops import dispatch
from vizoo.ops.tracing import known

from .function import state_space_dual_triton, unsupported_reasons
from .reference import state_space_dual_reference

__all__ = ["state_space_dual"]


@overload
def state_space_dual(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    *,
    causal: bool = True,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    softplus: bool = False,
    dt_limit: tuple[float, float] | None = None,
    states: int | None = None,
    initial_state: Tensor | None = None,
    return_state: Literal[False] = False,
    implementation: dispatch.ImplementationName | None = None,
) -> Tensor: ...


@overload
def state_space_dual(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    *,
    causal: bool = True,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    softplus: bool = False,
    dt_limit: tuple[float, float] | None = None,
    states: int | None = None,
    initial_state: Tensor | None = None,
    return_state: Literal[True],
    implementation: dispatch.ImplementationName | None = None,
) -> tuple[Tensor, Tensor]: ...


def state_space_dual(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    *,
    causal: bool = True,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    softplus: bool = False,
    dt_limit: tuple[float, float] | None = None,
    states: int | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    implementation: dispatch.ImplementationName | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mixes tokens through a state of P x N numbers for each head, as Mamba-2 does, or VSSD without an order.

    With the step Δ_t = `dt`_t + `dt_bias`, through softplus if asked for and then clamped, for each head and token

        S_t = exp(Δ_t A) S_(t-1) + Δ_t x_t B_t^T        y_t = S_t C_t + D x_t        out_t = y_t silu(z_t)

    as in "Transformers are SSMs" (arXiv 2405.21060), computed in chunks, by matrix products. With `causal=False` all
    tokens read one state, to which the size of their decay weighs what each adds, as in "VSSD: Vision Mamba with
    Non-Causal State Space Duality" (arXiv 2407.18559):

        S = sum over t of -Δ_t A x_t B_t^T        y_t = S C_t + D x_t

    There is no exponential, no normaliser and no order: permuted tokens give the permuted output. Head h has the maps
    B and C of group h // (H / G). Steps, decays and states are float32, for float64 input float64. Autocast changes
    nothing here.

    Args:
        x: Input, (batch, L, H, P); without `B` and `C` all three side by side, in this order, as one projection leaves
            them, (batch, L, H * P + 2 * states). Then their gradient is one tensor, too, and nothing has to be put
            together.
        dt: Step before bias and softplus, (batch, L, H).
        A: Rate of each head, (H,), negative.
        B: Input map, (batch, L, G, N), where G divides H.
        C: Output map, of the shape of `B`.
        D: Factor of the skip connection, (H,) or (H, P).
        causal: Whether a token sees only what comes before it, and itself.
        z: Gate, of the shape of the output.
        dt_bias: Added to `dt`, (H,).
        softplus: Whether the step passes softplus.
        dt_limit: Least and largest step.
        states: N, if `x` holds the maps, too; they are those of all heads then.
        initial_state: State before the first token, (batch, H, P, N), or what is added to the one state without an
            order; zero unless given.
        return_state: Whether to return the state after the last token, too.
        implementation: `"reference"` or `"triton"` to force one; it never falls back to the other.

    Returns:
        The output, (batch, L, H, P), in the dtype of `x`; with `return_state` also the last state, (batch, H, P, N), in
        float32 or wider. Differentiable in every tensor given, through both.

    Raises:
        TypeError: A tensor is not floating point.
        ValueError: A shape, device or limit does not fit, or a forced implementation cannot run.
    """
    arguments = _prepare(
        x, dt, A, B, C, D, causal=causal, z=z, dt_bias=dt_bias, softplus=softplus, dt_limit=dt_limit, states=states,
        initial_state=initial_state, return_state=return_state,
    )  # fmt: skip
    out, state = dispatch.call(_OPERATOR, implementation, x.device, arguments)
    return (out, state) if return_state and state is not None else out


def _prepare(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    *,
    causal: bool = True,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    softplus: bool = False,
    dt_limit: tuple[float, float] | None = None,
    states: int | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
) -> dict[str, Any]:
    """Checks the public arguments and writes out their defaults. A symbolic size is refused only if surely wrong."""
    tensors = {
        "x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias, "initial_state": initial_state,
    }  # fmt: skip
    for name, tensor in tensors.items():
        if tensor is not None:
            _check_kind(name, tensor, x)
    if A.ndim != 1 or known(A.shape[0] == 0):
        raise ValueError(f"A must have the shape (H,) with a head at least, got {tuple(A.shape)}")
    if B is None and C is None:
        P, N = _check_packed(x, A.shape[0], states)
    else:
        P, N = _check_maps(x, A.shape[0], B, C, states)
    batch, L, heads = x.shape[0], x.shape[1], A.shape[0]
    shapes = {
        "dt": ("(batch, L, H)", (batch, L, heads)),
        "z": ("(batch, L, H, P)", (batch, L, heads, P)),
        "dt_bias": ("(H,)", (heads,)),
        "initial_state": ("(batch, H, P, N)", (batch, heads, P, N)),
        "D": ("(H, P)", (heads, P)) if D is not None and D.ndim == 2 else ("(H,)", (heads,)),
    }
    for name, (legend, shape) in shapes.items():
        tensor = tensors[name]
        if tensor is not None and _differs(tensor.shape, shape):
            raise ValueError(f"{name} must have the shape {legend} = {shape}, got {tuple(tensor.shape)}")
    if dt_limit is not None and not dt_limit[0] < dt_limit[1]:
        raise ValueError(f"dt_limit must be (least, largest) with least < largest, got {dt_limit}")
    return {
        **tensors, "causal": causal, "softplus": softplus, "dt_limit": dt_limit, "states": N,
        "return_state": return_state,
    }  # fmt: skip


def _check_kind(name: str, tensor: Tensor, x: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")


def _check_packed(x: Tensor, heads: int, states: int | None) -> tuple[int, int]:
    """Channels of a head, and states, where one tensor holds input and maps."""
    if states is None:
        raise ValueError("without B and C, x holds them, too, and states must say how many: (batch, L, H * P + 2 * N)")
    inner = x.shape[-1] - 2 * states
    if x.ndim != 3 or known(states < 1) or known(inner < 1) or known(inner % heads != 0):
        raise ValueError(
            f"x without B and C must have the shape (batch, L, H * P + 2 * states) for H = {heads} and"
            f" states = {states}, got {tuple(x.shape)}"
        )
    return inner // heads, states


def _check_maps(x: Tensor, heads: int, B: Tensor | None, C: Tensor | None, states: int | None) -> tuple[int, int]:
    """Channels of a head, and states, where input and maps come apart."""
    if B is None or C is None:
        missing, given = ("B", "C") if B is None else ("C", "B")
        raise ValueError(f"B and C come together: {given} is given, {missing} is not")
    if x.ndim != 4 or known(x.shape[2] != heads) or known(x.shape[3] == 0):
        raise ValueError(
            f"x must have the shape (batch, L, H, P) with H = {heads} as A has, and a channel at least,"
            f" got {tuple(x.shape)}"
        )
    if B.ndim != 4 or _differs(B.shape[:2], tuple(x.shape[:2])) or known(B.shape[2] == 0) or known(B.shape[3] == 0):
        raise ValueError(
            f"B must have the shape (batch, L, G, N) = ({x.shape[0]}, {x.shape[1]}, G, N), got {tuple(B.shape)}"
        )
    if _differs(C.shape, tuple(B.shape)):
        raise ValueError(f"C must have the shape of B, {tuple(B.shape)}, got {tuple(C.shape)}")
    if known(heads % B.shape[2] != 0):
        nearest = max(divisor for divisor in range(1, B.shape[2]) if heads % divisor == 0)
        raise ValueError(
            f"groups of B must divide the {heads} heads, got {B.shape[2]}; the next number that does is {nearest}"
        )
    if states is not None and known(states != B.shape[3]):
        raise ValueError(f"states must be those of B, {B.shape[3]}, or be left out, got {states}")
    return x.shape[3], B.shape[3]


def _differs(found: torch.Size, expected: tuple[int, ...]) -> bool:
    return len(found) != len(expected) or any(known(a != b) for a, b in zip(found, expected, strict=True))


_OPERATOR = dispatch.Operator(
    name="state_space_dual",
    prepare=_prepare,
    reference=state_space_dual_reference,
    triton=state_space_dual_triton,
    unsupported=unsupported_reasons,
)
dispatch.register(state_space_dual, _OPERATOR)
