"""Flowformer at 224 on ImageNet-1K, from scratch.

Command: torchrun --nproc-per-node 6 -m vizoo train imagenet/flowformer_cv
Hardware: 6 GPUs, 128 images each, as official.
Time: not measured here; 300 epochs.
Expected: 80.6 % top-1 on ImageNet-1K, as the authors report.
Precision: bfloat16 where the official run has float16; the sums of attention in float32.
Status: not run here.
"""

from mmengine.config import read_base

with read_base():
    from .._runtime import *
    from ._recipe_300e import *

# Beside Swin's recipe: a rate for 768 images, a short warm-up, a tighter clip, nothing erased.
param_scheduler[0].update(warmup=5, start_ratio=1e-6 / 7.5e-4, min_ratio=1e-5 / 7.5e-4)
optim_wrapper.update(clip_grad=dict(max_norm=1.0))
train_dataloader["dataset"]["transform"].update(erase_prob=0.0)
model["backbone"].update(name="flowformer_cv", drop_path_rate=0.2)
