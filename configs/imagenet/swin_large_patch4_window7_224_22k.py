"""Swin-L at 224 pretrained on ImageNet-22K.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/swin_large_patch4_window7_224_22k
Hardware: 8 GPUs, 64 images each, 8 batches accumulated: the official 4096 images per update.
Time: not measured here; 90 epochs.
Expected: not published before fine-tuning; then, on ImageNet-1K, 86.3 % top-1.
Status: not run here.

ImageNet-22K has no official validation set: hold one out as `val`, with the same 21841 class folders.
"""

from mmengine.config import read_base

with read_base():
    from .._runtime import *
    from ._recipe_22k import *

model["backbone"].update(name="swin_large_patch4_window7_224", drop_path_rate=0.2)
