"""Four well-known frames around a token mixer: DeiT, PVT, Swin and CSwin, which several families put theirs into.

Papers: Touvron et al., "Training data-efficient image transformers & distillation through attention", ICML 2021, arXiv
2012.12877; Wang et al., "Pyramid Vision Transformer", ICCV 2021, arXiv 2102.12122; Liu et al., "Swin Transformer", ICCV
2021, arXiv 2103.14030; Dong et al., "CSWin Transformer", CVPR 2022, arXiv 2107.00652.

A frame is a `Backbone` that takes two functions: `mixer(stage, block)` builds what mixes the tokens of a block, and
`norm(channels, eps=..., keep_float32=...)` builds every norm. Parameters have the names that DeiT, PVT, Swin and CSwin
gave them. A mixer takes and gives a map (B, H, W, C); in DeiT's frame tokens (B, L, C) and their grid; in CSwin's frame
it is a list of branches that share the projections, see `CswinBlock`. The softmax attention of each frame is here, too.

What differs from the original frames, and why:

- Any image size runs. An image or map that patches do not divide is padded with zeros at the bottom and right, and
  position tables are resized: PVT's bilinearly, as its authors do, DeiT's bicubically.
- DeiT's has stages of equal size, so that features can be taken from several depths; stages of 12 blocks are thirds.
- PVT's spatial reduction leaves out the rows and columns that do not fill a patch, as its authors' does.
- CSwin's stripes are padded at the bottom and right with zero queries, keys and values. At every size, the last stage
  attends to the whole map and stripes are as long as the map.
"""

from __future__ import annotations

from .cswin import CswinConfig, CswinHost, StripeAttention, stripe_branches
from .deit import DeitConfig, DeitHost, TokenAttention
from .parts import MakeMixer, MakeNorm, same_grid, square_grid
from .pvt import PvtConfig, PvtHost, ReducedAttention
from .swin import ShiftedWindowAttention, SwinHost

__all__ = [
    "CswinConfig",
    "CswinHost",
    "DeitConfig",
    "DeitHost",
    "MakeMixer",
    "MakeNorm",
    "PvtConfig",
    "PvtHost",
    "ReducedAttention",
    "ShiftedWindowAttention",
    "StripeAttention",
    "SwinHost",
    "TokenAttention",
    "same_grid",
    "square_grid",
    "stripe_branches",
]
