"""What only Flowformer has: flow attention in its vision model's form, scaled MLPs, positions of other images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vizoo
from vizoo.backbones.flowformer import FlowAttention, FlowformerBlock
from vizoo.registry import families


def tiny(**options: Any) -> vizoo.Backbone:
    tiny = families()["flowformer"].tiny
    return vizoo.create_model("flowformer_cv", **{"num_classes": 5, **tiny, **options}).eval()


def by_definition(module: FlowAttention, x: Tensor) -> Tensor:
    """Flow attention of one image (N, C): all capacities of a head at once, N x N."""
    e, tokens, d = 1e-6, len(x), x.shape[1] // module.heads
    q, k, v = module.qkv(x).double().split(x.shape[1], -1)
    out = torch.zeros(x.shape, dtype=torch.float64)
    for head in range(module.heads):
        own = slice(head * d, (head + 1) * d)
        sink, source = q[:, own].sigmoid(), k[:, own].sigmoid()
        incoming = ((sink + e) * (source.sum(0) + e)).sum(1) + e
        outgoing = ((source + e) * (sink.sum(0) + e)).sum(1) + e
        conserved_sink = ((sink + e) * ((source / outgoing[:, None]).sum(0) + e)).sum(1) + e
        conserved_source = ((source + e) * ((sink / incoming[:, None]).sum(0) + e)).sum(1) + e
        competition = tokens * conserved_source.clamp(-1, 1).softmax(0)
        capacity = sink @ source.T / incoming[:, None]  # of sinks by sources
        out[:, own] = conserved_sink.sigmoid()[:, None] * (capacity * competition) @ v[:, own]
    return module.proj(out.float())


@torch.no_grad()
def test_attention_by_definition() -> None:
    module, x = FlowAttention(8, 2), torch.randn(2, 3, 4, 8)
    nn.init.normal_(module.qkv.weight)
    want = torch.stack([by_definition(module, image.flatten(0, 1)) for image in x]).view_as(x)
    torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_only_the_mlp_is_scaled() -> None:
    block, x = tiny().blocks[0][0], torch.randn(2, 5, 6, 16)
    assert torch.all(block.gamma == 1e-5)
    nn.init.normal_(block.gamma)
    middle = x + block.attn(F.layer_norm(x, (16,), eps=1e-6))
    torch.testing.assert_close(block(x), middle + block.gamma * block.mlp(F.layer_norm(middle, (16,), eps=1e-6)))


@torch.no_grad()
def test_positions_are_added_once_and_resized_for_other_images() -> None:
    model = tiny()
    own = model.pos_embed.view(1, 16, 16, 16)
    torch.testing.assert_close(model.positions(16, 16), own)
    image = own.permute(0, 3, 1, 2)
    want = F.interpolate(image, (9, 20), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    torch.testing.assert_close(model.positions(9, 20), want)
    x = torch.randn(1, 3, 33, 80)
    patches = model.patch_embed[0].proj(F.pad(x, (0, 0, 0, 3))).permute(0, 2, 3, 1)
    torch.testing.assert_close(model.stem(x), patches + want)


def test_a_checkpoint_of_another_size_gives_its_positions() -> None:
    small, large = tiny(), tiny(img_size=(96, 66))
    report = vizoo.load_checkpoint(large, small.state_dict())
    assert report.adapted == {"pos_embed": "positions of 16 x 16 to 24 x 17 patches, bicubic"}
    torch.testing.assert_close(large.pos_embed.view(1, 24, 17, 16), small.positions(24, 17))
    with pytest.raises(vizoo.CheckpointMismatch, match=r"1 of another shape: pos_embed \(1, 408, 16\) instead of"):
        vizoo.load_checkpoint(small, large.state_dict())  # of an image that was not square


def test_counters_of_operations_in_a_checkpoint_are_ignored() -> None:
    model = tiny()
    counters = dict.fromkeys(("total_ops", "blocks.0.0.attn.total_ops", "norm.total_params"), torch.zeros(1))
    report = vizoo.load_checkpoint(model, {**model.state_dict(), **counters})
    assert sorted(report.ignored) == sorted(counters)


def test_odd_maps_are_padded_with_zeros() -> None:
    model, x = tiny(), torch.randn(1, 5, 7, 16)
    padded = F.pad(x, (0, 0, 0, 1, 0, 1))
    torch.testing.assert_close(model.downsample(1, x), model.downsample(1, padded))
    assert model.downsample(1, x).shape == (1, 3, 4, 32)


def test_maps_stay_contiguous_between_blocks() -> None:
    model, seen = tiny(), []
    for module in model.modules():
        if isinstance(module, FlowformerBlock):
            module.register_forward_hook(lambda _, inputs, out: seen.extend((inputs[0], out)))
    maps = model.features(torch.randn(2, 3, 64, 96))
    assert len(seen) == 2 * sum(model.config.depths)
    assert all(x.is_contiguous() for x in seen)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)


def test_drop_path_rises_from_block_to_block() -> None:
    model = tiny(depths=(1, 2, 1, 1), drop_path_rate=0.4)
    rates = [module.drop_path.rate for module in model.modules() if isinstance(module, FlowformerBlock)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_weights_are_fetched_by_hand(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIZOO_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"fetched by hand .*cloud\.tsinghua\.edu\.cn"):
        vizoo.create_model("flowformer_cv", pretrained=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"depths": (1, 1)}, r"embed_dims and depths need one entry per stage, got .* and \(1, 1\)"),
        ({"depths": (3, 0, 10, 3)}, "embed_dims, depths and mlp_ratio must be positive"),
        ({"num_heads": 10}, "got 10 heads for 96 channels; nearest valid: 8"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must lie in \[0, 1\), got 1.0"),
        ({"img_size": 16}, "img_size must be at least 32 on both sides, got 16"),
    ],
)
def test_impossible_configurations(override: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vizoo.create_model("flowformer_cv", **override)
