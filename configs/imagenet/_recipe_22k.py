"""The official Swin recipe for pretraining on ImageNet-22K: 90 epochs, AdamW, 4096 images per update."""

from typing import Any

from mmengine.dataset import DefaultSampler, default_collate
from torch.optim import AdamW

from vizoo.preprocess import EvalTransform
from vizoo.train.classification import ImageClassifier
from vizoo.train.datasets import ImageFolder
from vizoo.train.loop import EpochLoop, init_worker
from vizoo.train.metrics import Accuracy
from vizoo.train.mixup import Mixup
from vizoo.train.optim import AutocastOptimWrapper, GroupedOptimizer
from vizoo.train.schedules import WarmupCosineLR
from vizoo.train.transforms import RecipeTrainTransform

model: dict[str, Any] = dict(
    type=ImageClassifier,
    backbone=dict(pretrained=False, num_classes=21841),
    mixup=dict(
        type=Mixup,
        num_classes=21841,
        mixup_alpha=0.8,
        cutmix_alpha=1.0,
        prob=1.0,
        switch_prob=0.5,
        mode="batch",
        label_smoothing=0.1,
    ),
    # Where mixup is on, it smooths the targets itself.
    label_smoothing=0.1,
)

train_dataloader: dict[str, Any] = dict(
    batch_size=64,
    num_workers=8,
    pin_memory=True,
    drop_last=True,
    dataset=dict(
        type=ImageFolder,
        root="data/imagenet22k",
        split="train",
        transform=dict(
            type=RecipeTrainTransform,
            size=224,
            auto_augment="rand-m9-mstd0.5-inc1",
            color_jitter=0.4,
            interpolation="bicubic",
            erase_prob=0.25,
            erase_mode="pixel",
            erase_count=1,
        ),
    ),
    sampler=dict(type=DefaultSampler, shuffle=True),
    collate_fn=dict(type=default_collate),
    worker_init_fn=dict(type=init_worker),
)
val_dataloader: dict[str, Any] = dict(
    batch_size=64,
    num_workers=8,
    pin_memory=True,
    dataset=dict(
        type=ImageFolder,
        root="data/imagenet22k",
        split="val",
        reference="train",
        transform=dict(type=EvalTransform, size=224, crop_pct=0.875, crop_mode="center", interpolation="bicubic"),
    ),
    sampler=dict(type=DefaultSampler, shuffle=False),
    collate_fn=dict(type=default_collate),
    worker_init_fn=dict(type=init_worker),
)
val_evaluator: list[dict[str, Any]] = [dict(type=Accuracy, topk=(1, 5))]

train_cfg: dict[str, Any] = dict(type=EpochLoop, max_epochs=90, val_interval=1)
optim_wrapper: dict[str, Any] = dict(
    type=AutocastOptimWrapper,
    dtype="bfloat16",
    accumulative_counts=8,
    clip_grad=dict(max_norm=5.0),
    constructor=GroupedOptimizer,
    paramwise_cfg=dict(layer_decay=1.0),
    optimizer=dict(type=AdamW, lr=1.25e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
)
# The rate above is for 512 images per update; it is scaled to the actual number, and with it start and end.
auto_scale_lr: dict[str, Any] = dict(enable=True, base_batch_size=512)
param_scheduler: list[dict[str, Any]] = [
    dict(
        type=WarmupCosineLR,
        warmup=5,
        start_ratio=1e-3,
        min_ratio=1e-2,
        by_epoch=True,
        convert_to_iter_based=True,
    )
]
