"""Images beside their truth and a model's prediction: outlines, boxes and colour maps as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from .charts import join, png_uri
from .findings import LabelledScene, Objects, Scene

COLOURS = ("#ff5252", "#ffb300", "#3ecf6b", "#29b6f6", "#7c6cff", "#f062c8", "#c0ca33", "#8d6e63", "#26a69a", "#9e9e9e")
"""Colours of classes, in their order; with more classes they come again."""
GROUND = "#353841"
"""Colour of the background in a colour map."""


def colour(label: int) -> str:
    """Colour of a class."""
    return COLOURS[label % len(COLOURS)]


def legend(names: Sequence[str], colours: Sequence[str]) -> Markup:
    """Which colour stands for which class."""
    entries = [
        Markup('<li><i style="background:{}"></i>{}</li>').format(shade, name)
        for name, shade in zip(names, colours, strict=True)
    ]
    return Markup('<ul class="colours">{}</ul>').format(join(entries))


def scene_list(cards: Sequence[Markup]) -> Markup:
    """Cards of scenes, side by side where there is room."""
    return Markup('<ul class="scenes">{}</ul>').format(join(cards))


def object_card(scene: Scene, classes: Sequence[str], name: str, told: str) -> Markup:
    """An image, its objects, and those that were found; `name` is unique on the page, `told` a line below."""
    truth, found = (_drawn(objects, classes) for objects in (scene.truth, scene.found))
    return _card(scene.image, name, told, _copy(name) + truth, _copy(name) + found)


def map_card(scene: LabelledScene, colours: Sequence[str], name: str, told: str) -> Markup:
    """An image, its label map, and the predicted one; `name` is unique on the page, `told` a line below."""
    size = scene.image.shape
    truth, found = (_picture(colour_map(labels, colours), size, "map") for labels in (scene.truth, scene.found))
    return _card(scene.image, name, told, truth, found)


def colour_map(labels: NDArray[np.integer], colours: Sequence[str]) -> NDArray[np.uint8]:
    """A label map (H, W) as colours (H, W, 3); what is not labelled is black."""
    table = np.zeros((256, 3), np.uint8)
    for label, shade in enumerate(colours):
        table[label] = [int(shade[i : i + 2], 16) for i in (1, 3, 5)]
    return table[labels]


def _card(image: NDArray[np.uint8], name: str, told: str, truth: Markup, found: Markup) -> Markup:
    photo = _picture(image, image.shape, "photo", name)
    panels = [
        Markup(
            '<figure><svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg><figcaption>{}</figcaption></figure>'
        ).format(image.shape[1], image.shape[0], f"{caption}; {told}", drawn, caption)
        for caption, drawn in zip(("Image", "Truth", "Prediction"), (photo, truth, found), strict=True)
    ]
    return Markup('<li><div class="panels">{}</div><p>{}</p></li>').format(join(panels), told)


def _picture(image: NDArray[np.uint8], size: Sequence[int], style: str, name: str = "") -> Markup:
    own = Markup(' id="{}"').format(name) if name else Markup()
    return Markup('<image{} class="{}" width="{}" height="{}" href="{}"/>').format(
        own, style, size[1], size[0], png_uri(image)
    )


def _copy(name: str) -> Markup:
    """An image that is elsewhere on the page, gray, so that colours stand out."""
    return Markup('<use href="#{}" class="dim"/>').format(name)


def _drawn(objects: Objects, classes: Sequence[str]) -> Markup:
    """Masks, then boxes, then names, so that no mask hides a name."""
    areas, boxes, names = [], [], []
    for place, (box, label) in enumerate(zip(objects.boxes, objects.labels.tolist(), strict=True)):
        score = "" if objects.scores is None else f" {objects.scores[place]:.2f}"
        told, shade = f"{classes[label]}{score}", colour(label)
        areas.append(_area(objects.masks[place], shade))
        x1, y1, x2, y2 = (round(float(v), 1) for v in box)
        boxes.append(
            Markup(
                '<rect class="box" x="{}" y="{}" width="{}" height="{}" stroke="{}"><title>{}</title></rect>'
            ).format(x1, y1, round(x2 - x1, 1), round(y2 - y1, 1), shade, told)
        )
        names.append(Markup('<text x="{}" y="{}">{}</text>').format(x1 + 1.5, y1 - 1.5 if y1 > 8 else y1 + 6.5, told))
    return join([*areas, *boxes, *names])


def _area(mask: NDArray[np.bool_], shade: str) -> Markup:
    """The outline of a mask, holes left open."""
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    tracks = ["M" + "L".join(f"{x + 0.5:g} {y + 0.5:g}" for x, y in outline[:, 0]) + "Z" for outline in outlines]
    return Markup('<path class="mask" fill-rule="evenodd" d="{}" fill="{}" stroke="{}"/>').format(
        "".join(tracks), shade, shade
    )
