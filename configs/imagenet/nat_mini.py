"""NAT-Mini at 224 on ImageNet-1K, from scratch.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/nat_mini
Hardware: 8 GPUs, 128 images each, as official.
Time: not measured here; 310 epochs.
Expected: 81.8 % top-1 on ImageNet-1K, as the authors report.
Status: not run here.
"""

from mmengine.config import read_base

with read_base():
    from .._runtime import *
    from ._recipe_300e import *

# Beside Swin's recipe: ten last epochs at the lowest rate, which is half of Swin's, and either filter for crops.
train_cfg.update(max_epochs=310)
param_scheduler[0].update(end=300, min_ratio=5e-3)
train_dataloader["dataset"]["transform"].update(interpolation="random")
model["backbone"].update(name="nat_mini", drop_path_rate=0.2)
