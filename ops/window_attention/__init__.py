"""Shifted-window attention."""
