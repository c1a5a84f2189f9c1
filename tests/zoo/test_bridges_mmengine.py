"""The zoo in mmengine's registry and configurations."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vizoo
from vizoo.registry import families, resolve
from vizoo.weights.errors import UnverifiedWeightsWarning
from vizoo.weights.store import import_file

FAMILIES = sorted(families())
SWIN = "swin_tiny_patch4_window7_224"


def first(family: str) -> str:
    """A variant of the family."""
    return next(iter(families()[family].variants))


def tiny(family: str) -> dict[str, Any]:
    """Overrides that make it run in milliseconds."""
    return dict(families()[family].tiny)


def reached(module: nn.Module) -> set[str]:
    """Names of the parameters that a backward pass has come to; a gradient may be zero in a new model."""
    return {name for name, parameter in module.named_parameters() if parameter.grad is not None}


@pytest.fixture
def models() -> Any:
    """mmengine's registry of models, knowing the zoo."""
    registry = pytest.importorskip("mmengine.registry")
    vizoo.register_mmengine()
    vizoo.register_mmengine()
    return registry.MODELS


@pytest.mark.parametrize("family", FAMILIES)
def test_mmengine_builds_a_backbone(models: Any, family: str) -> None:
    config = {"type": "vizoo.Backbone", "name": first(family), "out_indices": (0, -1), **tiny(family)}
    model = models.build(config).eval()
    x = torch.randn(1, 3, 70, 90)
    maps = model(x)
    assert type(maps) is tuple
    assert [y.shape for y in maps] == [y.shape for y in model.body.features(x, (0, -1))]
    assert getattr(model.body.config, "output_norms", True)


def test_other_registries_and_their_default_scope_find_it(models: Any) -> None:
    from mmengine.registry import DefaultScope, Registry

    theirs = Registry("model", parent=models, scope="theirs")
    try:
        config = {"type": "vizoo.Backbone", "name": SWIN, **tiny("swin")}
        assert type(theirs.build(config)).__name__ == "MMEngineBackbone"
        with DefaultScope.overwrite_default_scope("vizoo"):
            assert type(models.build({"_scope_": "vizoo", **config})).__name__ == "MMEngineBackbone"
            assert models.children["vizoo"].get("BaseDataPreprocessor") is models.get("BaseDataPreprocessor")
    finally:
        del models.children["theirs"]


def test_import_names_in_configurations_still_mean_what_they_say(models: Any) -> None:
    from vizoo.mmengine_bridge import MMEngineBackbone
    from vizoo.train.classification import ImageClassifier

    assert models.get("vizoo.train.classification.ImageClassifier") is ImageClassifier
    assert models.get("vizoo.mmengine_bridge.MMEngineBackbone") is models.get("vizoo.Backbone") is MMEngineBackbone
    assert models.get("vizoo.create_model") is vizoo.create_model
    assert models.get("vizoo.backbones.swin.Swin") is families()["swin"].model


def test_frozen_stages_stay_frozen_in_training(models: Any) -> None:
    config = {"type": "vizoo.Backbone", "name": SWIN, "frozen_stages": 1, "drop_path_rate": 0.5, **tiny("swin")}
    model = models.build(config).train()
    sum(y.square().mean() for y in model(torch.randn(4, 3, 64, 64))).backward()
    names = reached(model)
    assert not any(name.startswith(("body.patch_embed", "body.layers.0")) for name in names)
    assert any(name.startswith("body.layers.1") for name in names)
    assert not model.body.layers[0].training
    assert model.body.layers[1].training
    copy = pickle.loads(pickle.dumps(model)).eval().train()
    assert not copy.body.layers[0].training


def test_mmengine_arguments(models: Any) -> None:
    config = {"type": "vizoo.Backbone", "name": SWIN, **tiny("swin")}
    assert models.build({**config, "grad_checkpointing": True}).body.grad_checkpointing
    assert models.build({**config, "in_chans": 4})(torch.randn(1, 4, 64, 64))[0].shape == (1, 16, 16, 16)
    with pytest.raises(ValueError, match=r"frozen_stages must lie in -1\.\.4"):
        models.build({**config, "frozen_stages": 7})
    with pytest.raises(TypeError, match="no field 'depth'; did you mean 'depths'"):
        models.build({**config, "depth": (1, 1, 1, 1)})


@pytest.fixture
def quiet_mmengine(models: Any, tmp_path: Path) -> Iterator[None]:
    """mmengine reports every parameter that it initialises; at this level it doesn't."""
    from mmengine.logging import MMLogger

    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel("ERROR")
    yield
    logger.setLevel(level)


SHAPE = {"img_size": 32, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}


@pytest.mark.usefixtures("quiet_mmengine")
def test_init_cfg_takes_official_checkpoints_and_initialisers(models: Any, official_file: Path) -> None:
    pretrained = {"type": "Pretrained", "checkpoint": str(official_file)}
    constant = {"type": "Constant", "layer": "Linear", "val": 0.25}
    state = torch.load(official_file, weights_only=True)["model"]
    for init_cfg in (pretrained, [pretrained, constant]):
        model = models.build({"type": "vizoo.Backbone", "name": SWIN, "init_cfg": init_cfg, **SHAPE})
        model.init_weights()
        key = "layers.1.blocks.0.mlp.fc1.weight"
        assert torch.equal(model.body.state_dict()[key], state[key])
        assert model.is_init
    model = models.build({"type": "vizoo.Backbone", "name": SWIN, "init_cfg": constant, **SHAPE})
    model.init_weights()
    assert (model.body.layers[0].blocks[0].mlp.fc1.weight == 0.25).all()


@pytest.mark.usefixtures("quiet_mmengine")
def test_a_detector_above_it_leaves_loaded_weights_alone(models: Any, with_weights: str) -> None:
    from mmengine.model import BaseModule

    class Above(BaseModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = models.build({"type": "vizoo.Backbone", "name": with_weights, "pretrained": True})

    with pytest.warns(UnverifiedWeightsWarning):
        model = Above()
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    model.init_weights()
    assert model.backbone.is_init
    assert all(torch.equal(before[key], value) for key, value in model.backbone.state_dict().items())


@pytest.fixture
def with_weights(tiny_model: str, official_file: Path) -> str:
    """The tiny model, its weights in the cache."""
    import_file(resolve(tiny_model).variant.weights["plain"], official_file)
    return tiny_model


@pytest.mark.usefixtures("quiet_mmengine")
def test_init_cfg_with_a_prefix_is_refused(models: Any) -> None:
    init_cfg = {"type": "Pretrained", "checkpoint": "x.pth", "prefix": "backbone."}
    model = models.build({"type": "vizoo.Backbone", "name": SWIN, "init_cfg": init_cfg, **tiny("swin")})
    with pytest.raises(ValueError, match="takes `checkpoint` and nothing else"):
        model.init_weights()


CONFIGS = {
    "string": f"""
model = dict(type="vizoo.mmengine_bridge.MMEngineBackbone", name="{SWIN}", frozen_stages=1)
""",
    "class": f"""
from vizoo.mmengine_bridge import MMEngineBackbone
model = dict(type=MMEngineBackbone, name="{SWIN}", frozen_stages=1)
""",
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_configuration_can_do_without_registering(kind: str, tmp_path: Path) -> None:
    """For programs that are not ours to change; in a process of its own, where nothing has been registered."""
    pytest.importorskip("mmengine")
    path = tmp_path / "config.py"
    path.write_text(CONFIGS[kind])
    code = f"""
from mmengine.config import Config
from mmengine.registry import MODELS
print(type(MODELS.build(Config.fromfile({str(path)!r}).model)).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("MMEngineBackbone")
