"""ViG-T at 224 on ImageNet-1K, from scratch.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/vig_tiny
Hardware: 8 GPUs, 128 images each, as official.
Time: not measured here; 300 epochs.
Expected: 77.2 % top-1 on ImageNet-1K, as the authors report.
Precision: float32, as official; `--set optim_wrapper.dtype=bfloat16` is faster.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.hooks import EMA

with read_base():
    from .._runtime import *
    from ._recipe_300e import *

# Beside Swin's recipe: a higher rate that starts and ends as there, a slow average of the weights, and float32.
optim_wrapper.update(dtype="float32")
optim_wrapper["optimizer"].update(lr=1e-3)
param_scheduler[0].update(start_ratio=5e-7 / 1e-3, min_ratio=5e-6 / 1e-3)
custom_hooks = [dict(type=EMA, decay=0.9999)]
model["backbone"].update(name="vig_tiny", drop_path_rate=0.0)
