"""The report is one well-formed page that needs no other file, and tells what it was given."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from vizoo.train.demo.charts import Bar, Line, bar_chart, heat_overlay, line_chart, nice_ticks, png_uri
from vizoo.train.demo.classifier_page import CLASSIFICATION
from vizoo.train.demo.dense_page import DETECTION, SEGMENTATION
from vizoo.train.demo.findings import (
    Course,
    DetectionFindings,
    Example,
    Findings,
    Gaze,
    LabelledScene,
    Objects,
    Scene,
    SegmentationFindings,
    Speed,
    Tally,
)
from vizoo.train.demo.page import demo_page
from vizoo.train.demo.report import Chapter, Page, Section, render, seconds
from vizoo.train.demo.scenes import GROUND, colour, colour_map, object_card

VOID = {"meta", "img", "br", "hr", "link", "input"}
CLASSES = ("zero", "one", "<two>")


def make_history(epochs: int = 4, batches: int = 5) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = [
        {"kind": "start", "epoch": 0, "iter": 0, "batches": batches, "images": 20, "time": 100.0}
    ]
    for epoch in range(1, epochs + 1):
        facts = {"epoch": epoch, "iter": epoch * batches, "time": 100.0 + 2 * epoch}
        history.append({"kind": "train", "loss": 2 / epoch, "lr": 1e-3 / epoch, **facts})
        figures = {"top1": 100 - 40 / epoch, "top5": 100.0, "box_AP50": 70.0, "mask_AP50": 60.0, "mIoU": 65.0}
        history.append({"kind": "val", "loss": 1.5 / epoch, **figures, **facts})
    return history


COURSE: dict[str, Any] = {
    "config": "demo/digits",
    "model": "swin_tiny_patch4_window7_224",
    "design": "A Swin with a stem of stride 2.",
    "classes": CLASSES,
    "seed": 7,
    "history": make_history(),
    "recipe": [("Optimiser", "AdamW")],
}
MACHINE = [("Processor", "A CPU"), ("Threads", "2"), ("vizoo", "0.1.0"), ("torch", "2.6")]


def make_findings(**changes: Any) -> Findings:
    generator = np.random.default_rng(0)
    examples = []
    for index in range(30):
        label = index % 3
        answer = (label + 1) % 3 if index in (4, 11) else label
        probabilities = np.full(3, 0.1)
        probabilities[answer] = 0.8
        image = generator.integers(0, 256, (8, 8), dtype=np.uint8)
        examples.append(Example(image=image, label=label, probabilities=probabilities))
    counts = np.zeros((3, 3), dtype=int)
    np.add.at(counts, ([e.label for e in examples], [e.answer for e in examples]), 1)
    heat = [generator.random((8, 8)) for _ in range(3)]
    found = Findings(
        **COURSE,
        subject="digits",
        parameters=560_000,
        macs=11_000_000,
        goal=90.0,
        figures={"top1": 100 * 28 / 30},
        confusion=counts.tolist(),
        examples=examples,
        gaze=Gaze(examples=examples[:3], heat=heat, share=0.2, hidden_hot=40.0, hidden_random=80.0),
        plane=generator.normal(size=(30, 2)),
        speeds=[
            Speed("inference", 1, 120.0, 0.02),
            Speed("inference", 64, 1234.0, 0.01),
            Speed("training", 64, 400.0, 0.0),
        ],
        machine=MACHINE,
    )
    return dataclasses.replace(found, **changes)


def make_objects(count: int, **options: Any) -> Objects:
    masks = np.zeros((count, 24, 32), bool)
    masks[:, 4:12, 6:18] = True
    masks[:, 7:9, 9:12] = False
    boxes = np.tile(np.array([[6.0, 4.0, 18.0, 12.0]]), (count, 1))
    return Objects(boxes=boxes, labels=np.arange(count) % 3, masks=masks, **options)


def make_detection(**changes: Any) -> DetectionFindings:
    image = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    rows = [
        {"name": name, "objects": 4, "box_AP": 31.2, "box_AP50": 55.5, "mask_AP": 21.0, "mask_AP50": 44.4}
        for name in CLASSES
    ]
    rows[1] |= {"objects": 0, "box_AP": None, "box_AP50": None, "mask_AP": None, "mask_AP50": None}
    found = DetectionFindings(
        **COURSE,
        parameters=2_500_000,
        goal=50.0,
        figures={"box_AP50": 71.25, "box_AP": 40.0, "mask_AP50": 61.0, "mask_AP": 38.0},
        per_class=rows,
        images=9,
        score=0.5,
        tally=Tally(8, 6, 1),
        scenes=[Scene(image=image, truth=make_objects(2), found=make_objects(1, scores=np.array([0.87])))] * 2,
    )
    return dataclasses.replace(found, **changes)


def make_segmentation(**changes: Any) -> SegmentationFindings:
    image = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    truth = np.zeros((24, 32), np.int64)
    truth[5:15] = 2
    found = SegmentationFindings(
        **COURSE,
        parameters=1_900_000,
        goal=60.0,
        figures={"mIoU": 65.5, "mAcc": 79.0, "aAcc": 93.8},
        confusion=[[80, 10, 10], [5, 45, 0], [0, 0, 50]],
        images=9,
        scenes=[LabelledScene(image=image, truth=truth, found=np.zeros_like(truth))],
    )
    return dataclasses.replace(found, **changes)


def make_page(*found: Course) -> str:
    phases = [("digits, training", 60.0), ("digits, evaluation", 2.5)]
    commands = [("Look at an image", "vizoo predict image.png --checkpoint best.pth")]
    return render(demo_page(found, phases, MACHINE, commands))


class Checker(HTMLParser):
    """Fails on a tag that is not closed in its order; gathers text, tags and their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-3:]} at {self.getpos()}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert not checker.open, f"never closed: {checker.open}"
    return checker


@pytest.fixture(scope="module")
def page() -> str:
    return make_page(make_findings(), make_detection(), make_segmentation())


def test_the_page_is_well_formed_and_has_every_section(page: str) -> None:
    seen = check(page)
    sections = {attributes["id"] for tag, attributes in seen.attributes if tag == "section"}
    chapters = {attributes["id"] for tag, attributes in seen.attributes if tag == "article"}
    links = {(attributes["href"] or "")[1:] for tag, attributes in seen.attributes if tag == "a"}
    made = {make(make_findings()).anchor for make in CLASSIFICATION}
    made |= {make(make_detection()).anchor for make in DETECTION}
    made |= {make(make_segmentation()).anchor for make in SEGMENTATION}
    assert chapters == {"classify", "detect", "segment", "around"}
    assert sections == made | {"time", "onward"}
    assert links == sections | chapters
    assert len(made) == len(CLASSIFICATION) + len(DETECTION) + len(SEGMENTATION)


def test_the_page_asks_for_nothing_else(page: str) -> None:
    seen = check(page)
    for tag, attributes in seen.attributes:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "srcset", "poster", "data", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "#")), (tag, name, value)
    assert not re.search(r"https?:|@import|url\(", page)


def test_every_picture_says_what_it_shows(page: str) -> None:
    for tag, attributes in check(page).attributes:
        if tag == "img":
            assert attributes["alt"]
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"


def test_ids_are_unique(page: str) -> None:
    ids = [attributes["id"] for _, attributes in check(page).attributes if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_head_states_the_figures(page: str) -> None:
    text = check(page.partition("<nav")[0] + "</body></html>").text
    for stated in (
        "Three small models",
        "93.33",
        "71.25",
        "65.50",
        "Seed 7",
        "goal 90",
        "goal 50",
        "Every goal reached",
    ):
        assert stated in text, stated


@pytest.mark.parametrize(
    "stated",
    [
        "28 of 30",
        "0.56",
        "8.0 seconds",
        "1,234",
        "finds 6 of 8 shapes in 9 scenes",
        "labels 93.8 %",
        "44.4",
        "no benchmark",
    ],
)
def test_the_chapters_state_the_figures(page: str, stated: str) -> None:
    assert stated in check(page.partition("</nav>")[2].partition("</body>")[0]).text


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (make_findings(goal=97.0), "accuracy on held-out digits"),
        (make_detection(goal=75.0), "box AP50 on held-out scenes"),
        (make_segmentation(goal=66.0), "mIoU on held-out scenes"),
    ],
    ids=["digits", "detection", "segmentation"],
)
def test_a_missed_goal_is_said(found: Course, told: str) -> None:
    text = check(make_page(found)).text
    assert f"Goal missed: {told}" in text, "at the top"
    assert f"Goal missed: it was at least {found.goal:g} %" in text, "in its chapter"
    assert "oal reached" not in text


def test_one_task_makes_a_page_of_its_own() -> None:
    text = check(make_page(make_segmentation())).text
    assert "One small model" in text
    assert "It labels every pixel" in text
    assert "Mask R-CNN" not in text


def test_objects_are_drawn_with_their_names_and_scores(page: str) -> None:
    scene = make_detection().scenes[0]
    drawn = object_card(scene, CLASSES, "scene", "two objects")
    seen = check(drawn)
    assert sum(tag == "svg" for tag, _ in seen.attributes) == 3
    assert sum(tag == "image" for tag, _ in seen.attributes) == 1, "the photograph is there once"
    assert [attributes["href"] for tag, attributes in seen.attributes if tag == "use"] == ["#scene", "#scene"]
    boxes = [attributes for tag, attributes in seen.attributes if tag == "rect"]
    assert [(b["x"], b["y"], b["width"], b["height"]) for b in boxes] == [("6.0", "4.0", "12.0", "8.0")] * 3
    assert "zero 0.87" in seen.text
    outline = next(attributes["d"] for tag, attributes in seen.attributes if tag == "path")
    assert outline is not None
    assert outline.count("M") == 2, "a mask with a hole has two outlines"


def test_a_scene_without_objects_is_drawn_too() -> None:
    scene = dataclasses.replace(make_detection().scenes[0], found=make_objects(0, scores=np.zeros(0)))
    text = check(make_page(make_detection(scenes=[scene]))).text
    assert "2 objects, no detections" in text


def test_colours_of_a_map_are_those_of_the_legend() -> None:
    drawn = colour_map(np.array([[0, 1], [2, 255]]), [GROUND, colour(0), colour(1)])
    assert ["#" + bytes(pixel.tolist()).hex() for pixel in drawn.reshape(-1, 3)] == [
        GROUND,
        colour(0),
        colour(1),
        "#000000",
    ]


def test_iou_of_each_class() -> None:
    assert make_segmentation().ious == pytest.approx([100 * 80 / 105, 100 * 45 / 60, 100 * 50 / 60])


def test_names_are_escaped(page: str) -> None:
    assert "<two>" not in page
    assert "&lt;two&gt;" in page


def test_mistakes_are_named_and_framed(page: str) -> None:
    seen = check(page)
    assert "erred with" in seen.text
    assert sum(tag == "li" and attributes.get("class") == "wrong" for tag, attributes in seen.attributes) == 2
    assert sum(tag == "circle" and attributes.get("class") == "ring" for tag, attributes in seen.attributes) == 2


def test_no_mistake_is_said_too() -> None:
    examples = [e for e in make_findings().examples if e.is_right]
    counts = np.diag([sum(e.label == k for e in examples) for k in range(3)]).tolist()
    found = make_findings(examples=examples, confusion=counts, plane=np.random.default_rng(0).normal(size=(28, 2)))
    assert "no mistake" in check(make_page(found)).text


def test_a_page_takes_other_chapters() -> None:
    own = Section("boxes", "Boxes", "What was found.", bar_chart([Bar("mAP", 0.0, "0")], title="Scores"))
    part = Chapter(anchor="depth", name="Depth", title="T", lead="L", sections=[own])
    text = render(Page(title="T", eyebrow="E", lead="L", met=True, verdict="V", tiles=[], chapters=[part], footer="F"))
    assert 'id="boxes"' in text
    assert text.count('class="verdict') == 1, "a chapter without a goal has no verdict"
    check(text)


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.013, 0.087), (95.0, 99.7), (-3.0, 4.0), (5.0, 5.0), (0.0, 0.0), (0, 12345)]
)
def test_ticks_cover_the_values_evenly(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 3 <= len(ticks) <= 8
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


def test_lines_end_at_the_edges_of_the_axes() -> None:
    drawn = line_chart([Line(name="a", x=[0, 10], y=[0.0, 5.0])], title="T")
    points = re.search(r'points="([^"]+)"', drawn)
    assert points is not None
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in points.group(1).split())
    assert x0 < x1
    assert y0 > y1, "larger values lie higher up"


def test_heat_keeps_size_and_brightens() -> None:
    image = np.full((4, 6), 128, dtype=np.uint8)
    heat = np.zeros((4, 6))
    heat[1, 2] = 1
    drawn = heat_overlay(image, heat)
    assert drawn.shape == (4, 6, 3)
    assert drawn.dtype == np.uint8
    assert drawn[1, 2].sum() == drawn.sum(axis=2).max() > drawn[0, 0].sum()


def test_an_image_survives_as_a_data_uri() -> None:
    import base64
    import io

    from PIL import Image

    image = np.arange(12, dtype=np.uint8).reshape(3, 4)
    data = base64.b64decode(png_uri(image, scale=2).removeprefix("data:image/png;base64,"))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data)))[::2, ::2], image)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3.21, "3.2 seconds"),
        (9.97, "10 seconds"),
        (61.0, "61 seconds"),
        (119.7, "2:00 minutes"),
        (125.4, "2:05 minutes"),
    ],
)
def test_seconds_in_words(value: float, text: str) -> None:
    assert seconds(value) == text
