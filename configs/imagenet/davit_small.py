"""DaViT-S at 224 on ImageNet-1K, from scratch.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/davit_small
Hardware: 8 GPUs, 128 images each, as official.
Time: not measured here; 310 epochs.
Expected: 84.2 % top-1 on ImageNet-1K, as the authors report.
Drop path: not published for this size; 0.1 is the default of the authors' script, as in their command for DaViT-T.
Status: not run here.
"""

from mmengine.config import read_base

with read_base():
    from .._runtime import *
    from ._recipe_300e import *

# Beside Swin's recipe: a short warm-up, ten last epochs at the lowest rate, a tighter clip, and a tighter crop.
train_cfg.update(max_epochs=310)
param_scheduler[0].update(warmup=5, end=300)
optim_wrapper.update(clip_grad=dict(max_norm=1.0))
val_dataloader["dataset"]["transform"].update(crop_pct=0.9)
model["backbone"].update(name="davit_small", drop_path_rate=0.1)
