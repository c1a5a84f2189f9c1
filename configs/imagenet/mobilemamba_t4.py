"""MobileMamba-T4 at 192 on ImageNet-1K, from scratch.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/mobilemamba_t4
Hardware: 8 GPUs, 128 images each, 1024 per update as official.
Time: not measured here; 300 epochs.
Expected: 76.1 % top-1 on ImageNet-1K, as the authors report.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.hooks import EMA

with read_base():
    from .._runtime import *
    from ._recipe_300e import *

# Beside Swin's recipe: a higher rate, either filter for crops, and a slow average of the weights.
optim_wrapper["optimizer"].update(lr=7.5e-4)
train_dataloader["dataset"]["transform"].update(size=192, interpolation="random")
val_dataloader["dataset"]["transform"].update(size=192)
custom_hooks = [dict(type=EMA, decay=0.9998)]
model["backbone"].update(name="mobilemamba_t4", drop_path_rate=0.0)
