"""SegFormer's all-MLP head on ADE20K, 160000 iterations: UPerNet's recipe.

Command: torchrun --nproc-per-node 8 -m vizoo train ade20k/mlp_160k
Hardware: 8 GPUs, 2 images each, as official.
Time: not measured here; 160000 iterations.
Expected: nothing is published for these backbones.
Drop path: the backbone's default. SegFormer's own recipe raises the head's learning rate tenfold, this one does not.
Precision: float32, as official; `--set optim_wrapper.dtype=bfloat16` is faster.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.segmentation.heads import MLPHead

with read_base():
    from ._base import *

model.update(decode_head=dict(type=MLPHead, channels=256))
