"""RetinaNet on COCO for plain backbones, 12 epochs: PlainMamba's recipe.

Command: torchrun --nproc-per-node 8 -m vizoo train coco/retinanet_plain_1x
Hardware: 8 GPUs, 2 images each, as official.
Time: not measured here; 12 epochs.
Expected: 41.7 box AP with PlainMamba-L1, 43.9 with L2, 44.8 with L3, as the authors report.
An adapter beside the backbone makes strides 8 to 32. Other families whose stages hold maps of stride 16 are set whole,
`--set "model.backbone={'name': 'vig_tiny', 'pretrained': True}"`.
Drop path: as published, 0.1, 0.2 and 0.3 for PlainMamba by size. Plain resizing; all batch norms learn.
Precision: float32, as official; `--set optim_wrapper.dtype=bfloat16` is faster.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.detection import RetinaNet
from vizoo.train.detection.adapter import VitAdapter
from vizoo.train.detection.neck import Pyramid
from vizoo.train.detection.transforms import ResizeTransform

with read_base():
    from ._base import *

model.update(
    type=RetinaNet,
    backbone=dict(name="plainmamba_l1", pretrained=True, output_norms=False),
    adapter=dict(type=VitAdapter, out_indices=(1, 2, 3)),
    neck=dict(type=Pyramid, norm=True, extra_on_output=True),
    norm_eval=False,
)
drop_path.update(plainmamba_l1=0.1, plainmamba_l2=0.2, plainmamba_l3=0.3)
train_dataloader["dataset"].update(masks=False)
train_dataloader["dataset"]["transform"] = dict(type=ResizeTransform, short=800, long=1333, hflip=0.5, extra=())
val_evaluator[0].update(masks=False)
optim_wrapper.update(dtype="float32", clip_grad=dict(max_norm=35.0))
optim_wrapper["paramwise_cfg"].update(
    not_decayed=("level_embed", "pos_embed", "norm", "bias", ".A_log", ".D", ".direction_Bs")
)
# Adapter and pyramid have batch norms, which several GPUs share.
sync_bn = "torch"
