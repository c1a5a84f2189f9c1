"""BiFormer-T at 224 on ImageNet-1K, from scratch.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/biformer_tiny
Hardware: 8 GPUs, 128 images each, as official.
Time: not measured here; 300 epochs.
Expected: 81.4 % top-1 on ImageNet-1K, as the authors report.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.hooks import EMA
from vizoo.train.samplers import RepeatedAugmentation

with read_base():
    from .._runtime import *
    from ._recipe_300e import *

# Beside Swin's recipe: a short warm-up, no clip, and a slow average of the weights.
param_scheduler[0].update(warmup=5)
optim_wrapper.update(clip_grad=None)
custom_hooks = [dict(type=EMA, decay=0.99996)]
model["backbone"].update(name="biformer_tiny", drop_path_rate=0.1)
train_dataloader["sampler"] = dict(type=RepeatedAugmentation)
