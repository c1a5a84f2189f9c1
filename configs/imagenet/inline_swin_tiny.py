"""InLine-Swin-T at 224 on ImageNet-1K, from scratch.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/inline_swin_tiny
Hardware: 8 GPUs, 128 images each; the authors scale the rate to the number of all.
Time: not measured here; 300 epochs.
Expected: 82.4 % top-1 on ImageNet-1K, as the authors report.
Status: not run here.
"""

from mmengine.config import read_base

with read_base():
    from .._runtime import *
    from ._recipe_300e import *

model["backbone"].update(name="inline_swin_tiny", drop_path_rate=0.2)
