from __future__ import annotations

import pickle
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import albumentations
import numpy as np
import pytest
import timm.data
import torch
from mmengine.dataset import worker_init_fn
from mmengine.registry import TRANSFORMS
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Subset

from vizoo.preprocess import EvalTransform
from vizoo.train import transforms
from vizoo.train.datasets import Digits
from vizoo.train.transforms import AlbumentationsTransform, RecipeTrainTransform, Seeded, build_transform

HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def noise(size: int = 32, low: int = 0, high: int = 256) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(low, high, (size, size, 3), dtype=np.uint8))


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 -- timm draws from the global generator
    torch.manual_seed(seed)


def recipe() -> RecipeTrainTransform:
    return RecipeTrainTransform(size=16)


def fast() -> AlbumentationsTransform:
    specs = [
        {"type": "Affine", "rotate": (-20, 20), "p": 1.0},
        {"type": "OneOf", "transforms": [{"type": "HorizontalFlip"}, {"type": "ColorJitter", "p": 1.0}]},
    ]
    return AlbumentationsTransform(specs, erase_prob=0.5)


# -- the recipe ----------------------------------------------------------------------------------------------------


def posterize(image: Image.Image, bits: int) -> Image.Image:
    """As Pillow defined it when the recipes were published: 0 bits are allowed."""
    return image.point([i & ~(2 ** (8 - bits) - 1) for i in range(256)] * 3)


RENAMED = {"size": "input_size", "erase_mode": "re_mode", "erase_prob": "re_prob", "erase_count": "re_count"}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"interpolation": "random", **HALF},
        {"auto_augment": None},
        {"auto_augment": None, "color_jitter": None},
        {"auto_augment": "3a", "color_jitter": 0.3},
        {"auto_augment": "original-mstd0.5"},
        {"auto_augment": "augmix-m5-w4-d2"},
        {"erase_mode": "const", "erase_prob": 1.0, "erase_count": 3},
        {"size": (32, 20), "scale": (0.5, 1), "ratio": (1, 2)},
        {"hflip": 0.0, "vflip": 0.5},
    ],
)
def test_bit_for_bit_timms_create_transform(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageOps.posterize", posterize)  # timm's own raises with Pillow 13 in one image of 700
    official = {
        "input_size": 24,
        "is_training": True,
        "color_jitter": 0.4,
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "re_prob": 0.25,
        "re_mode": "pixel",
        "interpolation": "bicubic",
    }
    theirs = timm.data.create_transform(
        **(official | {RENAMED.get(key, key): value for key, value in settings.items()})
    )
    mine = RecipeTrainTransform(**({"size": 24} | settings))
    image = noise(40)
    for seed in range(12):
        seed_all(seed)
        expected = theirs(image)
        seed_all(seed)
        assert torch.equal(mine(image), expected)


def rand_augment() -> Any:
    return recipe().steps[2]


def test_rand_augment_ops_fill_and_filter() -> None:
    ops = rand_augment().ops
    increasing = ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
    plain = ("AutoContrast", "Equalize", "Invert", "Rotate", "SolarizeAdd", "ShearX", "ShearY")
    expected = {f"{name}Increasing" for name in increasing} | set(plain) | {"TranslateXRel", "TranslateYRel"}
    assert {op.name for op in ops} == expected
    assert len(ops) == 15
    assert {(op.prob, op.magnitude, op.magnitude_std) for op in ops} == {(0.5, 9, 0.5)}
    assert {op.kwargs["fillcolor"] for op in ops} == {(124, 116, 104)}
    assert {op.kwargs["resample"] for op in ops} == {Image.Resampling.BICUBIC}


def test_a_quarter_of_the_images_passes_rand_augment_unchanged() -> None:
    augment, image = rand_augment(), noise(16, 60, 180)  # low contrast, so that every operation changes it
    seed_all(0)
    pixels = np.asarray(image)
    same = sum(np.array_equal(augment(image), pixels) for _ in range(3000))
    assert same / 3000 == pytest.approx(0.25, abs=0.03)


def test_posterizing_to_no_bits_is_a_black_image() -> None:
    for description in ("rand-m10-inc1", "rand-m0", "augmix-m10", "v0r"):
        augment = RecipeTrainTransform(auto_augment=description).steps[2]
        ops = augment.ops if hasattr(augment, "ops") else [op for steps in augment.policy for op in steps]
        (op, *_) = [op for op in ops if op.name.startswith("Posterize")]
        op.prob, op.magnitude, op.magnitude_std = 1.0, 0 if op.name == "Posterize" else 10, 0
        assert not np.asarray(op(noise())).any()


def erased_boxes(tensors: list[torch.Tensor]) -> list[tuple[int, int]]:
    """Heights and widths of what differs from zero."""
    boxes = []
    for tensor in tensors:
        touched = tensor.abs().sum(0) > 0
        if touched.any():
            boxes.append((int(touched.any(1).sum()), int(touched.any(0).sum())))
    return boxes


@pytest.mark.parametrize("kind", ["timm", "torchvision"])
def test_random_erasing(kind: str) -> None:
    erase = recipe().erase if kind == "timm" else AlbumentationsTransform([], erase_prob=0.25).erase
    seed_all(0)
    outs = [erase(torch.zeros(3, 64, 64)) for _ in range(2000)]
    boxes = erased_boxes(outs)
    assert len(boxes) / 2000 == pytest.approx(0.25, abs=0.03)
    areas = [h * w / 64**2 for h, w in boxes]
    assert 0.015 < min(areas) < 0.03
    assert 0.31 < max(areas) < 0.35
    aspects = [h / w for h, w in boxes]
    assert 0.25 < min(aspects) < 0.4 < 2.5 < max(aspects) < 4
    values = torch.cat([out[out != 0] for out in outs])
    assert values.mean() == pytest.approx(0, abs=0.01)
    assert values.std() == pytest.approx(1, abs=0.01)


def test_padded_crop_keeps_the_resolution() -> None:
    plain = {"auto_augment": None, "color_jitter": None, "erase_prob": 0.0, "hflip": 0.0}
    transform = RecipeTrainTransform(size=32, padded_crop=True, **plain, mean=(0, 0, 0), std=(1, 1, 1))
    image = noise(32)
    padded = torch.nn.functional.pad(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255, (4, 4, 4, 4))
    windows = padded.unfold(1, 32, 1).unfold(2, 32, 1)
    out = transform(image)
    assert any(torch.equal(windows[:, i, j], out) for i in range(9) for j in range(9))


def test_recipe_converts_other_modes() -> None:
    assert recipe()(noise().convert("L")).shape == (3, 16, 16)
    assert recipe()(Image.new("RGB", (1, 1))).shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be one positive number, or height and width"),
        ({"scale": (1.0, 0.5)}, r"scale must be a range .* got \(1.0, 0.5\)"),
        ({"ratio": (0.0, 0.5)}, r"ratio must be a range .* got \(0.0, 0.5\)"),
        ({"hflip": 1.5}, r"hflip must lie in \[0, 1\], got 1.5"),
        ({"erase_prob": -0.1}, r"erase_prob must lie in \[0, 1\], got -0.1"),
        ({"erase_mode": "pixels"}, "unknown erase_mode 'pixels'; did you mean 'pixel'"),
        ({"interpolation": "cubic"}, "unknown interpolation 'cubic'; did you mean 'bicubic'"),
        ({"auto_augment": "rand-x9"}, "auto_augment='rand-x9' is not a description timm knows"),
        ({"auto_augment": "v9"}, "auto_augment='v9' is not a description timm knows"),
        ({"mean": (0.5,)}, "3 channels need 3 means"),
    ],
)
def test_recipe_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecipeTrainTransform(**arguments)


# -- albumentations ------------------------------------------------------------------------------------------------


def test_albumentations_normalises_as_the_rest_does() -> None:
    image = noise()
    out = AlbumentationsTransform([])(image)
    assert torch.equal(out, EvalTransform(size=32, crop_pct=1.0)(image))
    assert torch.equal(out, AlbumentationsTransform([])(np.asarray(image)))
    gray = AlbumentationsTransform([], mean=(0.5,), std=(0.5,))(image.convert("L"))
    assert gray.shape == (1, 32, 32)
    assert -1 <= gray.min() < gray.max() <= 1


def test_albumentations_takes_objects_and_configs() -> None:
    spec = {"type": "HorizontalFlip", "p": 1.0}
    by_class, by_path = (spec | {"type": t} for t in (albumentations.HorizontalFlip, "albumentations.x.HorizontalFlip"))
    for transform in (spec, by_class, by_path, albumentations.HorizontalFlip(p=1.0)):
        flipped = AlbumentationsTransform([transform])(noise())
        assert torch.equal(flipped, AlbumentationsTransform([])(noise()).flip(2))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": "Afine"}, "albumentations has no transform 'Afine'; did you mean 'Affine'"),
        ({"type": "Affine", "rotation": 3}, "Affine has no argument 'rotation'; did you mean 'rotate'"),
        ({"type": "OneOf", "transforms": [{"type": "Flop"}]}, "albumentations has no transform 'Flop'"),
        ({"rotate": 3}, "albumentations has no transform None"),
        ({"type": "Affine", "scale": "big"}, "scale"),
    ],
)
def test_bad_specs(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlbumentationsTransform([spec])


def test_pipelines_must_stay_in_eight_bits_and_channels() -> None:
    with pytest.raises(ValueError, match="must keep 8-bit arrays, got float32: leave out Normalize"):
        AlbumentationsTransform([{"type": "Normalize"}])(noise())
    with pytest.raises(ValueError, match="the image has 1 channels, mean and std have 3"):
        AlbumentationsTransform([])(noise().convert("L"))
    with pytest.raises(ValueError, match="erase_prob must lie in"):
        AlbumentationsTransform([], erase_prob=2.0)


def test_importing_does_not_import_albumentations_nor_let_it_phone_home() -> None:
    code = (
        "import sys, os; os.environ.pop('NO_ALBUMENTATIONS_UPDATE', None)\n"
        "from vizoo.train.transforms import AlbumentationsTransform as T; print('albumentations' in sys.modules)\n"
        "T([]); print(os.environ['NO_ALBUMENTATIONS_UPDATE'])"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "1"]


# -- random streams ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [recipe, fast])
def test_the_main_process_repeats_with_the_seed(make: Callable[[], Any]) -> None:
    transform, image = make(), noise()

    def draw(seed: int) -> list[torch.Tensor]:
        seed_all(seed)
        return [transform(image) for _ in range(4)]

    first, again, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_torch_alone_seeds_albumentations() -> None:
    transform, image = fast(), noise()
    torch.manual_seed(5)
    first = transform(image)
    random.seed(99)
    torch.manual_seed(5)
    assert torch.equal(transform(image), first)


def outcomes(compose: Any, draws: int = 400) -> Counter[tuple[int, ...]]:
    image = np.arange(4, dtype=np.uint8).reshape(2, 2)
    return Counter(tuple(map(int, compose(image=image)["image"].ravel())) for _ in range(draws))


def two_flips(**settings: Any) -> albumentations.Compose:
    inner = albumentations.Compose([albumentations.VerticalFlip(p=0.5)])
    return albumentations.Compose([albumentations.HorizontalFlip(p=0.5), inner], **settings)


def test_transforms_of_one_composition_draw_independently() -> None:
    counts = outcomes(Seeded(two_flips()))
    assert len(counts) == 4
    assert min(counts.values()) > 60
    # A seed given to albumentations itself makes every transform start from it: both flips or none.
    assert len(outcomes(two_flips(seed=3))) == 2


def test_two_compositions_draw_independently() -> None:
    one, two = (
        Seeded(albumentations.Compose([flip(p=0.5)]))
        for flip in (albumentations.HorizontalFlip, albumentations.VerticalFlip)
    )

    def both(image: np.ndarray) -> dict[str, np.ndarray]:
        return two(**one(image=image))

    assert len(outcomes(both)) == 4


def test_seeded_survives_pickling() -> None:
    seeded = Seeded(two_flips())
    copy = pickle.loads(pickle.dumps(seeded))
    torch.manual_seed(1)
    first = outcomes(seeded, 50)
    torch.manual_seed(1)
    assert outcomes(copy, 50) == first


class Bare:
    """The fast pipeline as one would write it without `Seeded`."""

    def __init__(self) -> None:
        self.compose = albumentations.Compose([albumentations.Affine(rotate=(-20, 20), p=1.0)])

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(self.compose(image=np.asarray(image))["image"].copy())


class BareRecipe:
    """timm's pipeline as its own loader uses it."""

    def __init__(self) -> None:
        self.transform = timm.data.create_transform((3, 16, 16), is_training=True, auto_augment="rand-m9-mstd0.5-inc1")

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.transform(image)


def epochs(transform: Any, seed: int = 0, **loader: Any) -> list[list[torch.Tensor]]:
    """What two workers make of one and the same image in two epochs: epochs x samples, worker 0 and 1 in turn."""
    torch.manual_seed(seed)
    data = Subset(Digits(transform=transform), [0] * 6)
    batches = DataLoader(data, batch_size=1, num_workers=2, **loader)
    return [[batch["inputs"][0] for batch in batches] for _ in range(2)]


def distinct(tensors: list[torch.Tensor]) -> int:
    return len({tensor.numpy().tobytes() for tensor in tensors})


MMENGINE = {"worker_init_fn": partial(worker_init_fn, num_workers=2, rank=0, seed=0)}
LOADERS = {
    "fork": {"multiprocessing_context": "fork"},
    "persistent": {"multiprocessing_context": "fork", "persistent_workers": True},
    "mmengine": {"multiprocessing_context": "fork", **MMENGINE},
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("make", [recipe, fast])
def test_workers_and_epochs_draw_their_own(make: Callable[[], Any], loader: str) -> None:
    one, two = epochs(make(), **LOADERS[loader])
    assert distinct(one + two) == 12


def test_spawned_workers_draw_their_own() -> None:
    data = ConcatDataset([Subset(Digits(transform=make()), [0] * 4) for make in (recipe, fast)])
    batches = DataLoader(data, num_workers=2, multiprocessing_context="spawn", persistent_workers=True, **MMENGINE)
    drawn = [batch["inputs"][0] for _ in range(2) for batch in batches]
    assert distinct(drawn) == 16


@pytest.mark.parametrize("make", [recipe, fast])
def test_the_same_seed_repeats_in_workers(make: Callable[[], Any]) -> None:
    first, again, other = (epochs(make(), seed, **LOADERS["mmengine"]) for seed in (1, 1, 2))
    for epoch in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first[epoch], again[epoch], strict=True))
    assert distinct([t for run in (first, other) for epoch in run for t in epoch]) == 24


@pytest.mark.parametrize("make", [recipe, fast])
def test_ranks_draw_their_own(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    zero = epochs(make(), **LOADERS["fork"])
    monkeypatch.setenv("RANK", "1")
    one = epochs(make(), **LOADERS["fork"])
    assert distinct(zero[0] + one[0]) == 12


def test_what_happens_without_seeded() -> None:
    one, two = epochs(Bare(), **LOADERS["fork"])
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert distinct(one) == 3  # both workers draw the same three


def test_what_mmengines_worker_seeds_do_without_prepare_worker() -> None:
    one, two = epochs(BareRecipe(), **LOADERS["mmengine"])
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_workers_keep_opencv_to_one_thread() -> None:
    # OpenCV reports 1 for setNumThreads(0), which runs everything in the calling thread.
    (threads,) = {int(t) for t in epochs(Threads(), **LOADERS["fork"])[0]}
    assert threads == 1


class Threads:
    """Reports OpenCV's threads after `prepare_worker`."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        import cv2

        cv2.setNumThreads(4)
        transforms._prepared = None
        transforms.prepare_worker()
        return torch.tensor(cv2.getNumThreads())


def test_the_main_process_keeps_its_streams() -> None:
    state = random.getstate(), torch.get_rng_state()
    transforms.prepare_worker()
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    assert transforms._prepared is None


# -- configs -------------------------------------------------------------------------------------------------------


def test_transforms_are_built_from_configs() -> None:
    built = build_transform({"type": RecipeTrainTransform, "size": 8})
    assert isinstance(built, RecipeTrainTransform)
    assert built.sides == (8, 8)
    assert isinstance(build_transform({"type": "vizoo.preprocess.EvalTransform", "size": 8}), EvalTransform)
    assert isinstance(TRANSFORMS.build({"type": AlbumentationsTransform, "transforms": []}), AlbumentationsTransform)
    assert build_transform(built) is built


@pytest.mark.parametrize("transform", [{"size": 8}, 3, None])
def test_neither_config_nor_callable(transform: Any) -> None:
    with pytest.raises(TypeError, match="a transform must be a callable or a dict with a `type`, got"):
        build_transform(transform)
