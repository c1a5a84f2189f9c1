"""SwinV2-B at 256 with windows of 16 on ImageNet-1K, from scratch.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/swinv2_base_patch4_window16_256
Hardware: 8 GPUs, 64 images each, 2 batches accumulated: the official 1024 images per update.
Time: not measured here; 300 epochs.
Expected: 84.6 % top-1 on ImageNet-1K, as the authors report.
Status: not run here.
"""

from mmengine.config import read_base

with read_base():
    from .._runtime import *
    from ._recipe_300e import *

model["backbone"].update(name="swinv2_base_patch4_window16_256", drop_path_rate=0.5)
train_dataloader["dataset"]["transform"].update(size=256)
val_dataloader["dataset"]["transform"].update(size=256)
train_dataloader.update(batch_size=64)
optim_wrapper.update(accumulative_counts=2)
