"""InLine-Swin-B at 384 fine-tuned on ImageNet-1K from 224.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/inline_swin_base_384
Hardware: 8 GPUs, 64 images each, 2 batches accumulated; the authors scale the rate to the number of all images.
Time: not measured here; 30 epochs.
Expected: nothing is published; the authors have this configuration, but no weights of it.
Status: not run here.

Drop path as from scratch; warm-up and clip as in the fine-tuning of Swin.
"""

from mmengine.config import read_base

with read_base():
    from .._runtime import *
    from ._recipe_finetune import *

train_dataloader["dataset"]["transform"].update(size=384)
val_dataloader["dataset"]["transform"].update(size=384)
model["backbone"].update(name="inline_swin_base", img_size=384, window_size=12, drop_path_rate=0.5)
