"""The zoo inside other libraries; each is imported only when its function is called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


def as_torchvision_backbone(
    name: str,
    *,
    pretrained: bool = False,
    out_indices: Sequence[int] | None = None,
    fpn_channels: int = 256,
    extra_blocks: nn.Module | None = None,
    **overrides: Any,
) -> nn.Module:
    """A backbone with a feature pyramid, as torchvision's detectors take it.

    Where the family has them, a norm per map stands in front of the pyramid, as in the authors' dense code.

    Args:
        name: `variant` or `variant.tag`, as `vizoo.list_models()` prints them.
        pretrained: Load the tag's official weights; the pyramid stays newly initialised.
        out_indices: Stages that feed the pyramid; None takes all.
        fpn_channels: Channels of every map of the pyramid, `out_channels` of the module.
        extra_blocks: What adds coarser maps: a block of `torchvision.ops.feature_pyramid_network`. None takes
            `LastLevelMaxPool`, which adds one, as the R-CNNs want it; RetinaNet and FCOS want `LastLevelP6P7`.
        **overrides: Further arguments of `vizoo.create_model`, such as `drop_path_rate` or fields of the configuration.

    Returns:
        A module from images (B, in_chans, H, W) to an OrderedDict of maps (B, fpn_channels, h, w), finest first, named
        "0", "1", ... and as `extra_blocks` names its own.

    Raises:
        ImportError: torchvision is not installed.
        ValueError: Unknown name, or values that cannot go together.
        TypeError: An override that does not exist, or `extra_blocks` of another kind.
    """
    with _needs("as_torchvision_backbone", "torchvision>=0.21"):
        from .torchvision_bridge import TorchvisionBackbone
    from .dense import create_dense

    body = create_dense(name, pretrained=pretrained, out_indices=out_indices, **overrides)
    return TorchvisionBackbone(body, fpn_channels, extra_blocks)


def register_timm() -> list[str]:
    """Make `timm.create_model("vizoo_" + name)` build every variant of the zoo; calling it again changes nothing.

    Returns:
        The names under which timm knows the variants.

    Raises:
        ImportError: timm is not installed, or lacks something that the bridge uses.
    """
    with _needs("register_timm", "timm>=1.0.16,<2"):
        from .timm_bridge import register
    return register()


def register_mmengine() -> None:
    """Make `dict(type="vizoo.Backbone", name=...)` build a backbone in configurations of mmengine and its kin.

    Calling it again changes nothing. The further keys are those of `vizoo.mmengine_bridge.MMEngineBackbone`.

    Raises:
        ImportError: mmengine is not installed.
    """
    with _needs("register_mmengine", "mmengine>=0.10.7,<0.11"):
        from .mmengine_bridge import register
    register()


@contextmanager
def _needs(caller: str, requirement: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ImportError(f"vizoo.{caller}() needs {requirement}: pip install '{requirement}' ({error})") from error
