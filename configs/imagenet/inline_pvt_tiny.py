"""InLine-PVT-T at 224 on ImageNet-1K, from scratch.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/inline_pvt_tiny
Hardware: 8 GPUs, 128 images each; the authors scale the rate to the number of all.
Time: not measured here; 310 epochs.
Expected: 78.2 % top-1 on ImageNet-1K, as the authors report.
Status: not run here.
"""

from mmengine.config import read_base

with read_base():
    from .._runtime import *
    from ._recipe_300e import *

# Beside Swin's recipe: a short warm-up, other ends of the schedule, ten last epochs at the lowest rate, no clip.
train_cfg.update(max_epochs=310)
param_scheduler[0].update(warmup=5, start_ratio=2e-3, min_ratio=2e-2, end=300)
optim_wrapper.update(clip_grad=None)
model["backbone"].update(name="inline_pvt_tiny", drop_path_rate=0.1)
