"""The first VMamba-T at 224 on ImageNet-1K, from scratch.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/vssmtiny_dp01
Hardware: 8 GPUs, 128 images each, as official.
Time: not measured here; 300 epochs.
Expected: 82.2 % top-1 on ImageNet-1K, as the authors report.
Drop path: 0.2, as in the authors' configuration; the name of their weights says 0.1.
Status: not run here.
"""

from mmengine.config import read_base

with read_base():
    from .._runtime import *
    from ._recipe_300e import *

model["backbone"].update(name="vssmtiny_dp01", drop_path_rate=0.2)
