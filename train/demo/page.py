"""The page of a whole demo: what each task reached, a chapter for each, and what they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from .charts import Bar, bar_chart, join
from .classifier_page import classification_chapter
from .dense_page import detection_chapter, segmentation_chapter
from .findings import Course, DetectionFindings, Findings, SegmentationFindings
from .report import Chapter, Page, Section, Tile, card, columns, roomy, seconds, table

COUNTS = {1: "One small model", 2: "Two small models", 3: "Three small models"}


def demo_page(
    found: Sequence[Course],
    phases: Sequence[tuple[str, float]],
    machine: Sequence[tuple[str, str]],
    commands: Sequence[tuple[str, str]],
) -> Page:
    """The page of the tasks that were run.

    Args:
        found: What was found, of each task.
        phases: What took how many seconds.
        machine: Where: name and value.
        commands: What one may want to do next, and the command.
    """
    missed = [HEADLINES[type(one)][0] for one in found if not one.met]
    reached = "✓ Every goal reached" if len(found) > 1 else "✓ Goal reached"
    return Page(
        title=f"{COUNTS[len(found)]}, trained here from random weights.",
        eyebrow="vizoo demo",
        lead=(
            f"{_told(found)}, all of it in {seconds(sum(value for _, value in phases))} on a CPU, with the code that "
            f"trains large models. Seed {found[0].seed}: the same seed on the same machine gives the same models."
        ),
        met=not missed,
        verdict=f"✗ Goal missed: {', '.join(missed)}" if missed else reached,
        tiles=[_headline(one) for one in found],
        chapters=[*map(chapter, found), closing(phases, machine, commands)],
        footer=_footer(dict(machine)),
    )


HEADLINES: Mapping[type[Course], tuple[str, str]] = {
    Findings: ("accuracy on held-out digits", "reads handwritten digits"),
    DetectionFindings: ("box AP50 on held-out scenes", "finds and outlines shapes"),
    SegmentationFindings: ("mIoU on held-out scenes", "labels every pixel"),
}
"""What the headline figure of a task is, and what its model does."""


def _told(found: Sequence[Course]) -> str:
    does = [HEADLINES[type(one)][1] for one in found]
    if len(does) == 1:
        return f"It {does[0]}"
    return f"One {', one '.join(does[:-1])}, and one {does[-1]}" if len(does) > 2 else f"One {does[0]}, one {does[1]}"


def _headline(found: Course) -> Tile:
    return Tile(f"{HEADLINES[type(found)][0]}, goal {found.goal:g}", f"{found.headline:.2f}", "%")


def chapter(found: Course) -> Chapter:
    """The chapter of one task."""
    if isinstance(found, Findings):
        return classification_chapter(found)
    if isinstance(found, DetectionFindings):
        return detection_chapter(found)
    assert isinstance(found, SegmentationFindings), f"there is no chapter for {type(found).__name__}"
    return segmentation_chapter(found)


def closing(
    phases: Sequence[tuple[str, float]], machine: Sequence[tuple[str, str]], commands: Sequence[tuple[str, str]]
) -> Chapter:
    """The last chapter: time, machine, and what to do next."""
    return Chapter(
        anchor="around",
        name="This run",
        title="Where it ran, and how to go on.",
        lead="Everything above was done by one thread.",
        sections=[spent(phases, machine), onward(commands)],
    )


def spent(phases: Sequence[tuple[str, float]], machine: Sequence[tuple[str, str]]) -> Section:
    """Where the time went, and the machine."""
    bars = [Bar(name, value, f"{value:.1f} s", "two") for name, value in phases]
    charts = [card(roomy(bar_chart(bars, title="Where the time went")))]
    lead = "Seconds on the clock: on a machine that does other work besides, they are more."
    return Section("time", "Time and machine", lead, columns([*charts, card(table("Machine and versions", machine))]))


def onward(commands: Sequence[tuple[str, str]]) -> Section:
    """Commands to go on with."""
    entries = [Markup("<dt>{}</dt><dd><code>{}</code></dd>").format(what, command) for what, command in commands]
    body = card(Markup("<dl>{}</dl>").format(join(entries)))
    return Section("onward", "Go on from here", "The same commands work for every model of the zoo.", body)


def _footer(facts: Mapping[str, str]) -> str:
    return " · ".join(f"{name} {facts[name]}" for name in ("vizoo", "torch", "Date") if facts.get(name))
