"""What all segmenters share: ADE20K, the official recipe of UPerNet with Swin, any backbone of the zoo.

`--set model.backbone.name=davit_tiny` trains another backbone, from its ImageNet weights; a tag in the name chooses
them. `drop_path` holds the published rates by the beginning of that name; a backbone that is not there keeps its
family's default, and `--set model.backbone.drop_path_rate=...` overrides both. `dilations` holds DiNAT's likewise, for
crops of 512, of the large ones for crops of 640; `n_win` BiFormer's regions a side, for crops of 512.
`not_decayed` adds what a family spares beside norms, where anything is spared by name.
"""

from typing import Any

from mmengine.config import read_base
from mmengine.dataset import DefaultSampler
from torch.optim import AdamW

from vizoo.train.loop import IterLoop, init_worker
from vizoo.train.optim import AutocastOptimWrapper, GroupedOptimizer
from vizoo.train.schedules import WarmupPolyLR
from vizoo.train.segmentation.data import ADE20K, collate
from vizoo.train.segmentation.inference import Whole
from vizoo.train.segmentation.metrics import MeanIoU
from vizoo.train.segmentation.segmenter import Segmenter
from vizoo.train.segmentation.transforms import ResizeTransform, ScaleCropTransform

with read_base():
    from .._runtime import *

data_root = "data/ADEChallengeData2016"
drop_path: dict[str, float] = dict()
dilations: dict[str, Any] = dict.fromkeys(
    ("dinat_mini", "dinat_tiny", "dinat_small", "dinat_base"), ((1, 16), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2))
)
dilations.update(
    dinat_large=((1, 20), (1, 5, 1, 10), (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5), (1, 2)),
    dinat_s=((1, 16), (1, 8), (1, 2, 1, 3, 1, 4), (1, 2)),
    dinat_s_large=((1, 20), (1, 10), (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5), (1, 2)),
)
n_win: dict[str, int] = dict(biformer=8)
not_decayed: dict[str, Any] = dict(plainmamba=(".pos_embed", ".A_log", ".D", ".direction_Bs"))

# Heads and neck are a leaf's.
model: dict[str, Any] = dict(
    type=Segmenter,
    backbone=dict(name="swin_tiny_patch4_window7_224", pretrained=True),
    num_classes=150,
    pad_size=(512, 512),
    inference=dict(type=Whole),
    frozen_stages=-1,
    grad_checkpointing=False,
)

train_dataloader: dict[str, Any] = dict(
    batch_size=2,
    num_workers=4,
    pin_memory=True,
    drop_last=True,
    dataset=dict(
        type=ADE20K,
        root=data_root,
        split="training",
        classes=None,
        transform=dict(
            type=ScaleCropTransform,
            scale=(2048, 512),
            ratio=(0.5, 2.0),
            crop=512,
            max_share=0.75,
            hflip=0.5,
            distort=True,
            extra=(),
        ),
    ),
    sampler=dict(type=DefaultSampler, shuffle=True),
    collate_fn=dict(type=collate),
    worker_init_fn=dict(type=init_worker),
)
# One image at a time, as published: they differ in size.
val_dataloader: dict[str, Any] = dict(
    num_workers=4,
    pin_memory=True,
    dataset=dict(
        type=ADE20K,
        root=data_root,
        split="validation",
        classes=None,
        transform=dict(type=ResizeTransform, scale=(2048, 512)),
    ),
    sampler=dict(type=DefaultSampler, shuffle=False),
    collate_fn=dict(type=collate),
    worker_init_fn=dict(type=init_worker),
)
val_evaluator: list[dict[str, Any]] = [dict(type=MeanIoU)]

train_cfg: dict[str, Any] = dict(type=IterLoop, max_iters=160_000, val_interval=16_000)
optim_wrapper: dict[str, Any] = dict(
    type=AutocastOptimWrapper,
    dtype="float32",
    accumulative_counts=1,
    clip_grad=None,
    constructor=GroupedOptimizer,
    paramwise_cfg=dict(
        layer_decay=1.0, not_decayed=("absolute_pos_embed", "relative_position_bias_table", "rpb", "norm")
    ),
    optimizer=dict(type=AdamW, lr=6e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01),
)
# The rate above is for 16 images per update; it is scaled to the actual number.
auto_scale_lr: dict[str, Any] = dict(enable=True, base_batch_size=16)
param_scheduler: list[dict[str, Any]] = [
    dict(type=WarmupPolyLR, power=1.0, warmup=1500, start_ratio=1e-6, min_ratio=0.0, by_epoch=False)
]
# The heads have batch norms, which several GPUs share.
sync_bn = "torch"
default_hooks["checkpoint"].update(epochs=0, iters=16_000, best="mIoU")
