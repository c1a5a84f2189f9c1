"""The demo makes a report by the ordinary roads, keeps earlier ones, and says when it falls short of its goal."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import vizoo
from vizoo.train.attribution import hide, hiding_test, look
from vizoo.train.demo import GoalMissed, run

SHORT = (
    "train_cfg.max_epochs=1",
    "param_scheduler.0.warmup=0",
    "train_dataloader.dataset.held_out=0.9",
    "val_dataloader.dataset.held_out=0.05",
    "model.backbone.embed_dim=16",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "report"
    result = run(folder, seed=3, settings=SHORT, goal=0.0, quiet=True)
    assert result.report == folder / "report.html"
    assert result.run == folder / "runs" / "001"
    assert 0 <= result.accuracy <= 100
    return folder


def test_the_report_tells_the_run(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    confusion = json.loads((folder / "runs" / "001" / "test" / "confusion.json").read_text())["matrix"]
    total, right = int(np.sum(confusion)), int(np.trace(confusion))
    assert f"It reads {right} of {total} digits" in page
    assert "Seed 3" in page
    assert page == (folder / "runs" / "001" / "report.html").read_text(encoding="utf-8")


def test_prediction_from_files_agrees_with_the_evaluation(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    confusion = json.loads((folder / "runs" / "001" / "test" / "confusion.json").read_text())["matrix"]
    wrong = int(np.sum(confusion) - np.trace(confusion))
    told = re.search(r"All (\d+) held-out images, one class a row; (\d+) were answered wrongly", page)
    assert told is not None
    assert tuple(map(int, told.groups())) == (int(np.sum(confusion)), wrong)


def test_the_held_out_digits_lie_there_as_files(folder: Path) -> None:
    files = sorted((folder / "runs" / "001" / "held-out").glob("*.png"))
    confusion = json.loads((folder / "runs" / "001" / "test" / "confusion.json").read_text())["matrix"]
    assert len(files) == int(np.sum(confusion))
    assert re.fullmatch(r"\d{4}_[a-z]+\.png", files[0].name)


def test_a_missed_goal_is_an_error_after_the_report(folder: Path) -> None:
    earlier = (folder / "runs" / "001" / "report.html").read_bytes()
    with pytest.raises(GoalMissed, match=r"reached .* instead of 100.5 %; .*report.html shows what happened"):
        run(folder, settings=SHORT, goal=100.5, quiet=True)
    assert "Goal missed" in (folder / "report.html").read_text(encoding="utf-8")
    assert (folder / "runs" / "001" / "report.html").read_bytes() == earlier, "an earlier run stays as it was"


def test_heat_follows_the_stage_that_the_class_reads() -> None:
    model = vizoo.create_model(
        "swin_tiny_patch4_window7_224",
        num_classes=3,
        img_size=32,
        embed_dim=8,
        depths=(1, 1),
        num_heads=(1, 2),
        window_size=4,
    ).eval()
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    for stage in (0, 1):
        heat = look(model, images, labels, stage)
        assert heat.shape == (2, 32, 32)
        assert heat.min() >= 0
        assert heat.amax(dim=(1, 2)).tolist() == pytest.approx([1, 1])
    assert all(p.grad is None for p in model.parameters())
    assert not torch.equal(look(model, images, labels), look(model, images, labels.flip(0)))


def test_heat_of_the_last_stage_is_its_share_of_the_logit() -> None:
    """Behind the last stage come a norm, a mean and a linear layer: without the norm the maps sum to the logit."""
    model = vizoo.create_model(
        "swin_tiny_patch4_window7_224", num_classes=2, img_size=32, embed_dim=8, depths=(1,), num_heads=(1,)
    ).eval()
    model.norm = torch.nn.Identity()
    images, labels = torch.randn(1, 3, 32, 32), torch.tensor([1])
    maps = model.features(images)[0]
    shares = (maps * model.head.weight[1][None, :, None, None]).sum(1).clamp(min=0)[0]
    heat = look(model, images, labels)[0]
    coarse = torch.nn.functional.interpolate((shares / shares.max())[None, None], (32, 32), mode="bilinear")[0, 0]
    torch.testing.assert_close(heat, (coarse / coarse.max()).detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stage", [-1, 2])
def test_a_stage_that_is_not_there_is_refused(stage: int) -> None:
    model = vizoo.create_model(
        "swin_tiny_patch4_window7_224", num_classes=2, img_size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 1)
    )
    with pytest.raises(ValueError, match=r"stage must lie in 0..1, got"):
        look(model, torch.randn(1, 3, 32, 32), torch.tensor([0]), stage)


def test_hides_the_hottest_ink_only() -> None:
    image = np.array([[0, 10, 20], [30, 40, 0]], dtype=np.uint8)
    heat = np.array([[9.0, 1.0, 4.0], [2.0, 3.0, 8.0]])
    assert hide(image, heat, 0.5).tolist() == [[0, 10, 0], [30, 0, 0]]
    assert image.tolist() == [[0, 10, 20], [30, 40, 0]], "the image itself is not changed"


def test_hiding_what_matters_hurts_more_than_chance() -> None:
    images = [np.full((4, 4), 50, dtype=np.uint8) for _ in range(8)]
    heat = [np.eye(4) for _ in images]

    def accuracy(changed: object) -> float:
        return 100 * float(np.mean([image[0, 0] > 0 for image in changed]))  # type: ignore[attr-defined]

    hot, at_random = hiding_test(accuracy, images, heat, share=0.25, seed=0)
    assert hot == 0
    assert 40 < at_random < 100
