"""Window attention as a torch operator."""

from __future__ import annotations

from torch import Tensor

from .reference import window_attention_reference


def unsupported_reasons(
    qkv: Tensor,
    bias: Tensor | None,
    cosine_scale: Tensor | None,
    padding: Tensor | None,
    *,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
) -> list[str]:
    """Why the kernels cannot take these arguments."""
    return ["the kernels are not in this build"]


window_attention_triton = window_attention_reference
