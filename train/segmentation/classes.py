"""Class names and colours of segmentation data sets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

IGNORE = 255
"""Label of pixels that neither losses nor metrics look at."""

ADE20K = tuple(
    """
    wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door,
    table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair,
    seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers,
    counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table,
    pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench,
    countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel,
    light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel,
    pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt,
    canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball,
    food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood,
    sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator,
    glass, clock, flag
    """.replace("\n    ", " ")
    .strip()
    .split(", ")
)
"""The 150 classes of the ADE20K scene parsing benchmark; the label images number them from 1."""

# Id in the label images, name, public colour.
_CITYSCAPES = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
CITYSCAPES = tuple(name for _, name, _ in _CITYSCAPES)
"""The 19 classes that Cityscapes evaluates."""

CITYSCAPES_IDS = tuple(number for number, _, _ in _CITYSCAPES)
"""Id of each of them in the `labelIds` images."""

CITYSCAPES_ALL_IDS = 34
"""The `labelIds` images hold 0 to 33."""


def palette(classes: Sequence[str]) -> np.ndarray:
    """A colour for each class (classes, 3), uint8: Cityscapes' public ones for its classes, made up ones for others.

    Made-up colours differ from each other for up to some hundred classes, and are the same in every run.
    """
    if tuple(classes) == CITYSCAPES:
        return np.array([colour for _, _, colour in _CITYSCAPES], np.uint8)
    number = np.arange(len(classes))
    # Steps of the golden ratio around the circle of hues are far from all earlier ones, however many there are.
    hue = number * 0.618033988749895 % 1
    value = np.array([1.0, 0.75, 0.5])[number % 3]
    saturation = np.array([0.85, 0.55])[number // 3 % 2]
    turn = (hue[:, None] * 6 + np.array([0, 4, 2])) % 6
    pure = np.clip(np.abs(turn - 3) - 1, 0, 1)
    colours = 255 * value[:, None] * (1 - saturation[:, None] * (1 - pure))
    return np.rint(colours).astype(np.uint8)
