"""RetinaNet on COCO, 12 epochs, as small convolutional backbones are compared.

Command: torchrun --nproc-per-node 8 -m vizoo train coco/retinanet_light_1x
Hardware: 8 GPUs, 4 images each, as official.
Time: not measured here; 12 epochs.
Expected: nothing is published for Swin; CAS-ViT's authors report 36.5 box AP (`rcvit_xs`), 38.6 (S), 40.9 (M) and 41.9
(T).
Drop path: none for CAS-ViT, as published. Plain resizing, AdamW, everything is decayed.
Precision: bfloat16 where the official run has float32; losses in float32.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.detection import RetinaNet
from vizoo.train.detection.transforms import ResizeTransform

with read_base():
    from ._base import *

model.update(type=RetinaNet)
model["backbone"].update(out_indices=(1, 2, 3))
drop_path.update(rcvit=0.0)
train_dataloader.update(batch_size=4)
train_dataloader["dataset"].update(masks=False)
train_dataloader["dataset"]["transform"] = dict(type=ResizeTransform, short=800, long=1333, hflip=0.5, extra=())
val_evaluator[0].update(masks=False)
optim_wrapper["paramwise_cfg"].update(not_decayed=())
optim_wrapper["optimizer"].update(weight_decay=1e-4)
