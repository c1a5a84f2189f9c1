"""Tables say what the records say, and the README holds the one that they give today."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vizoo
from vizoo import tables
from vizoo.registry import resolve

MARKERS = [tables.markers(name) for name in ("models", "speed")]


def test_readme_is_up_to_date(root: Path) -> None:
    text = (root / "README.md").read_text(encoding="utf-8")
    assert tables.renewed(text, root / "benchmarks" / "results") == text, "run `python -m vizoo.tables README.md`"


def test_every_model_has_a_row_in_markdown() -> None:
    lines = tables.markdown_table().splitlines()
    assert len(lines) == 2 + len(vizoo.list_models())
    (row,) = [line for line in lines if line.startswith("| `swin_large_patch4_window12_384` |")]
    assert row.endswith("| 103.9 | 384 | 87.3 | `in22k_ft_in1k`, `in22k` | MIT |")


def test_weight_rows_hold_what_the_record_says() -> None:
    names = vizoo.list_models("swin_tiny*", pretrained=True)
    rows = tables.weight_rows(names)
    assert [row.name for row in rows] == names
    for row in rows:
        record = resolve(row.name).weights
        assert record is not None
        assert row.metrics == record.metrics
        assert row.top1 == record.metrics.get("top1")
        assert row.license == record.license


def document(models: str = "old", speed: str = "old") -> str:
    parts = [f"{begin}\n{text}\n{end}" for (begin, end), text in zip(MARKERS, (models, speed), strict=True)]
    return "\n".join(["before", parts[0], "between", parts[1], "after"])


def test_only_what_lies_between_the_markers_changes(tmp_path: Path) -> None:
    expected = document(tables.markdown_table(), "Nothing yet.")
    assert tables.renewed(document(), tmp_path) == expected
    assert tables.renewed(expected, tmp_path) == expected


@pytest.mark.parametrize("text", ["", MARKERS[0][0], f"{MARKERS[0][1]}\n{MARKERS[0][0]}", "\n".join(MARKERS[0])])
def test_a_document_without_markers_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold the markers"):
        tables.renewed(text, tmp_path)


def test_speed_comes_from_result_files(tmp_path: Path) -> None:
    case = {
        "model": "swin",
        "mode": "inference",
        "execution": "eager",
        "img_size": [64, 96],
        "batch_size": 8,
        "threads": 2,
    }
    rows = [
        {**case, "library": library, "dtype": "float32", "images_per_second": speed, "peak_memory": memory}
        for library, speed, memory in (("vizoo", 20.04, 2**29), ("timm", 10.0, 2**30), ("torchvision", None, None))
    ]
    facts = {"device": "A chip", "torch": "9.9", "commit": "abc", "date": "2001-02-03T04:05"}
    result = {
        "environment": facts,
        "rows": rows,
        "ratios": [{**case, "peer": "timm", "ratio": 2.004, "memory_ratio": 2.0}],
    }
    (tmp_path / "a-chip_2001-02-03_models.json").write_text(json.dumps(result))
    (tmp_path / "a-chip_2001-02-03_startup.json").write_text("{}")
    assert tables.speed_tables(tmp_path).splitlines() == [
        "A chip, float32, torch 9.9, commit abc, 2001-02-03:",
        "",
        "| model | mode | run | size | batch | CPU threads | images/s | peak GiB | times timm | its memory "
        "| times torchvision | its memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        "| `swin` | inference | eager | 64x96 | 8 | 2 | 20.0 | 0.50 | 2.00 | 2.00 | - | - |",
    ]


def test_cells() -> None:
    assert tables.figure(None) == "-"
    assert tables.figure(4.49) == "4.5"
    assert tables.rounded(28.0) == "28"
    assert tables.rounded(103.94) == "103.9"
    assert tables.side((224, 224)) == "224"
    assert tables.side((192, 320)) == "192x320"
    assert tables.reported({}) == "-"
    assert tables.reported({"top5": 95.5, "top1": 81.25}) == "81.2"
    assert tables.reported({"box_ap": 46.0, "mask_ap": 41.6}) == "box_ap 46, mask_ap 41.6"
