"""The chapter of a classifier: how it learned, where it errs, what it looks at and how fast it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from .charts import (
    Bar,
    Line,
    bar_chart,
    bar_row,
    confusion_chart,
    glyph_map,
    heat_overlay,
    join,
    line_chart,
    picture,
)
from .findings import Example, Findings
from .report import Chapter, Section, Tile, card, columns, roomy, seconds, table

SHOWN_HARD, SHOWN_OTHERS = 12, 12


def classification_chapter(found: Findings) -> Chapter:
    """The chapter of a classifier's run."""
    total = sum(map(sum, found.confusion))
    family = found.model.partition("_")[0].capitalize()
    goal = f"{found.goal:g} % of the held-out images"
    return Chapter(
        anchor="classify",
        name="Image classification",
        title=f"It reads {total - found.wrong} of {total} {found.subject} it has never seen.",
        lead=(
            f"A small {family} learned them from {found.start['images']:,} real scans, from random weights, in "
            f"{seconds(found.training_seconds)}. How it learned, where it errs, what it looks at and how fast it is."
        ),
        met=found.met,
        verdict=f"✓ Goal reached: at least {goal}" if found.met else f"✗ Goal missed: it was at least {goal}",
        tiles=_tiles(found),
        sections=[make(found) for make in CLASSIFICATION],
    )


def _tiles(found: Findings) -> list[Tile]:
    fastest = max(found.speeds, key=lambda s: s.images_per_second)
    return [
        Tile("held-out accuracy", f"{found.accuracy:.2f}", "%"),
        Tile("to train", *seconds(found.training_seconds).split(" ", 1)),
        Tile("parameters", f"{found.parameters / 1e6:.2f}", "M"),
        Tile(f"classified, batch {fastest.batch}", f"{fastest.images_per_second:,.0f}", "images/s"),
    ]


def glance(found: Findings) -> Section:
    """All held-out images as one picture."""
    lead = (
        f"All {len(found.examples)} {found.subject} that were held out from training, one class a row; those it got "
        "wrong are framed."
    )
    return Section("glance", "At a glance", lead, _mosaic(found))


def curves(found: Findings) -> Section:
    """Loss, accuracy and learning rate over the epochs."""
    batches = found.start["batches"]
    train = [r for r in found.history if r["kind"] == "train"]
    held = [r for r in found.history if r["kind"] == "val"]
    at, epochs = [r["iter"] / batches for r in train], [float(r["epoch"]) for r in held]
    loss = [
        Line(name="training", x=at, y=[r["loss"] for r in train]),
        Line(name="held out", x=epochs, y=[r["loss"] for r in held], style="two"),
    ]
    accuracy = [
        Line(name="goal", x=[0, max(epochs)], y=[found.goal] * 2, style="goal"),
        Line(name="held out", x=epochs, y=[r["top1"] for r in held], style="two"),
    ]
    rate = [Line(name="last update", x=at, y=[r["lr"] * 1000 for r in train])]
    charts = [
        line_chart(loss, title="Loss", form="{:.2f}".format),
        line_chart(accuracy, title="Accuracy, %", form="{:.4g}".format),
        line_chart(rate, title="Learning rate, thousandths", form="{:.3g}".format),
    ]
    lead = (
        "Training sees every image turned, moved and scaled anew each epoch, so its loss may lie above that of the "
        "held-out images, which are shown as they are. What is reported is the last epoch, not the best one, so no "
        "luck on the held-out images is picked."
    )
    return Section("learning", "How it learned", lead, columns([card(chart) for chart in charts]))


def mistakes(found: Findings) -> Section:
    """The confusion matrix, and recall per class."""
    recalls = [100 * row[i] / max(sum(row), 1) for i, row in enumerate(found.confusion)]
    bars = [
        Bar(str(name), recall, f"{recall:.1f} %", "one" if recall == 100 else "two")
        for name, recall in zip(found.classes, recalls, strict=True)
    ]
    body = Markup('<div class="columns wide">{}{}</div>').format(
        card(confusion_chart(found.confusion, found.classes)),
        card(bar_chart(bars, title="Found, of each class")),
    )
    return Section("mistakes", "Where it errs", _confused(found), body)


def _confused(found: Findings) -> str:
    names, counts = found.classes, found.confusion
    pairs = Counter(
        {(i, j): counts[i][j] for i in range(len(names)) for j in range(len(names)) if i != j and counts[i][j]}
    )
    explained = "Each row is what was drawn, each column what the model reads."
    if not pairs:
        return f"{explained} It made no mistake at all."
    often = ", ".join(f"{names[i]} read as {names[j]} ({_times(n)})" for (i, j), n in pairs.most_common(3))
    return f"{explained} Most often it erred with {often}."


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def answers(found: Findings) -> Section:
    """What the model says to the images it finds hard, and to others."""
    hard = sorted(found.examples, key=lambda e: float(e.probabilities[e.label]))
    others = np.random.default_rng(found.seed).permutation(len(hard) - SHOWN_HARD)[:SHOWN_OTHERS] + SHOWN_HARD
    lead = (
        f"{len(found.examples)} scans that training never saw, read from image files by the code behind vizoo predict. "
        "The bars are the probabilities that the model states."
    )
    body = join(
        [
            Markup("<h4>The hardest: those whose true class it thought least likely</h4>"),
            _answer_cards(hard[:SHOWN_HARD], found.classes),
            Markup("<h4>Drawn at random from the others</h4>"),
            _answer_cards([hard[i] for i in others], found.classes),
        ]
    )
    return Section("answers", "What it says", lead, body)


def _answer_cards(examples: Sequence[Example], classes: Sequence[str]) -> Markup:
    return Markup('<ul class="answers">{}</ul>').format(join([_answer_card(e, classes) for e in examples]))


def _answer_card(example: Example, classes: Sequence[str]) -> Markup:
    truth, answer = classes[example.label], classes[example.answer]
    bars = []
    for index in np.argsort(-example.probabilities)[:3]:
        share = float(example.probabilities[index])
        bars.append(bar_row(Bar(classes[index], share, f"{100 * share:.0f} %", _bar_style(int(index), example)), top=1))
    said = f"{answer}, rightly" if example.is_right else f"{answer}, but it is {truth}"
    return Markup('<li class="{}">{}<p>{}</p>{}</li>').format(
        "right" if example.is_right else "wrong",
        picture(example.image, f"Handwritten {truth}, read as {answer}"),
        said,
        join(bars),
    )


def _bar_style(index: int, example: Example) -> str:
    if index == example.label:
        return "one"
    return "wrong" if index == example.answer else "faint"


def _mosaic(found: Findings) -> Markup:
    """All held-out images as one picture, one class a row, with frames over those answered wrongly."""
    rows = [[e for e in found.examples if e.label == k] for k in range(len(found.classes))]
    height, width = (side + 2 for side in found.examples[0].image.shape)
    sheet = np.zeros((len(rows) * height, max(map(len, rows)) * width), dtype=np.uint8)
    frames = []
    for top, row in zip(range(0, len(sheet), height), rows, strict=True):
        for left, example in zip(range(0, sheet.shape[1], width), row, strict=False):
            sheet[top + 1 : top + height - 1, left + 1 : left + width - 1] = example.image
            if not example.is_right:
                told = f"{found.classes[example.label]} read as {found.classes[example.answer]}"
                frames.append(_frame(left, top, width, height, told))
    alt = f"All {len(found.examples)} held-out images, one class a row; {len(frames)} were answered wrongly"
    return Markup('<div class="mosaic">{}<svg viewBox="0 0 {} {}" aria-hidden="true">{}</svg></div>').format(
        picture(sheet, alt), sheet.shape[1], sheet.shape[0], join(frames)
    )


def _frame(left: int, top: int, width: int, height: int, told: str) -> Markup:
    return Markup('<rect x="{}" y="{}" width="{}" height="{}" rx="1"><title>{}</title></rect>').format(
        left, top, width, height, told
    )


def gaze(found: Findings) -> Section:
    """Heat maps over images, and the test whether they mean anything."""
    seen = found.gaze
    pairs = [_gaze_pair(e, heat, found.classes) for e, heat in zip(seen.examples, seen.heat, strict=True)]
    percent = f"{100 * seen.share:g} %"
    bars = [
        Bar("nothing hidden", found.accuracy, f"{found.accuracy:.1f} %"),
        Bar(f"random {percent} hidden", seen.hidden_random, f"{seen.hidden_random:.1f} %", "two"),
        Bar(f"brightest {percent} hidden", seen.hidden_hot, f"{seen.hidden_hot:.1f} %", "wrong"),
    ]
    lead = (
        "Bright places are those whose features spoke most for the model's answer: gradient times activation of its "
        "first stage, the positive part (HiResCAM, Draelos and Carin 2020, after Grad-CAM, Selvaraju et al. 2017). "
        "Such a map can look convincing and mean nothing, so it is put to a test below: if it is true, hiding the "
        "brightest strokes must hurt more than hiding as much ink at random."
    )
    verdict = (
        "They do: hiding what they point at costs more."
        if seen.hidden_hot < seen.hidden_random
        else "Not here: hiding what they point at costs no more, so do not trust them."
    )
    test = roomy(bar_chart(bars, title="Accuracy on the held-out images with parts of each blackened"))
    body = Markup('<div class="gazes">{}</div><h4>Do the maps tell the truth? {}</h4>{}').format(
        join(pairs), verdict, card(test)
    )
    return Section("gaze", "Where it looks", lead, body)


def _gaze_pair(example: Example, heat: NDArray[np.floating], classes: Sequence[str]) -> Markup:
    truth, answer = classes[example.label], classes[example.answer]
    caption = f"read as {answer}" if example.is_right else f"read as {answer}, but it is {truth}"
    return Markup('<figure><div class="pair">{}{}</div><figcaption>{}</figcaption></figure>').format(
        picture(example.image, f"Handwritten {truth}"),
        picture(heat_overlay(example.image, heat), f"The same image; places that spoke for {answer} are bright"),
        caption,
    )


def plane(found: Findings) -> Section:
    """The features of the held-out images in two dimensions."""
    wrong = [not e.is_right for e in found.examples]
    told = "Features of the held-out images in two dimensions, each drawn as its class"
    body = glyph_map(found.plane, [e.label for e in found.examples], wrong, found.classes, told=told)
    lead = (
        "Each held-out scan, drawn as what it really is and placed by t-SNE so that neighbours have features alike. "
        "The model's answers had no part in the placing; those it got wrong are ringed."
    )
    return Section("plane", "How it sorts them", lead, body)


def speed(found: Findings) -> Section:
    """Images per second."""
    bars = [
        Bar(
            f"{s.name}, batch {s.batch}",
            s.images_per_second,
            f"{s.images_per_second:,.0f} ± {100 * s.spread:.0f} %",
            "two" if s.name == "training" else "one",
        )
        for s in found.speeds
    ]
    facts = dict(found.machine)
    lead = (
        f"On {facts.get('Processor', 'this machine')}, threads: {facts.get('Threads', '?')}, float32, images already "
        f"in memory: the median, ± half the interquartile range. One image takes {found.macs / 1e6:.1f} million "
        "multiply-adds. Training includes the backward pass and the update."
    )
    return Section("speed", "How fast it is", lead, card(roomy(bar_chart(bars, title="Images per second"))))


def making(found: Findings) -> Section:
    """The recipe."""
    return Section("making", "How it was made", found.design, card(table("Recipe", found.recipe)))


CLASSIFICATION: tuple[Callable[[Findings], Section], ...] = (
    glance,
    curves,
    mistakes,
    answers,
    gaze,
    plane,
    speed,
    making,
)
"""Sections of a classifier's chapter, in their order."""
