"""Where results go, and what their files are called."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def save(kind: str, facts: dict[str, Any], results: dict[str, Any], folder: Path) -> Path:
    """Write a result file, named by device, date and kind."""
    device = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    path = folder / f"{device}_{facts['date'][:10]}_{kind}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": facts, **results}, indent=1) + "\n", encoding="utf-8")
    return path
