"""SwinV2-L at 256 with windows of 16 fine-tuned on ImageNet-1K from ImageNet-22K at 192.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/swinv2_large_patch4_window12to16_192to256_22kto1k_ft
Hardware: 8 GPUs, 64 images each, 2 batches accumulated: the official 1024 images per update.
Time: not measured here; 30 epochs.
Expected: 86.9 % top-1 on ImageNet-1K, as the authors report.
Status: not run here.

Positions keep the scale of the pretraining windows. The classifier starts from the 1000 rows of the 22K one that
are classes of ImageNet-1K.
"""

from mmengine.config import read_base

with read_base():
    from .._runtime import *
    from ._recipe_finetune import *

model["backbone"].update(
    name="swinv2_large_patch4_window12_192_22k",
    img_size=256,
    window_size=16,
    pretrained_windows=(12, 12, 12, 6),
    drop_path_rate=0.2,
)
train_dataloader["dataset"]["transform"].update(size=256)
val_dataloader["dataset"]["transform"].update(size=256)
