from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vizoo import ops
from vizoo.ops import channel_attention, gpu
from vizoo.ops.channel_attention import function, tiles
from vizoo.ops.channel_attention.function import FLOPS

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes of an input: images, positions, groups, channels of a group. Logits are `spread` wide."""

    batch: int
    positions: int
    groups: int
    d: int
    scale: float | None = None
    spread: float = 2.0

    def tensors(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensors:
        generator = torch.Generator().manual_seed(1)
        qkv = torch.randn(self.batch, self.positions, 3, self.groups, self.d, generator=generator)
        size = max(1, self.positions) ** 0.5 * (self.d**-0.5 if self.scale is None else self.scale)
        qkv[:, :, 1] *= self.spread / size
        return {"qkv": qkv.to(dtype).to(device)}

    def call(self, implementation: Any) -> Callable[[Tensors], Tensor]:
        return lambda tensors: channel_attention(tensors["qkv"], scale=self.scale, implementation=implementation)


def by_hand(qkv: Tensor, scale: float | None = None) -> Tensor:
    q, k, v = qkv.unbind(2)
    factor = qkv.shape[-1] ** -0.5 if scale is None else scale
    weights = torch.einsum("bngi,bngj->bgij", k, v).mul(factor).softmax(-1)
    return torch.einsum("bgij,bngj->bngi", weights, q)


SMALL = [
    Case(2, 35, 3, 32),
    Case(1, 1, 1, 16),
    Case(1, 7, 2, 24),
    Case(3, 64, 1, 16, scale=0.3),
    Case(2, 33, 1, 64),
    Case(1, 130, 2, 48),
    Case(2, 5, 3, 4),
    Case(1, 1100, 1, 32),
]
LARGE = [
    Case(8, 3136, 3, 32),
    Case(64, 196, 12, 32),
    Case(128, 49, 24, 32),
    Case(1, 16701, 3, 32),
    Case(2, 4000, 4, 64),
    Case(1, 785, 48, 24),
]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
KERNEL = [*SMALL, *[pytest.param(case, marks=pytest.mark.gpu, id=str(case)) for case in LARGE]]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_reference_is_the_definition(case: Case) -> None:
    tensors = case.tensors(torch.float64)
    torch.testing.assert_close(case.call("reference")(tensors), by_hand(**tensors, scale=case.scale))


def test_reference_gradients(checks: Any) -> None:
    case = Case(2, 5, 2, 4)
    checks.gradients(case.call("reference"), case.tensors(torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", KERNEL, ids=str)
def test_kernels(case: Case, dtype: torch.dtype, device: torch.device, checks: Any) -> None:
    reference = case.call("reference")  # which keeps logits and softmax in float32 for every dtype
    checks.factor_two(case.call("triton"), reference, reference, case.tensors(dtype, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", [Case(2, 75, 2, 24), Case(1, 160, 1, 32), Case(1, 97, 3, 16)], ids=str)
def test_images_are_summed_in_chunks(
    case: Case, dtype: torch.dtype, device: torch.device, checks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "chunk", lambda *sizes: 32)
    monkeypatch.setattr(tiles, "products", lambda d, itemsize: tiles.Tile(16, tiles.power_of_two(d), warps=2))
    monkeypatch.setattr(tiles, "PARTS", 2)
    reference = case.call("reference")
    checks.factor_two(case.call("triton"), reference, reference, case.tensors(dtype, device))


@pytest.mark.parametrize("positions", [1, 49, 196, 3136, 66800])
@pytest.mark.parametrize("pairs", [1, 6, 24, 263, 264, 3072])
def test_chunks_fill_the_machine(positions: int, pairs: int) -> None:
    length = tiles.chunk(positions, pairs, 64, 132)
    chunks = -(-positions // length)
    assert length % 64 == 0
    assert chunks == 1 or pairs < 264
    assert pairs * chunks <= 2 * 4 * 132 or chunks == 1
    assert pairs * chunks >= 2 * 132 or length < 2 * 4 * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernels_take_any_strides(dtype: torch.dtype, device: torch.device, checks: Any) -> None:
    case = Case(2, 19, 2, 24)
    tensors = case.tensors(dtype, device)
    incoming = torch.randn(2, 19, 2, 24, device=device).to(dtype)
    expected = checks.values_and_gradients(case.call("triton"), tensors, incoming)
    leaf = checks.scattered(tensors["qkv"]).requires_grad_()
    out = channel_attention(leaf, implementation="triton")
    (gradient,) = torch.autograd.grad(out, leaf, checks.scattered(incoming))
    torch.testing.assert_close(out, expected["output"], rtol=0, atol=0)
    torch.testing.assert_close(gradient, expected["qkv"], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_logits_exceed_half_precision(implementation: Any, dtype: torch.dtype, device: torch.device) -> None:
    # The logits lie around 72,000: beyond float16, and bfloat16 would round away what distinguishes the channels.
    qkv = (10 + torch.randn(1, 4096, 3, 1, 32) / 100).to(dtype).to(device)
    with torch.autocast(device.type, dtype=dtype):
        out = channel_attention(qkv, implementation=implementation)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), by_hand(qkv.double()), rtol=0, atol=0.05)


@pytest.mark.parametrize("powers", [(12, 6, -6, -6), (-18, -8, -20, 14)], ids=["large", "small"])
def test_gradients_of_logits_exceed_half_precision(powers: tuple[int, ...], device: torch.device) -> None:
    """They are sums over positions, beyond or below float16 though the gradient of the keys is well within."""
    incoming, *sizes = (2.0**power for power in powers)
    qkv = torch.randn(1, 600, 3, 1, 16, generator=torch.Generator().manual_seed(1))
    qkv = (qkv * torch.tensor(sizes)[:, None, None]).half().to(device).requires_grad_()
    out = channel_attention(qkv, implementation="triton")
    signs = out.detach().sign()
    (gradient,) = torch.autograd.grad(out, qkv, signs * incoming)
    wide = qkv.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(by_hand(wide), wide, signs.double() * incoming)
    assert gradient.isfinite().all()
    found, wanted = gradient[:, :, 1].double(), exact[:, :, 1]
    assert (found - wanted).norm() <= 5e-3 * wanted.norm()


@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 8), (2, 0, 3, 2, 8)])
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_empty_input(implementation: Any, shape: tuple[int, ...], device: torch.device) -> None:
    qkv = torch.randn(shape, device=device, requires_grad=True)
    out = channel_attention(qkv, implementation=implementation)
    out.sum().backward()
    assert out.shape == (*shape[:2], *shape[3:])
    assert torch.equal(qkv.grad, torch.zeros_like(qkv))


def test_second_derivative_is_refused(device: torch.device) -> None:
    qkv = torch.randn(1, 9, 3, 1, 16, device=device, requires_grad=True)
    out = channel_attention(qkv, implementation="triton")
    (gradient,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("gradient", [True, False])
def test_operator_is_registered_well(gradient: bool, dtype: torch.dtype, device: torch.device) -> None:
    qkv = Case(2, 9, 2, 24).tensors(dtype, device)["qkv"].requires_grad_(gradient)
    torch.library.opcheck(function._forward, (qkv, 0.2))


def test_the_short_way_equals_the_registered_operator(device: torch.device, checks: Any) -> None:
    case = Case(2, 40, 2, 24, scale=0.2)
    tensors, incoming = case.tensors(torch.float32, device), torch.randn(2, 40, 2, 24, device=device)
    short = checks.values_and_gradients(case.call("triton"), tensors, incoming)
    long = checks.values_and_gradients(
        lambda leaves: torch.ops.vizoo.channel_attention(leaves["qkv"], 0.2)[0], tensors, incoming
    )
    for name, value in long.items():
        torch.testing.assert_close(short[name], value, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(case.call("triton")(tensors), long["output"], rtol=0, atol=0)


def test_whoever_looks_on_sees_the_registered_operator(device: torch.device) -> None:
    qkv = torch.randn(1, 9, 3, 1, 16, device=device)
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda x: channel_attention(x, implementation="triton"))(qkv)
    assert "torch.ops.vizoo.channel_attention" in traced.code
    torch.testing.assert_close(traced(qkv), channel_attention(qkv, implementation="triton"), rtol=0, atol=0)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        qkv = self.project(x).view(batch, height * width, 3, 2, channels // 2)
        return channel_attention(qkv).reshape(x.shape)


SIZES = [(2, 8, 9), (1, 4, 4), (3, 1, 7), (1, 1, 1)]


def test_exports_with_free_sizes() -> None:
    block = Block().eval()
    free = {axis: torch.export.Dim(name, min=1) for axis, name in enumerate(("batch", "height", "width"))}
    exported = torch.export.export(block, (torch.randn(2, 8, 9, 32),), dynamic_shapes=(free,)).module()
    for size in SIZES:
        x = torch.randn(*size, 32)
        torch.testing.assert_close(exported(x), block(x))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_compiles_without_graph_breaks(implementation: Any, device: torch.device) -> None:
    torch.compiler.reset()
    block = Block().to(device)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    with ops.use(implementation):
        for size in SIZES[:3]:
            x = torch.randn(*size, 32, device=device)
            out, expected = compiled(x), block(x)
            torch.testing.assert_close(out, expected)
            gradient = torch.autograd.grad(out.square().sum(), block.project.weight)
            torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), block.project.weight))


@pytest.mark.gpu
def test_compilers_get_the_kernels() -> None:
    torch.compiler.reset()
    graphs: list[str] = []

    def look(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module.code)
        return module

    block, x = Block().cuda(), torch.randn(2, 8, 9, 32, device="cuda")
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend=look)(x), block(x))
    assert "vizoo.channel_attention" in graphs[0]
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x), rtol=1e-4, atol=1e-5)


def test_operations_are_counted(device: torch.device) -> None:
    case = Case(2, 35, 3, 16)
    counts = []
    for implementation in ("reference", "triton"):
        qkv = case.tensors(torch.float32, device)["qkv"].requires_grad_()
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            channel_attention(qkv, implementation=implementation).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts == [(2 + 4) * 2 * 2 * 35 * 3 * 16 * 16] * 2


QKV = torch.randn(1, 4, 3, 2, 8)


@pytest.mark.parametrize(
    ("error", "message", "qkv"),
    [
        (TypeError, r"qkv must be floating point, got torch\.int64", QKV.long()),
        (ValueError, r"must have the shape \(B, N, 3, groups, d\) .*, got \(1, 4, 3, 16\)", QKV.flatten(3)),
        (ValueError, r"must have the shape \(B, N, 3, groups, d\) .*, got \(1, 4, 2, 2, 8\)", QKV[:, :, :2]),
        (ValueError, r"with a group and a channel at least, got \(1, 4, 3, 2, 0\)", QKV[..., :0]),
    ],
)
def test_refuses_what_breaks_a_rule(error: type[Exception], message: str, qkv: Tensor) -> None:
    with pytest.raises(error, match=message):
        channel_attention(qkv)


def test_explains_what_the_kernels_cannot_take() -> None:
    def reasons(qkv: Tensor) -> str:
        return "; ".join(ops.explain(channel_attention, qkv)["triton"])

    assert "float16, bfloat16 and float32, the input is torch.float64" in reasons(QKV.double())
    assert "a group may have 64 channels, this has 65" in reasons(torch.zeros(1, 4, 3, 1, 65))
    one = torch.zeros(1, device="meta")
    assert "one image of qkv may have" in reasons(one.expand(1, 2**26, 3, 1, 16))
    assert "the output may have 2**31 - 1 vectors" in reasons(one.expand(2**20, 2**11, 3, 1, 1))
    assert "the interpreter has no bfloat16" in reasons(QKV.bfloat16())
    assert ops.explain(channel_attention, QKV)["reference"] == []


def test_device_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"channel_attention: implementation 'triton' cannot run: .* need an NVIDIA"):
        channel_attention(QKV, implementation="triton")
    monkeypatch.setattr(gpu, "TRITON_INSTALLED", False)
    assert ops.explain(channel_attention, QKV)["triton"] == ["triton is not installed"]
