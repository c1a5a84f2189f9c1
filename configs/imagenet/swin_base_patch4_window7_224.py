"""Swin-B at 224 on ImageNet-1K, from scratch.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/swin_base_patch4_window7_224
Hardware: 8 GPUs, 64 images each, 2 batches accumulated, as official.
Time: not measured here; 300 epochs.
Expected: 83.5 % top-1 on ImageNet-1K, as the authors report.
Status: not run here.
"""

from mmengine.config import read_base

with read_base():
    from .._runtime import *
    from ._recipe_300e import *

model["backbone"].update(name="swin_base_patch4_window7_224", drop_path_rate=0.5)
train_dataloader.update(batch_size=64)
optim_wrapper.update(accumulative_counts=2)
