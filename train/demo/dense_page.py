"""The chapters of a detector and of a segmenter: what they found, how they learned, and how each class fares."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from markupsafe import Markup

from .charts import Bar, Line, bar_chart, line_chart
from .findings import Course, DetectionFindings, SegmentationFindings
from .report import Chapter, Section, Tile, card, columns, grid, seconds, table
from .scenes import GROUND, colour, legend, map_card, object_card, scene_list

CAVEAT = (
    "The shapes are made for this demonstration and are no benchmark: most objects of a class share a hue, which makes "
    "them easy, and no figure here says how well such a model does on photographs. Held-out scenes lie over "
    "photographs that training never saw."
)


def detection_chapter(found: DetectionFindings) -> Chapter:
    """The chapter of a detector's run."""
    tally = found.tally
    return Chapter(
        anchor="detect",
        name="Object detection and instance segmentation",
        title=f"It finds {tally.found} of {tally.objects} shapes in {found.images} scenes it has never seen.",
        lead=f"{_learnt('Mask R-CNN', found)} {CAVEAT}",
        met=found.met,
        verdict=_verdict(found, "box AP50 on the held-out scenes"),
        tiles=[
            Tile("box AP50, held out", f"{found.figures['box_AP50']:.1f}", "%"),
            Tile("mask AP50", f"{found.figures['mask_AP50']:.1f}", "%"),
            *_run_tiles(found),
        ],
        sections=[make(found) for make in DETECTION],
    )


def segmentation_chapter(found: SegmentationFindings) -> Chapter:
    """The chapter of a segmenter's run."""
    return Chapter(
        anchor="segment",
        name="Semantic segmentation",
        title=f"It labels {found.figures['aAcc']:.1f} % of the pixels of {found.images} scenes rightly.",
        lead=f"{_learnt('UPerNet', found)} {CAVEAT}",
        met=found.met,
        verdict=_verdict(found, "mIoU on the held-out scenes"),
        tiles=[
            Tile("mIoU, held out", f"{found.figures['mIoU']:.1f}", "%"),
            Tile("mean accuracy of the classes", f"{found.figures['mAcc']:.1f}", "%"),
            *_run_tiles(found),
        ],
        sections=[make(found) for make in SEGMENTATION],
    )


def _learnt(name: str, found: Course) -> str:
    family = found.model.partition("_")[0].capitalize()
    return (
        f"A small {name} on a {family} learned {len(found.classes)} classes from {found.start['images']:,} "
        f"generated scenes, from random weights, in {seconds(found.training_seconds)} with the checks in between."
    )


def _verdict(found: Course, figure: str) -> str:
    goal = f"{found.goal:g} % {figure}"
    return f"✓ Goal reached: at least {goal}" if found.met else f"✗ Goal missed: it was at least {goal}"


def _run_tiles(found: Course) -> list[Tile]:
    return [
        Tile("to train", *seconds(found.training_seconds).split(" ", 1)),
        Tile("parameters", f"{found.parameters / 1e6:.2f}", "M"),
    ]


def found_objects(found: DetectionFindings) -> Section:
    """Images with the objects that are there and those that were found."""
    score, invented = found.score, found.tally.invented
    lead = (
        f"Scenes drawn at random from the held-out ones. Shown and counted is what the model is {100 * score:g} % sure "
        f"of; an object counts as found where such a box has its class and an IoU of one half or more. In all "
        f"held-out scenes {invented} such {'box is' if invented == 1 else 'boxes are'} of nothing that is there. "
        "Crowds of many small shapes are not counted, as COCO has it."
    )
    cards = [
        object_card(
            scene,
            found.classes,
            f"detect-scene-{number}",
            f"{_many(len(scene.truth.labels), 'object')}, {_many(len(scene.found.labels), 'detection')}",
        )
        for number, scene in enumerate(found.scenes)
    ]
    colours = legend(found.classes, [colour(label) for label in range(len(found.classes))])
    return Section("detect-scenes", "What it finds", lead, colours + scene_list(cards))


def _many(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"


def detection_curves(found: DetectionFindings) -> Section:
    """Loss, precision and learning rate over the epochs."""
    names = {"box AP50": "box_AP50", "mask AP50": "mask_AP50"}
    return _curves(found, "detect-learning", "Average precision at IoU 0.5, %", names)


def segmentation_curves(found: SegmentationFindings) -> Section:
    """Loss, intersection over union and learning rate over the epochs."""
    return _curves(found, "segment-learning", "Mean IoU, %", {"mIoU": "mIoU"})


def _curves(found: Course, anchor: str, title: str, names: dict[str, str]) -> Section:
    batches = found.start["batches"]
    train = [r for r in found.history if r["kind"] == "train"]
    held = [r for r in found.history if r["kind"] == "val"]
    at, epochs = [r["iter"] / batches for r in train], [float(r["epoch"]) for r in held]
    goal = Line(name="goal", x=[0, max(epochs)], y=[found.goal] * 2, style="goal")
    figures = [
        Line(name=name, x=epochs, y=[r[key] for r in held], style=style)
        for (name, key), style in zip(names.items(), ("one", "two"), strict=False)
    ]
    charts = [
        line_chart([Line(name="training", x=at, y=[r["loss"] for r in train])], title="Loss", form="{:.3g}".format),
        line_chart([goal, *figures], title=title, form="{:.4g}".format),
        line_chart(
            [Line(name="last update", x=at, y=[1000 * r["lr"] for r in train])],
            title="Learning rate, thousandths",
            form="{:.3g}".format,
        ),
    ]
    lead = (
        "The loss is the sum of the model's losses, the mean over the updates since the point before. Figures on the "
        "held-out scenes are those of the last epoch, not of the best one."
    )
    return Section(anchor, "How it learned", lead, columns([card(chart) for chart in charts]))


def detection_classes(found: DetectionFindings) -> Section:
    """Average precision of each class."""
    keys = ("box_AP50", "box_AP", "mask_AP50", "mask_AP")
    rows = [[row["name"], f"{row['objects']}", *(_percent(row[key]) for key in keys)] for row in found.per_class]
    total = f"{sum(row['objects'] for row in found.per_class)}"
    rows.append(["all", total, *(_percent(found.figures[key]) for key in keys)])
    header = ["class", "objects", "box AP50", "box AP", "mask AP50", "mask AP"]
    bars = [
        Bar(row["name"], row["box_AP50"] or 0, _percent(row["box_AP50"]), "one")
        for row in sorted(found.per_class, key=lambda row: -(row["box_AP50"] or 0))
    ]
    body = Markup('<div class="columns wide">{}{}</div>').format(
        card(grid("Average precision, %", header, rows)), card(bar_chart(bars, title="Box AP50 of each class"))
    )
    lead = (
        "Average precision as COCO defines it: AP50 counts a detection as right from an IoU of 0.5 on, AP is the mean "
        "over thresholds from 0.5 to 0.95."
    )
    return Section("detect-classes", "How each class fares", lead, body)


def _percent(value: float | None) -> str:
    """A percentage; a class without objects has none."""
    return "none" if value is None else f"{value:.1f}"


def labelled_scenes(found: SegmentationFindings) -> Section:
    """Images with their label maps and the predicted ones."""
    colours = _map_colours(found.classes)
    cards = []
    for number, scene in enumerate(found.scenes):
        right = 100 * float((scene.truth == scene.found).mean())
        cards.append(map_card(scene, colours, f"segment-scene-{number}", f"{right:.1f} % of the pixels right"))
    lead = "Scenes drawn at random from the held-out ones, each pixel in the colour of its class."
    return Section("segment-scenes", "What it labels", lead, legend(found.classes, colours) + scene_list(cards))


def _map_colours(classes: Sequence[str]) -> list[str]:
    """The background, which is first, in gray, the others as in the detector's chapter."""
    return [GROUND, *(colour(label) for label in range(len(classes) - 1))]


def segmentation_classes(found: SegmentationFindings) -> Section:
    """Intersection over union of each class."""
    bars = [
        Bar(str(name), iou, f"{iou:.1f} %", "one" if iou >= found.goal else "two")
        for name, iou in zip(found.classes, found.ious, strict=True)
    ]
    counts = found.confusion
    rows = [
        [
            str(name),
            f"{sum(counts[i]):,}",
            f"{100 * counts[i][i] / max(sum(counts[i]), 1):.1f}",
            f"{100 * counts[i][i] / max(sum(row[i] for row in counts), 1):.1f}",
            f"{iou:.1f}",
        ]
        for i, (name, iou) in enumerate(zip(found.classes, found.ious, strict=True))
    ]
    body = Markup('<div class="columns wide">{}{}</div>').format(
        card(grid("Pixels", ["class", "pixels", "found, %", "rightly called so, %", "IoU, %"], rows)),
        card(bar_chart(bars, title="IoU of each class")),
    )
    lead = "Intersection over union: pixels that are and are called a class, over those that are or are called so."
    return Section("segment-classes", "How each class fares", lead, body)


def detection_making(found: DetectionFindings) -> Section:
    """The recipe."""
    return Section("detect-making", "How it was made", found.design, card(table("Recipe", found.recipe)))


def segmentation_making(found: SegmentationFindings) -> Section:
    """The recipe."""
    return Section("segment-making", "How it was made", found.design, card(table("Recipe", found.recipe)))


DETECTION: tuple[Callable[[DetectionFindings], Section], ...] = (
    found_objects,
    detection_curves,
    detection_classes,
    detection_making,
)
"""Sections of a detector's chapter, in their order."""

SEGMENTATION: tuple[Callable[[SegmentationFindings], Section], ...] = (
    labelled_scenes,
    segmentation_curves,
    segmentation_classes,
    segmentation_making,
)
"""Sections of a segmenter's chapter, in their order."""
