"""Operators: definition, kernels and registration. Importing them needs torch alone."""

from __future__ import annotations

from .dispatch import explain, use
from .layer_norm import layer_norm
from .window_attention import window_attention

__all__ = ["explain", "layer_norm", "use", "window_attention"]
