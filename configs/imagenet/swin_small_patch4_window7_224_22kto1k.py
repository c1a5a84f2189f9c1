"""Swin-S at 224 fine-tuned on ImageNet-1K from ImageNet-22K.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/swin_small_patch4_window7_224_22kto1k
Hardware: 8 GPUs, 64 images each, 2 batches accumulated, as official.
Time: not measured here; 30 epochs.
Expected: 83.2 % top-1 on ImageNet-1K, as the authors report.
Status: not run here.

The classifier starts from the 1000 rows of the 22K one that are classes of ImageNet-1K.
"""

from mmengine.config import read_base

with read_base():
    from .._runtime import *
    from ._recipe_finetune import *

model["backbone"].update(name="swin_small_patch4_window7_224.in22k", drop_path_rate=0.2)
