"""The selective scan of Mamba (S6): a linear recurrence whose rates depend on the input."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from vizoo.ops import dispatch
from vizoo.ops.tracing import known

from .function import selective_scan_triton, unsupported_reasons
from .reference import selective_scan_reference

__all__ = ["selective_scan"]


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    softplus: bool = False,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_state: Literal[False] = False,
    dtype: torch.dtype | None = None,
    implementation: dispatch.ImplementationName | None = None,
) -> Tensor: ...


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    softplus: bool = False,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_state: Literal[True],
    dtype: torch.dtype | None = None,
    implementation: dispatch.ImplementationName | None = None,
) -> tuple[Tensor, Tensor]: ...


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    softplus: bool = False,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    dtype: torch.dtype | None = None,
    implementation: dispatch.ImplementationName | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scans each channel of a sequence with N states, whose decay, input and output maps change from token to token.

    With the step Δ_t = `delta`_t + `delta_bias`, through softplus if asked for (v itself beyond v = 20), for each
    channel and token

        h_t = exp(Δ_t A) h_(t-1) + Δ_t u_t B_t        y_t = C_t · h_t + D u_t        out_t = y_t silu(z_t)

    as in "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752). Channel c has the maps
    of group c // (D / G). All of it is computed in float32, for float64 input in float64, and rounded once, at the
    end. Autocast changes nothing here. Any strides will do: (B, L, D) in memory, as projections leave it, as well.

    Args:
        u: Input, (B, D, L).
        delta: Step before bias and softplus, (B, D, L).
        A: Rates, (D, N), negative for a state that fades; N is 1 to 64 for the kernels.
        B: Input map, (B, G, N, L) or, for one group, (B, N, L).
        C: Output map, of the shape of `B`.
        D: Factor of the skip connection of each channel, (D,).
        z: Gate, (B, D, L).
        delta_bias: Added to `delta`, (D,).
        softplus: Whether the step passes softplus.
        reverse: Scan from the last token to the first; equals a scan of flipped inputs, flipped back.
        initial_state: State before the first token scanned, (B, D, N); zero unless given.
        return_state: Whether to return the state after the last token scanned, too.
        dtype: Of the output; that of `u` unless given. Half precision may be too narrow for what states add up to.
        implementation: `"reference"` or `"triton"` to force one; it never falls back to the other.

    Returns:
        The output, (B, D, L); with `return_state` also the last state, (B, D, N), in float32 or wider. Differentiable
        in every tensor given, through both.

    Raises:
        TypeError: A tensor or `dtype` is not floating point.
        ValueError: A shape or device does not fit, or a forced implementation cannot run.
    """
    arguments = _prepare(
        u, delta, A, B, C, D, z=z, delta_bias=delta_bias, softplus=softplus, reverse=reverse,
        initial_state=initial_state, return_state=return_state, dtype=dtype,
    )  # fmt: skip
    out, last_state = dispatch.call(_OPERATOR, implementation, u.device, arguments)
    return (out, last_state) if return_state else out


def _prepare(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    softplus: bool = False,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Checks the public arguments and writes out their defaults. A symbolic size is refused only if surely wrong."""
    tensors = {
        "u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias,
        "initial_state": initial_state,
    }  # fmt: skip
    for name, tensor in tensors.items():
        if tensor is not None:
            _check_kind(name, tensor, u)
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}")
    if u.ndim != 3 or known(u.shape[1] == 0) or known(u.shape[2] == 0):
        raise ValueError(f"u must have the shape (B, D, L) with a channel and a token at least, got {tuple(u.shape)}")
    if A.ndim != 2 or known(A.shape[0] != u.shape[1]) or known(A.shape[1] == 0):
        raise ValueError(
            f"A must have the shape (D, N) = ({u.shape[1]}, N) with a state at least, got {tuple(A.shape)}"
        )
    channels, states = A.shape
    _check_maps(u, B, C, states)
    shapes = {
        "delta": ("(B, D, L)", tuple(u.shape)),
        "z": ("(B, D, L)", tuple(u.shape)),
        "D": ("(D,)", (channels,)),
        "delta_bias": ("(D,)", (channels,)),
        "initial_state": ("(B, D, N)", (u.shape[0], channels, states)),
    }
    for name, (legend, shape) in shapes.items():
        tensor = tensors[name]
        if tensor is not None and _differs(tensor.shape, shape):
            raise ValueError(f"{name} must have the shape {legend} = {shape}, got {tuple(tensor.shape)}")
    if B.ndim == 3:
        B, C = B[:, None], C[:, None]
    return {
        **tensors, "B": B, "C": C, "softplus": softplus, "reverse": reverse, "return_state": return_state,
        "dtype": u.dtype if dtype is None else dtype,
    }  # fmt: skip


def _check_kind(name: str, tensor: Tensor, u: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if tensor.device != u.device:
        raise ValueError(f"{name} must be on the device of u, {u.device}, got {tensor.device}")


def _check_maps(u: Tensor, B: Tensor, C: Tensor, states: int) -> None:
    batch, channels, length = u.shape
    groups = B.shape[1] if B.ndim == 4 else 1
    if (
        B.ndim not in (3, 4)
        or _differs(B.shape[-2:], (states, length))
        or known(B.shape[0] != batch)
        or known(groups == 0)
    ):
        raise ValueError(
            f"B must have the shape (B, G, N, L) = ({batch}, G, {states}, {length}) or"
            f" (B, N, L) = ({batch}, {states}, {length}), got {tuple(B.shape)}"
        )
    if _differs(C.shape, tuple(B.shape)):
        raise ValueError(f"C must have the shape of B, {tuple(B.shape)}, got {tuple(C.shape)}")
    if known(channels % groups != 0):
        nearest = max(divisor for divisor in range(1, groups) if channels % divisor == 0)
        raise ValueError(
            f"groups of B must divide the {channels} channels, got {groups}; the next number that does is {nearest}"
        )


def _differs(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return len(shape) != len(expected) or any(known(a != b) for a, b in zip(shape, expected, strict=True))


_OPERATOR = dispatch.Operator(
    name="selective_scan",
    prepare=_prepare,
    reference=selective_scan_reference,
    triton=selective_scan_triton,
    unsupported=unsupported_reasons,
)
dispatch.register(selective_scan, _OPERATOR)
