"""Feature maps for a detector or a decoder: any image size, channels and strides known before the first image.

python examples/features.py
"""

from __future__ import annotations

import torch
from torchvision.ops import FeaturePyramidNetwork

import vizoo

torch.manual_seed(0)
backbone = vizoo.create_model("swin_tiny_patch4_window7_224", features_only=True, out_indices=(1, 2, 3)).eval()
fpn = FeaturePyramidNetwork(backbone.feature_info.channels(), out_channels=128)

image = torch.randn(1, 3, 203, 331)  # neither side divides by a window, a patch or a stride
with torch.inference_mode():
    maps = backbone(image)
    pyramid = fpn({f"p{i}": x for i, x in enumerate(maps, start=3)})

for stride, before, (name, after) in zip(backbone.feature_info.reduction(), maps, pyramid.items(), strict=True):
    print(f"{name}: stride {stride:2}, {tuple(before.shape)} -> {tuple(after.shape)}")
