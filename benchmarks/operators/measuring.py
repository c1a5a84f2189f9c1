"""How operators are measured, whichever they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.testing import do_bench

from vizoo.environment import commit, driver_version

Tensors = dict[str, Tensor]
Way = Callable[[Tensors], Tensor]
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One use of an operator.

    Attributes:
        facts: What tells its row in the result from others, beside the name.
        tensors: Inputs; each asks for a gradient.
        ours: The operator's kernels.
        expected: Computes what ours must come near, or there is no time of it; None where none can.
        peers: Other ways, by name.
        compiled: What makes further ways, by name, called where these are wanted.
        forward_bytes: Least bytes of the forward pass: inputs read once, outputs written once.
        both_bytes: Least bytes of the forward and the backward pass.
        own_tensors: The inputs of peers that take others.
    """

    facts: dict[str, Any]
    tensors: Tensors
    ours: Way
    expected: Way | None
    peers: dict[str, Way]
    compiled: dict[str, Callable[[], Way]] = field(default_factory=dict)
    forward_bytes: float
    both_bytes: float
    own_tensors: dict[str, Tensors] = field(default_factory=dict)

    def ways(self, eager: bool, wanted: Sequence[str] | None) -> Iterator[tuple[str, Way]]:
        """All ways by name, or only those that nothing compiles; of the peers those wanted."""

        def asked(name: str) -> bool:
            return wanted is None or name in wanted

        yield "vizoo", self.ours
        yield from ((name, way) for name, way in self.peers.items() if asked(name))
        if not eager:
            yield from ((name, build()) for name, build in self.compiled.items() if asked(name))

    def rows(self, eager: bool, wanted: Sequence[str] | None, bandwidth: float) -> Iterator[Row]:
        """The figures of each way, as soon as they are known."""
        if self.expected is not None:
            with torch.no_grad():
                expected = self.expected(self.tensors).float()
            check(self.ours(self.tensors).detach().float(), expected)
            del expected
        for name, way in self.ways(eager, wanted):
            figures = measure(way, self.own_tensors.get(name, self.tensors))
            shares = {
                "forward_share": self.forward_bytes / bandwidth / figures["forward_device_ms"] * 1e3,
                "both_share": self.both_bytes / bandwidth / figures["both_device_ms"] * 1e3,
            }
            yield {**self.facts, "implementation": name, **figures, **shares}
        torch.compiler.reset()


def compiling(function: Way) -> Callable[[], Way]:
    """What compiles a way for one size."""
    return partial(torch.compile, function, dynamic=False)


def measure(function: Way, tensors: Tensors) -> dict[str, float]:
    """Times in ms, with their 20 % and 80 % quantiles, and extra memory in bytes."""
    leaves = list(tensors.values())
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


def extra_memory(function: Way, tensors: Tensors, incoming: Tensor) -> float:
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


def line(row: Row) -> str:
    parts = [f"{row['name']:32} {row['implementation']:14}"]
    for kind, title in (("forward", "forward"), ("both", "with backward")):
        device, share = row[f"{kind}_device_ms"], row[f"{kind}_share"]
        parts.append(f"{title} {row[f'{kind}_ms']:8.4f} ms, {device:8.4f} on the device ({share:5.1%})")
    return "  ".join([*parts, f"extra {int(row['extra_bytes']) / 2**20:7.1f} MiB"])


def environment() -> dict[str, Any]:
    """What a figure depends on."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
