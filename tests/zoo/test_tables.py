"""Tables say what the records say, and the README holds the one that they give today."""

from __future__ import annotations

from pathlib import Path

import pytest

import vizoo
from vizoo import tables
from vizoo.registry import resolve


def test_readme_is_up_to_date(root: Path) -> None:
    text = (root / "README.md").read_text(encoding="utf-8")
    assert tables.with_table(text) == text, "run `python -m vizoo.tables README.md`"


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


def test_only_what_lies_between_the_markers_changes() -> None:
    text = f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter"
    renewed = tables.with_table(text)
    assert renewed.startswith(f"before\n{tables.BEGIN}\n| model |")
    assert renewed.endswith(f"|\n{tables.END}\nafter")
    assert tables.with_table(renewed) == renewed


@pytest.mark.parametrize("text", ["", tables.BEGIN, f"{tables.END}\n{tables.BEGIN}"])
def test_a_document_without_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must hold the markers"):
        tables.with_table(text)


def test_cells() -> None:
    assert tables.figure(None) == "-"
    assert tables.figure(4.49) == "4.5"
    assert tables.side((224, 224)) == "224"
    assert tables.side((192, 320)) == "192x320"
    assert tables.reported({}) == "-"
    assert tables.reported({"top5": 95.5, "top1": 81.25}) == "81.2"
    assert tables.reported({"box_ap": 46.0, "mask_ap": 41.6}) == "box_ap 46, mask_ap 41.6"
