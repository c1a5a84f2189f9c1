"""ViG-S at 224 on ImageNet-1K, from scratch.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/vig_small
Hardware: 8 GPUs, 128 images each, as official.
Time: not measured here; 300 epochs.
Expected: 81.7 % top-1 on ImageNet-1K, as the authors report.
Precision: float32, as official; `--set optim_wrapper.dtype=bfloat16` is faster.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.hooks import EMA

with read_base():
    from .._runtime import *
    from ._recipe_300e import *

# Beside Swin's recipe: more decay, a slow average of the weights, and float32.
optim_wrapper.update(dtype="float32")
optim_wrapper["optimizer"].update(weight_decay=0.1)
custom_hooks = [dict(type=EMA, decay=0.9999)]
model["backbone"].update(name="vig_small", drop_path_rate=0.2)
