"""Selective scan over routes of a map: scan orders, scan and merge in one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vizoo.ops import dispatch
from vizoo.ops.tracing import known

from .function import selective_scan_2d_triton, unsupported_reasons
from .reference import selective_scan_2d_reference
from .routes import CONTINUOUS_ROUTES, ROW_AND_COLUMN_ROUTES, ROW_ROUTES, Route

__all__ = ["CONTINUOUS_ROUTES", "ROW_AND_COLUMN_ROUTES", "ROW_ROUTES", "Route", "selective_scan_2d"]


def selective_scan_2d(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    delta_weight: Tensor | None = None,
    delta_bias: Tensor | None = None,
    softplus: bool = True,
    routes: Sequence[Route] = ROW_AND_COLUMN_ROUTES,
    routed_parameters: bool = True,
    direction_B: Tensor | None = None,
    dtype: torch.dtype | None = None,
    implementation: dispatch.ImplementationName | None = None,
) -> Tensor:
    """Scans a map along several routes by selective state spaces, and adds up what they give at each pixel.

    Each route reads all pixels of the map in an order of its own, as `vizoo.ops.selective_scan` reads tokens:
    h_t = exp(Δ_t A) h_(t-1) + Δ_t B_t x_t and y_t = C_t · h_t + D x_t, with Δ = softplus(delta · weight + bias). The
    maps are those that pointwise projections make of the map as it lies; no scanned copy of any is made. States and
    sums are float32, for float64 input float64. Autocast changes nothing here.

    Each of the K routes has a set of parameters, the axis K below; or one set, K = 1, serves all routes.

    Args:
        x: Map, (B, H, W, d).
        delta: What steps are projected from, (B, H, W, K, r); without `delta_weight` the steps themselves, before bias
            and softplus, (B, H, W, K, d).
        A: Rates, (K, d, N), negative.
        B: Input maps, (B, H, W, K, N).
        C: Output maps, (B, H, W, K, N).
        D: Skip of each route, (K, d).
        delta_weight: Projection of the steps, (K, d, r).
        delta_bias: Added to the steps, (K, d).
        softplus: Take the softplus of the steps.
        routes: The routes: `ROW_AND_COLUMN_ROUTES` (VMamba), `ROW_ROUTES` (MobileMamba), `CONTINUOUS_ROUTES`
            (PlainMamba), or any others.
        routed_parameters: A route takes delta, B and C of the pixels that it reads. If not, its step t takes those of
            the t-th pixel, counted row after row, whatever pixel is read: so PlainMamba's weights were trained.
        direction_B: Added to B by the direction of the step of a continuous route, (5, N), in the order start, right,
            left, up, down.
        dtype: Of the output: float32 by default, of float64 input float64, since sums of scans leave the range of
            half precision.
        implementation: `"reference"` or `"triton"` to force one; it never falls back to the other.

    Returns:
        The sum over all routes, (B, H, W, d). Differentiable in every tensor given.

    Raises:
        TypeError: A tensor or `dtype` is not floating point.
        ValueError: A shape, a device or a route breaks a rule above, or a forced implementation cannot run.
    """
    arguments = _prepare(
        x, delta, A, B, C, D,
        delta_weight=delta_weight, delta_bias=delta_bias, softplus=softplus, routes=routes,
        routed_parameters=routed_parameters, direction_B=direction_B, dtype=dtype,
    )  # fmt: skip
    return dispatch.call(_OPERATOR, implementation, x.device, arguments)


def _prepare(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    delta_weight: Tensor | None = None,
    delta_bias: Tensor | None = None,
    softplus: bool = True,
    routes: Sequence[Route] = ROW_AND_COLUMN_ROUTES,
    routed_parameters: bool = True,
    direction_B: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Checks the public arguments and writes out their defaults. A symbolic size is refused only if surely wrong."""
    routes = tuple(routes)
    tensors = {
        "delta": delta, "A": A, "B": B, "C": C, "D": D,
        "delta_weight": delta_weight, "delta_bias": delta_bias, "direction_B": direction_B,
    }  # fmt: skip
    _check_kinds(x, tensors, dtype)
    _check_routes(routes, direction_B)
    if x.ndim != 4 or any(known(size < 1) for size in x.shape[1:]):
        raise ValueError(
            f"x must have the shape (B, H, W, d) with a row, a column and a channel at least, got {tuple(x.shape)}"
        )
    d = x.shape[-1]
    if A.ndim != 3 or (known(A.shape[0] != 1) and known(A.shape[0] != len(routes))) or known(A.shape[-1] < 1):
        raise ValueError(
            f"A must have the shape (K, d, N) = ({len(routes)}, {d}, N), or with K = 1 for one set that all routes"
            f" share, and N at least 1, got {tuple(A.shape)}"
        )
    sets, N = A.shape[0], A.shape[-1]
    rank = d if delta_weight is None else delta_weight.shape[-1]
    pixel = (*x.shape[:3], sets)
    shapes = {
        "A": ("(K, d, N)", (sets, d, N)),
        "delta": ("(B, H, W, K, d)" if delta_weight is None else "(B, H, W, K, r)", (*pixel, rank)),
        "B": ("(B, H, W, K, N)", (*pixel, N)),
        "C": ("(B, H, W, K, N)", (*pixel, N)),
        "D": ("(K, d)", (sets, d)),
        "delta_weight": ("(K, d, r)", (sets, d, rank)),
        "delta_bias": ("(K, d)", (sets, d)),
        "direction_B": ("(5, N)", (5, N)),
    }
    for name, (legend, shape) in shapes.items():
        _check_shape(name, tensors[name], legend, shape)
    expanded = {name: _for_each_route(name, tensor, len(routes)) for name, tensor in tensors.items()}
    return {
        "x": x,
        **expanded,
        "softplus": softplus,
        "routes": routes,
        "routed_parameters": routed_parameters,
        "dtype": torch.promote_types(x.dtype, torch.float32) if dtype is None else dtype,
    }


def _check_kinds(x: Tensor, tensors: dict[str, Tensor | None], dtype: torch.dtype | None) -> None:
    for name, tensor in {"x": x, **tensors}.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}")


def _check_routes(routes: tuple[Route, ...], direction_B: Tensor | None) -> None:
    if not routes:
        raise ValueError("routes must hold one route at least, got none")
    for route in routes:
        if not isinstance(route, Route):
            raise TypeError(f"routes must hold Route(columns=, reverse=, continuous=) only, got {route!r}")
        if direction_B is not None and not route.continuous:
            raise ValueError(f"direction_B needs continuous routes, whose every step has a direction, got {route}")


def _check_shape(name: str, tensor: Tensor | None, legend: str, shape: tuple[int, ...]) -> None:
    if tensor is None:
        return
    if tensor.ndim != len(shape) or any(known(a != b) for a, b in zip(tensor.shape, shape, strict=True)):
        raise ValueError(f"{name} must have the shape {legend} = {shape}, got {tuple(tensor.shape)}")


def _for_each_route(name: str, tensor: Tensor | None, routes: int) -> Tensor | None:
    """A view with a set of parameters for each route, where all share one."""
    if tensor is None or name == "direction_B":
        return tensor
    axis = 3 if tensor.ndim == 5 else 0
    sizes = list(tensor.shape)
    sizes[axis] = routes
    return tensor.expand(sizes)


_OPERATOR = dispatch.Operator(
    name="selective_scan_2d",
    prepare=_prepare,
    reference=selective_scan_2d_reference,
    triton=selective_scan_2d_triton,
    unsupported=unsupported_reasons,
)
dispatch.register(selective_scan_2d, _OPERATOR)
