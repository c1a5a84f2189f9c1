"""UPerNet on ADE20K for plain backbones, 60000 iterations of twice the images: Vim's recipe.

Command: torchrun --nproc-per-node 4 -m vizoo train ade20k/upernet_plain_60k
Hardware: 4 GPUs, 8 images each, as official.
Time: not measured here; 60000 iterations.
Expected: 41.0 mIoU with Vim-T, 44.9 with Vim-S, as the authors report. Vim-S is trained with
`--set model.backbone.name=vim_small model.decode_head.channels=384 lr=1e-4 optim_wrapper.optimizer.weight_decay=0.05
optim_wrapper.paramwise_cfg.layer_decay=0.95`.
Transposed convolutions and a pooling make strides 4 to 32 of maps of four depths; the position table is resized to the
crops when the weights are loaded. For Vim-S the authors take the residual stream as here, for Vim-T the branch alone.
Vim classifies by a token, which is left out; PlainMamba has a recipe of its own, without this neck
(`ade20k/upernet_160k`); others are set whole, `--set "model.backbone={'name': 'vig_tiny', 'pretrained': True}"`.
Drop path: 0.1, the default of the authors' code.
Precision: float32, as official; `--set optim_wrapper.dtype=bfloat16` is faster.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.segmentation.heads import FCNHead, UPerHead
from vizoo.train.segmentation.inference import Sliding
from vizoo.train.segmentation.rescale import Rescale

with read_base():
    from ._base import *

model.update(
    backbone=dict(name="vim_tiny", pretrained=True, img_size=512, class_token=False),
    neck=dict(type=Rescale),
    decode_head=dict(type=UPerHead, channels=192),
    auxiliary_head=dict(type=FCNHead, channels=256, in_index=2),
    auxiliary_weight=0.4,
    inference=dict(type=Sliding, crop=(512, 512), stride=(341, 341)),
)
drop_path.update(vim=0.1)
train_dataloader.update(batch_size=8)
train_cfg.update(max_iters=60_000, val_interval=6_000)
# Vectors and position tables are spared, each layer learns at 0.92 of the rate of the next.
optim_wrapper["paramwise_cfg"].update(layer_decay=0.92, not_decayed=None)
optim_wrapper["optimizer"].update(lr=2e-4, weight_decay=0.1)
# The rate is for 32 images per update.
auto_scale_lr.update(base_batch_size=32)
default_hooks["checkpoint"].update(iters=6_000)
