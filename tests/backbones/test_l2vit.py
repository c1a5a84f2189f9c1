"""What only L2ViT has: which block stands where, attention with a floor, local concentration, its norms when folded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vizoo
from vizoo.backbones.davit import DavitBlock
from vizoo.backbones.l2vit import ChannelAffine, GlobalBlock, LinearAttention, LocalConcentration
from vizoo.registry import families, resolve
from vizoo.weights.reader import read_state_dict


def tiny(**options: Any) -> vizoo.Backbone:
    return vizoo.create_model("l2vit_tiny", **{"num_classes": 5, **families()["l2vit"].tiny, **options}).eval()


def concentration() -> LocalConcentration:
    """With norms that do something, on few channels."""
    module = LocalConcentration(6).eval()
    assert isinstance(module.bn, nn.BatchNorm2d)
    for values in (module.bn.running_mean, module.bn.weight.data, module.bn.bias.data):
        values.normal_()
    module.bn.running_var.uniform_(0.5, 2)
    return module


def by_definition(module: LinearAttention, x: Tensor) -> Tensor:
    """Weights of every pair of tokens of one image (N, C), a head and a query at a time."""
    d = x.shape[1] // module.heads
    q, k, v = module.qkv(x).split(x.shape[1], -1)
    out = torch.zeros_like(x)
    for head in range(module.heads):
        own = slice(head * d, (head + 1) * d)
        for i in range(len(x)):
            scores = torch.stack([q[i, own].clamp(min=0) @ key.clamp(min=0) for key in k[:, own]])
            weights = module.temperature[head, 0, 0] * scores / max(scores.sum().item(), 100.0)
            out[i, own] = weights @ v[:, own]
    return module.proj(out)


@pytest.mark.parametrize("size", [0.5, 8.0], ids=["below the floor", "above the floor"])
@torch.no_grad()
def test_attention_by_definition(size: float) -> None:
    module, x = LinearAttention(8, 2), size * torch.randn(2, 3, 4, 8)
    nn.init.uniform_(module.temperature, 0.1, 0.5)
    nn.init.normal_(module.qkv.weight, std=0.5)
    q, k, _ = module.qkv(x).flatten(1, 2).unflatten(-1, (3, 2, 4)).relu().unbind(2)
    total = torch.einsum("bqhd,bkhd->bqhk", q, k).sum(-1)
    assert (total.max() < 100) if size < 1 else (total.max() > 100)
    want = torch.stack([by_definition(module, image.flatten(0, 1)) for image in x]).view_as(x)
    torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_order_of_the_branches() -> None:
    block, x = tiny().layers[0][1], torch.randn(2, 5, 6, 16)
    x1 = x + block.cpe[0].proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    x2 = x1 + block.attn(block.norm1(x1))
    x3 = x2 + block.local_mp(block.norm3(x2))
    torch.testing.assert_close(block(x), x3 + block.mlp(block.norm2(x3)))


@torch.no_grad()
def test_local_concentration_pads_what_is_normalised() -> None:
    module, x = concentration(), torch.randn(2, 5, 4, 6)
    y = F.gelu(module.conv1(x.permute(0, 3, 1, 2)))
    want = module.conv2(module.bn(y)).permute(0, 2, 3, 1)
    torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_folded_norm_is_its_arithmetic_up_to_the_border() -> None:
    module, x = concentration(), torch.randn(2, 9, 8, 6)
    want = module(x)
    module.fuse_()
    first = module.bn
    assert isinstance(first, ChannelAffine)
    torch.testing.assert_close(module(x), want, rtol=1e-5, atol=1e-5)
    module.fuse_()
    assert module.bn is first
    half = x.bfloat16().permute(0, 3, 1, 2)
    assert first(half).dtype == torch.bfloat16
    assert first(half).stride() == half.stride()


def test_a_norm_that_is_watched_is_not_folded() -> None:
    module = concentration()
    module.bn.register_forward_hook(lambda *_: None)
    module.fuse_()
    assert isinstance(module.bn, nn.BatchNorm2d)


def test_frozen_norms_stay_frozen_when_folded() -> None:
    model = tiny().requires_grad_(False).fuse()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


def test_blocks_alternate_in_each_stage_and_share_a_rate() -> None:
    model = tiny(depths=(2, 1, 3, 1), drop_path_rate=0.6)
    kinds = [[type(block) for block in stage] for stage in model.layers]
    pair = [DavitBlock, GlobalBlock]
    assert kinds == [pair, pair[:1], [*pair, DavitBlock], pair[:1]]
    rates = [block.drop_path.rate for stage in model.layers for block in stage]
    assert rates == pytest.approx([0.1 * i for i in range(7)])


def test_maps_stay_contiguous_between_blocks() -> None:
    model, seen = tiny(), []
    for module in model.modules():
        if isinstance(module, (DavitBlock, GlobalBlock)):
            module.register_forward_hook(lambda _, inputs, out: seen.extend((inputs[0], out)))
    maps = model.features(torch.randn(2, 3, 64, 96))
    assert len(seen) == 2 * sum(model.config.depths)
    assert all(x.is_contiguous() for x in seen)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)


def test_dense_version_normalises_each_output() -> None:
    whole = tiny()
    dense = tiny(num_classes=None, output_norms=True, features_only=True, out_indices=(1, 3))
    report = vizoo.load_checkpoint(dense, whole.state_dict())
    assert sorted(report.fresh) == ["norm1.bias", "norm1.weight", "norm3.bias", "norm3.weight"]
    x = torch.randn(1, 3, 70, 50)
    for got, plain in zip(dense(x), whole.features(x, (1, 3)), strict=True):
        want = F.layer_norm(plain.permute(0, 2, 3, 1), plain.shape[1:2]).permute(0, 3, 1, 2)
        torch.testing.assert_close(got, want)


def test_initialisation_is_the_official_one() -> None:
    model = vizoo.create_model("l2vit_tiny", depths=(2, 1, 1, 1))
    block = model.layers[0][1]
    assert torch.all(block.attn.temperature == torch.tensor(32**-0.5))
    for layer in (block.mlp.fc1, block.local_mp.conv1, model.downsample_layers[3].proj):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not layer.bias.any()


def test_averaged_weights_are_preferred_where_the_file_is_named_so(tmp_path: Path) -> None:
    averaged, tuned = resolve("l2vit_base").weights, resolve("l2vit_base.in22k_ft_in1k").weights
    assert averaged is not None
    assert tuned is not None
    file = tmp_path / "weights.pth"
    torch.save({"model": {"head.bias": torch.zeros(2)}, "model_ema": {"head.bias": torch.ones(2)}}, file)
    assert read_state_dict(file, averaged.container)["head.bias"].sum() == 2
    assert read_state_dict(file, tuned.container)["head.bias"].sum() == 0


def test_weights_of_one_window_load_into_another() -> None:
    model = tiny(window_size=5)
    vizoo.load_checkpoint(model, tiny(window_size=4).state_dict())
    assert torch.isfinite(model(torch.randn(1, 3, 45, 77))).all()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"depths": (1, 1)}, "embed_dims, depths and num_heads need one entry per stage, got .* and "),
        ({"depths": (2, 0, 6, 2)}, "embed_dims, depths and mlp_ratio must be positive"),
        ({"embed_dims": (95, 192, 384, 768)}, "embed_dims must begin with an even number, .* nearest valid: 96"),
        ({"window_size": 1}, "window_size must be at least 2, got 1"),
        ({"num_heads": (5, 6, 12, 24)}, "got 5 heads for 96 channels; nearest valid: 4"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must lie in \[0, 1\), got 1.0"),
        ({"img_size": (224, 16)}, r"img_size must be at least 32 on both sides, got \(224, 16\)"),
    ],
)
def test_impossible_configurations(override: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vizoo.create_model("l2vit_tiny", **override)
