"""Mask R-CNN on COCO, 36 epochs.

Command: torchrun --nproc-per-node 8 -m vizoo train coco/mask_rcnn_3x
Hardware: 8 GPUs, 2 images each, as official.
Time: not measured here; 36 epochs.
Expected: 46.0 box AP and 41.6 mask AP with Swin-T, 48.5 and 43.3 with Swin-S, as the authors report; DaViT's report
47.4 and 42.9 (T), 49.5 and 44.3 (S), 49.9 and 44.6 (B).
Drop path: 0.2 for Swin-T and Swin-S, as published; DaViT's is not.
Precision: bfloat16 where the official run has float16; pooling and losses in float32, as there.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.detection import MaskRCNN

with read_base():
    from ._base import *

model.update(type=MaskRCNN)
drop_path.update(swin_tiny=0.2, swin_small=0.2)
train_cfg.update(max_epochs=36)
param_scheduler[0].update(milestones=(27, 33))
