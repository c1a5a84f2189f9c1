"""PlainMamba-L3 at 224 on ImageNet-1K, from scratch.

Command: torchrun --nproc-per-node 4 -m vizoo train imagenet/plainmamba_l3
Hardware: 4 GPUs, 256 images each, as official.
Time: not measured here; 300 epochs.
Expected: 82.3 % top-1 on ImageNet-1K, as the authors report.
Precision: float32, as official; `--set optim_wrapper.dtype=bfloat16` is faster.
Status: not run here.

The authors let the average follow more slowly from epoch 250 on; here it does not.
"""

from mmengine.config import read_base

from vizoo.train.hooks import EMA

with read_base():
    from .._runtime import *
    from ._recipe_300e import *

# Beside Swin's recipe: a tighter clip, an average of the weights, float32.
train_dataloader.update(batch_size=256)
optim_wrapper.update(dtype="float32", clip_grad=dict(max_norm=1.0))
custom_hooks = [dict(type=EMA, decay=0.9999)]
model["backbone"].update(name="plainmamba_l3", drop_path_rate=0.4)
