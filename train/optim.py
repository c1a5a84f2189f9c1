"""Parameter groups (no decay, layer-wise learning rates) and mixed precision on any device."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from torch import Tensor, nn

from vizoo.backbones.base import nearest

DTYPES = ("float32", "bfloat16", "float16")
_OPTIONS = ("layer_decay", "not_decayed")


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    not_decayed: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Groups of a model's trainable parameters for an optimiser.

    Vectors, biases and what `no_weight_decay()` of a module names (dotted names below that module, whole or ending) are
    not decayed, unless `not_decayed` says otherwise. With `layer_decay` d, layer i of n (as `group_matcher()` numbers
    them; the deepest is the head) learns at lr * d^(n - 1 - i). The rate is written into the group, since only timm's
    schedulers know of `lr_scale`.

    Args:
        model: A backbone, or a module that has one at `backbone`; parameters outside it learn at full rate.
        lr: Learning rate of the last layer.
        weight_decay: Decay of the parameters that are decayed.
        layer_decay: Factor per layer, in (0, 1].
        not_decayed: Parts of names; exactly the parameters whose name contains one are not decayed. So the published
            detectors and segmenters were trained, which decay biases and the heads' batch norms.

    Returns:
        Groups with `params`, `param_names`, `lr`, `lr_scale` and `weight_decay`, earliest layers first.

    Raises:
        ValueError: A factor outside (0, 1], or one below 1 for a model that does not number its layers.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must lie in (0, 1], got {layer_decay}")
    spared = _spared_names(model, not_decayed)
    scales = _layer_scales(model, layer_decay) if layer_decay < 1 else {}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = scales.get(name, 1.0)
        decay = 0.0 if name in spared else weight_decay
        group = groups.setdefault(
            (scale, decay),
            {"params": [], "param_names": [], "lr": lr * scale, "lr_scale": scale, "weight_decay": decay},
        )
        group["params"].append(parameter)
        group["param_names"].append(name)
    return [groups[key] for key in sorted(groups)]


def _spared_names(model: nn.Module, parts: Sequence[str] | None) -> set[str]:
    """Full names of the parameters that are not decayed."""
    named = model.named_parameters()
    if parts is not None:
        return {name for name, _ in named if any(part in name for part in parts)}
    spared = {name for name, parameter in named if parameter.ndim <= 1 or name.endswith(".bias")}
    for prefix, module in model.named_modules():
        listed = getattr(module, "no_weight_decay", None)
        if not callable(listed):
            continue
        endings = tuple(listed())
        for name, _ in module.named_parameters():
            if any(name == ending or name.endswith(f".{ending}") for ending in endings):
                spared.add(f"{prefix}.{name}" if prefix else name)
    return spared


def _layer_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Share of the learning rate per parameter name."""
    from timm.models import group_parameters

    prefix, backbone = ("backbone.", model.backbone) if hasattr(model, "backbone") else ("", model)
    assert isinstance(backbone, nn.Module)
    matcher = getattr(backbone, "group_matcher", None)
    if not callable(matcher):
        name = type(backbone).__name__
        raise ValueError(f"layer_decay={layer_decay} needs numbered layers: {name} has no group_matcher()")
    groups = matcher(coarse=False)
    layers = group_parameters(backbone, groups, reverse=True)
    last = max(layers.values())
    if getattr(backbone, "features_only", False):
        # The heads outside are the deepest layer, in which output norms are, too; blocks lie in front of it.
        last += any(_is_block(name, groups["blocks"]) for name, layer in layers.items() if layer == last)
    return {f"{prefix}{name}": layer_decay ** (last - layer) for name, layer in layers.items()}


def _is_block(name: str, blocks: Any) -> bool:
    """Whether the patterns of `group_matcher()` count a parameter to a block, which has a number."""
    patterns = [(blocks, None)] if isinstance(blocks, str) else blocks
    return any(ends is None and re.match(pattern, name) for pattern, ends in patterns)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class GroupedOptimizer:
    """Builds an optimiser over `parameter_groups`; mmengine calls it an optim wrapper constructor.

    Args:
        optim_wrapper_cfg: Config of the optim wrapper, with the optimiser's under `optimizer` (`lr` is needed).
        paramwise_cfg: `layer_decay` and `not_decayed` of `parameter_groups`, or None.

    Raises:
        ValueError: No learning rate.
        TypeError: A key of `paramwise_cfg` that does not exist; names the nearest.
    """

    def __init__(self, optim_wrapper_cfg: Mapping[str, Any], paramwise_cfg: Mapping[str, Any] | None = None) -> None:
        self.wrapper = dict(optim_wrapper_cfg)
        self.optimizer = dict(self.wrapper.pop("optimizer"))
        self.options = dict(paramwise_cfg or {})
        if "lr" not in self.optimizer:
            raise ValueError("the optimizer's config needs a learning rate: optimizer=dict(type=..., lr=...)")
        for name in self.options:
            if name not in _OPTIONS:
                raise TypeError(f"paramwise_cfg has no key {name!r}; {nearest(name, _OPTIONS)}")

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """The optim wrapper over a model, unwrapped from DDP first."""
        model = getattr(model, "module", model)
        decay = self.optimizer.get("weight_decay", 0.0)
        groups = parameter_groups(model, lr=self.optimizer["lr"], weight_decay=decay, **self.options)
        optimizer = OPTIMIZERS.build({**self.optimizer, "params": groups})
        return OPTIM_WRAPPERS.build({"type": "OptimWrapper", **self.wrapper, "optimizer": optimizer})


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(OptimWrapper):
    """Mixed precision by autocast, on a CPU as well, with loss scaling where float16 needs it.

    The order within an update is fixed: unscale, clip, step. The norm of the gradients stays on the device, in
    `grad_norm`, so that no step waits for it.

    Args:
        dtype: `bfloat16`, `float16` (adds a gradient scaler) or `float32` (no autocast).
        init_scale: First loss scale of float16.
        **kwargs: Arguments of mmengine's `OptimWrapper`: `optimizer`, `accumulative_counts`, `clip_grad`.

    Raises:
        ValueError: Another dtype.
    """

    def __init__(self, dtype: str = "bfloat16", init_scale: float = 65536.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}; {nearest(dtype, DTYPES)}")
        self.dtype: torch.dtype = getattr(torch, dtype)
        device = self.optimizer.param_groups[0]["params"][0].device.type
        self.scaler = torch.amp.GradScaler(device, init_scale=init_scale, enabled=dtype == "float16")
        self.grad_norm: Tensor | None = None

    def initialize_count_status(self, model: nn.Module, init_counts: int, max_counts: int) -> None:
        """Start counting batches; `EpochLoop` does so per epoch, so that its last update takes what is left.

        Args:
            model: Not used.
            init_counts: Batches already behind.
            max_counts: Batch that ends with an update in any case.
        """
        self._inner_count, self._max_counts = init_counts, max_counts
        self._remainder_counts = max_counts % self._accumulative_counts

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast around the forward pass; no gradient exchange while gradients accumulate."""
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            yield

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Backward pass of the scaled loss."""
        self.scaler.scale(loss).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs: Any) -> None:
        """Unscale, clip, step; with float16 an update whose gradients overflow is left out."""
        self.scaler.unscale_(self.optimizer)
        if self.clip_grad_kwargs:
            self._clip_grad()
        self.scaler.step(self.optimizer, **kwargs)
        self.scaler.update()

    def _clip_grad(self) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if parameters:
            self.grad_norm = self.clip_func(parameters, **self.clip_grad_kwargs)

    def state_dict(self) -> dict[str, Any]:
        """State of optimiser and scaler, plain enough for `weights_only=True`."""
        return {**super().state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; a state without a scaler's part, of another dtype, is fine."""
        state_dict = dict(state_dict)
        scaler = state_dict.pop("scaler", None)
        if scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(scaler)
        super().load_state_dict(state_dict)
