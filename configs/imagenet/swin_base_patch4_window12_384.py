"""Swin-B fine-tuned on ImageNet-1K from 224 to 384.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/swin_base_patch4_window12_384
Hardware: 8 GPUs, 64 images each, 2 batches accumulated, as official.
Time: not measured here; 30 epochs.
Expected: 84.5 % top-1 on ImageNet-1K, as the authors report.
Status: not run here.

The bias tables of the windows of 7 are resized to windows of 12.
"""

from mmengine.config import read_base

with read_base():
    from .._runtime import *
    from ._recipe_finetune import *

model["backbone"].update(
    name="swin_base_patch4_window7_224.in1k",
    img_size=384,
    window_size=12,
    drop_path_rate=0.5,
)
train_dataloader["dataset"]["transform"].update(size=384)
val_dataloader["dataset"]["transform"].update(size=384, crop_pct=1.0, crop_mode="squash")
