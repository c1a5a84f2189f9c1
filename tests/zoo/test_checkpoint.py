"""Loading: every layout and adaptation, and what a user reads when a checkpoint does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vizoo
from vizoo.labels import subset_rows
from vizoo.registry import families
from vizoo.weights.adapt import resize_bias_table
from vizoo.weights.errors import CheckpointError, UnsafeCheckpointError
from vizoo.weights.record import Weights

NAME = "swin_tiny_patch4_window7_224"
TINY: dict[str, Any] = dict(families()["swin"].tiny)


def tiny(**options: Any) -> vizoo.Backbone:
    model = vizoo.create_model(NAME, **{**TINY, **options})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def official(model: vizoo.Backbone) -> dict[str, Tensor]:
    """A state dict as the official code writes it, with the tables it stores."""
    return {**model.state_dict(), "layers.0.blocks.1.attn_mask": torch.zeros(4, 16, 16)}


def timm_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same parameters under timm's names."""
    renamed = {}
    for key, value in state.items():
        if ".downsample." in key:
            stage = int(key.split(".")[1])
            key = key.replace(f"layers.{stage}.", f"layers.{stage + 1}.", 1)
        renamed[key.replace("head.", "head.fc.")] = value
    return renamed


def test_a_timm_checkpoint_loads() -> None:
    source, model, x = tiny(), tiny(), torch.randn(1, 3, 64, 64)
    report = vizoo.load_checkpoint(model, timm_layout(source.state_dict()))
    assert report.layout == "timm"
    assert torch.equal(model(x), source(x))


def test_timms_own_model_gives_our_outputs() -> None:
    import timm

    design = {
        **TINY,
        "num_classes": 7,
        "img_size": 128,
    }  # windows divide every map: timm pads them otherwise than the authors
    theirs = timm.create_model(NAME, **design)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = vizoo.create_model(NAME, **design)
    vizoo.load_checkpoint(ours, theirs.state_dict())
    x = torch.randn(2, 3, 128, 128)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "backbone.", "module.backbone."])
def test_a_wrapped_model_loads(prefix: str) -> None:
    source, model = tiny(), tiny()
    vizoo.load_checkpoint(model, {prefix + key: value for key, value in source.state_dict().items()})
    assert torch.equal(model.head.weight, source.head.weight)


def test_a_file_loads_and_the_report_says_what_happened(tmp_path: Path) -> None:
    source, model = tiny(), tiny(num_classes=7)
    file = tmp_path / "official.pth"
    torch.save({"model": official(source), "epoch": 3}, file)
    head = model.head.weight.clone()
    report = vizoo.load_checkpoint(model, file)
    assert report.ignored == ["layers.0.blocks.1.attn_mask"]
    assert report.fresh == ["head.weight", "head.bias"]
    assert torch.equal(model.head.weight, head)
    text = str(report)
    assert "official.pth" in text
    assert "head (1000 to 7 classes: newly initialised)" in text
    assert "newly initialised: head.weight, head.bias" in text


def test_other_channels_and_window() -> None:
    source = tiny()
    model = tiny(in_chans=1, window_size=8, img_size=128)
    report = vizoo.load_checkpoint(model, source.state_dict())
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    assert torch.equal(model.state_dict()[table], resize_bias_table(source.state_dict()[table], 15 * 15))
    torch.testing.assert_close(model.patch_embed.proj.weight, source.patch_embed.proj.weight.sum(1, keepdim=True))
    assert "3 to 1 input channels" in str(report)
    assert "bias table of 49 to 225 offsets, bicubic" in str(report)


def test_an_imagenet_22k_classifier_becomes_one_of_imagenet_1k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, model = tiny(num_classes=21841), tiny(num_classes=1000)
    file = tmp_path / "in22k.pth"
    torch.save({"model": source.state_dict()}, file)
    record = Weights(
        url="https://example.invalid/in22k.pth", license="MIT", repository="a/b", commit="c", container="model",
        input_size=(3, 64, 64), num_classes=21841, labels="imagenet-22k",
    )  # fmt: skip
    monkeypatch.setattr("vizoo.checkpoint.download", lambda record: file)
    report = vizoo.load_checkpoint(model, record)
    rows = subset_rows("imagenet-22k", "imagenet-1k")
    assert torch.equal(model.head.weight, source.head.weight[rows])
    assert "1000 ImageNet-1K rows" in str(report)


def test_a_classifier_feeds_a_dense_version_whose_norms_start_fresh() -> None:
    source, model = tiny(), tiny(output_norms=True)
    norm = model.norm0.weight.clone()
    report = vizoo.load_checkpoint(model, source.state_dict())
    assert torch.equal(model.norm0.weight, norm)
    assert report.fresh == [f"norm{i}.{p}" for i in range(4) for p in ("weight", "bias")]
    assert report.dropped == ["norm.weight", "norm.bias", "head.weight", "head.bias"]


def test_a_checkpoint_of_another_model_names_at_most_ten_keys() -> None:
    other = vizoo.create_model("swinv2_tiny_patch4_window8_256", **TINY)
    with pytest.raises(vizoo.CheckpointMismatch, match=r"does not fit this Swin; \d+ missing: .* and \d+ more; ") as e:
        vizoo.load_checkpoint(tiny(), other.state_dict())
    assert str(e.value).count("layers.") <= 30
    with pytest.raises(
        vizoo.CheckpointMismatch, match=r"of another shape: patch_embed.proj.weight \(32, 3, 4, 4\) instead of"
    ):
        vizoo.load_checkpoint(tiny(), tiny(embed_dim=32, num_heads=(1, 2, 2, 4)).state_dict())


def test_a_failed_load_changes_nothing() -> None:
    model = tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = tiny().state_dict()
    del state["norm.weight"]
    with pytest.raises(vizoo.CheckpointMismatch, match=r"1 missing: norm\.weight"):
        vizoo.load_checkpoint(model, state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_two_entries_for_one_parameter_are_refused() -> None:
    state = timm_layout(tiny().state_dict())
    state["head.weight"] = state["head.fc.weight"]
    with pytest.raises(vizoo.CheckpointMismatch, match=r"two entries are named head\.weight in the timm layout"):
        vizoo.load_checkpoint(tiny(), state)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('executed')",))


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.pth"):
        vizoo.load_checkpoint(tiny(), tmp_path / "missing.pth")
    hostile = tmp_path / "hostile.pth"
    torch.save({"model": Malicious()}, hostile)
    with pytest.raises(UnsafeCheckpointError, match="nothing of it was executed"):
        vizoo.load_checkpoint(tiny(), hostile)
    whole = tmp_path / "whole.pth"
    torch.save({"model": tiny().state_dict()}, whole)
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(whole.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"truncated\.pth"):
        vizoo.load_checkpoint(tiny(), truncated)


def test_create_model_with_a_checkpoint(tmp_path: Path) -> None:
    source = tiny()
    file = tmp_path / "mine.safetensors"
    from safetensors.torch import save_file

    save_file(source.state_dict(), file)
    model = vizoo.create_model(NAME, checkpoint_path=file, **TINY).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), source(x))
