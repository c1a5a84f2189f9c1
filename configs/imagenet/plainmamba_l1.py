"""PlainMamba-L1 at 224 on ImageNet-1K, from scratch.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/plainmamba_l1
Hardware: 8 GPUs, 256 images each, as official.
Time: not measured here; 300 epochs.
Expected: 77.9 % top-1 on ImageNet-1K, as the authors report.
Precision: bfloat16 where the official run has float16.
Status: not run here.
"""

from mmengine.config import read_base

with read_base():
    from .._runtime import *
    from ._recipe_300e import *

# Beside Swin's recipe: twice the images, and a shorter warm-up.
train_dataloader.update(batch_size=256)
param_scheduler[0].update(warmup=15)
model["backbone"].update(name="plainmamba_l1", drop_path_rate=0.2)
