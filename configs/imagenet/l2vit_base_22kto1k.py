"""L2ViT-B at 224 fine-tuned on ImageNet-1K from ImageNet-22K.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/l2vit_base_22kto1k
Hardware: 8 GPUs, 64 images each, 2 batches accumulated, as official.
Time: not measured here; 30 epochs.
Expected: 86.0 % top-1 on ImageNet-1K, as the authors report.
Precision: float32, as official; `--set optim_wrapper.dtype=bfloat16` is faster.
Status: not run here.

The classifier starts anew: the authors' starts from rows of their 22K one, whose order is their own.
"""

from mmengine.config import read_base

from vizoo.train.hooks import EMA

with read_base():
    from .._runtime import *
    from ._recipe_finetune import *

# Beside Swin's recipe: no clip, a slow average of the weights, float32.
optim_wrapper.update(dtype="float32", clip_grad=None)
custom_hooks = [dict(type=EMA, decay=0.9999)]
model["backbone"].update(name="l2vit_base.in22k", drop_path_rate=0.2)
