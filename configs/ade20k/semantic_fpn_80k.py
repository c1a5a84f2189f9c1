"""Semantic FPN on ADE20K, 80000 iterations: the recipe of LITv2.

Command: torchrun --nproc-per-node 8 -m vizoo train ade20k/semantic_fpn_80k
Hardware: 8 GPUs, 2 images each, as official.
Time: not measured here; 80000 iterations.
Expected: nothing is published for Swin; 44.3 mIoU with LITv2-S, as its authors report; BiFormer's report 48.9 (S) and
49.9 (B) with twice the learning rate, a cosine and 1000 updates of warm-up.
Drop path: 0.2, as published for LITv2-S; 0.15 for BiFormer-S, 0.3 for BiFormer-B, as published. No warm-up, no
auxiliary head, everything is decayed.
Precision: float32, as official; `--set optim_wrapper.dtype=bfloat16` is faster.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.segmentation.heads import FPN, SemanticFPNHead

with read_base():
    from ._base import *

model.update(neck=dict(type=FPN, channels=256), decode_head=dict(type=SemanticFPNHead, channels=128))
drop_path.update(swin=0.2, swinv2=0.2, davit=0.2, litv2=0.2, biformer_small=0.15, biformer_base=0.3)
train_cfg.update(max_iters=80_000, val_interval=8_000)
optim_wrapper["paramwise_cfg"].update(not_decayed=())
optim_wrapper["optimizer"].update(lr=1e-4, weight_decay=1e-4)
param_scheduler[0].update(power=0.9, warmup=0, min_ratio=1e-2)
default_hooks["checkpoint"].update(iters=8_000)
