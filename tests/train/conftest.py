"""A data set that draws from every random generator, and configs that train tiny models in a second or two."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

DATA = '''
import random
import numpy as np
import torch

class Tints(torch.utils.data.Dataset):
    """Which channel of a noisy image is bright, if any? Noise comes from Python's, numpy's and torch's generators."""
    def __init__(self, count=40, noise=0.5, seed=0, classes=4, poison=-1):
        rng = np.random.default_rng(seed)
        self.labels = rng.integers(0, 4, count).tolist()
        self.base = torch.from_numpy(rng.normal(0, 0.3, (count, 3, 32, 32)).astype("float32"))
        for image, label in zip(self.base, self.labels):
            image[:label][-1:] += 2
        if poison >= 0:
            self.base[poison] = float("nan")
        self.noise = noise
        self.metainfo = {"classes": [f"tint {i}" for i in range(classes)]}

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.base[index]
        if self.noise:
            image = image + self.noise * (torch.randn(1) + np.random.randn() + random.gauss(0, 1))
        return {"inputs": image, "label": self.labels[index]}


class Flip:
    """Mixes each image with its neighbour, by a share from numpy's generator."""
    def __call__(self, inputs, label):
        share = float(np.random.beta(0.8, 0.8))
        target = torch.nn.functional.one_hot(label, 4).float()
        return share * inputs + (1 - share) * inputs.flip(0), share * target + (1 - share) * target.flip(0)
'''

CONFIG = """
from mmengine.dataset import DefaultSampler, default_collate
from mmengine.hooks import DistSamplerSeedHook
from mmengine.visualization import TensorboardVisBackend, Visualizer
from run_data import Flip, Tints
from torch.optim import AdamW

from vizoo.train.checkpoint import Checkpoints
from vizoo.train.classification import ImageClassifier
from vizoo.train.hooks import EMA, RunInfo, UpdateScheduler
from vizoo.train.log import RunLog
from vizoo.train.loop import EpochLoop, init_worker
from vizoo.train.metrics import Accuracy
from vizoo.train.optim import AutocastOptimWrapper, GroupedOptimizer
from vizoo.train.schedules import WarmupCosineLR

model = dict(
    type=ImageClassifier,
    backbone=dict(
        name="swin_tiny_patch4_window7_224", pretrained=False, num_classes=4, img_size=32, embed_dim=8,
        depths=(1, 1), num_heads=(1, 2), window_size=4, drop_path_rate=0.2,
    ),
    mixup=dict(type=Flip),
    label_smoothing=0.0,
)
loading = dict(collate_fn=dict(type=default_collate), worker_init_fn=dict(type=init_worker), num_workers=0)
train_dataloader = dict(
    batch_size=8, drop_last=True, dataset=dict(type=Tints, count=40, noise=0.5, classes=4, poison=-1),
    sampler=dict(type=DefaultSampler, shuffle=True), **loading,
)
val_dataloader = dict(
    batch_size=8, dataset=dict(type=Tints, count=21, noise=0.0, seed=1, classes=4),
    sampler=dict(type=DefaultSampler, shuffle=False), **loading,
)
val_evaluator = [dict(type=Accuracy)]
train_cfg = dict(type=EpochLoop, max_epochs=3, val_interval=1)
val_cfg = dict()
optim_wrapper = dict(
    type=AutocastOptimWrapper, dtype="float32", constructor=GroupedOptimizer, paramwise_cfg=dict(layer_decay=0.9),
    accumulative_counts=1, clip_grad=dict(max_norm=5.0), optimizer=dict(type=AdamW, lr=1e-3, weight_decay=0.05),
)
param_scheduler = [dict(type=WarmupCosineLR, warmup=0.5, by_epoch=True, convert_to_iter_based=True)]
auto_scale_lr = dict(enable=False, base_batch_size=8)
default_hooks = dict(
    runtime_info=dict(type=RunInfo), timer=None, sampler_seed=dict(type=DistSamplerSeedHook),
    logger=dict(type=RunLog, interval=1, quiet=False), param_scheduler=dict(type=UpdateScheduler),
    checkpoint=dict(type=Checkpoints, epochs=1, iters=0, keep=2, best="top1"),
)
custom_hooks = [dict(type=EMA, decay=0.9)]
visualizer = dict(type=Visualizer, vis_backends=[dict(type=TensorboardVisBackend)])
env_cfg = dict(cudnn_benchmark=False)
randomness = dict(seed=0)
device = "cpu"
compile = False
"""

# The published recipes on generated shapes of 64 pixels.
_DENSE = """
from mmengine.config import read_base

with read_base():
    from vizoo.configs.{base} import *

model["backbone"].update(
    pretrained=False, img_size=64, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), window_size=4
)
train_dataloader.update(num_workers=0, pin_memory=False)
val_dataloader.update(num_workers=0, pin_memory=False)
default_hooks["logger"].update(interval=1)
default_hooks["checkpoint"].update(keep=99)
optim_wrapper.update(dtype="float32", clip_grad=dict(max_norm=5.0))
optim_wrapper["optimizer"].update(lr=8e-3)
randomness = dict(seed=1)
device = "cpu"
"""
DETECTOR = (
    _DENSE.format(base="coco.mask_rcnn_1x")
    + """
model.update(
    num_classes=6, channels=16, rpn=dict(anchor_scale=3.0, train_per_level=50, train_kept=50, test_kept=20),
    box=dict(hidden=(32,), samples=32), mask=dict(hidden=(16,)),
)
train_dataloader["dataset"].update(
    images="data/coco/train", annotations="data/coco/annotations/instances_train.json",
)
train_dataloader["dataset"]["transform"].update(short=(48, 64), long=80, crop_short=(56, 64), crop=(40, 56))
val_dataloader["dataset"].update(
    images="data/coco/val", annotations="data/coco/annotations/instances_val.json",
)
val_dataloader["dataset"]["transform"].update(short=64, long=80)
val_evaluator[0].update(annotations="data/coco/annotations/instances_val.json")
train_cfg.update(max_epochs=2)
param_scheduler[0].update(milestones=(1,), warmup=3)
default_hooks["checkpoint"].update(iters=3)
"""
)
SEGMENTER = (
    _DENSE.format(base="ade20k.upernet_160k")
    + """
names = ("background", "rectangle", "ellipse", "triangle", "star", "ring", "cross")
model.update(num_classes=7, pad_size=(64, 64))
model["decode_head"].update(channels=16)
model["auxiliary_head"].update(channels=8)
train_dataloader["dataset"].update(classes=names)
train_dataloader["dataset"]["transform"].update(scale=(80, 64), crop=64)
val_dataloader["dataset"].update(classes=names)
val_dataloader["dataset"]["transform"].update(scale=(80, 64))
train_cfg.update(max_iters=7, val_interval=3)
param_scheduler[0].update(warmup=2)
default_hooks["checkpoint"].update(iters=3)
"""
)


@pytest.fixture(scope="session")
def dense_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Config and `data_root=...` of a tiny `detector` and `segmenter` on 10 training and 5 other scenes."""
    from vizoo.train.shapes import write_ade, write_coco

    root = tmp_path_factory.mktemp("shapes")
    for split, count in (("train", 10), ("val", 5)):
        write_coco(root / "coco", count, size=64, split=split)
        write_ade(root / "ade", count, size=64, split=split)
    found = {}
    for name, text, data in (("detector", DETECTOR, "coco"), ("segmenter", SEGMENTER, "ade")):
        (root / f"{name}.py").write_text(text)
        found[name] = (root / f"{name}.py", f"data_root={root / data}")
    return found


@pytest.fixture(scope="session")
def run_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on the module path of this process and its children, with the module of the data set."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "run_data.py").write_text(DATA)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
        yield folder
    sys.modules.pop("run_data", None)


@pytest.fixture(scope="session")
def small_config(run_modules: Path) -> Path:
    """Path of the config."""
    path = run_modules / "small.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def small_run(small_config: Path, tmp_path: Path) -> Callable[..., Path]:
    """Train by the config: `small_run("name", "key=value", ..., resume=True)` returns the folder of the run."""
    from vizoo.train.run import train

    def run(name: str, *settings: str, **options: Any) -> Path:
        return train(small_config, settings, work_dir=tmp_path / name, quiet=True, **options)

    return run
