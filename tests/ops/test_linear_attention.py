from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vizoo.ops import FlowConservation, KernelSum, MeanSubtraction, linear_attention

Tensors = dict[str, Tensor]
RULES = [MeanSubtraction(), KernelSum(), KernelSum(floor=2.0), FlowConservation()]


@dataclass(frozen=True)
class Case:
    """Sizes of an input, the rule, and what is given besides: `grid` asks for kernels of each image."""

    batch: int
    N: int
    heads: int
    d: int
    e: int = 0
    rule: Any = RULES[0]
    temperature: bool = False
    position: bool = False
    grid: tuple[int, int] | None = None

    def __str__(self) -> str:
        parts = [type(self.rule).__name__, f"b{self.batch}n{self.N}h{self.heads}d{self.d}e{self.e or self.d}"]
        parts += ["floor"] if getattr(self.rule, "floor", None) else []
        parts += [name for name in ("temperature", "position", "grid") if getattr(self, name)]
        return "-".join(parts)

    def tensors(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensors:
        generator = torch.Generator().manual_seed(1)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator)

        tokens, e = (self.batch, self.N, self.heads), self.e or self.d
        tensors = {"q": draw(*tokens, self.d), "k": draw(*tokens, self.d) + 0.2, "v": draw(*tokens, e) + 0.5}
        if self.temperature:
            tensors["temperature"] = draw(self.heads)
        if self.position:
            tensors["key_position"] = draw(self.N, self.heads, self.d)
        if self.grid:
            tensors["local_kernels"] = draw(self.batch, self.heads, e, 3, 3)
        return {name: tensor.to(dtype).to(device) for name, tensor in tensors.items()}

    def call(self, implementation: Any = None) -> Callable[[Tensors], Tensor]:
        return lambda tensors: linear_attention(
            **tensors, rule=self.rule, grid=self.grid, implementation=implementation
        )

    def definition(self) -> Callable[[Tensors], Tensor]:
        return lambda tensors: by_hand(self, **tensors)


def by_hand(
    case: Case,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor | None = None,
    key_position: Tensor | None = None,
    local_kernels: Tensor | None = None,
) -> Tensor:
    """With the weight of every token for every other one."""
    k = k if key_position is None else k + key_position
    weights = torch.stack([torch.stack([_weights(q[b, :, h], k[b, :, h], case.rule) for h in range(case.heads)])
                           for b in range(case.batch)])  # fmt: skip
    out = torch.einsum("bhij,bjhe->bihe", weights, v)
    if temperature is not None:
        out = out * temperature[:, None]
    if local_kernels is not None and case.grid is not None:
        out = out + _local(case, v, local_kernels)
    return out


def _weights(q: Tensor, k: Tensor, rule: Any) -> Tensor:
    """(queries, keys) of one head, as the papers write them."""
    N, d = q.shape
    if isinstance(rule, MeanSubtraction):
        scores = q @ k.T * ((d**-0.5 if rule.scale is None else rule.scale) / N)
        return scores - scores.mean(1, keepdim=True) + 1 / N
    if isinstance(rule, KernelSum):
        scores = q.relu() @ k.relu().T
        total = scores.sum(1, keepdim=True)
        return scores / (total + rule.epsilon if rule.floor is None else total.clamp(min=rule.floor))
    e, q, k = rule.epsilon, q.sigmoid(), k.sigmoid()
    incoming = torch.stack([1 / ((q[i] + e).dot(sum(k) + e) + e) for i in range(N)])
    outgoing = torch.stack([1 / ((k[j] + e).dot(sum(q) + e) + e) for j in range(N)])
    conserved_sink = torch.stack([(q[i] + e).dot(sum(k[j] * outgoing[j] for j in range(N)) + e) + e for i in range(N)])
    conserved_source = torch.stack(
        [(k[j] + e).dot(sum(q[i] * incoming[i] for i in range(N)) + e) + e for j in range(N)]
    )
    competition = N * conserved_source.clamp(-1, 1).softmax(0)
    return (conserved_sink.sigmoid() * incoming)[:, None] * (q @ k.T) * competition


def _local(case: Case, v: Tensor, kernels: Tensor) -> Tensor:
    """Pixel by pixel."""
    H, W = case.grid
    out, leading = torch.zeros_like(v), case.N - H * W
    for y in range(H):
        for x in range(W):
            for row in range(max(0, y - 1), min(H, y + 2)):
                for column in range(max(0, x - 1), min(W, x + 2)):
                    taps = kernels[..., row - y + 1, column - x + 1]
                    out[:, leading + y * W + x] += taps * v[:, leading + row * W + column]
    return out


PLAIN = [Case(2, 13, 2, 3, 5), Case(1, 1, 1, 4), Case(1, 13, 2, 3, temperature=True, position=True, grid=(4, 3)),
         Case(2, 6, 2, 2, grid=(1, 6)), Case(1, 7, 2, 2, grid=(7, 1), position=True)]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_reference_is_the_definition(case: Case, rule: Any) -> None:
    case = replace(case, rule=rule)
    tensors = case.tensors(torch.float64)
    out = case.call("reference")(tensors)
    torch.testing.assert_close(out, case.definition()(tensors))
    assert out.is_contiguous()
    assert out.dtype == torch.float64


@pytest.mark.parametrize("rule", [*RULES, MeanSubtraction(scale=3.0), FlowConservation(epsilon=0.3)], ids=str)
def test_reference_gradients(rule: Any, checks: Any) -> None:
    case = Case(1, 5, 2, 2, 3, rule=rule, temperature=True, position=True, grid=(2, 2))
    checks.gradients(case.call("reference"), case.tensors(torch.float64))
