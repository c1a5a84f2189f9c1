"""SLAB-CSwin-S at 224 on ImageNet-1K, from scratch.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/slab_cswin_small
Hardware: 8 GPUs, 128 images each, as official.
Time: not measured here; 310 epochs.
Expected: not known; the authors have the design, but report no figure.
Norms: LayerNorm gives way to batch norm over the first 120,000 updates.
Not here: ten further epochs in which the authors only collect the statistics of the batch norms.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.hooks import EMA
from vizoo.train.hooks_norm import NormSchedule

with read_base():
    from .._runtime import *
    from ._recipe_300e import *

# Beside Swin's recipe: other ends of the schedule, ten epochs at the lowest rate, no clip, a slow average of the
# weights, with the decay for 1024 images and the schedule of the norms.
train_cfg.update(max_epochs=310)
param_scheduler[0].update(start_ratio=2e-3, min_ratio=2e-2, end=300)
optim_wrapper.update(clip_grad=None)
custom_hooks = [dict(type=EMA, decay=0.9999), dict(type=NormSchedule)]
model["backbone"].update(name="slab_cswin_small", drop_path_rate=0.3)
