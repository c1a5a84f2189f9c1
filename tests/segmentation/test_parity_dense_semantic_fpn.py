"""Neck and head of Semantic FPN against the official outputs, on maps of a plain LITv2 written for this test.

The fixture's backbone, LITv2-S (Pan et al., NeurIPS 2022, arXiv 2205.13213), is written out here as one function of
the published tensors. `test_official_outputs` takes its place once the zoo has that family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import deform_conv2d

from vizoo.train.dense_checkpoint import load_part, split_roots
from vizoo.train.segmentation.heads import FPN, SemanticFPNHead
from vizoo.train.segmentation.inference import Sliding, Whole

DEPTHS = (2, 2, 6, 2)
HEAD_WIDTH = 32


class PlainLITv2:
    """LITv2-S with a norm per map, from its state dict; maps are (B, H, W, C) inside."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def __call__(self, x: Tensor) -> list[Tensor]:
        x = F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
        x = F.conv2d(x, *self.pair("patch_embed.proj"), stride=4).movedim(1, -1)
        x, maps = self.norm("patch_embed.norm", x), []
        for stage, depth in enumerate(DEPTHS):
            if stage:
                x = self.merge(f"layers.{stage - 1}.downsample", x)
            for block in range(depth):
                x = self.block(f"layers.{stage}.blocks.{block}", x, stage)
            maps.append(self.norm(f"norm{stage}", x).movedim(-1, 1))
        return maps

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self.state[f"{name}.weight"], self.state[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *self.pair(name))

    def block(self, name: str, x: Tensor, stage: int) -> Tensor:
        if stage >= 2:
            x = x + self.hilo(f"{name}.attn", self.norm(f"{name}.norm1", x), window=2 if stage == 2 else 1)
        hidden = F.linear(self.norm(f"{name}.norm2", x), *self.pair(f"{name}.mlp.fc1")).movedim(-1, 1)
        kernel = self.pair(f"{name}.mlp.dwconv.dwconv")
        hidden = F.conv2d(hidden, *kernel, padding=1, groups=hidden.shape[1]).movedim(1, -1)
        return x + F.linear(F.gelu(hidden), *self.pair(f"{name}.mlp.fc2"))

    def hilo(self, name: str, x: Tensor, window: int) -> Tensor:
        """Some heads inside windows, the others from all tokens to the windows' means; channels [windows, means]."""
        _, height, width, _ = x.shape
        x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
        batch, rows, columns, _ = x.shape
        means = F.avg_pool2d(x.movedim(-1, 1), window).flatten(2).transpose(1, 2)
        keys, values = F.linear(means, *self.pair(f"{name}.l_kv")).chunk(2, -1)
        low = attend(F.linear(x.flatten(1, 2), *self.pair(f"{name}.l_q")), keys, values)
        parts = [F.linear(low, *self.pair(f"{name}.l_proj")).view(batch, rows, columns, -1)]
        if window > 1:
            cells = x.unflatten(1, (-1, window)).unflatten(3, (-1, window)).transpose(2, 3)
            high = attend(*F.linear(cells.flatten(3, 4), *self.pair(f"{name}.h_qkv")).chunk(3, -1))
            high = F.linear(high, *self.pair(f"{name}.h_proj")).unflatten(3, (window, window))
            parts.insert(0, high.transpose(2, 3).reshape(batch, rows, columns, -1))
        return torch.cat(parts, -1)[:, :height, :width]

    def merge(self, name: str, x: Tensor) -> Tensor:
        """Deformable convolution of stride 2, batch norm, GELU."""
        x = x.movedim(-1, 1).contiguous()
        offsets = F.conv2d(x, *self.pair(f"{name}.dconv.conv_offset"), stride=2)
        x = deform_conv2d(x, offsets, *self.pair(f"{name}.dconv"), stride=2)
        statistics = [self.state[f"{name}.norm_layer.running_{kind}"] for kind in ("mean", "var")]
        return F.gelu(F.batch_norm(x, *statistics, *self.pair(f"{name}.norm_layer"))).movedim(1, -1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over the last but one axis, by heads of 32 channels."""
    q, k, v = (x.unflatten(-1, (-1, HEAD_WIDTH)).transpose(-2, -3) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)


@torch.no_grad()
def test_official_outputs_of_neck_and_head(parity: ModuleType, dense_fixture: Callable[[str], dict[str, Any]]) -> None:
    fixture = dense_fixture("semantic_fpn")
    parts = split_roots(parity.fill_state_dict(fixture))
    backbone, neck, head = PlainLITv2(parts["backbone"]), FPN((96, 192, 384, 768)), SemanticFPNHead((256,) * 4, 150)
    load_part(neck, parts["neck"])
    load_part(head.eval(), parts["decode_head"])
    seen: list[Tensor] = []
    head.conv_seg.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    def logits(x: Tensor) -> Tensor:
        return head(neck(backbone(x)))

    for case in fixture["goldens"]:
        x = parity.image(case["input"]["shape"], case["input"]["seed"])
        maps = backbone(x)
        levels = neck(maps)
        slide = case["input"]["slide"]
        found = {f"stage{i}": y for i, y in enumerate(maps, 1)} | {f"fpn{i}": y for i, y in enumerate(levels)}
        found |= {"decode_logits": head(levels), "before_conv_seg": seen[-1]}
        found["logits"] = Whole().at_input_size(logits, x)
        found["logits_ori"] = Whole()(logits, x, tuple(case["input"]["ori_shape"]))
        sliding = Sliding(crop=tuple(slide["crop_size"]), stride=tuple(slide["stride"]))
        found["slide_logits"] = sliding.at_input_size(logits, x)
        for output in case["outputs"]:
            parity.check(case, output, found[output])
