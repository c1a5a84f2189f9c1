"""What evaluation needs no layer of its own for, folded into a neighbour: the arithmetic behind `Backbone.fuse`.

In evaluation a batch norm multiplies each channel by a constant and adds one. A convolution or linear layer beside it
can do both: W' = s W and b' = s b + t where the norm x -> s x + t stands behind the layer, W' = W s and b' = b + W t
where it stands in front. Constants are computed in float64 and rounded once.

A module that knows more of itself, such as parallel branches that become one convolution, has a method `fuse_()`; see
`Fusible`. A norm of a family's own takes part by a method `scale_and_shift()`, if it is such a map; see `Affine`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@runtime_checkable
class Fusible(Protocol):
    """A module that folds itself. Its children have been folded before it is asked."""

    def fuse_(self) -> None:
        """Fold, in place, what evaluation needs no layer of its own for; nothing where that is done already."""


@runtime_checkable
class Affine(Protocol):
    """A module that in evaluation multiplies each channel by a constant and adds one."""

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Factor and summand of each channel, (channels,), in float64."""


def fuse_children(module: nn.Module) -> None:
    """Fold whatever can be inside a module, innermost first; the module itself is not asked."""
    for child in list(module.children()):
        fuse_children(child)
        if isinstance(child, Fusible):
            child.fuse_()
        elif type(child) is nn.Sequential:  # a subclass may do other things than apply its children in order
            fold_neighbours(child, [name for name, _ in child.named_children()])


def fold_neighbours(parent: nn.Module, names: Sequence[str]) -> None:
    """Fold the norms among modules that are applied one directly behind the other.

    A norm that was folded leaves an identity in its place, so the names of other parameters stay. Pairs that cannot be
    folded exactly stay as they are: a convolution that pads a normed map, layers that are watched or adapted.

    Args:
        parent: What has the modules.
        names: Their names or dotted paths, in the order of their application.
    """
    names = [name for name in names if not isinstance(parent.get_submodule(name), nn.Identity)]
    for first, second in pairwise(names):
        before, behind = parent.get_submodule(first), parent.get_submodule(second)
        if is_layer(before) and is_affine(behind):
            fold_behind(cast(Layer, before), *scale_and_shift(behind))
            _replace(parent, second)
        elif is_affine(before) and is_layer(behind) and not _pads_with_zeros(behind):
            fold_before(*scale_and_shift(before), cast(Layer, behind))
            _replace(parent, first)


def is_layer(module: nn.Module) -> bool:
    """Whether weight and bias say all that a linear layer or a convolution does: no adapter, nobody watching it."""
    own = {name for name, _ in module.named_parameters()}
    return isinstance(module, LAYERS) and own <= {"weight", "bias"} and not _watched(module)


def is_affine(module: nn.Module) -> bool:
    """Whether a module multiplies each channel by a constant and adds one."""
    if _watched(module):
        return False
    if isinstance(module, _BatchNorm):
        return module.running_mean is not None  # else it takes the statistics of each batch
    return isinstance(module, Affine)


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Factor and summand of each channel of a norm that `is_affine`, (channels,), in float64."""
    if isinstance(norm, Affine):
        return norm.scale_and_shift()
    assert isinstance(norm, _BatchNorm)
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    scale = (variance.double() + norm.eps).rsqrt()
    if norm.affine:
        scale = norm.weight.detach().double() * scale
    shift = -mean.double() * scale
    return scale, shift + norm.bias.detach().double() if norm.affine else shift


def fold_behind(layer: Layer, scale: Tensor, shift: Tensor) -> None:
    """Let a layer multiply its outputs by `scale` and add `shift`, both (out_channels,), in place."""
    weight = layer.weight.detach().double()
    bias = 0 if layer.bias is None else layer.bias.detach().double()
    set_weights(layer, weight * scale.view(-1, *(1,) * (weight.ndim - 1)), bias * scale + shift)


def fold_before(scale: Tensor, shift: Tensor, layer: Layer) -> None:
    """Let a layer that pads nothing take x for `scale` x + `shift`, both (in_channels,), in place."""
    weight = layer.weight.detach().double()
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    scale, shift = (  # of the inputs that each output reads, (groups, 1, in_channels / groups, 1...)
        values.view(groups, 1, -1, *(1,) * (weight.ndim - 2)) for values in (scale, shift)
    )
    grouped = weight.unflatten(0, (groups, -1))
    bias = (grouped * shift).flatten(2).sum(-1).flatten()
    if layer.bias is not None:
        bias = bias + layer.bias.detach().double()
    set_weights(layer, (grouped * scale).flatten(0, 1), bias)


def mean_layer(layers: Sequence[nn.Linear]) -> nn.Linear:
    """One linear layer that gives the mean of what several give."""
    mean = copy.deepcopy(layers[0])
    weight = torch.stack([layer.weight.detach().double() for layer in layers]).mean(0)
    bias = torch.stack([layer.bias.detach().double() for layer in layers]).mean(0)
    set_weights(mean, weight, bias)
    return mean


def set_weights(layer: Layer, weight: Tensor, bias: Tensor) -> None:
    """Give a layer other numbers, in the dtype of its weight and in memory of their own."""
    like = layer.weight
    for name, values in (("weight", weight), ("bias", bias)):
        setattr(layer, name, nn.Parameter(values.to(like.dtype), requires_grad=like.requires_grad))


def _replace(parent: nn.Module, name: str) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(parent.get_submodule(path), leaf, nn.Identity().train(parent.training))


def _pads_with_zeros(layer: nn.Module) -> bool:
    """Whether a layer reads zeros beside the map, which a norm in front of it does not touch."""
    if isinstance(layer, nn.Linear) or cast(nn.Conv2d, layer).padding_mode != "zeros":
        return False
    padding = cast(nn.Conv2d, layer).padding
    return padding != "valid" if isinstance(padding, str) else any(padding)


def _watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
