"""UPerNet on Cityscapes, 80000 iterations.

Command: torchrun --nproc-per-node 8 -m vizoo train cityscapes/upernet_80k
Hardware: 8 GPUs, 2 images each.
Time: not measured here; 80000 iterations.
Expected: nothing is published for Swin.
Scale, crop and length are ours, by the habit of others for this set: the whole image at ratio 1, crops of 512 x 1024,
whole images in evaluation. All else is as in `ade20k/upernet_160k`, drop path included.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.segmentation.data import Cityscapes
from vizoo.train.segmentation.heads import FCNHead, UPerHead

with read_base():
    from ..ade20k._base import *

data_root = "data/cityscapes"
model.update(
    num_classes=19,
    pad_size=(512, 1024),
    decode_head=dict(type=UPerHead, channels=512),
    auxiliary_head=dict(type=FCNHead, channels=256, in_index=2),
    auxiliary_weight=0.4,
)
drop_path.update(swin_tiny=0.3, swin_small=0.3, swin_base=0.3)
train_dataloader["dataset"] = dict(
    type=Cityscapes,
    root=data_root,
    split="train",
    transform=dict(train_dataloader["dataset"]["transform"], scale=(2048, 1024), crop=(512, 1024)),
)
val_dataloader["dataset"] = dict(
    type=Cityscapes,
    root=data_root,
    split="val",
    transform=dict(val_dataloader["dataset"]["transform"], scale=(2048, 1024)),
)
train_cfg.update(max_iters=80_000, val_interval=8_000)
default_hooks["checkpoint"].update(iters=8_000)
