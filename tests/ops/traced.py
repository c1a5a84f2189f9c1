"""A script: traces each operator as `torch.compile` does for a GPU, without one, and prints what the graphs hold.

The tests run it as a process of its own, since theirs has Triton's interpreter, whose kernels cannot be traced.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import triton
from functorch.compile import aot_function, min_cut_rematerialization_partition
from torch import Tensor
from triton.backends.compiler import GPUTarget

from vizoo.ops import gpu
from vizoo.ops.channel_attention import function as channel
from vizoo.ops.depthwise_conv import function as depthwise
from vizoo.ops.gated_linear_attention import function as gated
from vizoo.ops.gelu_linear import function as gelu
from vizoo.ops.layer_norm import function as norm
from vizoo.ops.linear_attention import function as linear
from vizoo.ops.neighborhood_attention import function as neighborhood
from vizoo.ops.routing_attention import function as routing
from vizoo.ops.routing_attention import region_affinity
from vizoo.ops.selective_scan import function as scan
from vizoo.ops.selective_scan_2d import function as scan_2d
from vizoo.ops.state_space_dual import function as dual
from vizoo.ops.window_attention import function as window


class Driver:
    """Says what GPU there would be; that is all that Triton asks for what a kernel reads and writes."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_benchmarker(self) -> None:
        return None


class Traced(Exception):
    """Stops before anything would run."""


def found(module: torch.fx.GraphModule, graphs: list[dict[str, Any]]) -> None:
    kernels, operators = [], []
    for node in module.graph.nodes:
        if "triton_kernel_wrapper" in str(node.target):
            kernels.append(sorted(node.kwargs["tensors_to_clone"]))
        elif str(node.target).startswith("vizoo"):
            operators.append(str(node.target))
    graphs.append({"written": kernels, "operators": operators})


def trace(function: Callable[..., Tensor], tensors: list[Tensor], dynamic: bool) -> list[dict[str, Any]]:
    """What kernels of the forward graph and of the joint one write, and the operators left whole."""
    graphs: list[dict[str, Any]] = []

    def partition(joint: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        found(joint, graphs)
        forward, _ = min_cut_rematerialization_partition(joint, inputs, **options)
        found(forward, graphs)
        raise Traced

    traced = aot_function(function, fw_compiler=None, partition_fn=partition, dynamic=dynamic)
    try:
        traced(*tensors)
    except Traced:
        return graphs
    raise AssertionError("nothing was traced")


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def windows(side: int) -> Callable[..., Tensor]:
    return lambda qkv, bias, padding: window._forward(qkv, bias, None, padding, [side, side], [2, 2], 0.2)[0]


def regions(size: list[int], k: int, weighted: bool) -> Callable[..., Tensor]:
    def run(query: Tensor) -> Tensor:
        if k > 2:
            query = query.narrow(1, 0, 4).narrow(2, 0, 6)  # of a known size, which the kernels for small maps ask for
        logits, routes = region_affinity(query, region_size=(size[0], size[1])).topk(k)
        return routing._forward(query, None, None, routes, logits.softmax(-1) if weighted else None, size, 0.2)[0]

    return run


def neighbors(dtype: torch.dtype) -> Callable[..., Tensor]:
    sizes = [3, 5], [2, 1], [1, 1], [False, False]
    return lambda qkv, bias: neighborhood._forward(qkv.to(dtype), None, None, bias, *sizes, 0.2)[0]


def dual_form(causal: bool, tokens: int, packed: bool) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """State space duality of 2 heads with 16 channels and states, in one tensor or three."""

    def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor | None = None, C: Tensor | None = None) -> Tensor:
        return dual._forward(x, dt, A, B, C, A, A, None, 16, causal, True, None)[0]

    if packed:
        return run, leaves((2, tokens, 64), (2, tokens, 2), (2,))
    return run, leaves((2, tokens, 2, 16), (2, tokens, 2), (2,), (2, tokens, 1, 16), (2, tokens, 1, 16))


def attended(rule: int, tokens: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Linear attention of 2 heads with 16 channels by a rule, with all that can be added."""

    def run(qkv: Tensor, temperature: Tensor, position: Tensor, local: Tensor) -> Tensor:
        parts = (qkv, None, None) if rule == linear.MEAN else qkv.unbind(2)
        return linear._forward(*parts, temperature, position, local, 3, 7, rule, 0.2, False)[0]

    return run, leaves((2, tokens, 3, 2, 16), (2,), (tokens, 2, 16), (2, 2, 16, 3, 3))


def scan_sizes(states: int) -> list[tuple[int, ...]]:
    sequence, map_size = (2, 6, 50), (2, 2, states, 50)
    return [sequence, sequence, (6, states), map_size, map_size, (6,), sequence, (2, 6, states)]


def scanned(return_state: bool) -> Callable[..., Tensor]:
    def run(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, start: Tensor) -> Tensor:
        options = True, False, return_state, True, 16, u.dtype
        out, last, _ = scan._forward(u, delta, A, B, C, D, z, D, start, *options)
        return out.sum() + last.sum() if return_state else out

    return run


def gated_form(both: bool, tokens: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Gated linear attention of 2 heads, in both directions or with a state before the first token."""

    def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, other: Tensor) -> Tensor:
        rest = (other, None) if both else (None, other)
        return gated._forward(q, k, v, decay, *rest, 0.25, False, 16.0)[0]

    vectors = (2, tokens, 2, 16)
    return run, leaves(vectors, vectors, (2, tokens, 2, 8), vectors, vectors if both else (2, 2, 16, 8))


def map_sizes(states: int, rank: int = 3) -> list[tuple[int, ...]]:
    """Of a map with 40 channels, and of what two routes need; their steps are projected from so many numbers."""
    pixels, each = (2, 9, 7), (2, 40)
    token = (*pixels, 2, states)
    return [(*pixels, 40), (*pixels, 2, rank), (*each, states), token, token, each, (*each, rank)]


def routed(codes: list[int]) -> Callable[..., Tensor]:
    def run(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, weight: Tensor) -> Tensor:
        return scan_2d._forward(x, delta, A, B, C, D, weight, D, None, codes, True, True, torch.float32)[0]

    return run


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    gpu.on = lambda device: nullcontext()
    gpu.multiprocessors = lambda device: 132  # type: ignore[assignment]
    n, d = 64, 16
    cases = {
        "window_attention": (windows(5), leaves((2, 12, 13, 3, 2, d), (2, 25, 25), (3, 2, d))),
        "window_attention, tiled": (windows(12), leaves((2, 13, 14, 3, 2, d), (2, 144, 144), (3, 2, d))),
        "channel_attention": (lambda qkv: channel._forward(qkv, 0.2)[0], leaves((2, n, 3, 2, d))),
        "depthwise_conv 3": (lambda x, w, b: depthwise._forward(x, w, b, True, False),
                             leaves((2, 9, 7, 24), (24, 1, 3, 3), (24,))),
        "depthwise_conv 5": (lambda x, w, b: depthwise._forward(x, w, b, False, False),
                             leaves((2, 9, 7, 24), (24, 1, 5, 5), (24,))),
        "depthwise_conv 3, activation": (lambda x, w, b: depthwise._forward(x, w, b, True, True),
                                         leaves((2, 9, 7, 24), (24, 1, 3, 3), (24,))),
        "depthwise_conv 5, activation": (lambda x, w, b: depthwise._forward(x, w, b, False, True),
                                         leaves((2, 9, 7, 24), (24, 1, 5, 5), (24,))),
        "gated_linear_attention": gated_form(True, 16),
        "gated_linear_attention, chunks": gated_form(False, 1000),
        "gelu_linear": (lambda x, w, b: gelu._GeluLinear.apply(x, w, b), leaves((2, n, 24), (8, 24), (8,))),
        "routing_attention": (regions([2, 4], 2, False), leaves((2, 8, 12, 3, 2, d))),
        "routing_attention, weighted": (regions([2, 4], 2, True), leaves((2, 7, 10, 3, 2, d))),
        "routing_attention, dense": (regions([2, 2], 5, False), leaves((2, 8, 12, 3, 2, d))),
        "neighborhood_attention": (neighbors(torch.float32), leaves((2, 9, 7, 3, 2, d), (2, 5, 9))),
        "neighborhood_attention, whole": (neighbors(torch.float16), leaves((2, 9, 7, 3, 2, d), (2, 5, 9))),
        "selective_scan": (scanned(False), leaves(*scan_sizes(1))),
        "selective_scan, last state": (scanned(True), leaves(*scan_sizes(3))),
        "selective_scan_2d": (routed([0, 2]), leaves(*map_sizes(1))),
        "selective_scan_2d, wide steps": (routed([0, 2]), leaves(*map_sizes(1, 15))),
        "selective_scan_2d, two orders": (routed([1, 4]), leaves(*map_sizes(2))),
        "state_space_dual": dual_form(False, 1000, True),
        "state_space_dual, causal": dual_form(True, 64, True),
        "state_space_dual, causal, chunks": dual_form(True, 1000, False),
        "linear_attention": attended(linear.MEAN, 50),
        "linear_attention, flows": attended(linear.FLOW, 50),
        "linear_attention, flows, chunks": attended(linear.FLOW, 1000),
        "layer_norm": (lambda x, w, b: norm._forward(x, w, b, 1e-5, torch.float16), leaves((2, n, 24), (24,), (24,))),
    }  # fmt: skip
    print(
        json.dumps(
            {
                f"{name}, {'dynamic' if dynamic else 'static'}": trace(function, tensors, dynamic)
                for name, (function, tensors) in cases.items()
                for dynamic in (False, True)
            }
        )
    )


if __name__ == "__main__":
    main()
