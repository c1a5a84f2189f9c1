"""DeiT-S with PRepBN at 224 on ImageNet-1K, from scratch.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/deit_small_prepbn
Hardware: 8 GPUs, 128 images each, as official.
Time: not measured here; 300 epochs.
Expected: 80.2 % top-1 on ImageNet-1K, as the authors report.
Norms: LayerNorm gives way to batch norm over the first 300,000 updates.
Not here: ten further epochs in which the authors only collect the statistics of the batch norms.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.hooks_norm import NormSchedule

with read_base():
    from .._runtime import *
    from ._recipe_300e import *

# Beside Swin's recipe: the schedule of the norms.
custom_hooks = [dict(type=NormSchedule)]
model["backbone"].update(name="deit_small_prepbn", drop_path_rate=0.0)
