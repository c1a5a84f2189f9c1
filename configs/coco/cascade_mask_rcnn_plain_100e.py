"""Cascade Mask R-CNN on COCO for plain backbones, 100 epochs: Vim's recipe, after ViTDet.

Command: torchrun --nproc-per-node 8 -m vizoo train coco/cascade_mask_rcnn_plain_100e
Hardware: 8 GPUs, 8 images each; 64 images per update, as official.
Time: not measured here; 100 epochs.
Expected: 45.7 box AP and 39.2 mask AP with Vim-T, as the paper reports.
A simple pyramid makes strides 4 to 64 of the last map. Images are jittered in scale, and squares of 1024 pixels; the
position table is resized to these when the weights are loaded. Vim's class token is left out. Other families are set
whole, `--set "model.backbone={'name': 'vig_tiny', 'pretrained': True}"`, with a `layer_decay` of their own.
Drop path: 0.1, as published. Each layer learns at 0.837 of the rate of the next.
Beside the authors' detectron2: a mask head and boxes by class in every stage, where theirs has one mask head and boxes
of any class; the rate falls after epochs 89 and 96, where theirs does after updates 163889 and 177546 of 184375.
Precision: bfloat16 where the official run has float16; pooling and losses in float32.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.detection import CascadeMaskRCNN
from vizoo.train.detection.neck import SimplePyramid
from vizoo.train.detection.transforms import JitterTransform, ResizeTransform

with read_base():
    from ._base import *

model.update(
    type=CascadeMaskRCNN,
    backbone=dict(name="vim_tiny", pretrained=True, img_size=1024, class_token=False, out_indices=(3,)),
    neck=dict(type=SimplePyramid),
    pad_size=(1024, 1024),
    rpn=dict(depth=2, box_beta=0.0, train_kept=1000, allowed_border=None),
    box=dict(norm="layer", giou_weight=0.0, stage_weights=((10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15))),
    mask=dict(norm="layer"),
    stage_loss_weights=(1.0, 1.0, 1.0),
)
drop_path.update(vim=0.1)
train_dataloader.update(batch_size=8)
train_dataloader["dataset"]["transform"] = dict(type=JitterTransform, size=1024, ratio=(0.1, 2.0), hflip=0.5, extra=())
val_dataloader["dataset"]["transform"] = dict(type=ResizeTransform, short=1024, long=1024)
train_cfg.update(max_epochs=100)
# The heads' norms are the second modules of their layers.
optim_wrapper["paramwise_cfg"].update(
    layer_decay=0.837,
    not_decayed=("norm", "pos_embed", ".features.0.1.", ".features.1.1.", ".features.2.1.", ".features.3.1."),
)
optim_wrapper["optimizer"].update(weight_decay=0.1)
# The rate is for 64 images per update.
auto_scale_lr.update(base_batch_size=64)
param_scheduler[0].update(milestones=(89, 96), warmup=250)
