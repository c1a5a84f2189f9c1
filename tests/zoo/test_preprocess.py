from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image

from vizoo import preprocess
from vizoo.preprocess import EvalTransform, eval_transform

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def timm_eval(cfg: dict[str, Any]) -> Any:
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    return timm.data.create_transform(**{key: cfg[key] for key in keys})


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize(("side", "crop_pct"), [((224, 224), 0.9), ((64, 64), 0.875), ((96, 64), 0.9), ((48, 48), 1.0)])
@pytest.mark.parametrize("shape", [(300, 400), (375, 251), (57, 31), (1, 1), (3, 90), (256, 256)])
def test_bit_for_bit_timm(mode: str, side: tuple[int, int], crop_pct: float, shape: tuple[int, int]) -> None:
    cfg = {"input_size": (3, *side), "crop_pct": crop_pct, "crop_mode": mode, "interpolation": "bicubic", **IMAGENET}
    image = picture(*shape)
    ours = eval_transform(cfg)(image)
    assert ours.shape == (3, *side)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, timm_eval(cfg)(image))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"])
def test_bit_for_bit_timm_with_every_filter(interpolation: str) -> None:
    half = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    cfg = {"input_size": (3, 64, 64), "crop_pct": 0.95, "crop_mode": "center", "interpolation": interpolation, **half}
    image = picture(101, 75, seed=1)
    assert torch.equal(eval_transform(cfg)(image), timm_eval(cfg)(image))


def test_timms_own_default_cfg_is_understood() -> None:
    cfg = timm.create_model("swin_tiny_patch4_window7_224").pretrained_cfg
    assert eval_transform(cfg).crop_pct == 0.9


def test_defaults() -> None:
    assert eval_transform({"input_size": (3, 224, 224)}) == EvalTransform(size=(224, 224), **IMAGENET)
    assert EvalTransform().target == (224, 224)


@pytest.mark.parametrize("shape", [(2, 60000), (60000, 2), (1, 100000)])
def test_extreme_shapes_stay_small(shape: tuple[int, int]) -> None:
    # Resized whole, the last one would have 256 x 25.6 million pixels.
    values = np.full((*shape, 3), 200, np.uint8)
    out = EvalTransform(size=224, mean=(0, 0, 0), std=(1, 1, 1))(Image.fromarray(values))
    assert out.shape == (3, 224, 224)
    assert torch.equal(out, torch.full_like(out, 200 / 255))


def test_cutting_the_ends_first_keeps_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    # A column changes by 0.016 from one to the next at most, so the picture stays in place to a pixel.
    wave = 127 + 127 * np.sin(np.arange(2000) / 2000 * 20 * np.pi) + np.zeros((40, 1))
    image = Image.fromarray(np.stack([wave.astype(np.uint8)] * 3, axis=2))
    transform = EvalTransform(size=32, mean=(0, 0, 0), std=(1, 1, 1))
    whole = transform(image)
    monkeypatch.setattr(preprocess, "MAX_RESIZED", 1000)
    assert preprocess._shorten(image, 36, 36).width < 200
    assert (transform(image) - whole).abs().max() < 0.02
    assert (transform(image.transpose(Image.Transpose.ROTATE_90)) - whole.rot90(1, (1, 2))).abs().max() < 0.02


def test_other_modes_are_converted() -> None:
    gray = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    transform = EvalTransform(size=8, crop_pct=1.0, mean=(0, 0, 0), std=(1, 1, 1))
    assert torch.equal(transform(gray), transform(gray.convert("RGB")))
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert torch.equal(transform(clear), torch.ones(3, 8, 8))


def test_one_channel() -> None:
    transform = eval_transform({"input_size": (1, 8, 8), "crop_pct": 1.0, "mean": (0.4, 0.5, 0.6), "std": (0.5,) * 3})
    out = transform(Image.new("RGB", (8, 8), "white"))
    assert out.shape == (1, 8, 8)
    assert torch.allclose(out, torch.ones(1))


def test_survives_pickling() -> None:
    transform = EvalTransform(size=(32, 48), crop_mode="squash")
    assert pickle.loads(pickle.dumps(transform)) == transform


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_mode": "centre"}, "unknown crop_mode 'centre'; did you mean 'center'?"),
        ({"interpolation": "bicubik"}, "unknown interpolation 'bicubik'; did you mean 'bicubic'?"),
        ({"crop_pct": 0.0}, r"crop_pct must lie in \(0, 1\], got 0.0"),
        ({"crop_pct": 1.5}, r"crop_pct must lie in \(0, 1\], got 1.5"),
        ({"size": 0}, "size must be one positive number, or height and width, got 0"),
        ({"size": (1, 2, 3)}, "size must be one positive number, or height and width"),
        ({"channels": 4}, "images have 1 or 3 channels, got channels=4"),
        ({"mean": (0.5,)}, "3 channels need 3 means and deviations"),
        ({"std": (1, 1, 0)}, "standard deviations must be positive"),
    ],
)
def test_bad_values(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalTransform(**arguments)


@pytest.mark.parametrize("cfg", [{}, {"input_size": 224}, {"input_size": (224, 224)}])
def test_bad_input_size(cfg: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"input_size must be \(channels, height, width\), got"):
        eval_transform(cfg)


def test_neither_timm_nor_torchvision_is_imported() -> None:
    code = (
        "import sys; from PIL import Image\n"
        "from vizoo.labels import class_names; from vizoo.preprocess import EvalTransform\n"
        "EvalTransform()(Image.new('RGB', (9, 9))); class_names('imagenet-22k')\n"
        "print([m for m in ('timm', 'torchvision') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
