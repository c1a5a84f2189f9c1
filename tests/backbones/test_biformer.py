"""What only BiFormer has: both forms of its attention on borders, its options, and norms without counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vizoo
from vizoo.backbones.biformer import (
    POOLINGS,
    Attention,
    BiformerBlock,
    BiformerConfig,
    ConvolutionMixer,
    RoutingAttention,
    pool_regions,
)
from vizoo.registry import families

WIDTH, HEADS = 8, 2


def tiny(name: str = "biformer_tiny", **options: Any) -> vizoo.Backbone:
    return vizoo.create_model(name, **{"num_classes": 5, **families()["biformer"].tiny, **options}).eval()


def attention(topk: int, n_win: int, **options: Any) -> RoutingAttention:
    """A routing attention in float64, with weights that make every branch matter."""
    config = BiformerConfig(
        embed_dims=(WIDTH,), depths=(1,), topk=(topk,), n_win=n_win, head_dim=WIDTH // HEADS, **options
    )
    module = RoutingAttention(config, 0, topk).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def by_definition(module: RoutingAttention, x: Tensor, rows: int, cols: int) -> Tensor:
    """The attention of one image (H, W, C), position by position.

    The regions have `rows` x `cols` positions. Those beyond the map are, in the refactored form, keys with logit 0 and
    value 0 that no mean counts; in the first form the map is enlarged by zeros before it is projected.
    """
    height, width, channels = x.shape
    if not module.refactored:
        x = F.pad(x, (0, 0, 0, module.regions * cols - width, 0, module.regions * rows - height))
    q, k, v = module.qkv(x).split(channels, -1)
    down, across = -(-x.shape[0] // rows), -(-x.shape[1] // cols)
    inside = {
        (i, j): [
            (y, z)
            for y in range(i * rows, min((i + 1) * rows, x.shape[0]))
            for z in range(j * cols, min((j + 1) * cols, x.shape[1]))
        ]
        for i in range(down)
        for j in range(across)
    }
    means = {
        region: [torch.stack([part[at] for at in places]).mean(0) for part in (q, k)]
        for region, places in inside.items()
    }
    out = torch.zeros_like(x)
    for region, places in inside.items():
        affinity = {other: float(means[region][0] @ means[other][1]) for other in inside}
        chosen = sorted(affinity, key=lambda other: -affinity[other])[: module.topk]
        keys = [at for other in chosen for at in inside[other]]
        beyond = len(chosen) * rows * cols - len(keys)
        for at in places:
            for head in torch.arange(channels).chunk(HEADS):
                logits = torch.stack([q[at][head] @ k[key][head] for key in keys]) * channels**-0.5
                weights = torch.cat([logits, logits.new_zeros(beyond)]).softmax(0)
                out[at][head] = sum(w * v[key][head] for w, key in zip(weights, keys, strict=False))
    assert module.lepe is not None
    lepe = module.lepe(v.permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    return module.proj(out + lepe)[:height, :width]


@pytest.mark.parametrize(("n_win", "size", "region"), [(3, (5, 7), (2, 3)), (2, (4, 5), (2, 3)), (4, (3, 9), (1, 3))])
@torch.no_grad()
def test_first_form_pads_the_input_of_the_projection(
    n_win: int, size: tuple[int, int], region: tuple[int, int]
) -> None:
    module, x = attention(2, n_win), image(1, *size, WIDTH)
    torch.testing.assert_close(module(x)[0], by_definition(module, x[0], *region))


@pytest.mark.parametrize(("n_win", "size", "region"), [(2, (5, 7), (2, 3)), (3, (4, 8), (1, 2)), (4, (3, 9), (1, 2))])
@torch.no_grad()
def test_refactored_form_covers_the_map_by_more_regions(
    n_win: int, size: tuple[int, int], region: tuple[int, int]
) -> None:
    module, x = attention(2, n_win, refactored=True), image(1, *size, WIDTH)
    torch.testing.assert_close(module(x)[0], by_definition(module, x[0], *region))


@torch.no_grad()
def test_both_forms_agree_where_regions_divide_the_map() -> None:
    first, second, x = attention(2, 3), attention(2, 3, refactored=True), image(2, 6, 9, WIDTH)
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(first(x), second(x))
    x = image(2, 7, 9, WIDTH)
    assert not torch.allclose(first(x), second(x))


@pytest.mark.parametrize("refactored", [False, True])
@torch.no_grad()
def test_more_routes_than_regions_take_all(refactored: bool) -> None:
    module, x = attention(16, 3, refactored=refactored), image(2, 3, 3, WIDTH)
    q, k, v = module.qkv(x).view(2, 9, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, scale=WIDTH**-0.5).transpose(1, 2).reshape(x.shape)
    lepe = module.lepe(module.qkv(x)[..., -WIDTH:].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(module(x), module.proj(out + lepe))


# Options.


@pytest.mark.parametrize("mode", [mode for mode in POOLINGS if mode != "identity"])
def test_pooling_acts_inside_each_region(mode: Any) -> None:
    x = image(2, 10, 6, 4)  # 2 x 2 regions of 5 x 3
    got = pool_regions(x, 2, mode, 2)
    adaptive, kind = mode.startswith("ada_"), "max" if "max" in mode else "avg"
    pool = getattr(F, f"adaptive_{kind}_pool2d" if adaptive else f"{kind}_pool2d")
    tall, wide = (2, 2) if adaptive else (2, 1)
    assert got.shape == (2, 2 * tall, 2 * wide, 4)
    for i in range(2):
        for j in range(2):
            region = x[:, 5 * i : 5 * i + 5, 3 * j : 3 * j + 3].permute(0, 3, 1, 2)
            found = got[:, tall * i : tall * i + tall, wide * j : wide * j + wide].permute(0, 3, 1, 2)
            torch.testing.assert_close(found, pool(region, 2))


def test_pooling_is_no_larger_than_a_region() -> None:
    x = image(1, 4, 2, 4)
    torch.testing.assert_close(pool_regions(x, 2, "maxpool", 7), x.unflatten(1, (2, 2)).amax(2))


@torch.no_grad()
def test_pooled_keys_leave_routes_and_the_convolution_of_values_as_they_are() -> None:
    module = attention(1, 2, kv_downsample_mode="ada_avgpool", kv_per_wins=(1,))
    plain, x = attention(1, 2), image(1, 4, 4, WIDTH)
    plain.load_state_dict(module.state_dict())
    # With one key for a region, each position gets the mean of that region's values.
    q, k, v = module.qkv(x).split(WIDTH, -1)
    means = [part.unflatten(2, (2, 2)).unflatten(1, (2, 2)).mean((2, 4)).flatten(1, 2)[0] for part in (q, k, v)]
    chosen = means[2][(means[0] @ means[1].T).argmax(1)].view(2, 2, WIDTH)
    lepe = module.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    want = module.proj(chosen.repeat_interleave(2, 0).repeat_interleave(2, 1) + lepe)
    torch.testing.assert_close(module(x), want)
    assert not torch.allclose(plain(x), want)


@torch.no_grad()
def test_queries_and_keys_may_be_narrower() -> None:
    module, x = attention(4, 2, qk_dims=(4,)), image(1, 4, 4, WIDTH)
    assert (module.heads, module.qkv.out_features, module.scale) == (1, 4 + 4 + WIDTH, 0.5)
    q, k, v = module.qkv(x).view(1, 1, 16, -1).split((4, 4, WIDTH), -1)
    out = F.scaled_dot_product_attention(q, k, v, scale=0.5).view(x.shape)
    lepe = module.lepe(v.view(x.shape).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(module(x), module.proj(out + lepe))


def test_soft_routing_multiplies_keys_and_values() -> None:
    module, x = attention(2, 2, soft_routing=True), image(1, 2, 2, WIDTH)  # regions of one position
    q, k, v = module.qkv(x).view(4, 3, WIDTH).unbind(1)
    affinity, routes = (q @ k.T * WIDTH**-0.5).topk(2)
    weights = affinity.softmax(-1)[..., None]
    k, v = (part[routes].unflatten(-1, (HEADS, -1)) * weights[..., None] for part in (k, v))
    logits = torch.einsum("qhd,qkhd->qhk", q.unflatten(-1, (HEADS, -1)), k) * WIDTH**-0.5
    out = torch.einsum("qhk,qkhd->qhd", logits.softmax(-1), v).reshape(x.shape)
    lepe = module.lepe(module.qkv(x)[..., -WIDTH:].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(module(x), module.proj(out + lepe))


def test_gradients_pass_the_routing_where_it_is_differentiable() -> None:
    x, options = image(1, 5, 4, WIDTH), {"soft_routing": True, "diff_routing": True}
    learned = attention(2, 2, **options, param_routing=True)
    learned(x).square().sum().backward()
    assert learned.router is not None
    assert learned.router.weight.grad.abs().sum() > 0
    through, detached = attention(2, 2, **options), attention(2, 2, soft_routing=True)
    detached.load_state_dict(through.state_dict())
    for module in (through, detached):
        module(x).square().sum().backward()
    torch.testing.assert_close(through(x), detached(x))
    assert not torch.allclose(through.qkv.weight.grad, detached.qkv.weight.grad)


@torch.no_grad()
def test_convolution_of_the_whole_map_attention() -> None:
    config = BiformerConfig(embed_dims=(16,), depths=(1,), topk=("attention",), plain_heads=2)
    first, x = Attention(config, 0, 3).double(), image(1, 3, 5, 16)
    second = Attention(BiformerConfig(**{**vars(config), "refactored": True}), 0, 3).double()
    second.load_state_dict(first.state_dict())
    values = first.qkv(x)[..., -16:]
    q, k, v = first.qkv(x).view(1, 15, 3, 2, 8).permute(2, 0, 3, 1, 4)
    out = (q @ k.mT * 8**-0.5).softmax(-1).matmul(v).transpose(1, 2).reshape(x.shape)
    for module, seen in ((first, x), (second, values)):  # of the input; in the refactored form of the values
        lepe = module.lepe(seen.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        torch.testing.assert_close(module(x), module.proj(out + lepe))


def test_other_mixers_and_their_official_names() -> None:
    model = tiny(topk=("convolution", "attention_without_lepe", 4, "attention"))
    assert isinstance(model.layers[0][0].attn, ConvolutionMixer)
    assert model.layers[1][0].attn.lepe is None
    official = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 5, padding=2, groups=16), nn.Conv2d(16, 16, 1))
    state = model.state_dict()
    names = {"value": 1, "conv": 2, "proj": 3}
    theirs = {
        f"stages.0.0.attn.{i}.{key}": value
        for i, part in enumerate(official, 1)
        for key, value in part.state_dict().items()
    }
    ours = {
        key: value for key, value in state.items() if not key.startswith(tuple(f"layers.0.0.attn.{n}." for n in names))
    }
    vizoo.load_checkpoint(model, {**ours, **theirs})
    x = torch.randn(2, 7, 9, 16)
    torch.testing.assert_close(model.layers[0][0].attn(x), official(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def test_layer_scale_and_norms_behind_the_sums() -> None:
    block = tiny(layer_scale_init_value=0.5, pre_norm=False, pos_embed=False).layers[0][0]
    assert block.pos_embed is None
    x = torch.randn(1, 6, 6, 16)
    middle = block.norm1(x + 0.5 * block.attn(x))
    torch.testing.assert_close(block(x), block.norm2(middle + 0.5 * block.mlp(middle)))
    assert "layers.0.0.gamma1" not in dict(tiny(layer_scale_init_value=0.0).named_parameters())


def test_output_projection_may_be_left_out() -> None:
    model = tiny(output_projection=False)
    assert "layers.0.0.attn.proj.weight" not in model.state_dict()
    assert "layers.3.0.attn.proj.weight" in model.state_dict(), "that of the whole map keeps it"


# The model.


def test_regions_may_change_with_the_same_weights() -> None:
    model, other = tiny(), tiny(n_win=(4, 3, 2, 1))
    vizoo.load_checkpoint(other, model.state_dict())
    assert [stage[0].attn.regions for stage in other.layers[:3]] == [4, 3, 2]
    x = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(model(x), other(x))


@pytest.mark.parametrize("name", ["biformer_stl", "biformer_stl_nchw"])
@pytest.mark.parametrize("size", [(32, 32), (45, 78), (113, 224)], ids=str)
def test_swins_layout_rounds_odd_sides_down(name: str, size: tuple[int, int]) -> None:
    model = tiny(name, n_win=7, topk=(1, 4, 16, "attention"))
    for stage, y in zip(model.stages, model.features(torch.randn(1, 3, *size)), strict=True):
        assert y.shape == (1, stage.channels, size[0] // stage.stride, size[1] // stage.stride)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(torch.randn(1, 3, *size))).all()


def test_maps_stay_contiguous_between_blocks() -> None:
    model, seen = tiny(), []
    for module in model.modules():
        if isinstance(module, BiformerBlock):
            module.register_forward_hook(lambda _, inputs, out: seen.extend((inputs[0], out)))
    maps = model.features(torch.randn(2, 3, 64, 96))
    assert len(seen) == 2 * sum(model.config.depths)
    assert all(x.is_contiguous() for x in seen)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)


def test_norms_count_no_batches_in_checkpoints() -> None:
    model = tiny().train()
    model(torch.randn(2, 3, 64, 64))
    norm = model.downsample_layers[0][1]
    assert norm.num_batches_tracked == 1
    assert not [key for key in model.state_dict() if "num_batches_tracked" in key]
    joined = nn.SyncBatchNorm.convert_sync_batchnorm(model).state_dict()
    counts = [key for key in joined if key.endswith("num_batches_tracked")]
    other = tiny()
    report = vizoo.load_checkpoint(other, joined)
    assert sorted(report.ignored) == sorted(counts) != []
    torch.testing.assert_close(other.norm.running_mean, model.norm.running_mean)


def test_dense_version_normalises_outputs_but_not_what_goes_on() -> None:
    whole, dense = tiny(), tiny(num_classes=None, output_norms=True, out_indices=(1, 3))
    report = vizoo.load_checkpoint(dense, whole.state_dict())
    assert sorted(report.fresh) == ["norm1.bias", "norm1.weight", "norm3.bias", "norm3.weight"]
    assert dense.norm1.eps == 1e-6
    nn.init.constant_(dense.norm1.weight, 3.0)
    x = torch.randn(1, 3, 70, 50)
    for factor, got, plain in zip((3.0, 1.0), dense(x), whole.features(x, (1, 3)), strict=True):
        want = F.layer_norm(plain.permute(0, 2, 3, 1), plain.shape[1:2], eps=1e-6).permute(0, 3, 1, 2)
        torch.testing.assert_close(got, factor * want)


def test_initialisation_follows_the_authors_kind_of_layer() -> None:
    first, second = tiny(embed_dims=(64, 64, 64, 64)), tiny("biformer_stl_nchw", embed_dims=(64, 64, 64, 64))
    assert first.layers[0][0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    # A convolution's: uniform, within +-1 / sqrt(64).
    assert second.layers[0][0].attn.qkv.weight.std().item() == pytest.approx(0.125 / 3**0.5, rel=0.1)
    assert second.head.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_drop_path_rises_from_block_to_block() -> None:
    model = tiny(depths=(1, 2, 1, 1), drop_path_rate=0.4)
    rates = [module.drop_path.rate for module in model.modules() if isinstance(module, BiformerBlock)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"depths": (1, 1)}, r"depths needs one entry per stage, got \(1, 1\) for 4 stages"),
        ({"n_win": (7, 7)}, r"n_win needs one entry per stage, got \(7, 7\)"),
        ({"qk_dims": (64,)}, r"qk_dims needs one entry per stage, got \(64,\)"),
        ({"kv_downsample_mode": "ada_maxpool", "kv_per_wins": (2,)}, "kv_per_wins needs one entry per stage"),
        ({"kv_downsample_mode": "avgpool", "kv_downsample_ratios": (2, 0, 1, 1)}, "kv_downsample_ratios must be posi"),
        ({"depths": (2, 0, 8, 2)}, r"depths must be positive, got \(2, 0, 8, 2\)"),
        ({"topk": (1, -1, 16, "attention")}, "topk must be positive"),
        ({"n_win": 0}, "n_win must be positive, got 0"),
        ({"mlp_ratio": 0}, "mlp_ratio must be positive, got 0"),
        ({"topk": (1, 4, 16, "attend")}, "names of other mixers, got 'attend'; did you mean 'attention'"),
        ({"side_dwconv": 4}, r"side_dwconv must be one of \(0, 3, 5, 7\), got 4"),
        ({"kv_downsample_mode": "maxpol"}, "unknown kv_downsample_mode 'maxpol'; did you mean 'maxpool'"),
        ({"param_routing": True}, "set diff_routing=True with it"),
        ({"diff_routing": True}, "set soft_routing=True with it"),
        ({"refactored": True, "soft_routing": True}, "refactored attention has no soft_routing: leave it at False"),
        ({"refactored": True, "qk_dims": (64,) * 4}, "has no qk_dims: leave it at None"),
        ({"head_dim": 40}, "got head_dim 40 for 64 query channels of 64; nearest valid: 32"),
        ({"plain_heads": 7}, "got 7 heads for 512 channels; nearest valid: 8"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must lie in \[0, 1\), got 1.0"),
        ({"img_size": (224, 16)}, r"img_size must be at least 32 on both sides, got \(224, 16\)"),
    ],
)
def test_impossible_configurations(override: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vizoo.create_model("biformer_tiny", **override)
