"""Heads against their plain definitions, under published names, on maps whose sides do not halve evenly."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from vizoo.train.segmentation.heads import FPN, FCNHead, MLPHead, SemanticFPNHead, UPerHead

WIDTHS = (8, 16, 32, 64)
HEADS = (UPerHead, SemanticFPNHead, MLPHead, FCNHead)
OFFICIAL = (96, 192, 384, 768)

Pyramid = Callable[..., list[Tensor]]


def upsample(x: Tensor, size: Any) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def shape_of(module: nn.Module) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in module.state_dict().items()}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("sides", [(64, 64), (101, 150), (33, 200)])
def test_logits_have_the_size_of_the_map(head: Any, sides: tuple[int, int], pyramid: Pyramid) -> None:
    maps = pyramid(*sides)
    model = head(in_channels=WIDTHS, num_classes=5, channels=16)
    logits = model(maps)
    level = 2 if head is FCNHead else 0
    assert logits.shape == (2, 5, *maps[level].shape[2:])
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("head", HEADS)
def test_maps_are_left_as_they_were(head: Any, pyramid: Pyramid) -> None:
    maps = pyramid(64, 96)
    before = [x.clone() for x in maps]
    head(in_channels=WIDTHS, num_classes=5, channels=16)(maps)
    assert all(torch.equal(a, b) for a, b in zip(before, maps, strict=True))


def test_published_names(
    dense_fixture: Callable[[str], dict[str, Any]], shapes: Callable[[Any, str], dict[str, list[int]]]
) -> None:
    upernet, semantic = dense_fixture("upernet_swin_tiny"), dense_fixture("semantic_fpn")
    with torch.device("meta"):
        built = {
            ("decode_head", "upernet"): UPerHead(OFFICIAL, 150),
            ("auxiliary_head", "upernet"): FCNHead(OFFICIAL, 150),
            ("neck", "semantic"): FPN(OFFICIAL),
            ("decode_head", "semantic"): SemanticFPNHead((256,) * 4, 150),
        }
    for (root, name), module in built.items():
        assert shape_of(module) == shapes(upernet if name == "upernet" else semantic, root)


def test_all_mlp_head_is_linear_upsample_concatenate_fuse(pyramid: Pyramid) -> None:
    head = MLPHead(WIDTHS, 5, channels=16).double()
    maps = [x.double() for x in pyramid(101, 150)]
    size = maps[0].shape[2:]
    fused = torch.cat([upsample(linear(x), size) for linear, x in zip(head.linears, maps, strict=True)], 1)
    head.eval()
    expected = head.conv_seg(head.fusion_conv(fused))
    torch.testing.assert_close(head(maps), expected)


def test_semantic_fpn_doubles_a_convolution_at_a_time(pyramid: Pyramid) -> None:
    head = SemanticFPNHead(WIDTHS, 5, channels=16).double().eval()
    maps = [x.double() for x in pyramid(101, 150)]
    total = torch.zeros(())
    for level, (x, branch) in enumerate(zip(maps, head.scale_heads, strict=True)):
        convs = [module for module in branch if not isinstance(module, nn.Upsample)]
        assert len(convs) == max(1, level)
        for conv in convs:
            x = conv(x)
            x = upsample(x, [2 * side for side in x.shape[2:]]) if level else x
        total = total + upsample(x, maps[0].shape[2:])
    torch.testing.assert_close(head(maps), head.conv_seg(total))


def test_neck_is_torchvisions(pyramid: Pyramid) -> None:
    maps = pyramid(101, 150)
    neck, other = FPN(WIDTHS, channels=16), FeaturePyramidNetwork(WIDTHS, 16)
    names = {
        f"{theirs}.{i}.0.{kind}": f"{ours}.{i}.conv.{kind}"
        for theirs, ours in (("inner_blocks", "lateral_convs"), ("layer_blocks", "fpn_convs"))
        for i in range(4)
        for kind in ("weight", "bias")
    }
    other.load_state_dict({theirs: neck.state_dict()[ours] for theirs, ours in names.items()})
    expected = other(OrderedDict((str(i), x) for i, x in enumerate(maps)))
    for found, wanted in zip(neck(maps), expected.values(), strict=True):
        torch.testing.assert_close(found, wanted)
    assert neck.out_channels == (16,) * 4


def test_first_weights() -> None:
    torch.manual_seed(0)
    head = UPerHead((8, 64), 150)
    assert head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.05)
    fan_out = 512 * 9
    assert head.bottleneck.conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    neck = FPN((64, 64))
    bound = (6 / (64 + 256)) ** 0.5
    assert neck.lateral_convs[0].conv.weight.abs().max().item() == pytest.approx(bound, rel=0.02)
    assert not neck.lateral_convs[0].conv.bias.any()


def test_auxiliary_head_reads_the_map_it_is_told(pyramid: Pyramid) -> None:
    maps = pyramid(64, 64)
    assert FCNHead(WIDTHS, 5, channels=8, in_index=-1, num_convs=2)(maps).shape[2:] == maps[3].shape[2:]


def test_one_image_is_no_batch_for_pooled_maps(pyramid: Pyramid) -> None:
    head = UPerHead(WIDTHS, 5, channels=16)
    with pytest.raises(ValueError, match="at least 2 images a batch, got 1"):
        head(pyramid(64, 64, images=1))
    assert head.eval()(pyramid(64, 64, images=1)).shape == (1, 5, 16, 16)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: UPerHead(WIDTHS, 1), "num_classes must be at least 2, got 1"),
        (lambda: UPerHead(WIDTHS, 5, channels=0), "channels must be at least 1, got 0"),
        (lambda: MLPHead(WIDTHS, 5, dropout=1.0), r"dropout must lie in \[0, 1\), got 1.0"),
        (lambda: UPerHead((8,), 5), "UPerHead needs at least 2 maps, the backbone gives 1"),
        (lambda: UPerHead(WIDTHS, 5, pool_scales=(0, 1)), r"pool_scales must be sides of 1 or more, got \(0, 1\)"),
        (lambda: FPN((8,)), "FPN needs at least 2 maps"),
        (lambda: MLPHead((), 5), "MLPHead needs at least 1 maps"),
        (lambda: SemanticFPNHead((), 5), "SemanticFPNHead needs at least 1 maps"),
        (lambda: FCNHead(WIDTHS, 5, in_index=4), "in_index must name one of the 4 maps, got 4"),
        (lambda: FCNHead(WIDTHS, 5, num_convs=0), "num_convs must be at least 1, got 0"),
    ],
)
def test_impossible_heads(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
