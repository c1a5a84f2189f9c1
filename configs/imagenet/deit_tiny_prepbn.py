"""DeiT-T with batch norm at 224 on ImageNet-1K, from scratch.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/deit_tiny_prepbn
Hardware: 8 GPUs, 128 images each, as official.
Time: not measured here; 310 epochs.
Expected: 73.6 % top-1 on ImageNet-1K, as the authors report.
Norms: batch norm from the start on, as in the authors' code; model.backbone.norm_steps=300000 and the hook NormSchedule
would let LayerNorm train in front of it.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.hooks_norm import CollectStatistics

with read_base():
    from .._runtime import *
    from ._recipe_300e import *

# Beside Swin's recipe: ten last epochs for the statistics of the batch norms.
train_cfg.update(max_epochs=310)
param_scheduler[0].update(end=300)
custom_hooks = [dict(type=CollectStatistics, epochs=10)]
model["backbone"].update(name="deit_tiny_prepbn", drop_path_rate=0.0)
