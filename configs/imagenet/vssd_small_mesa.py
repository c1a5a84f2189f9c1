"""VSSD-S at 224 on ImageNet-1K, from scratch, with MESA: a loss against what the average of the weights predicts.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/vssd_small_mesa
Hardware: 8 GPUs, 128 images each; the authors state the latter only, and scale the rate to the number of all.
Time: not measured here; 300 epochs, with one forward pass more for each batch of the last 225.
Expected: 84.5 % top-1 on ImageNet-1K, as the authors report.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.hooks_mesa import Mesa

with read_base():
    from .vssd_small import *

# Beside the recipe without it: the loss, after a quarter of the epochs.
custom_hooks.append(dict(type=Mesa, weight=1.5, start=0.25))
