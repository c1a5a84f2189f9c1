"""SLAB-Swin-B at 224 on ImageNet-1K, from scratch.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/slab_swin_base
Hardware: 8 GPUs, 64 images each, as official.
Time: not measured here; 300 epochs.
Expected: not known; the authors have the design, but report no figure.
Norms: LayerNorm gives way to batch norm over the first 60,000 updates.
Not here: ten further epochs in which the authors only collect the statistics of the batch norms.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.hooks_norm import NormSchedule

with read_base():
    from .._runtime import *
    from ._recipe_300e import *

# Beside Swin's recipe: the schedule of the norms.
train_dataloader.update(batch_size=64)
custom_hooks = [dict(type=NormSchedule)]
model["backbone"].update(name="slab_swin_base", drop_path_rate=0.5)
