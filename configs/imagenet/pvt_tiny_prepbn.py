"""PVT-T with PRepBN at 224 on ImageNet-1K, from scratch.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/pvt_tiny_prepbn
Hardware: 8 GPUs, 128 images each, as official.
Time: not measured here; 320 epochs.
Expected: 76.0 % top-1 on ImageNet-1K, as the authors report.
Norms: LayerNorm gives way to batch norm over the first 300,000 updates.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.hooks_norm import CollectStatistics, NormSchedule

with read_base():
    from .._runtime import *
    from ._recipe_300e import *

# Beside Swin's recipe: a short warm-up, other ends of the schedule, ten epochs at the lowest rate, no clip, the
# schedule of the norms and ten last epochs for the statistics of the batch norms.
train_cfg.update(max_epochs=320)
param_scheduler[0].update(warmup=5, start_ratio=2e-3, min_ratio=2e-2, end=300)
optim_wrapper.update(clip_grad=None)
custom_hooks = [dict(type=NormSchedule), dict(type=CollectStatistics, epochs=10)]
model["backbone"].update(name="pvt_tiny_prepbn", drop_path_rate=0.0)
