"""VSSD-S at 224 on ImageNet-1K, from scratch.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/vssd_small
Hardware: 8 GPUs, 128 images each; the authors state the latter only, and scale the rate to the number of all.
Time: not measured here; 300 epochs.
Expected: 84.1 % top-1 on ImageNet-1K, as the authors report.
With MESA: imagenet/vssd_small_mesa.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.hooks import EMA

with read_base():
    from .._runtime import *
    from ._recipe_300e import *

# Beside Swin's recipe: a lower rate, and a slow average of the weights.
optim_wrapper["optimizer"].update(lr=3e-4)
param_scheduler[0].update(start_ratio=5e-7 / 3e-4)
custom_hooks = [dict(type=EMA, decay=0.9999)]
model["backbone"].update(name="vssd_small", drop_path_rate=0.4)
