"""SwinV2-L at 192 with windows of 12 pretrained on ImageNet-22K.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/swinv2_large_patch4_window12_192_22k
Hardware: 8 GPUs, 64 images each, 8 batches accumulated: the official 4096 images per update.
Time: not measured here; 90 epochs.
Expected: not published before fine-tuning; then, on ImageNet-1K, 86.9 (256) and 87.6 (384) % top-1.
Status: not run here.

ImageNet-22K has no official validation set: hold one out as `val`, with the same 21841 class folders.
"""

from mmengine.config import read_base

with read_base():
    from .._runtime import *
    from ._recipe_22k import *

model["backbone"].update(name="swinv2_large_patch4_window12_192_22k", drop_path_rate=0.2)
train_dataloader["dataset"]["transform"].update(size=192)
val_dataloader["dataset"]["transform"].update(size=192)
optim_wrapper["optimizer"].update(weight_decay=0.1)
