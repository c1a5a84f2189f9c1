"""Measures operators beside what torch offers for the same job, on one GPU, in one run.

    python benchmarks/ops.py [--only window_attention] [--first 4] [--eager] [--output benchmarks/results]

Times are medians of events on the device, with the L2 cache flushed before each run: `_ms` of calls from Python as a
user makes them, `_device_ms` of the same calls captured in a CUDA graph, without the launches. The least bytes of an
operator are its inputs read once and its outputs written once; `_share` is the time they take at the bandwidth that a
large copy reached in this run, over `_device_ms`. Extra memory is the peak beyond inputs, outputs and gradients.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.testing import do_bench

from vizoo.ops import (
    ROW_AND_COLUMN_ROUTES,
    FlowConservation,
    KernelSum,
    MeanSubtraction,
    Route,
    channel_attention,
    depthwise_conv,
    gated_linear_attention,
    layer_norm,
    linear_attention,
    neighborhood_attention,
    region_routes,
    routing_attention,
    selective_scan,
    selective_scan_2d,
    state_space_dual,
    window_attention,
)

Pair = tuple[int, int]


@dataclass(frozen=True)
class Shape:
    """A use of window attention: where it stands in a model, and its sizes."""

    name: str
    batch: int
    map: Pair
    heads: int
    window: int
    shift: int
    d: int = 32
    cosine: bool = False


SHAPES = [
    Shape("swin_tiny stage 1", 128, (56, 56), 3, 7, 3),
    Shape("swin_tiny stage 2", 128, (28, 28), 6, 7, 3),
    Shape("swin_tiny stage 3", 128, (14, 14), 12, 7, 3),
    Shape("swin_tiny stage 4", 128, (7, 7), 24, 7, 0),
    Shape("swin_tiny stage 1, 800x1333", 2, (200, 334), 3, 7, 3),
    Shape("swin_tiny stage 3, 800x1333", 2, (50, 84), 12, 7, 3),
    Shape("swin_base stage 1, 384", 32, (96, 96), 4, 12, 6),
    Shape("swin_base stage 3, 384", 32, (24, 24), 16, 12, 6),
    Shape("swinv2_tiny stage 1, window 8", 64, (64, 64), 3, 8, 4, cosine=True),
    Shape("swinv2_tiny stage 1, window 16", 64, (64, 64), 3, 16, 8, cosine=True),
    Shape("swinv2_base stage 1, window 24", 16, (96, 96), 4, 24, 12, cosine=True),
]


ROWS = {
    "swin_tiny stage 1": (128, 56, 56, 96),
    "swin_tiny stage 2": (128, 28, 28, 192),
    "swin_tiny stage 3": (128, 14, 14, 384),
    "swin_tiny stage 4": (128, 7, 7, 768),
    "swin_tiny merging 1": (128, 28, 28, 384),
    "swin_large stage 4": (128, 7, 7, 1536),
    "swin_tiny stage 3, one image": (1, 14, 14, 384),
}
"""Inputs of layer normalisation: where they stand in a model, and their sizes."""

CHANNELS = {
    "davit_tiny stage 1": (128, 56 * 56, 3, 3, 32),
    "davit_tiny stage 2": (128, 28 * 28, 3, 6, 32),
    "davit_tiny stage 3": (128, 14 * 14, 3, 12, 32),
    "davit_tiny stage 4": (128, 7 * 7, 3, 24, 32),
    "davit_tiny stage 1, 800x1333": (2, 200 * 334, 3, 3, 32),
}
"""Inputs of channel attention: where they stand in a model, and their sizes."""

MAPS = {
    **{
        f"davit_tiny stage {stage}, {name}": ((128, side, side, channels), dtype, 3)
        for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32))
        for stage, side, channels in ((1, 56, 96), (2, 28, 192), (3, 14, 384), (4, 7, 768))
    },
    "davit_tiny stage 1, 800x1333": ((2, 200, 334, 96), torch.bfloat16, 3),
    "biformer_tiny stage 1": ((128, 56, 56, 64), torch.bfloat16, 5),
}
"""Inputs of depthwise convolution: where they stand in a model, their sizes and dtype, and the side of the filters."""


ROUTED = {
    "biformer_tiny stage 1": (128, 56, 2, 7, 1),
    "biformer_tiny stage 2": (128, 28, 4, 7, 4),
    "biformer_tiny stage 3": (128, 14, 8, 7, 16),
    "biformer_base stage 1": (128, 56, 3, 7, 1),
    "biformer_base stage 2": (128, 28, 6, 7, 4),
    "biformer_base stage 3": (128, 14, 12, 7, 16),
    "biformer_small stage 3, 512": (4, 32, 8, 8, 16),
    "256 x 256 in 8 x 8 regions": (1, 256, 2, 8, 4),
}
"""Inputs of routing attention: where they stand in a model; batch, side of the map, heads of 32 channels, regions on a
side of the map, and how many of them each region attends to."""


NEIGHBORHOODS = {
    "nat_tiny stage 1": (128, (56, 56), 2, 32, 7, 1),
    "nat_tiny stage 2": (128, (28, 28), 4, 32, 7, 1),
    "nat_tiny stage 3": (128, (14, 14), 8, 32, 7, 1),
    "dinat_tiny stage 1, dilation 8": (128, (56, 56), 2, 32, 7, 8),
    "dinat_tiny stage 2, dilation 4": (128, (28, 28), 4, 32, 7, 4),
    "dinat_tiny stage 3, dilation 2": (128, (14, 14), 8, 32, 7, 2),
    "128 x 128, windows of 13": (2, (128, 128), 8, 64, 13, 1),
    "256 x 256, windows of 13": (1, (256, 256), 8, 64, 13, 1),
}
"""Inputs of neighborhood attention: batch, map, heads, channels of a head, kernel size and dilation."""

GATED = {
    "vig_small": (128, 14 * 14, 6, 32, 64, True),
    "vig_tiny": (128, 14 * 14, 3, 32, 64, True),
    "vig_small at 896, 4 heads": (64, 56 * 56, 4, 32, 64, True),
    "vig_h_tiny stage 1": (128, 56 * 56, 3, 16, 32, True),
    "vig_h_tiny stage 2": (128, 28 * 28, 6, 16, 32, True),
    "vig_h_tiny stage 3": (128, 14 * 14, 12, 16, 32, True),
    "65,536 tokens, one direction": (1, 65536, 8, 64, 64, False),
}
"""Gated linear attention: batch, tokens, heads, channels of keys and of values, and whether in both directions."""

DUALS = {
    "vssd_tiny stage 1": (128, 56 * 56, 2, 64, 64, False),
    "vssd_tiny stage 2": (128, 28 * 28, 4, 64, 64, False),
    "vssd_tiny stage 3": (128, 14 * 14, 8, 64, 64, False),
    "vssd_micro stage 1": (128, 56 * 56, 2, 48, 48, False),
    "vssd_base stage 2": (128, 28 * 28, 6, 64, 64, False),
    "vssd_tiny stage 1, 800x1333": (2, 200 * 334, 2, 64, 64, False),
    "vssd_tiny stage 1, causal": (128, 56 * 56, 2, 64, 64, True),
    "vssd_tiny stage 3, causal": (128, 14 * 14, 8, 64, 64, True),
    "mamba2 of 1,024, 65,536 tokens": (1, 65536, 32, 64, 128, True),
}
"""State space duality: batch, tokens, heads, channels and states of a head, and whether tokens have an order."""

SCANS = {
    "vmamba_tiny stage 1": (128, 4, 96, 56 * 56, 1, False),
    "vmamba_tiny stage 2": (128, 4, 192, 28 * 28, 1, False),
    "vmamba_tiny stage 3": (128, 4, 384, 14 * 14, 1, False),
    "vmamba_tiny stage 1, channels last": (128, 4, 96, 56 * 56, 1, True),
    "vmamba_tiny stage 3, channels last": (128, 4, 384, 14 * 14, 1, True),
    "vmamba v0 stage 1, 16 states": (32, 4, 192, 56 * 56, 16, False),
    "vim_tiny, 16 states": (128, 1, 384, 14 * 14 + 1, 16, True),
    "vim_tiny at 1248, 16 states": (8, 1, 384, 78 * 78 + 1, 16, True),
    "262,144 tokens, 16 states": (1, 1, 384, 262144, 16, True),
}
"""Selective scans: batch, groups, channels of a group, tokens, states; whether channels lie together in memory."""


def eager_sdpa(
    qkv: Tensor,
    bias: Tensor,
    cosine_scale: Tensor | None,
    padding: Tensor,
    mask: Tensor | None,
    window: int,
    shift: int,
) -> Tensor:
    """What a model does without the operator: pad, roll, partition, attend with a mask made beforehand, and back."""
    B, H, W, _, h, d = qkv.shape
    bottom, right = -H % window, -W % window
    if bottom or right:
        full = padding.to(qkv.dtype).expand(B, H + bottom, W + right, 3, h, d).clone()
        full[:, :H, :W] = qkv
        qkv = full
    Hp, Wp = H + bottom, W + right
    if shift:
        qkv = qkv.roll((-shift, -shift), (1, 2))
    tokens = qkv.view(B, Hp // window, window, Wp // window, window, 3, h, d).permute(5, 0, 1, 3, 6, 2, 4, 7)
    q, k, v = tokens.reshape(3, -1, h, window * window, d)
    scale = None
    if cosine_scale is not None:
        q, k, scale = F.normalize(q, dim=-1) * cosine_scale.to(q.dtype)[:, None, None], F.normalize(k, dim=-1), 1.0
    logits = bias.to(q.dtype)[None]
    if mask is not None:
        logits = (logits + mask[:, None].to(q.dtype)).repeat(B, 1, 1, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=logits, scale=scale)
    out = out.view(B, Hp // window, Wp // window, h, window, window, d).permute(0, 1, 4, 2, 5, 3, 6)
    out = out.reshape(B, Hp, Wp, h, d)
    if shift:
        out = out.roll((shift, shift), (1, 2))
    return out[:, :H, :W]


def shift_mask(shape: Shape) -> Tensor | None:
    """The mask of every window of the padded map, (windows, N, N); None without a shift."""
    if not shape.shift:
        return None
    w, parts = shape.window, []
    for size in shape.map:
        padded = -(-size // w) * w
        place = torch.arange(padded, device="cuda")
        parts.append((place >= padded - w).int() + (place >= padded - shape.shift).int())
    label = 3 * parts[0][:, None] + parts[1][None, :]
    label = label.view(len(parts[0]) // w, w, len(parts[1]) // w, w).transpose(1, 2).reshape(-1, w * w)
    return -100.0 * (label[:, :, None] != label[:, None, :])


def inputs(shape: Shape) -> dict[str, Tensor]:
    """Random tensors that ask for gradients, with the dtypes they have under autocast."""
    n = shape.window**2
    tensors = {
        "qkv": torch.randn(shape.batch, *shape.map, 3, shape.heads, shape.d, device="cuda", dtype=torch.bfloat16),
        "bias": torch.randn(shape.heads, n, n, device="cuda"),
        "padding": torch.randn(3, shape.heads, shape.d, device="cuda", dtype=torch.bfloat16),
    }
    if shape.cosine:
        tensors["cosine_scale"] = 1 + 9 * torch.rand(shape.heads, device="cuda")
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def implementations(shape: Shape) -> dict[str, Callable[[dict[str, Tensor]], Tensor]]:
    """The ways to compute one shape, by name."""
    mask = shift_mask(shape)

    def ours(tensors: dict[str, Tensor]) -> Tensor:
        return window_attention(**tensors, window=shape.window, shift=shape.shift, implementation="triton")

    def sdpa(tensors: dict[str, Tensor]) -> Tensor:
        return eager_sdpa(
            tensors["qkv"], tensors["bias"], tensors.get("cosine_scale"), tensors["padding"], mask,
            shape.window, shape.shift,
        )  # fmt: skip

    return {"vizoo": ours, "sdpa eager": sdpa, "sdpa compiled": torch.compile(sdpa, dynamic=False)}


def measure(function: Callable[[dict[str, Tensor]], Tensor], tensors: dict[str, Tensor]) -> dict[str, float]:
    """Times in ms, with their 20 % and 80 % quantiles, and extra memory in bytes."""
    leaves = [tensor for name, tensor in tensors.items()]
    incoming = torch.randn_like(function(tensors))

    @torch.no_grad()
    def forward() -> None:
        function(tensors)

    def both() -> None:
        torch.autograd.grad(function(tensors), leaves, incoming, allow_unused=True)

    results = {}
    for name, run in (("forward", forward), ("both", both)):
        for kind, timed in (("", run), ("_device", captured(run))):
            median, low, high = do_bench(timed, warmup=30, rep=200, quantiles=[0.5, 0.2, 0.8])
            results |= {f"{name}{kind}_ms": median, f"{name}{kind}_ms_low": low, f"{name}{kind}_ms_high": high}
    return {**results, "extra_bytes": extra_memory(function, tensors, incoming)}


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """The launches of a call as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def extra_memory(
    function: Callable[[dict[str, Tensor]], Tensor], tensors: dict[str, Tensor], incoming: Tensor
) -> float:
    """Peak of forward and backward beyond inputs, output and gradients."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = function(tensors)
    gradients = torch.autograd.grad(out, list(tensors.values()), incoming, allow_unused=True)
    needed = out.nbytes + sum(gradient.nbytes for gradient in gradients if gradient is not None)
    return torch.cuda.max_memory_allocated() - before - needed


def copy_bandwidth() -> float:
    """Bytes read and written each second by a large copy on the device."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / (do_bench(lambda: target.copy_(source), rep=200, return_mode="median") / 1e3)


def check(found: Tensor, expected: Tensor) -> None:
    """No time is reported of a wrong result."""
    error = ((found - expected).norm() / expected.norm()).item()
    if not error < 2e-2:
        raise RuntimeError(f"the operator and torch differ by {error:.2e}")


def measure_window_attention(bandwidth: float, first: int | None, eager: bool) -> list[dict[str, Any]]:
    """Rows of the result, one for each shape and implementation."""
    rows = []
    for shape in SHAPES[:first]:
        tensors = inputs(shape)
        ways = implementations(shape)
        check(ways["vizoo"](tensors).float(), ways["sdpa eager"](tensors).float())
        least = 4 * tensors["qkv"].nbytes / 3
        for name, function in chosen(ways, eager).items():
            figures = measure(function, tensors)
            shares = {
                "forward_share": least / bandwidth / figures["forward_device_ms"] * 1e3,
                # Backward reads qkv and the incoming gradient, and writes that of qkv.
                "both_share": (least + 7 * tensors["qkv"].nbytes / 3) / bandwidth / figures["both_device_ms"] * 1e3,
            }
            rows.append({"op": "window_attention", **asdict(shape), "implementation": name, **figures, **shares})
            print(line(rows[-1]), flush=True)
        torch.compiler.reset()
    return rows


def measure_layer_norm(bandwidth: float, first: int | None, eager: bool) -> list[dict[str, Any]]:
    """The norm before a linear layer under autocast: float32 comes in, bfloat16 is wanted."""

    def ours(tensors: dict[str, Tensor]) -> Tensor:
        return layer_norm(**tensors, dtype=torch.bfloat16, implementation="triton")

    def plain(tensors: dict[str, Tensor]) -> Tensor:
        return F.layer_norm(tensors["x"], tensors["x"].shape[-1:], tensors["weight"], tensors["bias"]).bfloat16()

    rows = []
    for name, shape in list(ROWS.items())[:first]:
        sizes = {"x": shape, "weight": shape[-1:], "bias": shape[-1:]}
        tensors = {key: torch.randn(size, device="cuda").requires_grad_() for key, size in sizes.items()}
        check(ours(tensors).float(), plain(tensors).float())
        least = tensors["x"].nbytes * 3 // 2
        ways = {"vizoo": ours, "torch eager": plain, "torch compiled": torch.compile(plain, dynamic=False)}
        for way, function in chosen(ways, eager).items():
            figures = measure(function, tensors)
            shares = {
                "forward_share": least / bandwidth / figures["forward_device_ms"] * 1e3,
                # Backward reads x and the incoming gradient, and writes that of x.
                "both_share": (least + tensors["x"].nbytes * 5 // 2) / bandwidth / figures["both_device_ms"] * 1e3,
            }
            rows.append({"op": "layer_norm", "name": name, "shape": shape, "implementation": way, **figures, **shares})
            print(line(rows[-1]), flush=True)
        torch.compiler.reset()
    return rows


def measure_channel_attention(bandwidth: float, first: int | None, eager: bool) -> list[dict[str, Any]]:
    """Channel attention in bfloat16, beside its definition in plain torch."""

    def ours(tensors: dict[str, Tensor]) -> Tensor:
        return channel_attention(tensors["qkv"], implementation="triton")

    def plain(tensors: dict[str, Tensor]) -> Tensor:
        return channel_attention(tensors["qkv"], implementation="reference")

    rows = []
    for name, shape in list(CHANNELS.items())[:first]:
        # Logits are sums over positions: about as wide for every size.
        qkv = torch.randn(shape, device="cuda") * shape[1] ** -0.25
        tensors = {"qkv": qkv.bfloat16().requires_grad_()}
        check(ours(tensors).float(), plain(tensors).float())
        part = tensors["qkv"].nbytes / 3
        ways = {"vizoo": ours, "torch eager": plain, "torch compiled": torch.compile(plain, dynamic=False)}
        for way, function in chosen(ways, eager).items():
            figures = measure(function, tensors)
            shares = {
                "forward_share": 4 * part / bandwidth / figures["forward_device_ms"] * 1e3,
                # Backward reads qkv and the incoming gradient, and writes that of qkv.
                "both_share": (4 + 7) * part / bandwidth / figures["both_device_ms"] * 1e3,
            }
            row = {"op": "channel_attention", "name": name, "shape": shape, "implementation": way}
            rows.append({**row, **figures, **shares})
            print(line(rows[-1]), flush=True)
        torch.compiler.reset()
    return rows


def measure_depthwise_conv(bandwidth: float, first: int | None, eager: bool) -> list[dict[str, Any]]:
    """A conditional position encoding: the map and its convolution, under autocast with parameters in float32."""

    def ours(tensors: dict[str, Tensor]) -> Tensor:
        return depthwise_conv(**tensors, residual=True, implementation="triton")

    def plain(tensors: dict[str, Tensor]) -> Tensor:
        x, weight, bias = tensors["x"].permute(0, 3, 1, 2), tensors["weight"], tensors["bias"]
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        out = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
        return (x + out).permute(0, 2, 3, 1)

    rows = []
    for name, (shape, dtype, kernel) in list(MAPS.items())[:first]:
        tensors = {
            "x": torch.randn(shape, device="cuda", dtype=dtype),
            "weight": torch.randn(shape[-1], 1, kernel, kernel, device="cuda") / kernel,
            "bias": torch.randn(shape[-1], device="cuda"),
        }
        tensors = {key: tensor.requires_grad_() for key, tensor in tensors.items()}
        check(ours(tensors).float(), plain(tensors).float())
        part = tensors["x"].nbytes
        ways = {"vizoo": ours, "torch eager": plain, "torch compiled": torch.compile(plain, dynamic=False)}
        for way, function in chosen(ways, eager).items():
            figures = measure(function, tensors)
            shares = {
                "forward_share": 2 * part / bandwidth / figures["forward_device_ms"] * 1e3,
                # Backward reads x and the incoming gradient, and writes that of x.
                "both_share": (2 + 3) * part / bandwidth / figures["both_device_ms"] * 1e3,
            }
            row = {"op": "depthwise_conv", "name": name, "shape": shape, "kernel": kernel, "implementation": way}
            rows.append({**row, "dtype": str(dtype).removeprefix("torch."), **figures, **shares})
            print(line(rows[-1]), flush=True)
        torch.compiler.reset()
    return rows


ATTENDED = {
    "4 heads, 49 tokens": (128, 49, 4, 32, MeanSubtraction(), None),
    "4 heads, 196 tokens": (128, 196, 4, 32, MeanSubtraction(), None),
    "4 heads, 784 tokens": (128, 784, 4, 32, MeanSubtraction(), None),
    "4 heads, 3,136 tokens": (128, 3136, 4, 32, MeanSubtraction(), None),
    "4 heads, 3,136 tokens, sums": (128, 3136, 4, 32, KernelSum(), None),
    "inline_swin_tiny stage 1": (128, 56 * 56, 3, 32, MeanSubtraction(), (56, 56)),
    "inline_swin_tiny stage 3": (128, 14 * 14, 12, 32, MeanSubtraction(), (14, 14)),
    "l2vit_tiny stage 2": (128, 28 * 28, 6, 32, KernelSum(floor=100.0), None),
    "flowformer stage 1": (128, 56 * 56, 12, 8, FlowConservation(), None),
    "flowformer stage 3": (128, 14 * 14, 12, 32, FlowConservation(), None),
    "4 heads, 65,536 tokens": (1, 65536, 4, 32, MeanSubtraction(), None),
}
"""Linear attention: images, tokens, heads, channels of a head, the rule, and the map for kernels of each image."""


def measure_linear_attention(bandwidth: float, first: int | None, eager: bool) -> list[dict[str, Any]]:
    """Linear attention in bfloat16, beside its definition in plain torch, and softmax attention of the same tensors."""
    rows = []
    for name, (batch, N, heads, d, rule, grid) in list(ATTENDED.items())[:first]:
        options = {"rule": rule, "grid": grid}

        def ours(tensors: dict[str, Tensor], options: dict[str, Any] = options) -> Tensor:
            qkv, *local = tensors.values()
            return linear_attention(
                qkv, None, None, local_kernels=local[0] if local else None, implementation="triton", **options
            )

        def plain(tensors: dict[str, Tensor], options: dict[str, Any] = options) -> Tensor:
            qkv, *local = tensors.values()
            return linear_attention(
                qkv, None, None, local_kernels=local[0] if local else None, implementation="reference", **options
            )

        def softmax(tensors: dict[str, Tensor]) -> Tensor:
            return F.scaled_dot_product_attention(*tensors["qkv"].permute(2, 0, 3, 1, 4)).transpose(1, 2)

        tensors = {"qkv": torch.randn(batch, N, 3, heads, d, device="cuda", dtype=torch.bfloat16).requires_grad_()}
        # Of keys without a mean little would be left to compare.
        with torch.no_grad():
            tensors["qkv"][:, :, 1:] += 0.5
        if grid is not None:
            kernels = torch.randn(batch, heads, d, 3, 3, device="cuda", dtype=torch.bfloat16)
            tensors["local_kernels"] = kernels.requires_grad_()
        check(ours(tensors).float(), plain(tensors).float())
        part = tensors["qkv"].nbytes / 3
        ways = {
            "vizoo": ours,
            "torch eager": plain,
            "torch compiled": torch.compile(plain, dynamic=False),
            "sdpa eager": softmax,
        }
        for way, function in chosen(ways, eager).items():
            figures = measure(function, tensors)
            shares = {
                "forward_share": 4 * part / bandwidth / figures["forward_device_ms"] * 1e3,
                # Backward reads qkv and the incoming gradient, and writes that of qkv.
                "both_share": (4 + 7) * part / bandwidth / figures["both_device_ms"] * 1e3,
            }
            row = {"op": "linear_attention", "name": name, "shape": (batch, N, heads, d), "rule": str(rule)}
            rows.append({**row, "grid": grid, "implementation": way, **figures, **shares})
            print(line(rows[-1]), flush=True)
        torch.compiler.reset()
    return rows


def gathered_sdpa(qkv: Tensor, routes: Tensor, regions: int) -> Tensor:
    """What a model does without the operator: cut the map into regions, copy the routed keys and values, attend."""
    B, H, W, _, h, d = qkv.shape
    rows, cols = H // regions, W // regions
    cut = qkv.view(B, regions, rows, regions, cols, 3, h, d).permute(5, 0, 1, 3, 6, 2, 4, 7)
    q, k, v = cut.reshape(3, B * regions**2, h, rows * cols, d)
    taken = (routes + torch.arange(B, device=qkv.device)[:, None, None] * regions**2).flatten(0, 1)  # (B * regions, k)
    k, v = (x[taken].transpose(1, 2).flatten(2, 3) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v).view(B, regions, regions, h, rows, cols, d)
    return out.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, H, W, h, d)


def measure_routing_attention(bandwidth: float, first: int | None, eager: bool) -> list[dict[str, Any]]:
    """Attention to routed regions, whose choice is given, beside copying them."""
    rows = []
    for name, (batch, side, heads, regions, k) in list(ROUTED.items())[:first]:
        size = side // regions
        tensors = {"qkv": torch.randn(batch, side, side, 3, heads, 32, device="cuda", dtype=torch.bfloat16)}
        routes = region_routes(tensors["qkv"], region_size=size, topk=k)
        tensors["qkv"].requires_grad_()

        def ours(tensors: dict[str, Tensor], routes: Tensor = routes, size: int = size) -> Tensor:
            return routing_attention(tensors["qkv"], routes=routes, region_size=size, implementation="triton")

        def gathered(tensors: dict[str, Tensor], routes: Tensor = routes, regions: int = regions) -> Tensor:
            return gathered_sdpa(tensors["qkv"], routes, regions)

        check(ours(tensors).float(), gathered(tensors).float())
        part = tensors["qkv"].nbytes / 3
        ways = {"vizoo": ours, "gather eager": gathered, "gather compiled": torch.compile(gathered, dynamic=False)}
        for way, function in chosen(ways, eager).items():
            figures = measure(function, tensors)
            shares = {
                "forward_share": 4 * part / bandwidth / figures["forward_device_ms"] * 1e3,
                # Backward reads qkv and the incoming gradient, and writes that of qkv.
                "both_share": (4 + 7) * part / bandwidth / figures["both_device_ms"] * 1e3,
            }
            row = {"op": "routing_attention", "name": name, "shape": (batch, side, heads, regions, k)}
            rows.append({**row, "implementation": way, **figures, **shares})
            print(line(rows[-1]), flush=True)
        torch.compiler.reset()
    return rows


def flex_neighborhoods(space: Pair, kernel: int, dilation: int) -> Callable[[dict[str, Tensor]], Tensor]:
    """FlexAttention with the same windows, over tokens row by row; it has no bias, which costs it time at best."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def near(i: Tensor, j: Tensor, length: int) -> Tensor:
        group = i % dilation
        size = (length - group + dilation - 1) // dilation
        start = torch.minimum((i // dilation - kernel // 2).clamp(min=0), size - kernel)
        return (j % dilation == group) & (j // dilation >= start) & (j // dilation < start + kernel)

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        W = space[1]
        return near(i // W, j // W, space[0]) & near(i % W, j % W, W)

    n = space[0] * space[1]
    blocks = torch.compile(create_block_mask)(mask, None, None, n, n, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(tensors: dict[str, Tensor]) -> Tensor:
        q, k, v = tensors["query"].flatten(1, 2).permute(2, 0, 3, 1, 4)
        return compiled(q, k, v, block_mask=blocks).transpose(1, 2).unflatten(1, space)

    return run


def measure_neighborhood_attention(bandwidth: float, first: int | None, eager: bool) -> list[dict[str, Any]]:
    """Neighborhood attention with a bias in float32 and all else in bfloat16, beside ways that have no bias."""

    def dense(tensors: dict[str, Tensor]) -> Tensor:
        q, k, v = tensors["query"].flatten(1, 2).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    rows = []
    for name, (batch, space, heads, d, kernel, dilation) in list(NEIGHBORHOODS.items())[:first]:
        query = torch.randn(batch, *space, 3, heads, d, device="cuda", dtype=torch.bfloat16)
        bias = torch.randn(heads, 2 * kernel - 1, 2 * kernel - 1, device="cuda")
        tensors = {"query": query.requires_grad_(), "bias": bias.requires_grad_()}
        sizes = {"kernel_size": kernel, "dilation": dilation}

        def ours(tensors: dict[str, Tensor], sizes: dict[str, int] = sizes) -> Tensor:
            return neighborhood_attention(**tensors, **sizes, implementation="triton")

        def plain(tensors: dict[str, Tensor], sizes: dict[str, int] = sizes) -> Tensor:
            return neighborhood_attention(**tensors, **sizes, implementation="reference")

        ways: Ways = {"vizoo": ours, "sdpa dense": dense}
        fits = space[0] <= 128  # beyond, gathering and FlexAttention ask for more memory than there is
        if fits:
            check(ours(tensors).float(), plain(tensors).float())
            ways["torch gather"] = plain
        if fits and not eager:
            ways["flex compiled"] = flex_neighborhoods(space, kernel, dilation)
            check(ways["flex compiled"](tensors).float(), ours({"query": tensors["query"]}).float())
        part = query.nbytes / 3
        for way, function in ways.items():
            figures = measure(function, tensors)
            shares = {
                "forward_share": 4 * part / bandwidth / figures["forward_device_ms"] * 1e3,
                # Backward reads the packed projection and the incoming gradient, and writes that of the projection.
                "both_share": (4 + 7) * part / bandwidth / figures["both_device_ms"] * 1e3,
            }
            row = {"op": "neighborhood_attention", "name": name, "shape": (batch, *space, 3, heads, d), **sizes}
            rows.append({**row, "implementation": way, **figures, **shares})
            print(line(rows[-1]), flush=True)
        torch.compiler.reset()
    return rows


def chunk_gla_calls() -> Callable[[dict[str, Tensor]], Tensor] | None:
    """One call of flash-linear-attention's kernels for each direction, or None where it is not installed.

    They are given log decays. What a user does besides is left out: those from gates, and flips for the way back.
    """
    try:
        from fla.ops.gla import chunk_gla
    except ImportError:
        print("flash-linear-attention is not installed, so it is left out", flush=True)
        return None

    def run(tensors: dict[str, Tensor]) -> Tensor:
        q, k, v, *decays = tensors.values()
        outs = [chunk_gla(q, k, v, decay)[0] for decay in decays]
        return outs[0] if len(outs) == 1 else outs[0] + outs[1]

    return run


def measure_gated_linear_attention(bandwidth: float, first: int | None, eager: bool) -> list[dict[str, Any]]:
    """Gated linear attention in bfloat16, gates included, beside its definition and calls of another library."""

    def ours(tensors: dict[str, Tensor]) -> Tensor:
        return gated_linear_attention(**tensors, normalizer=16.0, implementation="triton")

    def plain(tensors: dict[str, Tensor]) -> Tensor:
        return gated_linear_attention(**tensors, normalizer=16.0, implementation="reference")

    rows, peer = [], chunk_gla_calls()
    for name, (batch, N, heads, dk, dv, both) in list(GATED.items())[:first]:
        widths = {"q": dk, "k": dk, "v": dv, "decay": dk} | ({"reverse_decay": dk} if both else {})
        tensors = {
            key: torch.randn(batch, N, heads, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
            for key, width in widths.items()
        }
        ways: Ways = {"vizoo": ours}
        with torch.no_grad():
            check(ours(tensors).float(), plain(tensors).float())
        if batch * N * heads <= 2**18:  # the definition keeps dozens of numbers for each that comes in
            ways |= {"torch eager": plain, "torch compiled": torch.compile(plain, dynamic=False)}
        if peer is not None:
            ways[f"fla, {2 if both else 1} x chunk_gla"] = peer
        given, out = sum(tensor.nbytes for tensor in tensors.values()), tensors["v"].nbytes
        gates = ("decay", "reverse_decay")
        logs = {key: F.logsigmoid(each) / 16 if key in gates else each for key, each in tensors.items()}
        logs = {key: each.detach().requires_grad_() for key, each in logs.items()}
        for way, function in chosen(ways, eager).items():
            figures = measure(function, logs if function is peer else tensors)
            shares = {
                "forward_share": (given + out) / bandwidth / figures["forward_device_ms"] * 1e3,
                # Backward reads the inputs and the incoming gradient, and writes those of the inputs.
                "both_share": (3 * given + 2 * out) / bandwidth / figures["both_device_ms"] * 1e3,
            }
            row = {"op": "gated_linear_attention", "name": name, "shape": (batch, N, heads, dk, dv), "both": both}
            rows.append({**row, "implementation": way, **figures, **shares})
            print(line(rows[-1]), flush=True)
        torch.compiler.reset()
    return rows


def einsum_dual(tensors: dict[str, Tensor], states: int) -> Tensor:
    """What a model does without the operator, and without an order: two contractions, in the dtype of autocast."""
    heads = tensors["A"].shape[0]
    x, B, C = tensors["x"].split([tensors["x"].shape[-1] - 2 * states, states, states], -1)
    x = x.unflatten(-1, (heads, -1))
    weights = F.softplus(tensors["dt"].float() + tensors["dt_bias"]) * -tensors["A"]
    state = torch.einsum("bln,blhp->bhnp", B, x * weights[..., None].to(x.dtype))
    return torch.einsum("bln,bhnp->blhp", C, state) + x * tensors["D"][:, None].to(x.dtype)


def measure_state_space_dual(bandwidth: float, first: int | None, eager: bool) -> list[dict[str, Any]]:
    """State space duality in bfloat16, beside two einsums or, where tokens have an order, its definition in chunks."""
    rows = []
    for name, (batch, L, heads, P, N, causal) in list(DUALS.items())[:first]:
        tensors = {
            "x": torch.randn(batch, L, heads * P + 2 * N, device="cuda", dtype=torch.bfloat16),
            "dt": torch.randn(batch, L, heads, device="cuda", dtype=torch.bfloat16) - 3,
            "A": -torch.rand(heads, device="cuda"),
            "D": torch.randn(heads, device="cuda"),
            "dt_bias": torch.randn(heads, device="cuda"),
        }
        tensors = {key: tensor.requires_grad_() for key, tensor in tensors.items()}
        options: dict[str, Any] = {"causal": causal, "softplus": True, "states": N}

        def ours(tensors: dict[str, Tensor], options: dict[str, Any] = options) -> Tensor:
            return state_space_dual(**tensors, **options, implementation="triton")

        def plain(tensors: dict[str, Tensor], options: dict[str, Any] = options) -> Tensor:
            if not options["causal"]:
                return einsum_dual(tensors, options["states"])
            return state_space_dual(**tensors, **options, implementation="reference")

        check(ours(tensors).float(), plain(tensors).float())
        packed, out = tensors["x"].nbytes + tensors["dt"].nbytes, tensors["x"].nbytes * heads * P // (heads * P + 2 * N)
        ways = {"vizoo": ours, "torch eager": plain, "torch compiled": torch.compile(plain, dynamic=False)}
        for way, function in chosen(ways, eager).items():
            figures = measure(function, tensors)
            shares = {
                "forward_share": (packed + out) / bandwidth / figures["forward_device_ms"] * 1e3,
                # Backward reads the inputs and the incoming gradient, and writes those of the inputs.
                "both_share": (3 * packed + 2 * out) / bandwidth / figures["both_device_ms"] * 1e3,
            }
            row = {"op": "state_space_dual", "name": name, "shape": (batch, L, heads, P, N), "causal": causal}
            rows.append({**row, "implementation": way, **figures, **shares})
            print(line(rows[-1]), flush=True)
        torch.compiler.reset()
    return rows


def scan_inputs(batch: int, groups: int, each: int, L: int, N: int, channels_last: bool) -> dict[str, Tensor]:
    """Random tensors that ask for gradients, with the dtypes they have under autocast."""

    def drawn(*lead: int) -> Tensor:
        if channels_last:
            return torch.randn(batch, L, *lead, device="cuda", dtype=torch.bfloat16).movedim(1, -1)
        return torch.randn(batch, *lead, L, device="cuda", dtype=torch.bfloat16)

    channels = groups * each
    tensors = {
        "u": drawn(channels),
        "delta": drawn(channels),
        "A": -torch.exp(torch.randn(channels, N, device="cuda")),
        "B": drawn(groups, N),
        "C": drawn(groups, N),
        "D": torch.randn(channels, device="cuda"),
        "delta_bias": torch.randn(channels, device="cuda") - 3,
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def measure_selective_scan(bandwidth: float, first: int | None, eager: bool) -> list[dict[str, Any]]:
    """Selective scans in bfloat16, beside their definition in chunks of plain torch where its states fit."""

    def ours(tensors: dict[str, Tensor]) -> Tensor:
        return selective_scan(**tensors, softplus=True, implementation="triton")

    def plain(tensors: dict[str, Tensor]) -> Tensor:
        return selective_scan(**tensors, softplus=True, implementation="reference")

    rows = []
    for name, shape in list(SCANS.items())[:first]:
        tensors = scan_inputs(*shape)
        with torch.no_grad():
            check(ours(tensors).float(), plain(tensors).float())
        ways = {"vizoo": ours}
        if shape[4] == 1:
            ways |= {"torch eager": plain, "torch compiled": torch.compile(plain, dynamic=False)}
        sequence, maps = tensors["u"].nbytes, tensors["B"].nbytes + tensors["C"].nbytes
        for way, function in chosen(ways, eager).items():
            figures = measure(function, tensors)
            shares = {
                "forward_share": (3 * sequence + maps) / bandwidth / figures["forward_device_ms"] * 1e3,
                # Backward reads u, delta, the maps and the incoming gradient, and writes four gradients.
                "both_share": (8 * sequence + 3 * maps) / bandwidth / figures["both_device_ms"] * 1e3,
            }
            row = {"op": "selective_scan", "name": name, "shape": shape[:5], "channels_last": shape[5]}
            rows.append({**row, "implementation": way, **figures, **shares})
            print(line(rows[-1]), flush=True)
        torch.compiler.reset()
    return rows


SCANNED_MAPS = {
    "vssm1_tiny stage 1": (128, 56, 56, 96, 6),
    "vssm1_tiny stage 2": (128, 28, 28, 192, 12),
    "vssm1_tiny stage 3": (128, 14, 14, 384, 24),
    "vssm1_tiny stage 4": (128, 7, 7, 768, 48),
    "vssm1_tiny stage 1, 800x1333": (2, 200, 334, 96, 6),
    "vssm1_tiny stage 1, one image": (1, 56, 56, 96, 6),
}
"""Maps that are scanned along four routes, one state a channel: where they stand in a model, their sizes, and the rank
of the projection of steps."""


def routed_inputs(images: int, H: int, W: int, d: int, rank: int) -> dict[str, Tensor]:
    """A map, parts of one projection of it, and parameters with steps of about 0.02, as VMamba starts with."""
    K = len(ROW_AND_COLUMN_ROUTES)
    projected = torch.randn(images, H, W, K, rank + 2, device="cuda", dtype=torch.bfloat16)
    delta, B, C = projected.split([rank, 1, 1], -1)
    tensors = {
        "x": torch.randn(images, H, W, d, device="cuda", dtype=torch.bfloat16),
        "delta": delta,
        "A": -torch.ones(K, d, 1, device="cuda"),
        "B": B,
        "C": C,
        "D": torch.ones(K, d, device="cuda"),
        "delta_weight": (torch.rand(K, d, rank, device="cuda", dtype=torch.bfloat16) - 0.5) / rank**0.5,
        "delta_bias": torch.full((K, d), -4.0, device="cuda"),
    }
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def copied_routes(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_weight: Tensor, delta_bias: Tensor
) -> Tensor:
    """What a model does without the operator: copy the four routes, scan them at once, put them back and add."""
    _, H, W, d = x.shape

    def routed(tensor: Tensor, route: Route) -> Tensor:
        lines = (tensor.transpose(1, 2) if route.columns else tensor).flatten(1, 2)
        return (lines.flip(1) if route.reverse else lines).mT

    def each(tensor: Tensor) -> Tensor:
        return torch.stack([routed(tensor[:, :, :, k], route) for k, route in enumerate(ROW_AND_COLUMN_ROUTES)], 1)

    u = torch.stack([routed(x, route) for route in ROW_AND_COLUMN_ROUTES], 1).flatten(1, 2)
    steps = (delta_weight @ each(delta)).flatten(1, 2)
    y = selective_scan(
        u, steps, A.flatten(0, 1), each(B), each(C), D.flatten(),
        delta_bias=delta_bias.flatten(), softplus=True, dtype=torch.float32, implementation="triton",
    ).unflatten(1, (-1, d))  # fmt: skip
    rows, columns = y[:, 0] + y[:, 2].flip(-1), y[:, 1] + y[:, 3].flip(-1)
    return rows.mT.unflatten(1, (H, W)) + columns.mT.unflatten(1, (W, H)).transpose(1, 2)


def measure_selective_scan_2d(bandwidth: float, first: int | None, eager: bool) -> list[dict[str, Any]]:
    """Scans along four routes of a map in bfloat16, beside the chain of copies, our own selective scan, and a merge."""

    def ours(tensors: dict[str, Tensor]) -> Tensor:
        return selective_scan_2d(**tensors, implementation="triton")

    def chain(tensors: dict[str, Tensor]) -> Tensor:
        return copied_routes(**tensors)

    rows = []
    for name, shape in list(SCANNED_MAPS.items())[:first]:
        tensors = routed_inputs(*shape)
        with torch.no_grad():
            check(ours(tensors), chain(tensors))
        x, projected = tensors["x"].nbytes, sum(tensors[part].nbytes for part in ("delta", "B", "C"))
        ways = {"vizoo": ours, "chain eager": chain, "chain compiled": torch.compile(chain, dynamic=False)}
        for way, function in chosen(ways, eager).items():
            figures = measure(function, tensors)
            shares = {
                # The output is float32.
                "forward_share": (3 * x + projected) / bandwidth / figures["forward_device_ms"] * 1e3,
                # Backward reads the maps and the incoming gradient, and writes the maps' gradients.
                "both_share": (7 * x + 3 * projected) / bandwidth / figures["both_device_ms"] * 1e3,
            }
            rows.append({"op": "selective_scan_2d", "name": name, "shape": shape, "implementation": way})
            rows[-1] |= {**figures, **shares}
            print(line(rows[-1]), flush=True)
        torch.compiler.reset()
    return rows


Ways = dict[str, Callable[[dict[str, Tensor]], Tensor]]


def chosen(ways: Ways, eager: bool) -> Ways:
    """All ways, or only those that nothing compiles."""
    return {name: way for name, way in ways.items() if not (eager and name.endswith("compiled"))}


def line(row: dict[str, Any]) -> str:
    parts = [f"{row['name']:32} {row['implementation']:14}"]
    for kind, title in (("forward", "forward"), ("both", "with backward")):
        device, share = row[f"{kind}_device_ms"], row[f"{kind}_share"]
        parts.append(f"{title} {row[f'{kind}_ms']:8.4f} ms, {device:8.4f} on the device ({share:5.1%})")
    return "  ".join([*parts, f"extra {int(row['extra_bytes']) / 2**20:7.1f} MiB"])


def environment() -> dict[str, Any]:
    """What a figure depends on."""

    def ask(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "commit": ask("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


OPERATORS = {
    "channel_attention": measure_channel_attention,
    "depthwise_conv": measure_depthwise_conv,
    "gated_linear_attention": measure_gated_linear_attention,
    "layer_norm": measure_layer_norm,
    "linear_attention": measure_linear_attention,
    "neighborhood_attention": measure_neighborhood_attention,
    "routing_attention": measure_routing_attention,
    "selective_scan": measure_selective_scan,
    "selective_scan_2d": measure_selective_scan_2d,
    "state_space_dual": measure_state_space_dual,
    "window_attention": measure_window_attention,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(OPERATORS), help="measure one operator")
    parser.add_argument("--first", type=int, help="measure only so many shapes of each operator")
    parser.add_argument("--eager", action="store_true", help="leave out the compiled peers")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the result")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("operators are measured on a CUDA GPU, and there is none")
    bandwidth = copy_bandwidth()
    result = {**environment(), "copy_bytes_per_second": bandwidth, "rows": []}
    print({key: value for key, value in result.items() if key != "rows"}, flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    kind = f"_{options.only}" if options.only else ""
    path = options.output / f"ops-{torch.cuda.get_device_name().lower().replace(' ', '-')}{kind}.json"
    for name in [options.only] if options.only else sorted(OPERATORS):
        result["rows"] += OPERATORS[name](bandwidth, options.first, options.eager)
        path.write_text(json.dumps(result, indent=1) + "\n")  # after each, so that an interrupted run keeps what it has
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
