"""Mask R-CNN on COCO, 36 epochs.

Command: torchrun --nproc-per-node 8 -m vizoo train coco/mask_rcnn_3x
Hardware: 8 GPUs, 2 images each, as official.
Time: not measured here; 36 epochs.
Expected: 46.0 box AP and 41.6 mask AP with Swin-T, 48.5 and 43.3 with Swin-S, as the authors report; DaViT's report
47.4 and 42.9 (T), 49.5 and 44.3 (S), 49.9 and 44.6 (B); NAT's 46.5 and 41.7 (Mini), 47.7 and 42.6 (Tiny), 48.4 and
43.2 (Small); DiNAT's 47.2 and 42.5, 48.6 and 43.5, 49.3 and 44.0; DiNAT_s's 46.6 and 42.1 (Tiny), 48.6 and 43.5;
VMamba's 48.8 and 43.7 (`vssm1_tiny_0230s`), 48.9 and 43.7 (`vssm_tiny_0230`), 49.9 and 44.2 (`vssm_small_0229`);
VSSD's 47.7 and 42.8 (Micro), 48.8 and 43.6 (T), 50.0 and 44.6 (S).
Drop path: as published, 0.2 for Swin-T and Swin-S, 0.2 to 0.35 for NAT and DiNAT by size, 0.1 for VSSD-Micro,
0.2 for VSSD-T, L2ViT-T and L2ViT-S, 0.3 for L2ViT-B (which decay norms as well:
`--set optim_wrapper.paramwise_cfg.not_decayed=()`); DaViT's is not.
Precision: bfloat16 where the official run has float16; pooling and losses in float32, as there.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.detection import MaskRCNN

with read_base():
    from ._base import *

model.update(type=MaskRCNN)
drop_path.update(swin_tiny=0.2, swin_small=0.2)
drop_path.update(nat_mini=0.2, nat_tiny=0.2, nat_small=0.35, dinat_mini=0.2, dinat_tiny=0.2, dinat_small=0.35)
drop_path.update(dinat_s_tiny=0.2, dinat_s_small=0.35)
drop_path.update(vssd_micro=0.1, vssd_tiny=0.2)
drop_path.update(l2vit_tiny=0.2, l2vit_small=0.2, l2vit_base=0.3)
train_cfg.update(max_epochs=36)
param_scheduler[0].update(milestones=(27, 33))
