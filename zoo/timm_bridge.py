"""The zoo's variants in timm's registry. Importing this module imports timm, and registers nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from timm.models import FeatureInfo, generate_default_cfgs, is_model, register_model
from torch import Tensor, nn

from vizoo.backbones.base import Backbone, Variant, image_sides
from vizoo.weights.record import Weights

from .create import create_model
from .registry import variants

PREFIX = "vizoo_"

# timm looks for both in the module that an entrypoint says it is from: it appends the names of the models to the one,
# and reads the published weights from the other.
__all__ = ["PREFIX", "TimmFeatures", "register"]
default_cfgs: dict[str, Any] = {}


class TimmFeatures(nn.Module):
    """What timm's `features_only=True` gives: a list of maps (B, C, H / stride, W / stride), and what they are.

    Args:
        model: A backbone made with `features_only`.
    """

    def __init__(self, model: Backbone) -> None:
        super().__init__()
        self.model = model
        self.out_indices = tuple(model.out_indices)
        stages = [{"num_chs": s.channels, "reduction": s.stride, "module": s.name} for s in model.stages]
        self.feature_info = FeatureInfo(stages, self.out_indices)
        self.pretrained_cfg = self.default_cfg = model.default_cfg

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, in_chans, H, W) to maps, finest first."""
        return self.model(x)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass; see `Backbone`."""
        self.model.set_grad_checkpointing(enable)


def register() -> list[str]:
    """Register what timm does not know yet; see `vizoo.register_timm`."""
    missing = [name for name in variants() if not is_model(PREFIX + name)]
    cfgs: dict[str, Any] = {}
    for name in missing:
        cfgs |= _pretrained_cfgs(name, variants()[name][1])
    default_cfgs.update(generate_default_cfgs(cfgs))
    for name in missing:
        # An attribute of this module, since timm adds the name to `__all__`.
        globals()[PREFIX + name] = register_model(_entrypoint(name))
    return sorted(PREFIX + name for name in variants())


def _pretrained_cfgs(name: str, variant: Variant) -> dict[str, Any]:
    """timm's description of each checkpoint by `name.tag`; an asterisk marks the default."""
    if not variant.weights:
        return {PREFIX + name: {"input_size": (3, *image_sides(variant.config.img_size))}}
    return {
        f"{PREFIX}{name}.{tag}{'*' if tag == variant.default_tag else ''}": _pretrained_cfg(record)
        for tag, record in variant.weights.items()
    }


def _pretrained_cfg(record: Weights) -> dict[str, Any]:
    return {
        "url": record.url,
        "input_size": record.input_size,
        "interpolation": record.interpolation,
        "crop_pct": record.crop_pct,
        "crop_mode": record.crop_mode,
        "mean": record.mean,
        "std": record.std,
        "num_classes": record.num_classes,
        "license": record.license,
        "origin_url": f"https://github.com/{record.repository}",
    }


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        return _create(name, pretrained, **options)

    create.__name__ = create.__qualname__ = PREFIX + name
    create.__doc__ = f"`vizoo.create_model({name!r})` under timm's arguments."
    return create


def _create(
    name: str,
    pretrained: bool,
    *,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    cache_dir: Any = None,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    global_pool: str | None = None,
    drop_rate: float = 0.0,
    output_stride: int | None = None,
    **overrides: Any,
) -> nn.Module:
    """timm's arguments as ours. What `create_model` does not know either is refused there, by name.

    Raises:
        ValueError: An argument asks for what these models do not have.
    """
    if cache_dir is not None:
        raise ValueError(f"weights lie under VIZOO_HOME: set that instead of cache_dir, got {cache_dir!r}")
    if drop_rate:
        raise ValueError(f"{name} has no dropout before its classifier: drop_rate must be 0, got {drop_rate}")
    file = _checkpoint(pretrained, pretrained_cfg_overlay)
    model = create_model(
        _tagged(name, pretrained_cfg),
        pretrained and file is None,
        features_only=features_only,
        out_indices=tuple(range(-out_indices, 0)) if isinstance(out_indices, int) else out_indices,
        checkpoint_path=file,
        **overrides,
    )
    _check_stride(model, output_stride)
    _set_pooling(model, global_pool)
    return TimmFeatures(model) if model.features_only else model


def _tagged(name: str, pretrained_cfg: Any) -> str:
    """The zoo's name for what timm split into a model and the tag of its weights."""
    if pretrained_cfg and not isinstance(pretrained_cfg, str):
        tags = ", ".join(variants()[name][1].weights) or "none are published"
        raise ValueError(f"pretrained_cfg must be a tag of the weights of {name} ({tags}), got {pretrained_cfg!r}")
    return f"{name}.{pretrained_cfg}" if pretrained_cfg else name


def _checkpoint(pretrained: bool, overlay: Mapping[str, Any] | None) -> Any:
    """The file that timm's `pretrained_cfg_overlay=dict(file=...)` names."""
    if not overlay:
        return None
    if not pretrained or set(overlay) != {"file"}:
        raise ValueError(f"pretrained_cfg_overlay must be dict(file=...), with pretrained=True; got {dict(overlay)}")
    return overlay["file"]


def _check_stride(model: Backbone, output_stride: int | None) -> None:
    own = model.stages[-1].stride
    if output_stride not in (None, own):
        raise ValueError(f"{type(model).__name__} cannot be dilated: output_stride must be {own}, got {output_stride}")


def _set_pooling(model: Backbone, global_pool: str | None) -> None:
    if global_pool is None or model.features_only:
        return
    if global_pool not in ("", "avg"):
        raise ValueError(f"global_pool must be 'avg' or '' (none), got {global_pool!r}")
    if not global_pool and model.num_classes:
        raise ValueError(f"a classifier needs pooling: global_pool='' goes with num_classes=0, got {model.num_classes}")
    model.global_pool = global_pool
