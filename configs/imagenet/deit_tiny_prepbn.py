"""DeiT-T with batch norm at 224 on ImageNet-1K, from scratch.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/deit_tiny_prepbn
Hardware: 8 GPUs, 128 images each, as official.
Time: not measured here; 300 epochs.
Expected: 73.6 % top-1 on ImageNet-1K, as the authors report.
Norms: batch norm from the start on, as in the authors' code; model.backbone.norm_steps=300000 and the hook NormSchedule
would let LayerNorm train in front of it.
Not here: ten further epochs in which the authors only collect the statistics of the batch norms.
Status: not run here.
"""

from mmengine.config import read_base

with read_base():
    from .._runtime import *
    from ._recipe_300e import *

model["backbone"].update(name="deit_tiny_prepbn", drop_path_rate=0.0)
