"""Semantic FPN on ADE20K, 40000 iterations of twice the images, as small convolutional backbones are compared.

Command: torchrun --nproc-per-node 8 -m vizoo train ade20k/semantic_fpn_40k
Hardware: 8 GPUs, 4 images each, as official.
Time: not measured here; 40000 iterations.
Expected: nothing is published for Swin; CAS-ViT's authors report 37.1 mIoU (`rcvit_xs`), 41.3 (S), 43.6 (M) and 45.0
(T).
Drop path: none for CAS-ViT, as published. No warm-up, no auxiliary head, everything is decayed, and the rate ends at 0.
Precision: float32, as official; `--set optim_wrapper.dtype=bfloat16` is faster.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.segmentation.heads import FPN, SemanticFPNHead

with read_base():
    from ._base import *

model.update(neck=dict(type=FPN, channels=256), decode_head=dict(type=SemanticFPNHead, channels=128))
drop_path.update(rcvit=0.0)
train_dataloader.update(batch_size=4)
train_cfg.update(max_iters=40_000, val_interval=4_000)
optim_wrapper["paramwise_cfg"].update(not_decayed=())
optim_wrapper["optimizer"].update(lr=1e-4, weight_decay=1e-4)
param_scheduler[0].update(power=0.9, warmup=0)
default_hooks["checkpoint"].update(iters=4_000)
