"""Semantic segmentation on ADE20K."""
