"""Efficient vision backbones over shared Triton operators.

import vizoo

model = vizoo.create_model("swin_tiny_patch4_window7_224", pretrained=True)
pyramid = vizoo.create_model("swin_tiny_patch4_window7_224", features_only=True)
"""

from vizoo.backbones.base import Backbone, FeatureInfo, Stage

from .bridges import as_torchvision_backbone, register_mmengine, register_timm
from .card import Card, describe
from .checkpoint import CheckpointMismatch, LoadReport, load_checkpoint
from .create import create_model
from .registry import list_models

__version__ = "0.1.0"

__all__ = [
    "Backbone",
    "Card",
    "CheckpointMismatch",
    "FeatureInfo",
    "LoadReport",
    "Stage",
    "as_torchvision_backbone",
    "create_model",
    "describe",
    "list_models",
    "load_checkpoint",
    "register_mmengine",
    "register_timm",
]
