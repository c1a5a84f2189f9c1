"""The demo makes a report by the ordinary roads, keeps earlier ones, and says when it falls short of a goal."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import vizoo
from vizoo.train.demo import TASKS, GoalMissed, run
from vizoo.train.demo.attribution import hide, hiding_test, look
from vizoo.train.demo.shapes import tally
from vizoo.train.log import read_log

SHORT = (
    "digits.train_cfg.max_epochs=1",
    "digits.param_scheduler.0.warmup=0",
    "digits.train_dataloader.dataset.held_out=0.9",
    "digits.val_dataloader.dataset.held_out=0.05",
    "digits.model.backbone.embed_dim=16",
    *(
        f"{task}.{key}"
        for task in ("detect", "segment")
        for key in (
            "train_cfg.max_epochs=2",
            "train_cfg.val_interval=1",
            "param_scheduler.0.warmup=0",
            "train_dataloader.batch_size=4",
            "train_dataloader.dataset.scenes=(8,6)",
            "val_dataloader.dataset.scenes=(8,6)",
            "model.backbone.depths=(1,1,1,1)",
        )
    ),
)
NO_GOALS = dict.fromkeys(TASKS, 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "report"
    result = run(folder, seed=3, settings=SHORT, goals=NO_GOALS, quiet=True)
    assert result.report == folder / "report.html"
    assert result.run == folder / "runs" / "001"
    assert list(result.figures) == ["digits", "detect", "segment"]
    assert all(0 <= figure <= 100 for figure in result.figures.values())
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def confusion(run_folder: Path) -> np.ndarray:
    return np.array(json.loads((run_folder / "test" / "confusion.json").read_text())["matrix"])


def last_check(run_folder: Path) -> dict[str, float]:
    return [record for record in read_log(run_folder) if record["kind"] == "val"][-1]


def test_the_report_tells_the_runs(folder: Path, page: str) -> None:
    counts = confusion(folder / "runs" / "001" / "digits")
    assert f"It reads {np.trace(counts)} of {counts.sum()} digits" in page
    assert "Seed 3" in page
    assert page == (folder / "runs" / "001" / "report.html").read_text(encoding="utf-8")
    for anchor in ("classify", "detect", "segment", "around"):
        assert f'<article id="{anchor}"' in page


def test_prediction_from_files_agrees_with_the_evaluation(folder: Path, page: str) -> None:
    counts = confusion(folder / "runs" / "001" / "digits")
    told = re.search(r"All (\d+) held-out images, one class a row; (\d+) were answered wrongly", page)
    assert told is not None
    assert tuple(map(int, told.groups())) == (counts.sum(), counts.sum() - np.trace(counts))


def test_the_held_out_digits_lie_there_as_files(folder: Path) -> None:
    digits = folder / "runs" / "001" / "digits"
    files = sorted((digits / "held-out").glob("*.png"))
    assert len(files) == confusion(digits).sum()
    assert re.fullmatch(r"\d{4}_[a-z]+\.png", files[0].name)


@pytest.mark.parametrize(("run_name", "figure"), [("shapes_detect", "box_AP50"), ("shapes_segment", "mIoU")])
def test_figures_are_those_of_the_log(folder: Path, page: str, run_name: str, figure: str) -> None:
    logged = last_check(folder / "runs" / "001" / run_name)[figure]
    assert f"<b>{logged:.2f} <small>%</small></b>" in page, (
        "the evaluation of the last epoch's checkpoint says the same"
    )


def test_a_detector_fares_by_class_as_its_evaluation_says(folder: Path, page: str) -> None:
    run_folder = folder / "runs" / "001" / "shapes_detect"
    truth = json.loads((folder / "data" / "shapes_detect" / "annotations" / "instances_val.json").read_text())
    rows = json.loads((run_folder / "test" / "per_class.json").read_text())["rows"]
    own = [o for o in truth["annotations"] if not o["iscrowd"]]
    assert f"of {len(own)} shapes in {len(truth['images'])} scenes" in page
    assert sum(row["objects"] for row in rows) == len(own)
    for row in rows:
        precision = "none" if row["box_AP50"] is None else f"{row['box_AP50']:.1f}"
        assert f"<th scope='row'>{row['name']}</th><td>{row['objects']}</td>\n<td>{precision}</td>" in page


def test_the_report_says_how_to_ask_each_model(folder: Path, page: str) -> None:
    runs, data = folder / "runs" / "001", folder / "data"
    for told in (
        f"vizoo predict {runs}/digits/held-out --checkpoint {runs}/digits/epoch_1.pth",
        f"vizoo predict {data}/shapes_detect/val --task detect --checkpoint {runs}/shapes_detect/epoch_2.pth",
        f"vizoo predict {data}/shapes_segment/images/validation --task segment --checkpoint {runs}/shapes_segment/",
    ):
        assert told in page
        words = told.split()
        assert Path(words[2]).is_dir()


def test_iou_by_class_follows_from_the_confusion(folder: Path, page: str) -> None:
    counts = confusion(folder / "runs" / "001" / "shapes_segment")
    right = counts.diagonal()
    ious = 100 * right / np.maximum(counts.sum(0) + counts.sum(1) - right, 1)
    for iou in ious:
        assert f"<b>{iou:.1f} %</b>" in page


def test_a_task_can_run_alone_and_the_generated_images_are_kept(folder: Path) -> None:
    earlier = {path: path.stat().st_mtime_ns for path in (folder / "data").rglob("*.jpg")}
    assert len(earlier) == 2 * (8 + 6)
    result = run(folder, tasks=("segment",), seed=3, settings=SHORT, goals=NO_GOALS, quiet=True)
    assert {path: path.stat().st_mtime_ns for path in (folder / "data").rglob("*.jpg")} == earlier
    page = result.report.read_text(encoding="utf-8")
    assert "One small model" in page
    assert '<article id="detect"' not in page
    assert result.figures["segment"] == last_check(folder / "runs" / "001" / "shapes_segment")["mIoU"], "same seed"


def test_a_missed_goal_is_an_error_after_the_report(tmp_path: Path) -> None:
    run(tmp_path, tasks=("digits",), settings=SHORT, goals={"digits": 0}, quiet=True)
    earlier = (tmp_path / "runs" / "001" / "report.html").read_bytes()
    with pytest.raises(GoalMissed, match=r"reached accuracy .* instead of 100.5 %; .*report.html shows what happened"):
        run(tmp_path, tasks=("digits",), settings=SHORT, goals={"digits": 100.5}, quiet=True)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "✗ Goal missed: accuracy on held-out digits" in page
    assert (tmp_path / "runs" / "001" / "report.html").read_bytes() == earlier, "an earlier run stays as it was"


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (("digit",), "the demo has no task 'digit'; did you mean 'digits'?"),
        ((), "tasks must name one or more of digits, detect, segment, each once; got none"),
        (("detect", "detect"), "each once; got detect, detect"),
    ],
)
def test_tasks_that_are_not_there_are_refused(tmp_path: Path, tasks: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run(tmp_path, tasks=tasks, quiet=True)
    assert not list(tmp_path.iterdir()), "nothing was begun"


BOX = [10, 10, 20, 20]


@pytest.mark.parametrize(
    ("detections", "expected"),
    [
        ([], (0, 0)),
        ([(BOX, 1, 0.9)], (1, 0)),
        ([(BOX, 1, 0.9), ([12, 10, 20, 20], 1, 0.8)], (1, 1)),
        ([(BOX, 2, 0.9)], (0, 1)),
        ([([25, 25, 20, 20], 1, 0.9)], (0, 1)),
        ([([62, 62, 10, 10], 1, 0.9)], (0, 0)),
    ],
    ids=["nothing", "right", "twice", "another class", "elsewhere", "in a crowd"],
)
def test_counts_what_was_found(detections: list[tuple[list[int], int, float]], expected: tuple[int, int]) -> None:
    truth = {
        "annotations": [
            {"image_id": 1, "bbox": BOX, "category_id": 1, "iscrowd": 0},
            {"image_id": 1, "bbox": [60, 60, 40, 40], "category_id": 2, "iscrowd": 1},
            {"image_id": 2, "bbox": BOX, "category_id": 1, "iscrowd": 0},
        ]
    }
    records = [{"image_id": 1, "bbox": box, "category_id": k, "score": score} for box, k, score in detections]
    counted = tally(truth, records)
    assert (counted.objects, counted.found, counted.invented) == (2, *expected)


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
