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
    _, H, W, _ = x.shape
    if x.device.type == "meta":
        return _counted(x, delta, A, delta_weight, wide).to(dtype)
    y = None
    with without_autocast(x.device):
        for k, route in enumerate(routes):
            sources, drive, read = (tensor[:, :, :, k].to(wide) for tensor in (delta, B, C))
            u, sources, drive, read = _along(route, [x, sources, drive, read], routed_parameters)
            if direction_B is not None:
                drive = drive + direction_B.to(wide)[route.directions(H, W, x.device)]
            steps = _steps(
                sources,
                None if delta_weight is None else delta_weight[k].to(wide),
                None if delta_bias is None else delta_bias[k].to(wide),
                softplus,
            )
            reverse = route.reverse and not _is_gathered(route, routed_parameters)
            out, _ = scan_sequences(u, steps, A[k].to(wide).mT, drive, read, reverse=reverse)
            out = _back(out, route, H, W, routed_parameters)
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


def _steps(sources: Tensor, weight: Tensor | None, bias: Tensor | None, softplus: bool) -> Tensor:
    """Steps of one route, (B, L, d). They are projected in its order: what they are projected from is smaller."""
    steps = sources if weight is None else sources @ weight.mT
    if bias is not None:
        steps = steps + bias
    return F.softplus(steps) if softplus else steps


def _is_gathered(route: Route, routed_parameters: bool) -> bool:
    """Whether a route's pixels are gathered one by one, in the order of the scan; else lines are scanned either way."""
    return route.continuous or not routed_parameters


def _along(route: Route, maps: list[Tensor], routed_parameters: bool) -> list[Tensor]:
    """The maps, of which the first is x, as sequences, (B, L, n)."""
    if not _is_gathered(route, routed_parameters):
        return [(tensor.transpose(1, 2) if route.columns else tensor).flatten(1, 2) for tensor in maps]
    _, H, W, _ = maps[0].shape
    pixels = route.pixels(H, W, maps[0].device)
    return [
        tensor.flatten(1, 2).index_select(1, pixels) if routed_parameters or place == 0 else tensor.flatten(1, 2)
        for place, tensor in enumerate(maps)
    ]


def _back(out: Tensor, route: Route, H: int, W: int, routed_parameters: bool) -> Tensor:
    """A sequence as a map, (B, H, W, d)."""
    if _is_gathered(route, routed_parameters):
        return out.index_select(1, route.pixels(H, W, out.device).argsort()).unflatten(1, (H, W))
    return out.unflatten(1, (W, H)).transpose(1, 2) if route.columns else out.unflatten(1, (H, W))
