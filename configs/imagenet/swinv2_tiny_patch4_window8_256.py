"""SwinV2-T at 256 with windows of 8 on ImageNet-1K, from scratch.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/swinv2_tiny_patch4_window8_256
Hardware: 8 GPUs, 128 images each: the official 1024 images per update.
Time: not measured here; 300 epochs.
Expected: 81.8 % top-1 on ImageNet-1K, as the authors report.
Status: not run here.
"""

from mmengine.config import read_base

with read_base():
    from .._runtime import *
    from ._recipe_300e import *

model["backbone"].update(name="swinv2_tiny_patch4_window8_256", drop_path_rate=0.2)
train_dataloader["dataset"]["transform"].update(size=256)
val_dataloader["dataset"]["transform"].update(size=256)
