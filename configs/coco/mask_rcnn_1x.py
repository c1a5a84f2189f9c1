"""Mask R-CNN on COCO, 12 epochs.

Command: torchrun --nproc-per-node 8 -m vizoo train coco/mask_rcnn_1x
Hardware: 8 GPUs, 2 images each, as official.
Time: not measured here; 12 epochs.
Expected: 43.7 box AP and 39.8 mask AP with Swin-T, as the authors report; BiFormer's report 47.8 and 43.2 (S), 48.6 and
43.7 (B).
Drop path: 0.1 for Swin-T, 0.2 for BiFormer-S, 0.3 for BiFormer-B, as published; other sizes of Swin were published for
36 epochs only.
Precision: bfloat16 where the official run has float16; pooling and losses in float32, as there.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.detection import MaskRCNN

with read_base():
    from ._base import *

model.update(type=MaskRCNN)
drop_path.update(swin_tiny=0.1, biformer_small=0.2, biformer_base=0.3)
