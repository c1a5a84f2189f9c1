"""What only DaViT has: timm's names for it, maps that are never copied, and its configuration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import vizoo
from vizoo.backbones.davit import DavitBlock
from vizoo.registry import families


def tiny(**options: Any) -> vizoo.Backbone:
    return vizoo.create_model("davit_tiny", **{"num_classes": 5, **families()["davit"].tiny, **options}).eval()


@pytest.fixture(scope="module")
def timms() -> nn.Module:
    """timm's own DaViT, as small as ours, with weights that make every branch matter."""
    from timm.models.davit import DaVit

    design = {key: value for key, value in families()["davit"].tiny.items() if key != "img_size"}
    model = DaVit(num_classes=5, **design).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("size", [(64, 96), (75, 101)], ids=str)
def test_timms_checkpoint_gives_timms_logits(timms: nn.Module, size: tuple[int, int]) -> None:
    model = tiny()
    report = vizoo.load_checkpoint(model, timms.state_dict())
    assert report.layout == "timm"
    assert report.loaded == len(timms.state_dict()) == len(model.state_dict())
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(model(x), timms(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.features(x)[-1], timms.forward_features(x), rtol=1e-4, atol=1e-5)


def test_maps_stay_contiguous_between_blocks() -> None:
    model, seen = tiny(), []
    for module in model.modules():
        if isinstance(module, DavitBlock):
            module.register_forward_hook(lambda _, inputs, out: seen.extend((inputs[0], out)))
    maps = model.features(torch.randn(2, 3, 64, 96))
    assert len(seen) == 2 * 2 * sum(model.config.depths)
    assert all(x.is_contiguous() for x in seen)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)


def test_drop_path_rises_from_block_to_block() -> None:
    model = tiny(drop_path_rate=0.7)
    rates = [module.drop_path.rate for module in model.modules() if isinstance(module, DavitBlock)]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


def test_dense_version_normalises_each_output() -> None:
    whole = tiny()
    dense = tiny(num_classes=None, output_norms=True, out_indices=(1, 3))
    report = vizoo.load_checkpoint(dense, whole.state_dict())
    assert sorted(report.fresh) == ["norm1.bias", "norm1.weight", "norm3.bias", "norm3.weight"]
    x = torch.randn(1, 3, 70, 50)
    for got, plain in zip(dense(x), whole.features(x, (1, 3)), strict=True):
        want = nn.functional.layer_norm(plain.permute(0, 2, 3, 1), plain.shape[1:2]).permute(0, 3, 1, 2)
        torch.testing.assert_close(got, want)


def test_weights_to_be_fetched_by_hand_name_the_way(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIZOO_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"fetched by hand .*sharepoint\.com.* davit_tiny\.in1k_timm"):
        vizoo.create_model("davit_tiny", pretrained=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"depths": (1, 1)}, "embed_dims, depths and num_heads need one entry per stage, got .* and "),
        ({"depths": (1, 0, 3, 1)}, "embed_dims, depths, num_heads and mlp_ratio must be positive"),
        ({"window_size": 1}, "window_size must be at least 2, got 1"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must lie in \[0, 1\), got 1.0"),
        ({"img_size": (224, 16)}, r"img_size must be at least 32 on both sides, got \(224, 16\)"),
        ({"num_heads": (5, 6, 12, 24)}, "got 5 heads for 96 channels; nearest valid: 4"),
    ],
)
def test_impossible_configurations(override: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vizoo.create_model("davit_tiny", **override)
