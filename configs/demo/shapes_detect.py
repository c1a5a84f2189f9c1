"""A small Mask R-CNN on generated shapes over photographs: no download, minutes on one CPU core.

Command: vizoo train demo/shapes_detect
Hardware: 1 CPU core.
Time: 133 to 135 s of CPU time on one thread of an AMD EPYC that was busy with other work too; less alone.
Expected: at least 50 % box AP50 on 100 held-out scenes. Seeds 0, 1 and 2 gave 73.8, 74.7 and 76.0 % (masks: 68.4, 70.8
and 71.3 %).
Status: run, also by `vizoo demo`.

The scenes (`vizoo.train.shapes`) are written below `data_root` when they are first asked for. They are a demonstration,
no benchmark: most objects of a class share a hue, which makes them easy.

What was measured on the way: 375 updates on 600 scenes gave 74.7 % after half as much time again (seed 0).
"""

from typing import Any

from mmengine.config import read_base
from mmengine.dataset import DefaultSampler
from torch.optim import AdamW

from vizoo.train.detection import MaskRCNN
from vizoo.train.detection.data import collate
from vizoo.train.detection.metrics import CocoAP
from vizoo.train.detection.transforms import DetectionTransform
from vizoo.train.loop import EpochLoop, init_worker
from vizoo.train.optim import AutocastOptimWrapper, GroupedOptimizer
from vizoo.train.schedules import WarmupCosineLR
from vizoo.train.shape_sets import ShapesDetection

with read_base():
    from .._runtime import *

device = "cpu"
data_root = "data/shapes_detect"
scenes = dict(type=ShapesDetection, root=data_root, scenes=(520, 100), size=128, seed=0, masks=True)

model: dict[str, Any] = dict(
    type=MaskRCNN,
    backbone=dict(
        name="swin_tiny_patch4_window7_224",
        pretrained=False,
        img_size=128,
        embed_dim=32,
        depths=(2, 2, 2, 1),
        num_heads=(1, 2, 4, 8),
        window_size=4,
        drop_path_rate=0.0,
    ),
    num_classes=6,
    channels=64,
    rpn=dict(anchor_scale=6, train_per_level=200, train_kept=150, test_per_level=200, test_kept=100),
    box=dict(hidden=(256,), samples=96),
    mask=dict(hidden=(48, 48)),
)

train_dataloader: dict[str, Any] = dict(
    batch_size=8,
    num_workers=0,
    drop_last=True,
    dataset=dict(**scenes, split="train", transform=dict(type=DetectionTransform, hflip=0.5)),
    sampler=dict(type=DefaultSampler, shuffle=True),
    collate_fn=dict(type=collate),
    worker_init_fn=dict(type=init_worker),
)
val_dataloader: dict[str, Any] = dict(
    batch_size=10,
    num_workers=0,
    dataset=dict(**scenes, split="val", transform=dict(type=DetectionTransform)),
    sampler=dict(type=DefaultSampler, shuffle=False),
    collate_fn=dict(type=collate),
    worker_init_fn=dict(type=init_worker),
)
val_evaluator: list[dict[str, Any]] = [
    dict(type=CocoAP, annotations=f"{data_root}/annotations/instances_val.json", masks=True, output=None)
]

train_cfg: dict[str, Any] = dict(type=EpochLoop, max_epochs=4, val_interval=1)
optim_wrapper: dict[str, Any] = dict(
    type=AutocastOptimWrapper,
    dtype="float32",
    accumulative_counts=1,
    clip_grad=dict(max_norm=5.0),
    constructor=GroupedOptimizer,
    paramwise_cfg=dict(layer_decay=1.0),
    optimizer=dict(type=AdamW, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
)
auto_scale_lr: dict[str, Any] = dict(enable=False, base_batch_size=8)
param_scheduler: list[dict[str, Any]] = [
    dict(
        type=WarmupCosineLR,
        warmup=0.4,
        start_ratio=1e-2,
        min_ratio=1e-2,
        by_epoch=True,
        convert_to_iter_based=True,
    )
]
# An epoch has 65 updates.
default_hooks["logger"].update(interval=13)
# The mask head convolves another number of regions in every update.
env_cfg.update(cudnn_benchmark=False)
default_hooks["checkpoint"].update(best="box_AP50")
