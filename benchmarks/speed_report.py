"""How many times faster one library is than others."""

from __future__ import annotations

import statistics
from typing import Any

from contestants import INSTEAD

SHAPE = ("mode", "execution", "batch_size", "img_size", "threads")


def ratios(rows: list[dict[str, Any]], in_turn: bool) -> list[dict[str, Any]]:
    """How many times faster vizoo is than each peer run the same way.

    Of steps taken in turn each is compared with its neighbor; of those taken at other times, medians and quartiles, and
    what one would take instead is compared with all models.
    """
    found = []
    measured = [row for row in rows if row["seconds"]]
    for mine in (row for row in measured if row["library"] == "vizoo"):
        for peer in (row for row in measured if row["library"] != "vizoo" and meet(mine, row, in_turn)):
            low, middle, high = compared(mine["seconds"], peer["seconds"], in_turn)
            found.append(
                {
                    **{key: mine[key] for key in ("model", *SHAPE)},
                    "peer": peer["library"],
                    "ratio": round(middle, 3),
                    "quartiles": [round(low, 3), round(high, 3)],
                    "memory_ratio": memory_ratio(mine, peer),
                }
            )
    return found


def meet(mine: dict[str, Any], peer: dict[str, Any], in_turn: bool) -> bool:
    """Whether two rows are compared."""
    alike = all(mine[key] == peer[key] for key in SHAPE)
    return alike and (mine["model"] == peer["model"] or (not in_turn and peer["library"] in INSTEAD))


def compared(ours: list[float], theirs: list[float], in_turn: bool) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile of how many times longer theirs are."""
    if in_turn:
        return quartiles([peer / own for own, peer in zip(ours, theirs, strict=True)])
    (fast, own, slow), (quick, peer, late) = quartiles(ours), quartiles(theirs)
    return quick / slow, peer / own, late / fast


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return low, middle, high


def memory_ratio(mine: dict[str, Any], peer: dict[str, Any]) -> float | None:
    """The peer's peak memory over ours."""
    if not mine["peak_memory"] or not peer["peak_memory"]:
        return None
    return round(peer["peak_memory"] / mine["peak_memory"], 3)


def report(found: list[dict[str, Any]]) -> str:
    """The ratios as a Markdown table."""
    lines = [
        "| model | mode | execution | batch | size | threads | peer | times faster (quartiles) | memory, peer / ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in found:
        size = "x".join(map(str, r["img_size"]))
        low, high = r["quartiles"]
        lines.append(
            f"| {r['model']} | {r['mode']} | {r['execution']} | {r['batch_size']} | {size} | {r['threads']} "
            f"| {r['peer']} | {r['ratio']:.2f} ({low:.2f} to {high:.2f}) | {r['memory_ratio'] or '-'} |"
        )
    return "\n".join(lines)
