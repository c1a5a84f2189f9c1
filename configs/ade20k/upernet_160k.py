"""UPerNet on ADE20K, 160000 iterations.

Command: torchrun --nproc-per-node 8 -m vizoo train ade20k/upernet_160k
Hardware: 8 GPUs, 2 images each, as official.
Time: not measured here; 160000 iterations.
Expected: 44.51 mIoU with Swin-T, 47.64 with Swin-S, 48.13 with Swin-B, as the authors report (single scale); DaViT's
report 46.3 (T), 48.8 (S), 49.4 (B).
Drop path: 0.3 for every Swin, as published; DaViT's is not.
Precision: float32, as official; `--set optim_wrapper.dtype=bfloat16` is faster.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.segmentation.heads import FCNHead, UPerHead

with read_base():
    from ._base import *

model.update(
    decode_head=dict(type=UPerHead, channels=512),
    auxiliary_head=dict(type=FCNHead, channels=256, in_index=2),
    auxiliary_weight=0.4,
)
drop_path.update(swin_tiny=0.3, swin_small=0.3, swin_base=0.3)
