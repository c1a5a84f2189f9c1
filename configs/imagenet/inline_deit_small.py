"""InLine-DeiT-S at 288 on ImageNet-1K, from scratch.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/inline_deit_small
Hardware: 8 GPUs, 128 images each; the authors scale the rate to the number of all.
Time: not measured here; 300 epochs.
Expected: 80.2 % top-1 on ImageNet-1K, as the authors report.
Status: not run here.
"""

from mmengine.config import read_base

with read_base():
    from .._runtime import *
    from ._recipe_300e import *

train_dataloader["dataset"]["transform"].update(size=288)
val_dataloader["dataset"]["transform"].update(size=288)
model["backbone"].update(name="inline_deit_small", drop_path_rate=0.1)
