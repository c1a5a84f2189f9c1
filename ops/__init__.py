"""Operators: definition, kernels and registration. Importing them needs torch alone."""

from __future__ import annotations

from .channel_attention import channel_attention
from .dispatch import explain, use
from .layer_norm import layer_norm
from .window_attention import window_attention

__all__ = ["channel_attention", "explain", "layer_norm", "use", "window_attention"]
