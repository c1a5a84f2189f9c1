"""L2ViT-B at 224 pretrained on ImageNet-22K.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/l2vit_base_22k
Hardware: 8 GPUs, 128 images each, as official.
Time: not measured here; 90 epochs.
Expected: not published before fine-tuning; then, on ImageNet-1K, 86.0 % top-1.
Precision: float32, as official; `--set optim_wrapper.dtype=bfloat16` is faster.
Status: not run here.

ImageNet-22K has no official validation set: hold one out as `val`, with the same 21841 class folders.
"""

from mmengine.config import read_base

with read_base():
    from .._runtime import *
    from ._recipe_22k import *

# Beside Swin's recipe: a quarter of its images at the same rate, no clip, float32.
train_dataloader.update(batch_size=128)
optim_wrapper.update(dtype="float32", accumulative_counts=1, clip_grad=None)
optim_wrapper["optimizer"].update(lr=5e-4)
model["backbone"].update(name="l2vit_base", drop_path_rate=0.2)
