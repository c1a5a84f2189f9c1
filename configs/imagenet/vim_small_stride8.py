"""Vim-S at stride 8, fine-tuned on ImageNet-1K from stride 16.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/vim_small_stride8
Hardware: 8 GPUs, 128 images each, as official.
Time: not measured here; 30 epochs.
Expected: 81.6 % top-1 on ImageNet-1K, as the authors report.
Precision: float32, as official; `--set optim_wrapper.dtype=bfloat16` is faster.
Status: not run here.

Patches overlap by half; the position table is resized to their finer grid. The authors' lowest rate is their highest,
so the rate stays as it is.
"""

from mmengine.config import read_base

from vizoo.train.hooks import EMA
from vizoo.train.samplers import RepeatedAugmentation

with read_base():
    from .._runtime import *
    from ._recipe_finetune import *

# Beside Swin's recipe: a lower, constant rate, no accumulation and no clip, a slow average of the weights, float32.
param_scheduler[0].update(start_ratio=1.0, min_ratio=1.0)
optim_wrapper.update(dtype="float32", clip_grad=None, accumulative_counts=1)
optim_wrapper["optimizer"].update(lr=5e-6)
train_dataloader.update(batch_size=128)
train_dataloader["dataset"]["transform"].update(color_jitter=0.3)
custom_hooks = [dict(type=EMA, decay=0.99996)]
model["backbone"].update(name="vim_small", stride=8, drop_path_rate=0.0)
train_dataloader["sampler"] = dict(type=RepeatedAugmentation)
