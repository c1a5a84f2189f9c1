"""What all detectors share: COCO, the official Swin recipe for 12 epochs, any backbone of the zoo.

`--set model.backbone.name=davit_tiny` trains another backbone, from its ImageNet weights; a tag in the name chooses
them. `drop_path` holds the published rates by the beginning of that name; a backbone that is not there keeps its
family's default, and `--set model.backbone.drop_path_rate=...` overrides both. `dilations` holds DiNAT's, and `n_win`
BiFormer's regions a side, for maps of this size likewise.
"""

from typing import Any

from mmengine.config import read_base
from mmengine.dataset import DefaultSampler
from torch.optim import AdamW

from vizoo.train.detection.data import CocoDetection, collate
from vizoo.train.detection.metrics import CocoAP
from vizoo.train.detection.sampler import AspectBatches
from vizoo.train.detection.transforms import ResizeCropTransform, ResizeTransform
from vizoo.train.loop import EpochLoop, init_worker
from vizoo.train.optim import AutocastOptimWrapper, GroupedOptimizer
from vizoo.train.schedules import WarmupStepLR

with read_base():
    from .._runtime import *

data_root = "data/coco"
drop_path: dict[str, float] = dict()
dilations: dict[str, Any] = dict.fromkeys(
    ("dinat_mini", "dinat_tiny", "dinat_small", "dinat_base", "dinat_large"),
    ((1, 28), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3)),
)
dilations.update(dinat_s=((1, 28), (1, 14), (1, 3, 1, 5, 1, 7), (1, 3)))
n_win: dict[str, int] = dict(biformer=16)

# `type` is a leaf's.
model: dict[str, Any] = dict(
    backbone=dict(name="swin_tiny_patch4_window7_224", pretrained=True),
    num_classes=80,
    frozen_stages=-1,
    grad_checkpointing=False,
)

train_dataloader: dict[str, Any] = dict(
    batch_size=2,
    num_workers=4,
    pin_memory=True,
    dataset=dict(
        type=CocoDetection,
        images=f"{data_root}/train2017",
        annotations=f"{data_root}/annotations/instances_train2017.json",
        masks=True,
        training=True,
        transform=dict(
            type=ResizeCropTransform,
            short=tuple(range(480, 801, 32)),
            long=1333,
            crop_short=(400, 500, 600),
            crop=(384, 600),
            crop_prob=0.5,
            hflip=0.5,
            extra=(),
        ),
    ),
    sampler=dict(type=DefaultSampler, shuffle=True),
    batch_sampler=dict(type=AspectBatches),
    collate_fn=dict(type=collate),
    worker_init_fn=dict(type=init_worker),
)
# One image at a time, as published: the padding of a batch changes what a model sees.
val_dataloader: dict[str, Any] = dict(
    num_workers=4,
    pin_memory=True,
    dataset=dict(
        type=CocoDetection,
        images=f"{data_root}/val2017",
        annotations=f"{data_root}/annotations/instances_val2017.json",
        masks=False,
        training=False,
        transform=dict(type=ResizeTransform, short=800, long=1333),
    ),
    sampler=dict(type=DefaultSampler, shuffle=False),
    collate_fn=dict(type=collate),
    worker_init_fn=dict(type=init_worker),
)
# The metric reads crowds and areas from the file itself: it must be the validation set's.
val_evaluator: list[dict[str, Any]] = [
    dict(type=CocoAP, annotations=f"{data_root}/annotations/instances_val2017.json", masks=True, output=None)
]

train_cfg: dict[str, Any] = dict(type=EpochLoop, max_epochs=12, val_interval=1)
optim_wrapper: dict[str, Any] = dict(
    type=AutocastOptimWrapper,
    dtype="bfloat16",
    accumulative_counts=1,
    clip_grad=None,
    constructor=GroupedOptimizer,
    paramwise_cfg=dict(
        layer_decay=1.0, not_decayed=("absolute_pos_embed", "relative_position_bias_table", "rpb", "norm")
    ),
    optimizer=dict(type=AdamW, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
)
# The rate above is for 16 images per update; it is scaled to the actual number.
auto_scale_lr: dict[str, Any] = dict(enable=True, base_batch_size=16)
param_scheduler: list[dict[str, Any]] = [
    dict(
        type=WarmupStepLR,
        milestones=(8, 11),
        gamma=0.1,
        # Updates, not epochs.
        warmup=500,
        start_ratio=1e-3,
        by_epoch=True,
        convert_to_iter_based=True,
    )
]
# Every batch has another size.
env_cfg.update(cudnn_benchmark=False)
default_hooks["checkpoint"].update(best="box_AP")
