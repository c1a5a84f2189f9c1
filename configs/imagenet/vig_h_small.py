"""ViG-H-S at 224 on ImageNet-1K, from scratch.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/vig_h_small
Hardware: 8 GPUs, 128 images each, as official.
Time: not measured here; 300 epochs.
Expected: 83.8 % top-1 on ImageNet-1K, as the authors report.
Precision: bfloat16 where the official run has float16.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.hooks import EMA

with read_base():
    from .._runtime import *
    from ._recipe_300e import *

# Beside Swin's recipe: a slow average of the weights.
custom_hooks = [dict(type=EMA, decay=0.9999)]
model["backbone"].update(name="vig_h_small", drop_path_rate=0.3)
