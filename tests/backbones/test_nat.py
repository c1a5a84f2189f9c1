"""What only neighborhood attention models have: dilations, padding of small maps, and tables of biases by offset."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vizoo
from vizoo.backbones.nat import NatBlock, NeighborhoodAttention, block_dilations
from vizoo.backbones.nat_isotropic import GlobalAttention, relative_position_index
from vizoo.dense import freeze
from vizoo.registry import families, resolve
from vizoo.weights.adapt import resize_bias_image

PYRAMIDS = {"nat": "nat_mini", "dinat_s": "dinat_s_tiny"}


def tiny(name: str, **options: Any) -> vizoo.Backbone:
    """A small model with weights that make every branch matter."""
    model = vizoo.create_model(name, **{"num_classes": 5, **resolve(name).family.tiny, **options}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def dilations_of(name: str, **options: Any) -> list[int]:
    with torch.device("meta"):
        model = vizoo.create_model(name, **options)
    return [module.dilation for module in model.modules() if isinstance(module, NeighborhoodAttention)]


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("nat_tiny", [[1] * 3, [1] * 4, [1] * 18, [1] * 5]),
        ("dinat_mini", [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 3, [1] * 5]),
        ("dinat_base", [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5]),
        ("dinat_large_384", [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5]),
        ("dinat_large_384_11x11", [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5]),
        ("dinat_s_small", [[1, 8], [1, 4], [1, 2] * 9, [1, 1]]),
        ("dinat_s_large_384", [[1, 13], [1, 6], [1, 3] * 9, [1, 1]]),
        ("nat_isotropic_small", [[1] * 12]),
        ("dinat_isotropic_base", [[1, 2] * 6]),
    ],
)
def test_dilations_are_the_published_ones(name: str, stages: list[list[int]]) -> None:
    assert dilations_of(name) == [dilation for stage in stages for dilation in stage]


def test_dilations_can_be_given_per_model_stage_and_block() -> None:
    assert dilations_of("dinat_mini", dilations=2) == [2] * 18
    assert dilations_of("nat_mini", dilations=(1, 2, 3, (1, 2, 3, 4, 5))) == [1] * 3 + [2] * 4 + [3] * 6 + [
        1,
        2,
        3,
        4,
        5,
    ]
    assert block_dilations(((1, 7, 1, 14), (1, 3, 5)), (6, 4)) == ((1, 7, 1, 14, 1, 7), (1, 3, 5, 1))
    assert dilations_of("dinat_isotropic_small", dilations=(1, 2, 4)) == [1, 2, 4] * 4


def neighborhood(module: NeighborhoodAttention, x: Tensor) -> Tensor:
    """The definition, position by position, in the words of the paper: nearest positions of one's own group."""
    height, width = x.shape[1:3]
    K, d, heads = module.kernel_size, module.dilation, module.heads
    q, k, v = module.qkv(x).unflatten(-1, (3, heads, -1)).unbind(-3)

    def around(i: int, size: int) -> list[int]:
        group = list(range(i % d, size, d))
        first = min(max(group.index(i) - K // 2, 0), len(group) - K)
        return group[first : first + K]

    out = torch.zeros_like(q)
    for y in range(height):
        for x_ in range(width):
            places = [(j, i) for j in around(y, height) for i in around(x_, width)]
            keys, values = (torch.stack([t[:, j, i] for j, i in places], 1) for t in (k, v))
            bias = [module.rpb[:, (j - y) // d + K - 1, (i - x_) // d + K - 1] for j, i in places]
            logits = torch.einsum("bhd,bnhd->bhn", q[:, y, x_], keys) * q.shape[-1] ** -0.5
            out[:, y, x_] = torch.einsum("bhn,bnhd->bhd", (logits + torch.stack(bias, 1)).softmax(-1), values)
    return module.proj(out.flatten(3))


def attention(kernel_size: int, dilation: int) -> NeighborhoodAttention:
    module = NeighborhoodAttention(8, 2, kernel_size, dilation).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


@pytest.mark.parametrize(("kernel_size", "dilation", "size"), [(3, 1, (4, 5)), (3, 2, (7, 9)), (5, 1, (5, 8))], ids=str)
def test_attention_is_the_definition(kernel_size: int, dilation: int, size: tuple[int, int]) -> None:
    module, x = attention(kernel_size, dilation), torch.randn(2, *size, 8, dtype=torch.float64)
    torch.testing.assert_close(module(x), neighborhood(module, x))


@pytest.mark.parametrize("size", [(4, 9), (7, 5), (2, 1), (6, 6)], ids=str)
def test_small_maps_are_padded_behind_the_norm_and_attended(size: tuple[int, int]) -> None:
    module, x = attention(3, 2), torch.randn(2, *size, 8, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, max(0, 6 - size[1]), 0, max(0, 6 - size[0])))
    torch.testing.assert_close(module(x), neighborhood(module, padded)[:, : size[0], : size[1]])


def test_layer_scale_exists_where_published() -> None:
    for name, variant in families()["nat"].variants.items():
        assert (variant.config.layer_scale == 1e-5) == (name in ("nat_small", "nat_base", "dinat_base"))
    model = vizoo.create_model("nat_small", **families()["nat"].tiny)
    factors = [p for n, p in model.named_parameters() if "gamma" in n]
    assert len(factors) == 2 * sum(model.config.depths)
    assert all((p == 1e-5).all() for p in factors)


def test_layer_scale_scales_both_branches() -> None:
    block, x = NatBlock(8, nn.Identity(), 2.0, 0.0, layer_scale=0.5), torch.randn(1, 3, 3, 8)
    assert block.gamma1 is not None
    nn.init.zeros_(block.gamma1)
    torch.testing.assert_close(block(x), x + 0.5 * block.mlp(block.norm2(x)))
    plain = NatBlock(8, nn.Identity(), 2.0, 0.0)
    assert not [name for name in plain.state_dict() if "gamma" in name]


@pytest.mark.parametrize("name", [*PYRAMIDS.values(), "dinat_isotropic_small"])
def test_another_kernel_resizes_the_tables(name: str) -> None:
    source, model = tiny(name, kernel_size=3), tiny(name, kernel_size=7)
    report = vizoo.load_checkpoint(model, source.state_dict())
    tables = [key for key in model.state_dict() if key.endswith(".rpb")]
    assert set(report.adapted) == set(tables)
    assert "bias table of 25 to 169 offsets, bicubic" in str(report)
    for key in tables:
        image = source.state_dict()[key][None]
        wanted = F.interpolate(image, size=(13, 13), mode="bicubic", align_corners=False)[0]
        assert torch.equal(model.state_dict()[key], wanted)


def test_other_heads_do_not_fit() -> None:
    with pytest.raises(vizoo.CheckpointMismatch, match=r"rpb \(1, 5, 5\) instead of \(2, 13, 13\)"):
        vizoo.load_checkpoint(tiny("nat_mini", kernel_size=7, num_heads=(2, 2, 2, 4)), tiny("nat_mini").state_dict())


@pytest.mark.parametrize("name", PYRAMIDS.values())
def test_dense_version_normalises_each_output_and_continues_without(name: str) -> None:
    whole = tiny(name)
    dense = vizoo.create_model(name, **resolve(name).family.tiny, output_norms=True, out_indices=(1, 3)).eval()
    report = vizoo.load_checkpoint(dense, whole.state_dict())
    assert sorted(report.fresh) == ["norm1.bias", "norm1.weight", "norm3.bias", "norm3.weight"]
    x = torch.randn(1, 3, 70, 50)
    for got, plain in zip(dense(x), whole.features(x, (1, 3)), strict=True):
        want = F.layer_norm(plain.permute(0, 2, 3, 1), plain.shape[1:2]).permute(0, 3, 1, 2)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", [*PYRAMIDS.values(), "dinat_isotropic_small", "vitrpb_small"])
def test_maps_stay_contiguous_between_blocks(name: str) -> None:
    model, seen = tiny(name), []
    for module in model.modules():
        if isinstance(module, NatBlock):
            module.register_forward_hook(lambda _, inputs, out: seen.extend((inputs[0], out)))
    model.features(torch.randn(2, 3, 61, 96))
    assert len(seen) == 2 * sum(model.config.depths)
    assert all(x.is_contiguous() for x in seen)


@pytest.mark.parametrize("name", [*PYRAMIDS.values(), "dinat_isotropic_small", "vitrpb_small"])
def test_bias_tables_are_not_decayed(name: str) -> None:
    model = tiny(name)
    assert model.no_weight_decay() == {key for key, _ in model.named_parameters() if key.endswith(".rpb")}
    assert len(model.no_weight_decay()) == sum(model.config.depths)


def test_freezing_takes_whole_stages_of_an_isotropic_model() -> None:
    model = tiny("dinat_isotropic_small", depths=(1, 2, 1, 1))
    freeze(model, 2)
    frozen = {name.partition(".attn")[0] for name, p in model.named_parameters() if not p.requires_grad}
    blocks = {name.split(".")[1] for name in frozen if name.startswith("layers")}
    assert blocks == {"0", "1", "2"}
    assert not model.patch_embed.proj.weight.requires_grad
    assert model.norm.weight.requires_grad


def official_index(side: int) -> Tensor:
    """The published buffer: Swin's index, query minus key, flipped in both directions."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([y, x]).flatten(1)
    difference = places[:, :, None] - places[:, None, :] + side - 1
    return (difference[0] * (2 * side - 1) + difference[1]).flip(0, 1)


@pytest.mark.parametrize("side", [1, 3, 14])
def test_index_of_global_attention_is_the_published_buffer(side: int) -> None:
    assert torch.equal(relative_position_index(side, side, torch.device("cpu")), official_index(side))


def test_index_goes_by_rows_and_columns() -> None:
    index = relative_position_index(2, 3, torch.device("cpu"))
    assert index[0].tolist() == [7, 8, 9, 12, 13, 14]  # from the first position: 0 to 1 rows down, 0 to 2 columns right
    assert index[5].tolist() == [0, 1, 2, 5, 6, 7]


def test_global_attention_is_attention_with_the_published_bias() -> None:
    module, x = GlobalAttention(8, 2, (4, 4)).double(), torch.randn(2, 4, 4, 8, dtype=torch.float64)
    nn.init.normal_(module.rpb)
    q, k, v = module.qkv(x).reshape(2, 16, 3, 2, 4).permute(2, 0, 3, 1, 4)
    bias = module.rpb.permute(1, 2, 0).flatten(0, 1)[official_index(4).flatten()].view(16, 16, 2).permute(2, 0, 1)
    out = (q * 0.5 @ k.transpose(-1, -2) + bias).softmax(-1) @ v
    torch.testing.assert_close(module(x), module.proj(out.transpose(1, 2).reshape(x.shape)))


def test_global_attention_at_another_size_is_the_model_made_for_it() -> None:
    model, other = tiny("vitrpb_small"), tiny("vitrpb_small", img_size=(48, 104))
    report = vizoo.load_checkpoint(other, model.state_dict())
    assert "bias table of 225 to 275 offsets, bicubic" in str(report)
    x = torch.randn(2, 3, 48, 104)
    torch.testing.assert_close(model(x), other(x), rtol=1e-4, atol=1e-5)


def test_stored_index_is_ignored() -> None:
    model = tiny("vitrpb_small")
    state = model.state_dict()
    stored = {f"layers.{i}.attn.relative_position_index": official_index(8) for i in range(4)}
    report = vizoo.load_checkpoint(model, {**state, **stored})
    assert (report.layout, report.ignored, report.loaded) == ("official", list(stored), len(state))


@pytest.mark.skipif(torch.__version__ < (2, 9), reason="older torch cannot follow sizes through padding")
def test_export_of_global_attention_with_free_size() -> None:
    sides = {0: None, 2: torch.export.Dim("H", min=33, max=512), 3: torch.export.Dim("W", min=33, max=512)}
    model = tiny("vitrpb_small", depths=(1, 1), num_classes=0)
    with vizoo.ops.use("reference"):
        exported = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=(sides,)).module()
    for size in ((64, 64), (45, 101)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-4)


def test_resized_tables_keep_rows_and_columns_apart() -> None:
    rows = torch.arange(5.0)[None, :, None].expand(2, 5, 7)  # grows with the row only
    image = resize_bias_image(rows, (9, 3))
    assert image.shape == (2, 9, 3)
    assert torch.allclose(image, image[:, :, :1].expand(2, 9, 3), atol=1e-5)
    assert resize_bias_image(rows, (5, 7)) is rows
    assert resize_bias_image(rows.half(), (3, 3)).dtype == torch.float16


@pytest.mark.parametrize(
    ("shape", "sides", "message"),
    [
        ((5, 5), (7, 7), r"a bias image must be \(heads, rows, columns\), got shape \(5, 5\)"),
        ((2, 5, 5), (8, 7), r"odd sides, 2 \* positions - 1 each; the table has \(5, 5\), the model needs \(8, 7\)"),
        ((2, 4, 5), (7, 7), r"the table has \(4, 5\)"),
    ],
)
def test_tables_of_even_sides_are_refused(shape: tuple[int, ...], sides: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resize_bias_image(torch.zeros(shape), sides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"depths": (3, 4)}, r"depths and num_heads need one entry per stage, got \(3, 4\) and \(2, 4, 8, 16\)"),
        ({"depths": (3, 0, 6, 5)}, "depths, embed_dim and mlp_ratio must be positive"),
        ({"embed_dim": 65, "num_heads": (1, 1, 1, 1)}, "embed_dim must be even, for the stem halves it, got 65"),
        ({"kernel_size": 8}, "kernel_size must be odd and at least 3, got 8; nearest valid: 9"),
        ({"kernel_size": 1}, "kernel_size must be odd and at least 3, got 1; nearest valid: 3"),
        ({"dilations": (1, 2)}, r"dilations needs one number, or one entry per stage \(4\), got \(1, 2\)"),
        (
            {"dilations": (1, (1, 2, 3, 4, 5), 1, 1)},
            r"a stage of 4 blocks must be a number or 1 to 4 of them, got \(1, 2",
        ),
        ({"dilations": (1, 1, (), 1)}, r"a stage of 6 blocks must be a number or 1 to 6 of them, got \(\)"),
        ({"dilations": 0}, r"dilations must be at least 1, got \(0,\)"),
        ({"num_heads": (2, 3, 8, 16)}, "got 3 heads for 128 channels; nearest valid: 2"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must lie in \[0, 1\), got 1.0"),
        ({"img_size": 16}, "img_size must be at least 32 on both sides, got 16"),
        ({"layer_scale": -1.0}, "layer_scale must be positive, or None for none, got -1.0"),
    ],
)
def test_impossible_configurations(override: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vizoo.create_model("nat_mini", **override)


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("dinat_s_tiny", {"patch_size": 0}, "patch_size must be positive, got 0"),
        ("dinat_isotropic_small", {"patch_size": 0}, "depths, embed_dim, patch_size and mlp_ratio must be positive"),
        ("dinat_isotropic_small", {"dilations": (1, 0)}, r"must be a positive number or 1 to 12 of them, got \(1, 0\)"),
        ("dinat_isotropic_small", {"dilations": ()}, r"must be a positive number or 1 to 12 of them, got \(\)"),
        ("dinat_isotropic_small", {"kernel_size": 4}, "kernel_size must be odd and at least 3, got 4"),
        ("vitrpb_small", {"dilations": 2}, "dilations need a kernel_size; global attention has none, got 2"),
        ("vitrpb_small", {"num_heads": 7}, "got 7 heads for 384 channels; nearest valid: 6"),
    ],
)
def test_impossible_configurations_of_the_others(name: str, override: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vizoo.create_model(name, **override)
