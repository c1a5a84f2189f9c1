"""A small Swin on the handwritten digits that scikit-learn ships: no download, minutes on two CPU cores.

Command: vizoo train demo/digits
Hardware: 2 CPU cores.
Time: see the demo's report.
Expected: at least 97 % top-1 on the 360 held-out digits.
Status: run by `vizoo demo`.
"""

from typing import Any

from mmengine.config import read_base
from mmengine.dataset import DefaultSampler, default_collate
from torch.optim import AdamW

from vizoo.preprocess import EvalTransform
from vizoo.train.classification import ImageClassifier
from vizoo.train.datasets import Digits
from vizoo.train.loop import EpochLoop, init_worker
from vizoo.train.metrics import Accuracy
from vizoo.train.optim import AutocastOptimWrapper, GroupedOptimizer
from vizoo.train.schedules import WarmupCosineLR
from vizoo.train.transforms import RecipeTrainTransform

with read_base():
    from .._runtime import *

mean = std = (0.5, 0.5, 0.5)

model: dict[str, Any] = dict(
    type=ImageClassifier,
    backbone=dict(
        name="swin_tiny_patch4_window7_224",
        pretrained=False,
        num_classes=10,
        img_size=32,
        patch_size=4,
        embed_dim=48,
        depths=(2, 2),
        num_heads=(3, 6),
        window_size=4,
        drop_path_rate=0.1,
    ),
    mixup=None,
    label_smoothing=0.1,
)

train_dataloader: dict[str, Any] = dict(
    batch_size=64,
    num_workers=0,
    drop_last=True,
    dataset=dict(
        type=Digits,
        split="train",
        transform=dict(
            type=RecipeTrainTransform,
            size=32,
            scale=(0.6, 1.0),
            hflip=0.0,
            auto_augment=None,
            color_jitter=None,
            mean=mean,
            std=std,
            erase_prob=0.0,
        ),
    ),
    sampler=dict(type=DefaultSampler, shuffle=True),
    collate_fn=dict(type=default_collate),
    worker_init_fn=dict(type=init_worker),
)
val_dataloader: dict[str, Any] = dict(
    batch_size=64,
    num_workers=0,
    dataset=dict(
        type=Digits,
        split="val",
        transform=dict(type=EvalTransform, size=32, crop_pct=1.0, crop_mode="squash", mean=mean, std=std),
    ),
    sampler=dict(type=DefaultSampler, shuffle=False),
    collate_fn=dict(type=default_collate),
    worker_init_fn=dict(type=init_worker),
)
val_evaluator: list[dict[str, Any]] = [dict(type=Accuracy, topk=(1, 5))]

train_cfg: dict[str, Any] = dict(type=EpochLoop, max_epochs=30, val_interval=1)
optim_wrapper: dict[str, Any] = dict(
    type=AutocastOptimWrapper,
    dtype="float32",
    accumulative_counts=1,
    clip_grad=dict(max_norm=5.0),
    constructor=GroupedOptimizer,
    paramwise_cfg=dict(layer_decay=1.0),
    optimizer=dict(type=AdamW, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
)
auto_scale_lr: dict[str, Any] = dict(enable=False, base_batch_size=64)
param_scheduler: list[dict[str, Any]] = [
    dict(
        type=WarmupCosineLR,
        warmup=3,
        start_ratio=1e-2,
        min_ratio=1e-2,
        by_epoch=True,
        convert_to_iter_based=True,
    )
]
