"""CAS-ViT-M fine-tuned on ImageNet-1K from 224 to 384.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/rcvit_m_384
Hardware: 8 GPUs, 64 images each, 2 batches accumulated, as official.
Time: not measured here; 30 epochs.
Expected: 83.0 % top-1 on ImageNet-1K, as the authors report.
Crops: each batch has a size from 160 to 320, or 384; smaller ones than that hold more images, as official.
Status: not run here.

The rate rises over 20 epochs, the default of the authors' trainer, and then stays. One classifier, the mean of those in
the checkpoint if it has two.
"""

from mmengine.config import read_base

from vizoo.train.hooks import EMA
from vizoo.train.samplers import MultiScaleBatches

with read_base():
    from .._runtime import *
    from ._recipe_finetune import *

model.update(mixup=None)
train_dataloader["dataset"]["transform"].update(size=384, erase_prob=0.0)
scales = dict(type=MultiScaleBatches, sizes=(160, 192, 256, 288, 320, 384), base=384)
train_dataloader.update(batch_sampler=scales, drop_last=False)  # the scales leave out what is left themselves
val_dataloader["dataset"]["transform"].update(size=384, crop_pct=1.0, crop_mode="squash")
optim_wrapper.update(clip_grad=None)
optim_wrapper["optimizer"].update(lr=2.5e-5, weight_decay=0.05)
param_scheduler[0].update(warmup=20, start_ratio=0.0, min_ratio=1.0)
custom_hooks = [dict(type=EMA, decay=0.9995)]
model["backbone"].update(name="rcvit_m", img_size=384, distillation=False, drop_path_rate=0.0)
