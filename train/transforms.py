"""Training transforms: the official recipes on PIL by timm's pieces, and faster pipelines by albumentations.

Every use of albumentations stays in this module, so that another library can take its place.
"""

from __future__ import annotations

import copy
import inspect
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import get_worker_info

from vizoo.backbones.base import nearest
from vizoo.images import to_rgb
from vizoo.preprocess import FILTERS, check_moments, to_tensor
from vizoo.weights.record import IMAGENET_MEAN, IMAGENET_STD

ERASE_MODES = ("const", "rand", "pixel")
ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)

Transform = Callable[[Any], Tensor]

_prepared: int | None = None


def prepare_worker() -> None:
    """Give a data loader's worker its own random streams; once per worker and epoch, at the first sample.

    Python's, numpy's and torch's generators are seeded from the seed that the loader drew for this worker in this
    epoch, and from the rank. Whatever `worker_init_fn` did before is replaced: mmengine's default gives a worker the
    same seed in every epoch. OpenCV is kept to one thread. In the main process nothing happens.
    """
    global _prepared
    info = get_worker_info()
    if info is None or info.seed == _prepared:
        return
    _prepared = info.seed
    words = np.random.SeedSequence([info.seed, int(os.environ.get("RANK", "0"))]).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002 -- timm's augmentations draw from the global generator
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(0)


def build_transform(transform: Transform | Mapping[str, Any]) -> Transform:
    """A transform from a config (`dict(type=RecipeTrainTransform, size=224)`), or the callable itself.

    Raises:
        TypeError: Neither a config with a `type` nor a callable.
    """
    if callable(transform):
        return transform
    if not isinstance(transform, Mapping) or "type" not in transform:
        raise TypeError(f"a transform must be a callable or a dict with a `type`, got {transform!r}")
    from mmengine.registry import TRANSFORMS

    return TRANSFORMS.build(dict(transform))


class RecipeTrainTransform:
    """What Swin, DeiT and most of their descendants train ImageNet with, step by step as timm's `create_transform`.

    Random resized crop, flip, RandAugment (or else colour jitter), normalisation, random erasing; all but the last two
    on PIL images. Draws from Python's, numpy's and torch's global generators.

    Args:
        size: Height and width of the result; one number for both.
        scale: Range of the cropped share of the area.
        ratio: Range of the crop's aspect ratio.
        padded_crop: Pad by 4 pixels and crop at random, without resizing: what the recipes do at 32 pixels and below,
            for images which have that size already.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        auto_augment: timm's description of RandAugment, AutoAugment, AugMix or 3-Augment (`3a`); None for none.
        color_jitter: Strength of brightness, contrast and saturation changes. They happen only without `auto_augment`,
            or with 3-Augment, as in the recipes; None for none.
        interpolation: Filter of the crop and of RandAugment, or `random` for bilinear or bicubic per image.
        mean: Mean of each channel, of values in [0, 1]; also the colour that RandAugment fills with.
        std: Standard deviation of each channel, of values in [0, 1].
        erase_prob: Probability of random erasing.
        erase_mode: `pixel` fills with noise, `rand` with one random colour, `const` with the mean.
        erase_count: Erase up to so many rectangles.

    Raises:
        ValueError: A probability outside [0, 1], an empty range, or a description or name that is not known.
    """

    def __init__(
        self,
        *,
        size: int | Sequence[int] = 224,
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        padded_crop: bool = False,
        hflip: float = 0.5,
        vflip: float = 0.0,
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        color_jitter: float | None = 0.4,
        interpolation: str = "bicubic",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        erase_prob: float = 0.25,
        erase_mode: str = "pixel",
        erase_count: int = 1,
    ) -> None:
        from timm.data.random_erasing import RandomErasing

        _check_probabilities(hflip=hflip, vflip=vflip, erase_prob=erase_prob)
        _check_choice("interpolation", interpolation, (*FILTERS, "random"))
        _check_choice("erase_mode", erase_mode, ERASE_MODES)
        check_moments(mean, std, 3)
        self.mean, self.std = tuple(mean), tuple(std)
        self.sides = (size, size) if isinstance(size, int) else tuple(size)
        self._steps_at = partial(
            _recipe_steps,
            scale=scale,
            ratio=ratio,
            padded_crop=padded_crop,
            hflip=hflip,
            vflip=vflip,
            auto_augment=auto_augment,
            color_jitter=color_jitter,
            interpolation=interpolation,
            mean=mean,
        )
        self.steps = self._steps_at(self.sides)
        self.erase = RandomErasing(erase_prob, mode=erase_mode, max_count=erase_count, device="cpu")
        self._others: dict[int, RecipeTrainTransform] = {}

    def at(self, size: int) -> RecipeTrainTransform:
        """The same transform with a square result of this size; see `vizoo.train.samplers.MultiScaleBatches`."""
        if size not in self._others:
            other = copy.copy(self)
            other.sides = (size, size)
            other.steps = self._steps_at(other.sides)
            self._others[size] = other
        return self._others[size]

    def __call__(self, image: Image.Image) -> Tensor:
        """Augment one PIL image.

        Returns:
            The normalised image (3, H, W), float32.
        """
        prepare_worker()
        image = to_rgb(image)
        for step in self.steps:
            image = step(image)
        return self.erase(to_tensor(image, self.mean, self.std))


def _recipe_steps(
    sides: Sequence[int],
    *,
    scale: Sequence[float],
    ratio: Sequence[float],
    padded_crop: bool,
    hflip: float,
    vflip: float,
    auto_augment: str | None,
    color_jitter: float | None,
    interpolation: str,
    mean: Sequence[float],
) -> list[Callable[[Image.Image], Image.Image]]:
    """What `RecipeTrainTransform` does to a PIL image."""
    from torchvision import transforms

    steps = [_crop(sides, scale, ratio, interpolation, padded_crop)]
    if hflip:
        steps.append(transforms.RandomHorizontalFlip(hflip))
    if vflip:
        steps.append(transforms.RandomVerticalFlip(vflip))
    if auto_augment:
        steps.append(_auto_augment(auto_augment, min(sides), mean, interpolation))
    if color_jitter and (not auto_augment or "3a" in auto_augment):
        steps.append(transforms.ColorJitter(color_jitter, color_jitter, color_jitter))
    return steps


def _crop(
    sides: Sequence[int], scale: Sequence[float], ratio: Sequence[float], interpolation: str, padded: bool
) -> Callable[[Image.Image], Image.Image]:
    from timm.data.transforms import RandomResizedCropAndInterpolation
    from torchvision import transforms

    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"size must be one positive number, or height and width, got {tuple(sides)}")
    for name, (low, high) in {"scale": scale, "ratio": ratio}.items():
        if not 0 < low <= high:
            raise ValueError(f"{name} must be a range (low, high) with 0 < low <= high, got {(low, high)}")
    if padded:
        return transforms.RandomCrop(sides, padding=4)
    return RandomResizedCropAndInterpolation(sides, tuple(scale), tuple(ratio), interpolation)


def _auto_augment(
    description: str, size: int, mean: Sequence[float], interpolation: str
) -> Callable[[Image.Image], Image.Image]:
    """timm's augmentation for a description, with the fill colour and filter that its `create_transform` gives it."""
    from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform

    settings: dict[str, Any] = {
        "translate_const": int(size * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in mean),
    }
    if interpolation != "random":
        settings["interpolation"] = FILTERS[interpolation]
    try:
        if description.startswith("rand"):
            return _mend_posterize(rand_augment_transform(description, settings))
        if description.startswith("augmix"):
            return _mend_posterize(augment_and_mix_transform(description, settings | {"translate_pct": 0.3}))
        return _mend_posterize(auto_augment_transform(description, settings))
    except (AssertionError, ValueError) as error:
        raise ValueError(
            f"auto_augment={description!r} is not a description timm knows ({error}); "
            "the recipes' is 'rand-m9-mstd0.5-inc1'"
        ) from error


def _mend_posterize(augment: Any) -> Any:
    """Let posterizing keep no bits, a black image, as the recipes were trained with; Pillow 13 raises instead."""
    policy = getattr(augment, "policy", None)
    for op in augment.ops if policy is None else [op for steps in policy for op in steps]:
        if op.name.startswith("Posterize"):
            op.aug_fn = _posterize
    return augment


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    return Image.new(image.mode, image.size) if bits < 1 else ImageOps.posterize(image, min(bits, 8))


class Seeded:
    """An albumentations transform or composition that draws from torch's generator, as everything else does.

    albumentations keeps generators of its own. Data loader workers copy them, so that all workers, and without
    persistent workers all epochs, draw the same augmentations; and when it is given a seed, each transform inside a
    composition starts from that same seed, so that a flip and a rotation happen together or not at all. Here every
    call takes a fresh seed from torch's generator (see `prepare_worker`) and one pair of generators serves the whole
    composition, however nested.

    Args:
        compose: An albumentations transform or composition.
    """

    def __init__(self, compose: Any) -> None:
        self.compose = compose

    def __call__(self, **data: Any) -> dict[str, Any]:
        """Augment what albumentations takes: `image`, `mask`, `bboxes` and so on."""
        prepare_worker()
        seed = int(torch.randint(2**63 - 1, ()))
        self.compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        return self.compose(**data)


def seeded_pipeline(transforms: Sequence[Any], **targets: Any) -> Seeded:
    """A composition of albumentations' transforms, seeded.

    Args:
        transforms: albumentations transforms or their configs, as `AlbumentationsTransform` takes them.
        targets: What `albumentations.Compose` is to know of boxes, masks and so on.

    Raises:
        ValueError: An unknown transform or argument, or a value that albumentations rejects.
    """
    return Seeded(_albumentations().Compose([_build(spec) for spec in transforms], **targets))


class AlbumentationsTransform:
    """A pipeline of albumentations' transforms on 8-bit images, then normalisation and random erasing.

    About twice as fast as PIL, but not the official recipe: OpenCV resizes without antialiasing, and several
    operations differ from those of RandAugment. Draws from torch's generator only.

    Args:
        transforms: albumentations transforms, or their configs: `dict(type="Affine", rotate=(-10, 10), p=1.0)` with
            the name of a class of albumentations; `OneOf`, `SomeOf` and `Sequential` hold a list `transforms` of their
            own. Leave out `Normalize` and `ToTensorV2`: they follow anyway.
        mean: Mean of each channel, of values in [0, 1]; one value for gray images.
        std: Standard deviation of each channel, of values in [0, 1].
        erase_prob: Probability of erasing one rectangle, filled with noise, after the normalisation.

    Raises:
        ValueError: An unknown transform or argument, or a value that albumentations rejects.
    """

    def __init__(
        self,
        transforms: Sequence[Any],
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        erase_prob: float = 0.0,
    ) -> None:
        from torchvision.transforms import RandomErasing

        _check_probabilities(erase_prob=erase_prob)
        check_moments(mean, std, len(mean))
        self.mean, self.std = tuple(mean), tuple(std)
        self.augment = seeded_pipeline(transforms)
        self.erase = RandomErasing(erase_prob, scale=ERASED_AREA, ratio=ERASED_ASPECT, value="random")

    def __call__(self, image: Image.Image | np.ndarray) -> Tensor:
        """Augment a PIL image, or an array (H, W) or (H, W, C) of 8-bit values.

        Returns:
            The normalised image (C, H, W), float32.

        Raises:
            ValueError: The transforms gave other values than 8-bit ones, or other channels than there are means.
        """
        pixels = self.augment(image=np.asarray(image))["image"]
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
            kind = getattr(pixels, "dtype", type(pixels).__name__)
            raise ValueError(f"the transforms must keep 8-bit arrays, got {kind}: leave out Normalize and ToTensorV2")
        channels = 1 if pixels.ndim == 2 else pixels.shape[2]
        if channels != len(self.mean):
            raise ValueError(f"the image has {channels} channels, mean and std have {len(self.mean)}")
        return self.erase(to_tensor(pixels, self.mean, self.std))


def _albumentations() -> ModuleType:
    # It asks the package index for a newer version of itself while it is imported, unless told not to.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations

    return albumentations


def _build(spec: Any) -> Any:
    """An albumentations transform from its config; the transform itself if it is one."""
    if not isinstance(spec, Mapping):
        return spec
    known = vars(_albumentations())
    arguments = dict(spec)
    name = arguments.pop("type", None)
    # A dumped config names a class by its whole path.
    cls = known.get(name.rpartition(".")[2]) if isinstance(name, str) else name
    if not inspect.isclass(cls):
        classes = [key for key, value in known.items() if inspect.isclass(value)]
        raise ValueError(f"albumentations has no transform {name!r}; {nearest(str(name), classes)}")
    accepted = inspect.signature(cls).parameters
    unknown = [key for key in arguments if key not in accepted]
    if unknown:
        # albumentations itself only warns and drops them.
        raise ValueError(f"{cls.__name__} has no argument {unknown[0]!r}; {nearest(unknown[0], accepted)}")
    if "transforms" in arguments:
        arguments["transforms"] = [_build(inner) for inner in arguments["transforms"]]
    return cls(**arguments)


def _check_probabilities(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; {nearest(value, choices)}")
