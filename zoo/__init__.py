"""Efficient vision backbones over shared Triton operators."""
