"""Semantic segmentation on Cityscapes."""
