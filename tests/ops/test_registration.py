"""Compilers take operators apart: they see the kernels, know what those write, and keep no more than meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCAN_GRADIENTS = [
    "grad_delta", "grad_start", "grad_u", "grad_z", "parts_A", "parts_B", "parts_C", "parts_D", "parts_bias",
    "waiting",
]  # fmt: skip
WRITTEN = {
    "window_attention": [["out"], ["grad_bias", "grad_padding", "grad_qkv"]],
    "window_attention, tiled": [
        ["lse", "out"],
        ["delta", "grad_qkv"],
        ["grad_padding", "grad_qkv"],
        ["grad_bias"],
    ],
    "channel_attention": [["result"], ["out"], ["result"], ["grad_qkv"]],
    "depthwise_conv 3": [["out"], ["grad_x", "parts"]],
    "depthwise_conv 5": [["out"], ["parts"], ["out"]],
    "depthwise_conv 3, activation": [["out"], ["out"], ["grad_x", "parts"]],
    "depthwise_conv 5, activation": [["out"], ["out"], ["parts"], ["out"]],
    "gated_linear_attention": [
        ["out", "part"],
        ["kept"],
        ["kept"],
        ["grad_decay", "grad_k", "grad_q", "grad_reverse_decay", "grad_v"],
    ],
    "gated_linear_attention, chunks": [
        ["decays", "ends"],
        ["last", "parts"],
        ["out"],
        *2 * [["decays", "ends"], ["last", "parts"], ["kept"]],
        ["grad_decay", "grad_k", "grad_q", "grad_v"],
    ],
    "gelu_linear": [["grad_x", "hidden"]],
    "layer_norm": [["out"], ["grad_x", "parts"]],
    "linear_attention": [["out", "sums"], ["grad_q", "parts"], ["grad_k", "parts"]],
    "linear_attention, flows": [
        ["flows", "out", "sums"],
        *2 * [["parts"]],
        ["grad_q", "parts"],
        ["grad_k", "grad_v", "parts"],
    ],
    "linear_attention, flows, chunks": [
        *3 * [["parts"]],
        ["out"],
        *2 * [["parts"]],
        ["grad_q", "parts"],
        ["grad_k", "grad_v", "parts"],
    ],
    "selective_scan": [["to_B", "to_C"], ["out", "states"], ["to_B", "to_C"], SCAN_GRADIENTS],
    "selective_scan, last state": [["to_B", "to_C"], ["last", "out", "states"], ["to_B", "to_C"], SCAN_GRADIENTS],
    "selective_scan_2d": [["out"], ["out"], ["out"], ["grad_x", "parameter_parts", "token_parts"]],
    "selective_scan_2d, wide steps": [
        ["out"],
        ["out"],
        ["out"],
        ["grad_delta", "grad_x", "parameter_parts", "token_parts"],
    ],
    "selective_scan_2d, two orders": [
        ["out"],
        ["out"],
        ["out"],
        ["out"],
        *2 * [["grad_x", "parameter_parts", "token_parts"]],
    ],
    "state_space_dual": [["parts"], ["out"], ["parts"], ["grad_dt", "grad_x", "parts"]],
    "state_space_dual, causal": [
        ["last_states", "out"],
        ["decays", "parts"],
        ["last", "parts"],
        ["parts"],
        ["last", "parts"],
        ["grad_dt", "grad_x", "parts"],
    ],
    "state_space_dual, causal, chunks": [
        ["decays", "parts"],
        ["last", "parts"],
        ["out"],
        ["decays", "parts"],
        ["last", "parts"],
        ["parts"],
        ["last", "parts"],
        ["grad_B", "grad_C", "grad_dt", "grad_x", "parts"],
    ],
    "neighborhood_attention": [["lse", "out"], ["delta", "grad_q"], ["grad_k"], ["parts"], ["grad_bias"]],
    "neighborhood_attention, whole": [["lse", "out"], ["delta", "grad_q"], ["grad_k"], ["parts"], ["grad_bias"]],
    "routing_attention": [["lse", "out"], ["delta", "grad_q"], ["sources", "starts"], ["grad_k"]],
    "routing_attention, weighted": [
        ["lse", "out"],
        ["delta", "grad_q", "grad_weights"],
        ["sources", "starts"],
        ["grad_k"],
    ],
    "routing_attention, dense": [["lse", "out"], ["grad_q"]],
}
"""What each kernel of an operator writes, forward and backward; anything more would be copied before each launch."""


@pytest.fixture(scope="module")
def graphs() -> dict[str, Any]:
    """What the script `traced.py` finds in the graphs of all operators."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("traced.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("sizes", ["static", "dynamic"])
@pytest.mark.parametrize("name", WRITTEN)
def test_compilers_see_the_kernels(name: str, sizes: str, graphs: dict[str, Any]) -> None:
    joint, _ = graphs[f"{name}, {sizes}"]
    assert joint == {"written": WRITTEN[name], "operators": []}


def test_compilers_do_not_launch_a_backward_kernel_forward(graphs: dict[str, Any]) -> None:
    """The GELU again, above all: its kernel is what keeps the hidden map from being kept."""
    for name, kernels in WRITTEN.items():
        _, forward = graphs[f"{name}, static"]
        assert all(written in kernels and not any("grad" in each for each in written) for written in forward["written"])
    for name in ("depthwise_conv 3, activation", "depthwise_conv 5, activation"):  # the sums again, by the same kernel
        assert graphs[f"{name}, static"][1]["written"] == [["out"]]
