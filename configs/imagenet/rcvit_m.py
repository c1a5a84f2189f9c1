"""CAS-ViT-M at 224 on ImageNet-1K, from scratch.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/rcvit_m
Hardware: 8 GPUs, 128 images each, 2 batches accumulated, as official.
Time: not measured here; 300 epochs.
Expected: 82.8 % top-1 on ImageNet-1K, as the authors report.
Crops: each batch has a size from 160 to 320; batches of less than 224 hold more images, as official.
Status: not run here.

One classifier, as the authors' trainer builds it; `--set model.backbone.distillation=true` has two.
"""

from mmengine.config import read_base

from vizoo.train.hooks import EMA
from vizoo.train.samplers import MultiScaleBatches

with read_base():
    from .._runtime import *
    from ._recipe_300e import *

# Beside Swin's recipe: six times the rate for twice the images, no mixing, erasing or clip, an average of the weights.
model.update(mixup=None)
train_dataloader["dataset"]["transform"].update(erase_prob=0.0)
scales = dict(type=MultiScaleBatches, sizes=(160, 192, 224, 256, 288, 320), base=224)
train_dataloader.update(batch_sampler=scales, drop_last=False)  # the scales leave out what is left themselves
optim_wrapper.update(accumulative_counts=2, clip_grad=None)
optim_wrapper["optimizer"].update(lr=1.5e-3)
param_scheduler[0].update(start_ratio=0.0, min_ratio=1e-6 / 6e-3)
custom_hooks = [dict(type=EMA, decay=0.9995)]
model["backbone"].update(name="rcvit_m", distillation=False, drop_path_rate=0.1)
