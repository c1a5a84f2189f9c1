"""The selective scan over routes of a map in plain torch: the definition, and what runs on a CPU.

Letters: B images, H x W = L pixels, d channels, K routes, N states, r numbers from which a step is projected.

Rows are read where they lie and columns through a transposed view; the way back is the scan's own. So one route is
scanned at a time, and only turning routes gather their pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vizoo.ops.selective_scan.reference import scan_sequences
from vizoo.ops.tracing import without_autocast

from .routes import Route


def selective_scan_2d_reference(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_weight: Tensor | None,
    delta_bias: Tensor | None,
    direction_B: Tensor | None,
    *,
    softplus: bool,
    routes: tuple[Route, ...],
    routed_parameters: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Computes what `vizoo.ops.selective_scan_2d` defines."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x = x.to(wide)
    if x.device.type == "meta":
        return _counted(x, delta, A, delta_weight, wide).to(dtype)
    y = None
    with without_autocast(x.device):
        for k, route in enumerate(routes):
            out = _scanned(
                x,
                _steps(delta, delta_weight, delta_bias, k, softplus, wide),
                A[k].to(wide).mT,
                B[:, :, :, k].to(wide),
                C[:, :, :, k].to(wide),
                None if direction_B is None else direction_B.to(wide),
                route,
                routed_parameters,
            )
            y = out if y is None else y + out
    assert y is not None  # there is a route
    if D is not None:
        y = torch.addcmul(y, x, D.to(wide).sum(0))
    return y.to(dtype)


def _counted(x: Tensor, delta: Tensor, A: Tensor, delta_weight: Tensor | None, wide: torch.dtype) -> Tensor:
    """The output on the meta device, which counts products: nine for each pixel, channel, state and route.

    So papers count a scan, though most of its operations are not products; none of them is counted elsewhere.
    """
    if delta_weight is not None:
        delta.to(wide).permute(3, 0, 1, 2, 4).flatten(1, 3) @ delta_weight.to(wide).mT
    pixels, ninefold = x[..., 0].reshape(-1, 1).expand(-1, 9), A.to(wide).reshape(1, -1).expand(9, -1)
    return (pixels @ ninefold).view(*x.shape[:3], -1)[..., : x.shape[-1]].contiguous()


def _steps(
    delta: Tensor, weight: Tensor | None, bias: Tensor | None, k: int, softplus: bool, wide: torch.dtype
) -> Tensor:
    """Steps of one route at each pixel, (B, H, W, d)."""
    steps = delta[:, :, :, k].to(wide)
    if weight is not None:
        steps = steps @ weight[k].to(wide).mT
    if bias is not None:
        steps = steps + bias[k].to(wide)
    return F.softplus(steps) if softplus else steps


def _scanned(
    x: Tensor,
    steps: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    direction_B: Tensor | None,
    route: Route,
    routed_parameters: bool,
) -> Tensor:
    """Output of one route at each pixel, (B, H, W, d), without the skip."""
    H, W = x.shape[1:3]
    if route.continuous or not routed_parameters:
        pixels = route.pixels(H, W, x.device)
        maps = [steps, B, C]
        steps, B, C = (_gathered(m, pixels) if routed_parameters else m.flatten(1, 2) for m in maps)
        if direction_B is not None:
            B = B + direction_B[route.directions(H, W, x.device)]
        y, _ = scan_sequences(_gathered(x, pixels), steps, A, B, C)
        return y.index_select(1, pixels.argsort()).unflatten(1, (H, W))
    u, steps, B, C = (_in_lines(m, route) for m in (x, steps, B, C))
    y, _ = scan_sequences(u, steps, A, B, C, reverse=route.reverse)
    return y.unflatten(1, (W, H)).transpose(1, 2) if route.columns else y.unflatten(1, (H, W))


def _gathered(tensor: Tensor, pixels: Tensor) -> Tensor:
    """A map's pixels in the order of a route, (B, L, n)."""
    return tensor.flatten(1, 2).index_select(1, pixels)


def _in_lines(tensor: Tensor, route: Route) -> Tensor:
    """A map's pixels row after row, or column after column, (B, L, n)."""
    return (tensor.transpose(1, 2) if route.columns else tensor).flatten(1, 2)
