"""Semantic segmentation on a pyramid of any backbone."""
