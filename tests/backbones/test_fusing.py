"""Folding of norms into layers: every kind of neighbour, and what must stay as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vizoo.backbones.fusing import fold_neighbours, fuse_children, mean_layer


def norm(channels: int, kind: type[nn.Module] = nn.BatchNorm2d, **options: Any) -> nn.Module:
    """A norm whose every constant matters."""
    module = kind(channels, **options).eval()
    for name, value in (("running_mean", torch.randn(channels)), ("running_var", torch.rand(channels) + 0.5)):
        if getattr(module, name) is not None:
            getattr(module, name).copy_(value)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def folded(*modules: nn.Module) -> list[str]:
    """The kinds of modules that a fused chain is left with; its output must not have changed."""
    chain = nn.Sequential(*modules).eval()
    first = next(m for m in chain if hasattr(m, "weight") or hasattr(m, "num_features"))
    channels = getattr(first, "in_channels", None) or getattr(first, "num_features", None) or first.in_features
    x = torch.randn(2, channels, 5, 6) if "2d" in str(chain) else torch.randn(7, channels)
    want, holder = chain(x), nn.ModuleList([chain])
    fuse_children(holder)
    torch.testing.assert_close(holder[0](x), want)
    return [type(module).__name__ for module in chain if not isinstance(module, nn.Identity)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"groups": 4}, {"groups": 2, "stride": 2, "padding": 1}, {"dilation": 2}], ids=str
)
def test_a_norm_behind_a_convolution(options: dict[str, Any], bias: bool) -> None:
    assert folded(nn.Conv2d(4, 8, 3, bias=bias, **options), norm(8), nn.ReLU()) == ["Conv2d", "ReLU"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"padding": 1, "padding_mode": "replicate"}], ids=str)
def test_a_norm_before_a_convolution(options: dict[str, Any], bias: bool) -> None:
    assert folded(norm(4), nn.Conv2d(4, 6, 2, 2, bias=bias, **options)) == ["Conv2d"]


def test_norms_beside_a_linear_layer() -> None:
    chain = norm(4, nn.BatchNorm1d), nn.Linear(4, 6, bias=False), norm(6, nn.BatchNorm1d, affine=False)
    assert folded(*chain, nn.GELU()) == ["Linear", "GELU"]


@pytest.mark.parametrize("padding", [1, "same", (0, 1)])
def test_a_norm_before_zero_padding_stays(padding: Any) -> None:
    assert folded(norm(4), nn.Conv2d(4, 4, 3, padding=padding)) == ["BatchNorm2d", "Conv2d"]
    assert folded(norm(4), nn.Conv2d(4, 4, 3, padding="valid")) == ["Conv2d"]


def test_statistics_of_each_batch_stay() -> None:
    assert folded(nn.Conv2d(4, 4, 1), norm(4, track_running_stats=False)) == ["Conv2d", "BatchNorm2d"]
    assert folded(nn.Conv2d(4, 4, 1), nn.ReLU(), norm(4)) == ["Conv2d", "ReLU", "BatchNorm2d"]
    assert folded(nn.ConvTranspose2d(4, 4, 2), norm(4)) == ["ConvTranspose2d", "BatchNorm2d"]


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("position", [0, 1])
def test_watched_and_adapted_layers_stay(position: int) -> None:
    chain = [nn.Conv2d(4, 4, 1), norm(4)]
    chain[position].register_forward_hook(lambda module, inputs, output: None)
    assert len(folded(*chain)) == 2
    adapted = nn.Conv2d(4, 4, 1)
    parametrize.register_parametrization(adapted, "weight", Doubled())
    assert len(folded(adapted, norm(4))) == 2


class Scale(nn.Module):
    """A norm of a family's own."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * x + 1

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        return torch.full((4,), 3.0, dtype=torch.float64), torch.ones(4, dtype=torch.float64)


class Branches(nn.Module):
    """Parallel layers that become one, once their own norms are in them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 3), norm(3, nn.BatchNorm1d)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return sum(layer(x) for layer in self.layers) / len(self.layers)

    def fuse_(self) -> None:
        self.layers = nn.ModuleList([mean_layer([layer[0] for layer in self.layers])])


def test_modules_that_know_more_of_themselves() -> None:
    assert folded(nn.Conv2d(4, 4, 1), Scale()) == ["Conv2d"]
    holder, x = nn.ModuleList([Branches()]).eval(), torch.randn(5, 4)
    want = holder[0](x)
    fuse_children(holder)
    torch.testing.assert_close(holder[0](x), want)
    assert [name for name, _ in holder.named_parameters()] == ["0.layers.0.weight", "0.layers.0.bias"]


def test_a_chain_that_is_applied_otherwise_stays() -> None:
    class Backwards(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for module in reversed(self):
                x = module(x)
            return x

    holder = nn.ModuleList([Backwards(nn.Conv2d(4, 4, 1), norm(4))])
    fuse_children(holder)
    assert len([m for m in holder[0] if isinstance(m, nn.BatchNorm2d)]) == 1


def test_numbers_are_rounded_once_and_keep_dtype_and_state() -> None:
    chain = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), norm(4)).half().eval().requires_grad_(False)
    double = [m.double() for m in nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), norm(4))]
    for exact, rounded in zip(double, chain, strict=True):
        exact.load_state_dict(rounded.state_dict())
    x = torch.eye(4, dtype=torch.float64)[:, :, None, None]
    bias = double[1](double[0](torch.zeros(1, 4, 1, 1, dtype=torch.float64))).flatten()
    weight = (double[1](double[0](x)).flatten(1) - bias).T
    fold_neighbours(chain, ["0", "1"])
    torch.testing.assert_close(chain[0].weight.flatten(1), weight.half(), rtol=0, atol=0)
    torch.testing.assert_close(chain[0].bias, bias.half(), rtol=0, atol=0)
    assert not chain[0].weight.requires_grad
    assert not chain[1].training
