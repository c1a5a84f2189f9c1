"""Cascade Mask R-CNN on COCO, 36 epochs.

Command: torchrun --nproc-per-node 8 -m vizoo train coco/cascade_mask_rcnn_3x
Hardware: 8 GPUs, 2 images each, as official.
Time: not measured here; 36 epochs.
Expected: 50.4 box AP and 43.7 mask AP with Swin-T, 51.9 and 45.0 with Swin-S and Swin-B, as the authors report.
Drop path: 0.2 for Swin-T and Swin-S, 0.3 for Swin-B, as published.
Precision: bfloat16 where the official run has float16; pooling and losses in float32, as there.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.detection import CascadeMaskRCNN

with read_base():
    from ._base import *

model.update(type=CascadeMaskRCNN)
drop_path.update(swin_tiny=0.2, swin_small=0.2, swin_base=0.3)
train_cfg.update(max_epochs=36)
param_scheduler[0].update(milestones=(27, 33))
# The heads of its stages have batch norms, which several GPUs share.
sync_bn = "torch"
