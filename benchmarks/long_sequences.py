"""Error of scans over long sequences, against the same scan of the same numbers in float64.

    python benchmarks/long_sequences.py --output benchmarks/results

For inputs in float32 and bfloat16: the norm of the difference over the norm of what is right, of the output and of the
gradient of every tensor, and the largest difference over the largest number. `kernels` are the Triton kernels,
`reference` is plain torch at the precision of the inputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from result_files import RESULTS, save
from vizoo.environment import environment
from vizoo.ops import selective_scan, state_space_dual

Tensors = dict[str, Tensor]


def selective(length: int, dtype: torch.dtype) -> tuple[Callable[..., Tensor], Tensors]:
    """16 channels of 16 states, with Mamba's rates and steps from 0.001 to 0.1."""
    tensors = {
        "u": torch.randn(1, 16, length, dtype=dtype, device="cuda"),
        "delta": torch.randn(1, 16, length, dtype=dtype, device="cuda"),
        "A": -torch.arange(1, 17, device="cuda").float().expand(16, 16).clone(),
        "B": torch.randn(1, 1, 16, length, dtype=dtype, device="cuda"),
        "C": torch.randn(1, 1, 16, length, dtype=dtype, device="cuda"),
        "D": torch.ones(16, device="cuda"),
        "delta_bias": torch.linspace(-7, -2.3, 16, device="cuda"),
    }
    return lambda **given: selective_scan(**given, softplus=True), tensors


def dual(length: int, dtype: torch.dtype) -> tuple[Callable[..., Tensor], Tensors]:
    """2 heads of 32 channels and 32 states, with Mamba-2's rates and steps from 0.001 to 0.1."""
    tensors = {
        "x": torch.randn(1, length, 2, 32, dtype=dtype, device="cuda"),
        "dt": torch.randn(1, length, 2, dtype=dtype, device="cuda"),
        "A": torch.tensor([-1.0, -16.0], device="cuda"),
        "B": torch.randn(1, length, 1, 32, dtype=dtype, device="cuda"),
        "C": torch.randn(1, length, 1, 32, dtype=dtype, device="cuda"),
        "D": torch.ones(2, device="cuda"),
        "dt_bias": torch.tensor([-6.0, -3.0], device="cuda"),
    }
    return lambda **given: state_space_dual(**given, softplus=True), tensors


OPERATORS = {"selective_scan": selective, "state_space_dual": dual}


def values(function: Callable[..., Tensor], tensors: Tensors, incoming: Tensor, implementation: str) -> Tensors:
    """Output and gradients."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    out = function(**leaves, implementation=implementation)
    gradients = torch.autograd.grad(out, list(leaves.values()), incoming.to(out.dtype))
    return {"output": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def errors(found: Tensors, exact: Tensors) -> dict[str, dict[str, float]]:
    rows = {}
    for name, value in exact.items():
        off = found[name].double() - value
        rows[name] = {
            "relative_norm": float(off.norm() / value.norm()),
            "largest": float(off.abs().max() / value.abs().max()),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=65536, help="tokens")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, dtype in ((name, dtype) for name in OPERATORS for dtype in (torch.float32, torch.bfloat16)):
        torch.manual_seed(0)
        function, tensors = OPERATORS[name](options.length, dtype)
        wide = {key: tensor.double() for key, tensor in tensors.items()}
        incoming = torch.randn_like(next(iter(tensors.values())))
        exact = values(function, wide, incoming.double(), "reference")
        for way, implementation in (("kernels", "triton"), ("reference", "reference")):
            found = errors(values(function, tensors, incoming, implementation), exact)
            rows.append({"op": name, "length": options.length, "dtype": str(dtype), "way": way, "errors": found})
            shown = {key: f"{error['relative_norm']:.1e}" for key, error in found.items()}
            print(name, dtype, way, shown, flush=True)
    path = save("long-sequences", environment(torch.device("cuda")), {"rows": rows}, options.output)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
