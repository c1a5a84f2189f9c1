"""Cascade Mask R-CNN on COCO, 36 epochs.

Command: torchrun --nproc-per-node 8 -m vizoo train coco/cascade_mask_rcnn_3x
Hardware: 8 GPUs, 2 images each, as official.
Time: not measured here; 36 epochs.
Expected: 50.4 box AP and 43.7 mask AP with Swin-T, 51.9 and 45.0 with Swin-S and Swin-B, as the authors report;
NAT's report 50.3 and 43.6 (Mini), 51.4 and 44.5 (Tiny), 52.0 and 44.9 (Small), 52.3 and 45.1 (Base); DiNAT's 51.2 and
44.4, 52.2 and 45.1, 52.9 and 45.8, 53.4 and 46.2, 55.3 and 47.8 (Large); DiNAT_s's 51.0 and 44.1 (Tiny), 52.3 and 45.2
(Small), 52.6 and 45.3 (Base), 54.8 and 47.2 (Large).
Drop path: as published, 0.2 for Swin-T and Swin-S, 0.3 for Swin-B, 0.2 to 0.6 for NAT and DiNAT by size.
DiNAT-Base, DiNAT_s-Base and DiNAT-Large learn at 7.5e-5 (`--set lr=7.5e-5`), DiNAT_s-Large at 5e-5; the large start
from `dinat_large_21k` and `dinat_s_large_21k`.
Precision: bfloat16 where the official run has float16; pooling and losses in float32, as there.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.detection import CascadeMaskRCNN

with read_base():
    from ._base import *

model.update(type=CascadeMaskRCNN)
drop_path.update(swin_tiny=0.2, swin_small=0.2, swin_base=0.3)
drop_path.update(nat_mini=0.2, nat_tiny=0.3, nat_small=0.3, nat_base=0.5)
drop_path.update(dinat_mini=0.2, dinat_tiny=0.3, dinat_small=0.5, dinat_base=0.6, dinat_large=0.6)
drop_path.update(dinat_s_tiny=0.3, dinat_s_small=0.5, dinat_s_base=0.6, dinat_s_large=0.6)
train_cfg.update(max_epochs=36)
param_scheduler[0].update(milestones=(27, 33))
# The heads of its stages have batch norms, which several GPUs share.
sync_bn = "torch"
