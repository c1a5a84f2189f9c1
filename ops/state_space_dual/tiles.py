"""Launch parameters of the kernels of state space duality."""

from __future__ import annotations

ROWS = 64
"""Tokens of a tile; those of the causal form see each other by a product of its own."""
