"""Predictions: what the model says of the very tensor that the transform makes, with the names that belong to it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import vizoo
from vizoo.images import load_image
from vizoo.labels import class_names, synsets
from vizoo.predict import Classifier, config_value, find_images, load_classifier, stored_meta
from vizoo.preprocess import eval_transform


@pytest.fixture
def trained(trained_file: Path) -> Classifier:
    return load_classifier(checkpoint=trained_file)


def by_hand(classifier: Classifier, path: Path) -> torch.Tensor:
    image = eval_transform(dict(classifier.preprocess))(load_image(path))
    with torch.no_grad():
        return classifier.model(image[None]).softmax(1)[0]


def test_prediction_is_the_models_own(trained: Classifier, photos: Path) -> None:
    paths = find_images([photos])
    found = list(trained.predict(paths, top=3))
    assert [p.path for p in found] == paths
    for prediction in found:
        expected = by_hand(trained, prediction.path).sort(descending=True)
        torch.testing.assert_close(torch.tensor(prediction.probabilities), expected.values)
        assert prediction.indices == tuple(expected.indices.tolist())
        assert prediction.classes == tuple(("ant", "bee", "cat")[i] for i in prediction.indices)
        assert sum(prediction.probabilities) == pytest.approx(1)
    assert len({p.probabilities for p in found}) == 3


@pytest.mark.parametrize("batch_size", [1, 2, 3, 50])
def test_batches_change_nothing(trained: Classifier, photos: Path, batch_size: int) -> None:
    paths = find_images([photos, photos])
    one_by_one = [next(iter(trained.predict([path]))) for path in paths]
    for single, batched in zip(one_by_one, trained.predict(paths, batch_size=batch_size), strict=True):
        assert batched.path == single.path
        assert batched.indices == single.indices
        assert batched.probabilities == pytest.approx(single.probabilities, rel=1e-4)


def test_images_of_different_shapes_never_share_a_batch(trained: Classifier, photos: Path) -> None:
    from vizoo.predict import _batches

    shapes = [(32, 32), (32, 32), (48, 32), (32, 32)]
    images = [(Path(str(i)), torch.full((3, *shape), float(i))) for i, shape in enumerate(shapes)]
    batches = list(_batches(images, 8))
    assert [[str(p) for p in paths] for paths, _ in batches] == [["0", "1"], ["2"], ["3"]]
    assert [tuple(batch.shape) for _, batch in batches] == [(2, 3, 32, 32), (1, 3, 48, 32), (1, 3, 32, 32)]


def test_top_is_at_most_the_number_of_classes(trained: Classifier, photos: Path) -> None:
    assert [len(p.classes) for p in trained.predict([photos / "a.png"], top=99)] == [3]
    assert [len(p.classes) for p in trained.predict([photos / "a.png"], top=1)] == [1]


@pytest.mark.parametrize("name", ["top", "batch_size"])
def test_numbers_below_one_are_refused(trained: Classifier, photos: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        list(trained.predict([photos / "a.png"], **{name: 0}))


def test_training_mode_comes_back(trained: Classifier, photos: Path) -> None:
    trained.model.train()
    list(trained.predict([photos / "a.png"]))
    assert trained.model.training


def test_a_bad_image_raises_or_is_reported(trained: Classifier, photos: Path) -> None:
    (photos / "b.jpg").write_bytes(b"not an image at all")
    paths = find_images([photos])
    with pytest.raises(ValueError, match=r"b\.jpg is not an image"):
        list(trained.predict(paths))
    errors: list[Path] = []
    found = list(trained.predict(paths, on_error=lambda path, error: errors.append(path)))
    assert [p.path.name for p in found] == ["a.png", "c.png"]
    assert errors == [photos / "b.jpg"]


def test_a_training_checkpoint_knows_model_classes_and_preprocessing(trained: Classifier, trained_file: Path) -> None:
    assert trained.model.num_classes == 3
    assert trained.model.config.embed_dim == 8
    assert trained.preprocess["input_size"] == (3, 48, 48)
    assert trained.preprocess["mean"] == [0.5, 0.5, 0.5]
    assert trained.preprocess["crop_mode"] == "squash"
    assert trained.preprocess["std"] == trained.model.default_cfg["std"]
    assert not trained.model.training
    state = torch.load(trained_file, weights_only=True)["state_dict"]
    torch.testing.assert_close(trained.model.state_dict()["head.weight"], state["backbone.head.weight"])


def test_arguments_win_over_the_checkpoint(trained_file: Path) -> None:
    assert load_classifier(checkpoint=trained_file, drop_path_rate=0.3).model.config.drop_path_rate == 0.3
    with pytest.raises(ValueError, match="does not fit this Swin"):
        load_classifier(checkpoint=trained_file, embed_dim=16)


def test_a_file_of_weights_alone_needs_a_name(official_file: Path, tiny_model: str) -> None:
    with pytest.raises(ValueError, match="does not say which model it is of"):
        load_classifier(checkpoint=official_file)
    classifier = load_classifier(tiny_model, checkpoint=official_file)
    assert list(classifier.class_names) == class_names("imagenet-1k")


def test_a_classifier_of_other_classes_keeps_them(tiny_model: str, tmp_path: Path) -> None:
    path = tmp_path / "own.pth"
    torch.save(vizoo.create_model(tiny_model, num_classes=7).state_dict(), path)
    classifier = load_classifier(tiny_model, checkpoint=path)
    assert classifier.model.num_classes == 7
    assert list(classifier.class_names) == [f"class {i}" for i in range(7)]


def test_folders_named_by_synsets_are_called_by_their_words(tiny_model: str, tmp_path: Path) -> None:
    path = tmp_path / "imagenet.pth"
    meta = {"dataset_meta": {"classes": synsets("imagenet-1k")}}
    torch.save({"meta": meta, "state_dict": vizoo.create_model(tiny_model).state_dict()}, path)
    assert list(load_classifier(tiny_model, checkpoint=path).class_names) == class_names("imagenet-1k")


def test_what_cannot_classify_says_so(tiny_model: str, tmp_path: Path) -> None:
    path = tmp_path / "headless.pth"
    torch.save(vizoo.create_model(tiny_model, num_classes=0).state_dict(), path)
    with pytest.raises(ValueError, match=f"{tiny_model} has no classifier"):
        load_classifier(tiny_model, checkpoint=path)
    with pytest.raises(ValueError, match="name a model, or pass a checkpoint"):
        load_classifier()
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint at .*; did you mean 'headless\.pth'\?"):
        load_classifier(tiny_model, checkpoint=tmp_path / "headles.pth")


def test_stored_config_is_read_but_never_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    text = f"model = dict(backbone=open({str(trap)!r}, 'w'))\nnested = dict(a=[1, dict(b=(2, -3.5))], c={{'d': None}})"
    assert config_value(text, "nested") == {"a": [1, {"b": (2, -3.5)}], "c": {"d": None}}
    with pytest.raises(ValueError, match="malformed"):
        config_value(text, "model")
    with pytest.raises(LookupError, match="does not set 'modl'"):
        config_value(text, "modl")
    path = tmp_path / "hostile.pth"
    torch.save({"meta": {"cfg": text}, "state_dict": {"x": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match="does not say which model it is of"):
        load_classifier(checkpoint=path)
    assert not trap.exists()


def test_meta_of_other_files_is_empty(tmp_path: Path) -> None:
    text = tmp_path / "text.pth"
    text.write_text("no checkpoint")
    assert stored_meta(text) == {}
    torch.save([1, 2], tmp_path / "list.pth")
    assert stored_meta(tmp_path / "list.pth") == {}


def test_find_images_takes_files_and_folders(photos: Path, tmp_path: Path) -> None:
    shutil.copy(photos / "a.png", tmp_path / "first.png")
    found = find_images([tmp_path / "first.png", photos])
    assert [p.name for p in found] == ["first.png", "a.png", "b.jpg", "c.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no image"):
        find_images([tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match=r"no image or folder at .*fist\.png; did you mean 'first\.png'\?"):
        find_images([tmp_path / "fist.png"])
