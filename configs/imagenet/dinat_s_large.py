"""DiNAT_s-Large at 224 fine-tuned on ImageNet-1K from ImageNet-22K.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/dinat_s_large
Hardware: 8 GPUs, 64 images each.
Time: not measured here; 30 epochs.
Expected: 86.5 % top-1 on ImageNet-1K, as the authors report.
Precision: float32, as official; `--set optim_wrapper.dtype=bfloat16` is faster.
Status: not run here.

The rate falls in a line, to 0 here: where it ends is not published. Nor is the decay, here DiNAT-Large's.
The classifier starts from the 1000 rows of the 22K one that are classes of ImageNet-1K.
"""

from mmengine.config import read_base

from vizoo.train.schedules import WarmupPolyLR

with read_base():
    from .._runtime import *
    from ._recipe_finetune import *

model.update(mixup=None)
optim_wrapper.update(dtype="float32", accumulative_counts=1)
optim_wrapper["optimizer"].update(lr=5e-5, weight_decay=1e-4)
param_scheduler[0] = dict(type=WarmupPolyLR, power=1.0, warmup=0, min_ratio=0.0, by_epoch=False)
train_dataloader["dataset"]["transform"].update(interpolation="random")
model["backbone"].update(name="dinat_s_large_21k", drop_path_rate=0.35)
