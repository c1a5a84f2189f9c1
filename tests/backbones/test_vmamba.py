"""What only VMamba has: its names of scans, of norms and of older weights, and its configuration."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vizoo
from vizoo.backbones.vmamba import SS2D, DepthwiseConv, ForwardType, VmambaBlock, make_mixer
from vizoo.registry import families, resolve


def tiny(name: str = "vssm1_tiny_0230s", **options: Any) -> vizoo.Backbone:
    """A small model with weights that make every branch matter."""
    model = vizoo.create_model(name, **{"num_classes": 5, **families()["vmamba"].tiny, **options}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def mixer(forward_type: str, channels: int = 32, **options: Any) -> Any:
    config = tiny(forward_type=forward_type, **options).config
    found = make_mixer(config, channels).eval()
    for parameter in found.parameters():
        nn.init.normal_(parameter, std=0.3)
    return found


def walk(op: SS2D, x: Tensor, k: int, pixels: list[tuple[int, int]]) -> Tensor:
    """Route k of a scan, pixel after pixel, by the paper's equations; x and the result are (H, W, d)."""
    delta, B, C = (x @ op.x_proj_weight[k].T).split((op.rank, op.states, op.states), -1)
    steps = nn.functional.softplus(delta @ op.dt_projs_weight[k].T + op.dt_projs_bias[k])
    rows = slice(k * op.inner, (k + 1) * op.inner)
    A, D = -op.A_logs[rows].exp(), op.Ds[rows]
    state, out = torch.zeros_like(A), torch.zeros_like(x)
    for p in pixels:
        state = torch.exp(steps[p][:, None] * A) * state + (steps[p] * x[p])[:, None] * B[p]
        out[p] = state @ C[p] + D * x[p]
    return out


@pytest.mark.parametrize("states", [1, 3])
def test_scan_is_the_sum_of_four_walks(states: int) -> None:
    op = mixer("v05_noz", 16, d_state=states)
    x = torch.randn(1, 3, 4, op.inner)
    rows = list(itertools.product(range(3), range(4)))
    columns = [(row, column) for column in range(4) for row in range(3)]
    orders = (rows, columns, rows[::-1], columns[::-1])
    with torch.no_grad():
        want = sum(walk(op, x[0], k, order) for k, order in enumerate(orders))
        torch.testing.assert_close(op.scan(x)[0], want, rtol=1e-4, atol=1e-5)


def test_routes_of_the_ablations() -> None:
    x = torch.randn(1, 3, 4, 16)
    rows = list(itertools.product(range(3), range(4)))
    for kind, orders in (("v051d", (rows,) * 4), ("v052d", (rows, rows, rows[::-1], rows[::-1]))):
        op = mixer(kind, 16)
        with torch.no_grad():
            want = sum(walk(op, x[0], k, order) for k, order in enumerate(orders))
            torch.testing.assert_close(op.scan(x)[0], want, rtol=1e-4, atol=1e-5)


def test_cascade_scans_lines_alone_rows_first() -> None:
    op, x = mixer("v052dc", 16), torch.randn(1, 3, 4, 16)

    def lines(x: Tensor, first: int) -> Tensor:
        """What both scans of each row give by their steps, which the second of them counts from its end."""
        pixels = [(0, column) for column in range(x.shape[1])]
        found = []
        for row in x[:, None]:
            there, back = walk(op, row, first, pixels), walk(op, row, first + 1, pixels[::-1])
            found.append(there + back.flip(1))
        return torch.cat(found)

    with torch.no_grad():
        normed = nn.functional.layer_norm(x[0], (16,))
        columns = nn.functional.layer_norm(lines(normed, 0), (16,)).transpose(0, 1)
        torch.testing.assert_close(op.scan(x)[0], lines(columns, 2).transpose(0, 1), rtol=1e-4, atol=1e-5)


def test_state_space_duality_is_a_scan_with_one_rate_a_head() -> None:
    dual, x = mixer("m0_noz", 32, d_state=3), torch.randn(2, 3, 4, 32)
    plain = mixer("v05_noz", 32, d_state=3)
    heads, width = dual.rank, dual.inner // dual.rank
    spread = torch.eye(heads).repeat_interleave(width, 0)  # (d, heads): each channel takes the step of its head
    with torch.no_grad():
        plain.x_proj_weight.copy_(dual.x_proj_weight)
        plain.dt_projs_weight.copy_(spread.expand(4, -1, -1))
        plain.dt_projs_bias.copy_(dual.dt_projs_bias.repeat_interleave(width, 1))
        plain.A_logs.copy_(dual.A_logs.repeat_interleave(width, 1).reshape(-1, 1).expand(-1, 3))
        plain.Ds.copy_(dual.Ds.flatten())
        torch.testing.assert_close(dual.scan(x), plain.scan(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["none", "dwconv3", "cnorm", "softmax", "sigmoid"])
def test_other_norms_of_the_output(norm: str) -> None:
    plain, other = mixer("v05_noz_onnone"), mixer(f"v05_noz_on{norm}")
    other.load_state_dict(plain.state_dict(), strict=False)
    x, y = torch.randn(2, 5, 4, 32), torch.randn(2, 5, 4, 32)
    plain.scan = other.scan = lambda _: y
    with torch.no_grad():
        normed = {
            "none": y,
            "softmax": y.flatten(1, 2).softmax(1).view(y.shape),
            "sigmoid": y.sigmoid(),
        }.get(norm)
        if normed is None:
            conv = next(m for m in other.out_norm if isinstance(m, DepthwiseConv))
            source = y if norm == "dwconv3" else other.out_norm[0](y)
            normed = nn.functional.conv2d(source.permute(0, 3, 1, 2), conv.weight, padding=1, groups=32).permute(
                0, 2, 3, 1
            )
        torch.testing.assert_close(other(x), normed @ other.out_proj.weight.T)


def test_gates_and_activation() -> None:
    x, y = torch.randn(2, 5, 4, 32), torch.randn(2, 5, 4, 32)
    for suffix, gate, activation in (
        ("", nn.functional.silu, nn.Identity()),
        ("_nozact", nn.Identity(), nn.Identity()),
        ("_oact", nn.functional.silu, nn.functional.gelu),
    ):
        op = mixer(f"v05{suffix}_onnone")
        op.scan = lambda _: y
        with torch.no_grad():
            z = op.in_proj(x)[..., 32:]
            torch.testing.assert_close(op(x), op.out_proj(activation(y) * gate(z)))


def test_forward_types() -> None:
    assert ForwardType.parse("v05_noz") == ForwardType(scan="v05", gate=False)
    assert ForwardType.parse("v01_no32_nozact_oact_oncnorm") == ForwardType(
        scan="v01", gate_activation=False, norm="cnorm", activation=True
    )
    for text, message in (
        ("v5_noz", r"forward_type 'v5_noz' begins with no known scan; "),
        ("v05_nz", r"forward_type 'v05_nz' has an unknown suffix 'nz'; did you mean 'noz'"),
        ("v05_onnone_onsoftmax", r"names 2 norms of the output, one at most can be"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(forward_type=text)


@pytest.mark.parametrize("name", ["vssm1_tiny_0230s", "vssmtiny_dp01"])
def test_older_names_and_point_wise_convolutions_load(name: str) -> None:
    model, other = tiny(name), tiny(name)
    old = {}
    for key, value in model.state_dict().items():
        for new, former in ((".norm.", ".ln_1."), (".op.", ".self_attention.")):
            key = key.replace(f"blocks.0{new}", f"blocks.0{former}")
        if name == "vssmtiny_dp01":
            key = key.replace("patch_embed.0.", "patch_embed.proj.").replace("patch_embed.2.", "patch_embed.norm.")
        key = key.replace("classifier.norm.", "norm.").replace("classifier.head.", "head.")
        if key.endswith(("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")):
            value = value[:, :, None, None]
        old[key] = value
    assert not {"classifier.head.weight", "layers.0.blocks.0.norm.weight"} & set(old)
    report = vizoo.load_checkpoint(other, old)
    assert report.loaded == len(old) == len(model.state_dict())
    x = torch.randn(1, 3, 40, 50)
    assert torch.equal(model(x), other(x))


def test_official_dense_checkpoint_loads() -> None:
    model = tiny(num_classes=None, output_norms=True)
    assert {f"outnorm{i}.weight" for i in range(4)} <= set(model.state_dict())
    report = vizoo.load_checkpoint(tiny(num_classes=None, output_norms=True), model.state_dict())
    assert (report.fresh, report.dropped) == ([], [])
    whole, x = tiny(), torch.randn(1, 3, 70, 50)
    report = vizoo.load_checkpoint(model, whole.state_dict())
    assert len(report.fresh) == 8
    for got, plain in zip(model(x), whole.features(x), strict=True):
        assert got.shape == plain.shape


def test_scans_stay_float32_under_autocast() -> None:
    model, seen = tiny(), []
    for module in model.modules():
        if isinstance(module, SS2D):
            module.out_norm.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0].dtype, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(1, 3, 64, 64))
    assert seen == [(torch.float32, torch.bfloat16)] * 4


def test_a_model_in_half_precision_runs() -> None:
    model = tiny().to(torch.bfloat16)
    assert model(torch.randn(1, 3, 64, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_maps_stay_contiguous_between_blocks() -> None:
    for name in ("vssm1_tiny_0230s", "vssmtiny_dp01"):
        model, seen = tiny(name), []
        for module in model.modules():
            if isinstance(module, VmambaBlock):
                module.register_forward_hook(lambda _, inputs, out, seen=seen: seen.extend((inputs[0], out)))
        maps = model.features(torch.randn(2, 3, 64, 96))
        assert len(seen) == 8
        assert all(x.is_contiguous() for x in seen)
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)


def test_initial_scan() -> None:
    op = make_mixer(resolve("vssmtiny_dp01").variant.config, 96)
    assert isinstance(op, SS2D)
    steps = nn.functional.softplus(op.dt_projs_bias)
    assert steps.min() >= 0.9e-3
    assert steps.max() <= 0.11
    assert steps.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.3)
    torch.testing.assert_close(op.A_logs.exp(), torch.arange(1.0, 17).expand(768, -1))
    assert torch.equal(op.Ds, torch.ones(768))
    assert op.dt_projs_weight.abs().max() <= 6**-0.5
    assert op.x_proj_weight.abs().max() <= 192**-0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"depths": (2, 2)}, "embed_dims and depths need one entry per stage, got .* and "),
        ({"d_state": 0}, "embed_dims, depths, d_state and ssm_ratio must be positive"),
        ({"mlp_ratio": -1.0}, "mlp_ratio must be positive, or 0 for blocks without an MLP, got -1.0"),
        ({"embed_dims": (15, 32, 64, 128)}, "embed_dims must begin with an even number.*got 15, nearest valid: 16"),
        ({"embed_dims": (16, 32, 60, 128), "overlap": False}, "doubles channels: behind 32 come 64, got embed_dims"),
        ({"forward_type": "m0_noz", "ssm_ratio": 1.1}, "heads of m0 must divide .* nearest valid ssm_ratio: "),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must lie in \[0, 1\), got 1.0"),
        ({"img_size": (224, 16)}, r"img_size must be at least 32 on both sides, got \(224, 16\)"),
    ],
)
def test_impossible_configurations(override: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vizoo.create_model("vssm1_tiny_0230s", **override)
