"""UPerNet on ADE20K, 160000 iterations.

Command: torchrun --nproc-per-node 8 -m vizoo train ade20k/upernet_160k
Hardware: 8 GPUs, 2 images each, as official.
Time: not measured here; 160000 iterations.
Expected: 44.51 mIoU with Swin-T, 47.64 with Swin-S, 48.13 with Swin-B, as the authors report (single scale); DaViT's
report 46.3 (T), 48.8 (S), 49.4 (B); NAT's 45.1 (Mini), 47.1 (Tiny), 48.0 (Small), 48.5 (Base); DiNAT's 45.8, 47.8,
48.9, 49.6; DiNAT_s's 46.0 (Tiny), 48.6 (Small), 49.4 (Base); 54.0 from `dinat_large_21k`, 53.4 from `dinat_s_large_21k`
with `--set train_dataloader.dataset.transform.crop=640 model.pad_size=(640,640)` and both scales (2560, 640);
BiFormer's 49.8 (S), 51.0 (B); PlainMamba's 44.1 (L1), 46.8 (L2), 49.1 (L3) with
`--set model.auxiliary_head.in_index=3`; VSSD's 45.6 (Micro), 47.9 (T).
Drop path: as published, 0.3 for every Swin and DiNAT_s, 0.2 to 0.5 for NAT and DiNAT by size, 0.3 for
BiFormer-S, 0.4 for BiFormer-B, 0.1 to 0.3 for PlainMamba by size, 0.2 for VSSD-T, 0.4
for VSSD-S, 0.3 for L2ViT (which decays norms as well: `--set optim_wrapper.paramwise_cfg.not_decayed=()`); DaViT's is
not.
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
drop_path.update(nat_mini=0.2, nat_tiny=0.3, nat_small=0.5, nat_base=0.5)
drop_path.update(dinat_mini=0.2, dinat_tiny=0.3, dinat_small=0.5, dinat_base=0.5, dinat_large=0.3, dinat_s=0.3)
drop_path.update(biformer_small=0.3, biformer_base=0.4)
drop_path.update(plainmamba_l1=0.1, plainmamba_l2=0.2, plainmamba_l3=0.3)
drop_path.update(vssd_tiny=0.2, vssd_small=0.4)
drop_path.update(l2vit_tiny=0.3, l2vit_small=0.3, l2vit_base=0.3)
