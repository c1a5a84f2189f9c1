"""Segmenters on image files: published weights and checkpoints that say what they are, label maps, what is refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from vizoo import CheckpointMismatch
from vizoo.cli import main
from vizoo.images import load_image
from vizoo.train.segmentation.classes import ADE20K, palette
from vizoo.train.segmentation.data import read_values
from vizoo.train.segmentation.heads import FCNHead, UPerHead
from vizoo.train.segmentation.inference import Sliding, Whole
from vizoo.train.segmentation.predict import ImageSegmenter, LabelledImage, label_png, load_segmenter
from vizoo.train.segmentation.segmenter import Segmenter
from vizoo.train.segmentation.transforms import ResizeTransform

NAME = "upernet.swin_tiny_patch4_window7_224.ade20k_160k"
HEADS = "vizoo.train.segmentation.heads."
RESIZE = {"type": "vizoo.train.segmentation.transforms.ResizeTransform", "scale": (96, 64)}
CLASSES = ("ant", "bee", "cat", "dog", "elk")

Make = Callable[..., Segmenter]


@pytest.fixture
def save(make: Make, tiny: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint as `vizoo train` does: `save(transform=..., **changes of the model)`."""

    def written(transform: dict[str, Any] | None = RESIZE, classes: Any = CLASSES, **changes: Any) -> Path:
        model = {
            "type": "vizoo.train.segmentation.segmenter.Segmenter",
            "backbone": {**tiny, "pretrained": True},
            "decode_head": {"type": f"{HEADS}UPerHead", "channels": 16},
            "auxiliary_head": {"type": f"{HEADS}FCNHead", "channels": 8},
            "num_classes": 5,
            "inference": {
                "type": "vizoo.train.segmentation.inference.Sliding",
                "crop": [64, 64],
                "stride": [32, 32],
            },
            **changes,
        }
        config = Config({"model": model, "val_dataloader": {"dataset": {"transform": transform}}})
        torch.manual_seed(1)
        kept = make({"type": UPerHead, "channels": 16}, auxiliary_head={"type": FCNHead, "channels": 8})
        torch.nn.init.normal_(kept.decode_head.conv_seg.weight, std=1.0)
        path = tmp_path / "best.pth"
        meta = {"cfg": config.pretty_text, "dataset_meta": {"classes": classes}}
        torch.save({"meta": meta, "state_dict": kept.state_dict()}, path)
        return path

    return written


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8)).save(path)
    return path


def test_a_checkpoint_says_all_that_predicting_takes(save: Callable[..., Path], photo: Path) -> None:
    segmenter = load_segmenter(checkpoint=save())
    assert segmenter.classes == CLASSES
    assert segmenter.model.inference == Sliding(crop=(64, 64), stride=(32, 32))
    assert not segmenter.model.training
    (found,) = segmenter.predict([photo])
    assert (found.labels.shape, found.labels.dtype) == ((90, 140), np.uint8)
    assert len(np.unique(found.labels)) > 1
    assert found.labels.max() < 5
    drawn = segmenter.draw(found)
    assert drawn.width == 140
    assert drawn.height > 90


def test_the_labels_are_the_models_own(save: Callable[..., Path], photo: Path) -> None:
    segmenter = load_segmenter(checkpoint=save(inference=None))
    assert segmenter.model.inference == Whole()
    (found,) = segmenter.predict([photo])
    image = segmenter._tensor(found.image)
    assert image.shape == (3, 62, 96)
    with torch.no_grad():
        expected = segmenter.model([image], [{"original_size": (90, 140)}], mode="predict")[0]["label_map"]
    assert (found.labels == expected.numpy()).all()


def test_shares_are_sorted() -> None:
    labels = np.array([[3, 3, 3, 1], [3, 3, 0, 0]], np.uint8)
    assert list(LabelledImage(Path("x"), Image.new("RGB", (4, 2)), labels).shares().items()) == [
        (3, 0.625),
        (0, 0.25),
        (1, 0.125),
    ]


def test_label_maps_are_palette_images_that_data_sets_read(tmp_path: Path) -> None:
    labels = np.array([[0, 1, 2], [149, 7, 255]], np.uint8)
    png = label_png(labels, ADE20K)
    (tmp_path / "map.png").write_bytes(png)
    assert (read_values(tmp_path / "map.png") == labels).all()
    image = Image.open(io.BytesIO(png))
    assert image.mode == "P"
    assert (np.asarray(image.convert("RGB"))[1, 0] == palette(ADE20K)[149]).all()


def test_images_are_read_upright_and_bad_ones_left_out(save: Callable[..., Path], photo: Path, tmp_path: Path) -> None:
    turned, bad = tmp_path / "turned.jpg", tmp_path / "bad.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    load_image(photo).save(turned, exif=exif)
    bad.write_bytes(b"")
    segmenter = load_segmenter(checkpoint=save())
    failed: list[Path] = []
    found = [*segmenter.predict([turned, bad, photo], batch_size=2, on_error=lambda path, error: failed.append(path))]
    assert [(f.path, f.labels.shape) for f in found] == [(turned, (140, 90)), (photo, (90, 140))]
    assert failed == [bad]
    with pytest.raises(ValueError, match=r"bad\.png is empty"):
        next(segmenter.predict([bad]))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        next(segmenter.predict([photo], batch_size=0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "vizoo.train.detection.models.MaskRCNN"}, "MaskRCNN is no model to segment: Segmenter is"),
        ({"decode_head": {"type": "os.system"}}, r"os\.system is no part that vizoo builds from a checkpoint"),
        ({"decode_head": {"type": f"{HEADS}UperHead"}}, "did you mean 'UPerHead'"),
        ({"inference": {"type": "builtins.print"}}, r"builtins\.print is no part that vizoo builds"),
    ],
)
def test_nothing_but_segmenters_is_built(save: Callable[..., Path], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_segmenter(checkpoint=save(**changes))


def test_other_classes_than_the_models_are_refused(save: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointMismatch, match=r"best\.pth has other classes than the model \(decode_head\.conv_seg"):
        load_segmenter(checkpoint=save(num_classes=7))


def test_what_cannot_be_loaded(save: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pass a checkpoint \(--checkpoint\), or the name"):
        load_segmenter()
    with pytest.raises(ValueError, match="is a model to detect, not to segment"):
        load_segmenter("mask_rcnn.swin_tiny_patch4_window7_224.coco_3x")
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint at .*none\.pth"):
        load_segmenter(NAME, checkpoint=tmp_path / "none.pth")


def test_more_classes_than_a_label_map_can_hold(make: Make) -> None:
    model = make({"type": UPerHead, "channels": 16})
    with pytest.raises(ValueError, match="8-bit images, for up to 255 classes, got 256"):
        ImageSegmenter(model, tuple(map(str, range(256))), ResizeTransform())


@pytest.mark.filterwarnings("ignore:.* is unverified")
def test_imported_weights_give_the_official_logits(
    parity: ModuleType, dense_fixture: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    fixture = dense_fixture("upernet_swin_tiny")
    path = tmp_path / "upernet_swin_tiny_patch4_window7_512x512.pth"
    torch.save({"meta": {}, "state_dict": parity.fill_state_dict(fixture)}, path)
    assert main(["weights", "import", NAME, str(path)]) == 0
    segmenter = load_segmenter(NAME)
    assert segmenter.classes == ADE20K
    case = fixture["goldens"][0]
    with torch.no_grad():
        x = parity.image(case["input"]["shape"], case["input"]["seed"])
        parity.check(case, "logits_ori", Whole()(segmenter.model.logits, x, tuple(case["input"]["ori_shape"])))
