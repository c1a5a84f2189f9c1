"""What only MobileMamba has: the split of channels, wavelets, the identity counted twice, and its configuration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vizoo
from vizoo.backbones.mobilemamba import LocalOp, MobilemambaBlock, MobilemambaConfig, haar, inverse_haar
from vizoo.registry import families, resolve

SIGNS = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) / 2.0
FILTERS = SIGNS.view(4, 1, 2, 2)


def tiny(**options: Any) -> vizoo.Backbone:
    return vizoo.create_model("mobilemamba_t2", **{"num_classes": 5, **families()["mobilemamba"].tiny, **options})


@pytest.mark.parametrize("size", [(4, 6), (5, 6), (7, 3), (1, 1)], ids=str)
def test_wavelets_are_convolutions_by_the_stored_filters(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size)
    padded = nn.functional.pad(x, (0, size[1] % 2, 0, size[0] % 2))
    want = nn.functional.conv2d(padded, FILTERS.repeat(3, 1, 1, 1), stride=2, groups=3)
    got = haar(x.permute(0, 2, 3, 1))
    torch.testing.assert_close(got.permute(0, 3, 1, 2), want)
    torch.testing.assert_close(inverse_haar(got).permute(0, 3, 1, 2), padded)
    other = torch.randn_like(want)
    want = nn.functional.conv_transpose2d(other, FILTERS.repeat(3, 1, 1, 1), stride=2, groups=3)
    torch.testing.assert_close(inverse_haar(other.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), want)


def test_channels_are_split_as_published() -> None:
    splits = {
        name: [resolve(name).variant.config.split(i) for i in range(3)] for name in ("mobilemamba_t2", "mobilemamba_b1")
    }
    assert splits["mobilemamba_t2"] == [(112, 28, 4), (192, 54, 26), (224, 110, 34)]
    assert splits["mobilemamba_b1"] == [(160, 40, 0), (256, 75, 45), (272, 134, 42)]
    tie = MobilemambaConfig(
        embed_dims=(40, 80), depths=(1, 1), global_ratios=(0.6, 0.5), local_ratios=(0.5, 0.2), kernels=(3, 3)
    )
    assert [tie.split(i) for i in range(2)] == [(32, 8, 0), (48, 16, 16)]  # 24 and 40 lie between two multiples of 16


def test_a_block_whose_branches_are_nothing_doubles_the_map() -> None:
    model = tiny().eval()
    x = torch.randn(2, 3, 4, 40)
    for block in model.modules():
        if isinstance(block, MobilemambaBlock) and block.dw0.m.c.in_channels == 40:
            torch.testing.assert_close(block(x), 2 * x)  # so every block begins


def test_local_part_is_two_convolutions() -> None:
    op, x = LocalOp(6, 5).eval(), torch.randn(2, 4, 3, 6)
    for parameter in op.parameters():
        nn.init.normal_(parameter)
    y = nn.functional.conv2d(x.permute(0, 3, 1, 2), op.dwconv3x3.weight, padding=2, groups=6)
    y = op.bn1(y).relu() * op.dwconv1x1.weight.view(6, 1, 1)
    torch.testing.assert_close(op(x), op.bn2(y).permute(0, 2, 3, 1))


def test_constants_of_official_checkpoints_are_ignored() -> None:
    model, other = tiny().eval(), tiny().eval()
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        key = key.replace(".mixer.m.proj.", ".mixer.m.attn.proj.1.").replace(".mixer.m.global", ".mixer.m.attn.global")
        key = key.replace(".mixer.m.local", ".mixer.m.attn.local").replace("wavelet_conv.", "wavelet_convs.0.")
        key = key.replace("base_scale", "base_scale.weight").replace("wavelet_scale", "wavelet_scale.0.weight")
        state[key] = value
    state["blocks1.0.mixer.m.attn.global_op.wt_filter"] = FILTERS.repeat(32, 1, 1, 1)
    state["blocks1.0.mixer.m.attn.global_op.iwt_filter"] = FILTERS.repeat(32, 1, 1, 1)
    state["patch_embed.0.bn.num_batches_tracked"] = torch.tensor(7)
    report = vizoo.load_checkpoint(other, state)
    assert report.loaded == len(model.state_dict())
    assert len(report.ignored) == 3
    x = torch.randn(1, 3, 70, 90)
    assert torch.equal(model(x), other(x))


def test_images_are_scanned_apart_in_training() -> None:
    torch.manual_seed(0)
    op = tiny().blocks1[0].mixer.m.global_op.global_atten
    x = torch.randn(3, 2, 5, op.inner)
    torch.testing.assert_close(op.scan(x)[1:2], op.scan(x[1:2]))


def test_initial_scan() -> None:
    op = tiny().blocks1[0].mixer.m.global_op.global_atten
    assert not op.A_logs.any()
    for parameter in (op.dt_projs_weight, op.dt_projs_bias):
        assert 0 <= parameter.min() < parameter.max() <= 0.1


def test_weights_to_be_fetched_by_hand_name_the_way(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIZOO_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"fetched by hand .*drive\.google\.com/file/d/14UUeEeN62a1"):
        vizoo.create_model("mobilemamba_t2.in1k_distilled", pretrained=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"depths": (1, 1)}, "depths needs one entry per stage, got .* for 3 stages"),
        ({"ssm_ratio": 0.0}, "embed_dims, depths and ssm_ratio must be positive"),
        ({"embed_dims": (150, 272, 368)}, "embed_dims must begin with a multiple of 8.*got 150, nearest valid: 152"),
        ({"kernels": (7, 5, 4)}, r"kernels must be among \(3, 5, 7\), got \(7, 5, 4\)"),
        ({"global_ratios": (0.01, 0.7, 0.6)}, "must leave 16 to all channels of a stage to scan, got 0.01 and 0.2: 0"),
        ({"global_ratios": (1.2, 0.7, 0.6)}, "must leave 16 to all channels of a stage to scan, got 1.2 and 0.2: 176"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must lie in \[0, 1\), got 1.0"),
    ],
)
def test_impossible_configurations(override: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vizoo.create_model("mobilemamba_t2", **override)
