"""Faster R-CNN on COCO, 12 epochs: Mask R-CNN's recipe without masks.

Command: torchrun --nproc-per-node 8 -m vizoo train coco/faster_rcnn_1x
Hardware: 8 GPUs, 2 images each, as official.
Time: not measured here; 12 epochs.
Expected: nothing is published; Mask R-CNN has 43.7 box AP with Swin-T, and masks help its boxes a little.
Drop path: 0.1 for Swin-T, as in Mask R-CNN's 12 epochs.
Precision: bfloat16 where the official run has float16; pooling and losses in float32, as there.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.detection import FasterRCNN

with read_base():
    from ._base import *

model.update(type=FasterRCNN)
drop_path.update(swin_tiny=0.1)
train_dataloader["dataset"].update(masks=False)
val_evaluator[0].update(masks=False)
