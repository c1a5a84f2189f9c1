"""What the kernels of neighborhood attention support."""

from __future__ import annotations

from typing import Any

from .reference import neighborhood_attention_reference


def unsupported_reasons(**arguments: Any) -> list[str]:
    """Why the kernels cannot take these arguments; empty when they can."""
    del arguments
    return ["its kernels are being written"]


neighborhood_attention_triton = neighborhood_attention_reference
