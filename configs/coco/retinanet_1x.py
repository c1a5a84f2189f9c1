"""RetinaNet on COCO, 12 epochs: mmdetection's recipe.

Command: torchrun --nproc-per-node 8 -m vizoo train coco/retinanet_1x
Hardware: 8 GPUs, 2 images each, as official.
Time: not measured here; 12 epochs.
Expected: nothing is published for Swin-T; BiFormer's authors report 45.9 box AP (S) and 47.1 (B) with AdamW, at a rate
and a decay of 1e-4.
Drop path: 0.2 for Swin-T, as in mmdetection's config; 0.2 for BiFormer-S, 0.3 for BiFormer-B, 0.1 for L2ViT-T
and L2ViT-S, 0.2 for L2ViT-B, as published; L2ViT's authors train with AdamW, as Mask R-CNN is trained here. Plain
resizing, SGD, everything is decayed.
Precision: bfloat16 where mmdetection's config has float32; losses in float32.
Status: not run here.
"""

from mmengine.config import read_base
from torch.optim import SGD

from vizoo.train.detection import RetinaNet
from vizoo.train.detection.transforms import ResizeTransform

with read_base():
    from ._base import *

model.update(type=RetinaNet)
model["backbone"].update(out_indices=(1, 2, 3))
drop_path.update(swin_tiny=0.2, biformer_small=0.2, biformer_base=0.3)
drop_path.update(l2vit_tiny=0.1, l2vit_small=0.1, l2vit_base=0.2)
train_dataloader["dataset"].update(masks=False)
train_dataloader["dataset"]["transform"] = dict(type=ResizeTransform, short=800, long=1333, hflip=0.5, extra=())
val_evaluator[0].update(masks=False)
optim_wrapper["paramwise_cfg"].update(not_decayed=())
optim_wrapper["optimizer"] = dict(type=SGD, lr=0.01, momentum=0.9, weight_decay=1e-4)
