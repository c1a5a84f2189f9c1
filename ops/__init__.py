"""Operators: definition, kernels and registration. Importing them needs torch alone."""

from __future__ import annotations

from .dispatch import explain, use
from .window_attention import window_attention

__all__ = ["explain", "use", "window_attention"]
