"""Mask R-CNN on COCO, 12 epochs, as small convolutional backbones are compared.

Command: torchrun --nproc-per-node 8 -m vizoo train coco/mask_rcnn_light_1x
Hardware: 8 GPUs, 4 images each, as official.
Time: not measured here; 12 epochs.
Expected: nothing is published for Swin; CAS-ViT's authors report 37.4 box AP and 34.9 mask AP (`rcvit_xs`), 39.8 and
36.7 (S), 42.3 and 38.9 (M), 43.5 and 39.6 (T).
Drop path: none for CAS-ViT, as published. Plain resizing, twice the images at twice the rate, everything is decayed.
Precision: bfloat16 where the official run has float32; pooling and losses in float32.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.detection import MaskRCNN
from vizoo.train.detection.transforms import ResizeTransform

with read_base():
    from ._base import *

model.update(type=MaskRCNN)
drop_path.update(rcvit=0.0)
train_dataloader.update(batch_size=4)
train_dataloader["dataset"]["transform"] = dict(type=ResizeTransform, short=800, long=1333, hflip=0.5, extra=())
optim_wrapper["paramwise_cfg"].update(not_decayed=())
optim_wrapper["optimizer"].update(weight_decay=1e-4)
