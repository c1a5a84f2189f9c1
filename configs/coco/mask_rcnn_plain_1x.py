"""Mask R-CNN on COCO for plain backbones, 12 epochs: PlainMamba's recipe.

Command: torchrun --nproc-per-node 8 -m vizoo train coco/mask_rcnn_plain_1x
Hardware: 8 GPUs, 2 images each, as official.
Time: not measured here; 12 epochs.
Expected: 44.1 box AP and 39.1 mask AP with PlainMamba-L1, 46.0 and 40.6 with L2, 46.8 and 41.2 with L3, as the authors
report.
An adapter beside the backbone makes strides 4 to 32. Other families whose stages hold maps of stride 16 are set whole,
`--set "model.backbone={'name': 'vig_tiny', 'pretrained': True}"`.
Drop path: as published, 0.1, 0.2 and 0.3 for PlainMamba by size. Plain resizing; images without objects are kept; all
batch norms learn.
Precision: float32, as official; `--set optim_wrapper.dtype=bfloat16` is faster.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.detection import MaskRCNN
from vizoo.train.detection.adapter import VitAdapter
from vizoo.train.detection.neck import Pyramid
from vizoo.train.detection.transforms import ResizeTransform

with read_base():
    from ._base import *

model.update(
    type=MaskRCNN,
    backbone=dict(name="plainmamba_l1", pretrained=True, output_norms=False),
    adapter=dict(type=VitAdapter),
    neck=dict(type=Pyramid, norm=True),
    box=dict(convs=(256, 256, 256, 256), hidden=(1024,)),
    norm_eval=False,
)
drop_path.update(plainmamba_l1=0.1, plainmamba_l2=0.2, plainmamba_l3=0.3)
train_dataloader["dataset"].update(keep_empty=True)
train_dataloader["dataset"]["transform"] = dict(type=ResizeTransform, short=800, long=1333, hflip=0.5, extra=())
optim_wrapper.update(dtype="float32")
optim_wrapper["paramwise_cfg"].update(
    not_decayed=("level_embed", "pos_embed", "norm", "bias", ".A_log", ".D", ".direction_Bs")
)
# Adapter, pyramid and box head have batch norms, which several GPUs share.
sync_bn = "torch"
