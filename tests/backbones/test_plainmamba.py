"""What only PlainMamba has: four routes with one set of parameters, a convolution behind a block, its dense norms."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vizoo
from vizoo.backbones.layers import resize_grid
from vizoo.backbones.plainmamba import PlainMambaBlock, SnakeMamba
from vizoo.ops import selective_scan
from vizoo.registry import families


def tiny(**options: Any) -> vizoo.Backbone:
    """A small PlainMamba-L2 with weights that make every branch matter."""
    model = vizoo.create_model("plainmamba_l2", **{"num_classes": 5, **families()["plainmamba"].tiny, **options}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def snake(rows: int, columns: int) -> list[tuple[int, int]]:
    """Pixels along the rows, every other one backwards."""
    return [(y, x if y % 2 == 0 else columns - 1 - x) for y in range(rows) for x in range(columns)]


def routes(rows: int, columns: int) -> list[list[tuple[int, int]]]:
    """The four routes: along rows, along columns, each both ways."""
    along_rows = snake(rows, columns)
    along_columns = [(y, x) for x, y in snake(columns, rows)]
    return [along_rows, along_rows[::-1], along_columns, along_columns[::-1]]


def direction(before: tuple[int, int], after: tuple[int, int]) -> int:
    return {(0, 1): 1, (0, -1): 2, (-1, 0): 3, (1, 0): 4}[after[0] - before[0], after[1] - before[1]]


@pytest.mark.parametrize("size", [(3, 4), (4, 3)], ids=str)
def test_mixer_against_one_scan_for_each_route(size: tuple[int, int]) -> None:
    rows, columns = size
    mixer = SnakeMamba(8, expand=2, states=4, conv_size=3)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, rows, columns, 8)
    inner, z = mixer.in_proj(x).chunk(2, -1)
    u = F.silu(mixer.conv2d(inner.permute(0, 3, 1, 2))).flatten(2)
    low_rank, B, C = mixer.x_proj(u.mT).split((mixer.rank, 4, 4), -1)
    steps = mixer.dt_proj(low_rank).mT  # with a bias, which the scan adds once more
    y: Tensor | float = 0.0
    for route in routes(rows, columns):
        pixels = torch.tensor([row * columns + column for row, column in route])
        labels = [0, *(direction(a, b) for a, b in pairwise(route))]
        turned = (B + mixer.direction_Bs[labels]).mT  # steps and maps are those of raster order
        rates = -mixer.A_log.exp()
        out = selective_scan(
            u[..., pixels], steps, rates, turned, C.mT, mixer.D, delta_bias=mixer.dt_proj.bias, softplus=True
        )
        y = y + torch.zeros_like(out).index_copy(2, pixels, out)
    want = mixer.out_proj(y.mT.unflatten(1, size) * F.silu(z))  # type: ignore[union-attr]
    torch.testing.assert_close(mixer(x), want, rtol=1e-4, atol=1e-5)


def masked(mixer: SnakeMamba, x: Tensor, kept: Tensor, size: tuple[int, int]) -> Tensor:
    """What the mixer scans of one image, (L, C), of which only some pixels have features: whole, (L, inner)."""
    mask = torch.zeros(len(x), 1).index_fill(0, kept, 1.0)
    inner, z = mixer.in_proj(x).chunk(2, -1)
    u = F.silu(mixer.conv2d((inner * mask).T.unflatten(1, size)[None])[0].flatten(1)) * mask.T
    low_rank, B, C = mixer.x_proj(u.T).split((mixer.rank, 4, 4), -1)
    steps = mixer.dt_proj(low_rank)  # of zero features the bias alone
    y = torch.zeros_like(u)
    for route in routes(*size):
        pixels = torch.tensor([row * size[1] + column for row, column in route])
        labels = torch.tensor([0, *(direction(a, b) for a, b in pairwise(route))])
        stays = mask[pixels, 0] > 0
        # At the s-th kept pixel of the route, step and maps of the s-th kept pixel in raster order.
        of = torch.full((len(x),), -1)
        of[stays] = kept
        step = torch.where(stays[:, None], steps[of], mixer.dt_proj.bias)
        turned = torch.where(stays[:, None], B[of] + mixer.direction_Bs[labels], 0.0)
        out = selective_scan(
            u[None][..., pixels], step.T[None], -mixer.A_log.exp(), turned.T[None], C[of].T[None], mixer.D,
            delta_bias=mixer.dt_proj.bias, softplus=True,
        )  # fmt: skip
        y = y + torch.zeros_like(u).index_copy(1, pixels, out[0])
    return y.T * F.silu(z)


@pytest.mark.parametrize("size", [(4, 5), (5, 4)], ids=str)
def test_pruned_mixer_equals_the_masked_map(size: tuple[int, int]) -> None:
    mixer = SnakeMamba(8, expand=2, states=4, conv_size=3)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 20, 8)
    pixel = torch.stack([torch.randperm(20)[:7] for _ in x]).sort(1).values
    got = mixer.scan_kept(x.gather(1, pixel[..., None].expand(-1, -1, 8)), pixel, size)
    for image in range(2):
        want = masked(mixer, x[image], pixel[image], size)[pixel[image]]
        torch.testing.assert_close(got[image], want, rtol=1e-4, atol=1e-5)


def test_nothing_pruned_is_the_plain_model() -> None:
    model, x = tiny(conv_layers=(0,)), torch.randn(2, 3, 64, 90)
    same = tiny(conv_layers=(0,), prune_after=(1, 3), keep_ratio=1.0)
    same.load_state_dict(model.state_dict())
    torch.testing.assert_close(same(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(same.features(x), model.features(x), rtol=1e-4, atol=1e-5)


def test_pruning_leaves_the_map_whole() -> None:
    model, x = tiny(prune_after=(2,), keep_ratio=0.3).train(), torch.randn(2, 3, 64, 64)
    seen: list[int] = []
    for block in model.layers:
        block.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    _, second, third, _ = model.eval().features(x)
    assert seen == [16, 16, 5, 5]
    assert ((second != third).any(1).flatten(1).sum(1) == 5).all()
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_hooked_convolution_is_called() -> None:
    mixer, x = SnakeMamba(8, expand=2, states=4, conv_size=5), torch.randn(1, 6, 5, 8)
    want, seen = mixer(x), []
    mixer.conv2d.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(mixer(x), want)
    assert seen


def test_the_convolution_behind_a_block_replaces_its_sum() -> None:
    model = tiny(conv_layers=(1,))
    assert [block.dw is not None for block in model.layers] == [False, True, False, False]
    block, x = model.layers[1], torch.randn(1, 4, 5, 16)
    assert isinstance(block, PlainMambaBlock)
    total = x + block.mamba(block.norm(x))
    convolution, norm = block.dw[0], block.dw[1]
    want = F.gelu(norm(convolution(total.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)
    torch.testing.assert_close(block(x), want)


def test_positions_follow_the_image() -> None:
    model = tiny()
    assert model.pos_embed.shape == (1, 16, 16)
    got = model.positions(3, 7)
    torch.testing.assert_close(got, resize_grid(model.pos_embed, (4, 4), (3, 7)).view(1, 3, 7, 16))
    assert torch.equal(model.positions(4, 4), model.pos_embed.view(1, 4, 4, 16))


def test_checkpoints_of_another_size_are_resized() -> None:
    model, wide = tiny(), tiny(img_size=(64, 96))
    report = vizoo.load_checkpoint(wide, model.state_dict())
    assert report.adapted == {"pos_embed": "positions of 4 x 4 to 4 x 6 patches, bicubic"}
    torch.testing.assert_close(wide.pos_embed.data, resize_grid(model.pos_embed.data, (4, 4), (4, 6)))
    with pytest.raises(ValueError, match=r"pos_embed \(1, 17, 16\) instead of \(1, 24, 16\)"):
        vizoo.load_checkpoint(wide, {**model.state_dict(), "pos_embed": torch.zeros(1, 17, 16)})


def test_dense_version_normalises_each_output() -> None:
    whole = tiny()
    dense = tiny(num_classes=None, output_norms=True, features_only=True, out_indices=(1, 3))
    report = vizoo.load_checkpoint(dense, whole.state_dict())
    assert sorted(report.fresh) == ["norm1.bias", "norm1.weight"]  # the last map has the classifier's norm
    nn.init.ones_(dense.norm1.weight)
    nn.init.zeros_(dense.norm1.bias)
    x = torch.randn(1, 3, 70, 50)
    inner, last = whole.features(x, (1, 3))
    want = F.layer_norm(inner.permute(0, 2, 3, 1), (16,), eps=1e-6).permute(0, 3, 1, 2)
    torch.testing.assert_close(dense(x)[0], want)
    torch.testing.assert_close(dense(x)[1], whole.ln1(last.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_dense_checkpoints_name_norms_by_block() -> None:
    dense = tiny(num_classes=None, output_norms=True, features_only=True, depths=(2, 1, 2, 1))
    names = {"norm0": "norm_layer1", "norm1": "norm_layer2", "norm2": "norm_layer4"}
    state = {}
    for key, value in dense.state_dict().items():
        head, _, leaf = key.partition(".")
        state[f"backbone.{names.get(head, head)}.{leaf}" if leaf else f"backbone.{key}"] = torch.randn_like(value)
    report = vizoo.load_checkpoint(dense, state)
    assert not report.fresh
    assert report.adapted["norm2.bias"] == "named norm_layer4.bias there"
    assert torch.equal(dense.norm1.weight, state["backbone.norm_layer2.weight"])
    assert torch.equal(dense.ln1.weight, state["backbone.ln1.weight"])


def test_what_the_authors_do_not_decay() -> None:
    names = {name.rpartition(".")[2] for name in tiny().no_weight_decay()}
    assert names == {"pos_embed", "A_log", "direction_Bs"}


def test_drop_path_rises_from_block_to_block() -> None:
    assert [block.drop_path.rate for block in tiny(drop_path_rate=0.3).layers] == pytest.approx([0.0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"depths": ()}, "depths, embed_dim, expand and state_dim must be positive"),
        ({"stem_depth": -1}, "stem_depth not negative, got .* -1"),
        ({"conv_size": 4}, "conv_size must be 3, 5 or 7, got 4"),
        ({"conv_layers": (24,)}, r"conv_layers must name blocks 0 to 23, got \(24,\)"),
        ({"prune_after": (0,)}, r"prune_after must name blocks 1 to 24, got \(0,\)"),
        ({"conv_layers": (0, 4), "prune_after": (4, 8)}, "must lie in front of pruning after block 4, got"),
        ({"img_size": 16}, "img_size must be at least 32 on both sides, got 16"),
    ],
)
def test_impossible_configurations(override: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vizoo.create_model("plainmamba_l2", **override)
