"""Linear attention as a torch operator: what its kernels support."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def unsupported_reasons(**arguments: Any) -> list[str]:
    """Why kernels cannot take these arguments."""
    del arguments
    return ["linear attention has no kernels yet"]


def linear_attention_triton(**arguments: Any) -> Tensor:
    """Is not called while `unsupported_reasons` has some."""
    raise AssertionError(f"there is nothing to call with {sorted(arguments)}")
