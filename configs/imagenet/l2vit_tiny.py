"""L2ViT-T at 224 on ImageNet-1K, from scratch.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/l2vit_tiny
Hardware: 8 GPUs, 128 images each, 4 batches accumulated, as official.
Time: not measured here; 300 epochs.
Expected: 83.1 % top-1 on ImageNet-1K, as the authors report.
Drop path: only L2ViT-B's is stated, 0.3; this one is ours.
Precision: float32, as official; `--set optim_wrapper.dtype=bfloat16` is faster.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.hooks import EMA

with read_base():
    from .._runtime import *
    from ._recipe_300e import *

# Beside Swin's recipe: four times as many images, rates that begin at 0 and end lower, no clip, a slow average of the
# weights, float32.
optim_wrapper.update(dtype="float32", accumulative_counts=4, clip_grad=None)
param_scheduler[0].update(start_ratio=0.0, min_ratio=1e-6 / 4e-3)
custom_hooks = [dict(type=EMA, decay=0.9999)]
model["backbone"].update(name="l2vit_tiny", drop_path_rate=0.1)
