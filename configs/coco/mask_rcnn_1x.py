"""Mask R-CNN on COCO, 12 epochs.

Command: torchrun --nproc-per-node 8 -m vizoo train coco/mask_rcnn_1x
Hardware: 8 GPUs, 2 images each, as official.
Time: not measured here; 12 epochs.
Expected: 43.7 box AP and 39.8 mask AP with Swin-T, as the authors report; BiFormer's report 47.8 and 43.2 (S), 48.6 and
43.7 (B); VMamba's 47.3 and 42.7 (`vssm1_tiny_0230s`), 47.4 and 42.7 (`vssm_tiny_0230`), 48.7 and 43.7
(`vssm_small_0229`), 49.2 and 44.1 (`vssm_base_0229`), of the first generation 46.5 and 42.1 (T), 48.2 and 43.0 (S),
48.6 and 43.3 (B); MobileMamba's 40.6 and 37.4 (B1); VSSD's 45.4 and 41.3 (Micro), 46.9 and 42.6 (T), 48.4 and 43.5
(S).
Drop path: 0.1 for Swin-T, 0.2 for BiFormer-S, 0.3 for BiFormer-B, 0.1, 0.2 and 0.4 for VSSD by size, 0.1 for
L2ViT-T and L2ViT-S, 0.2 for L2ViT-B (which decay norms as well: `--set optim_wrapper.paramwise_cfg.not_decayed=()`), as
published; other sizes of Swin were published for 36 epochs only. VMamba's is that of ImageNet, its default.
Precision: bfloat16 where the official run has float16; pooling and losses in float32, as there.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.detection import MaskRCNN

with read_base():
    from ._base import *

model.update(type=MaskRCNN)
drop_path.update(swin_tiny=0.1, biformer_small=0.2, biformer_base=0.3)
drop_path.update(vssd_micro=0.1, vssd_tiny=0.2, vssd_small=0.4)
drop_path.update(l2vit_tiny=0.1, l2vit_small=0.1, l2vit_base=0.2)
drop_path.update(slab_swin_tiny=0.1, slab_swin_small=0.2)
