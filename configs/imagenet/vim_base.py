"""Vim-B at 224 on ImageNet-1K, from scratch.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/vim_base
Hardware: 8 GPUs, 128 images each.
Time: not measured here; 300 epochs.
Expected: 81.9 % top-1 on ImageNet-1K, as the authors report.
Precision: float32, as official; `--set optim_wrapper.dtype=bfloat16` is faster.
Status: not run here.

The authors have published no command for this size; these are the defaults of their code.
"""

from mmengine.config import read_base

from vizoo.train.hooks import EMA
from vizoo.train.samplers import RepeatedAugmentation

with read_base():
    from .._runtime import *
    from ._recipe_300e import *

# Beside Swin's recipe: a short warm-up, no clip, a slow average of the weights, float32.
param_scheduler[0].update(warmup=5)
optim_wrapper.update(dtype="float32", clip_grad=None)
train_dataloader["dataset"]["transform"].update(color_jitter=0.3)
custom_hooks = [dict(type=EMA, decay=0.99996)]
model["backbone"].update(name="vim_base", drop_path_rate=0.1)
train_dataloader["sampler"] = dict(type=RepeatedAugmentation)
