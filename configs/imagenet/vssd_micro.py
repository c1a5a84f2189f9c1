"""VSSD-M at 224 on ImageNet-1K, from scratch.

Command: torchrun --nproc-per-node 8 -m vizoo train imagenet/vssd_micro
Hardware: 8 GPUs, 128 images each; the authors state the latter only, and scale the rate to the number of all.
Time: not measured here; 300 epochs.
Expected: 82.5 % top-1 on ImageNet-1K, as the authors report.
Drop path: 0.1 by the authors' file, another entry of which their code reads; it may have been 0.2.
Status: not run here.
"""

from mmengine.config import read_base

from vizoo.train.hooks import EMA

with read_base():
    from .._runtime import *
    from ._recipe_300e import *

# Beside Swin's recipe: a slow average of the weights.
custom_hooks = [dict(type=EMA, decay=0.9999)]
model["backbone"].update(name="vssd_micro", drop_path_rate=0.1)
