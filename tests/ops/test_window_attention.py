from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vizoo import ops
from vizoo.backbones.layers import larger, smaller
from vizoo.ops import gpu, window_attention
from vizoo.ops.window_attention import function, tiles
from vizoo.ops.window_attention.function import FLOPS

Pair = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """One use of the operator. `tile` shrinks the tiles, so that even tiny windows are walked over tile by tile."""

    map: Pair
    window: Pair
    shift: Pair = (0, 0)
    heads: int = 1
    d: int = 16
    batch: int = 1
    bias: bool = True
    cosine: bool = False
    padding: bool = False
    tile: int | None = None

    def __str__(self) -> str:
        parts = [
            "x".join(map(str, self.map)),
            "w" + "x".join(map(str, self.window)),
            "s" + "x".join(map(str, self.shift)),
            f"b{self.batch}h{self.heads}d{self.d}",
        ]
        parts += [name for name in ("bias", "cosine", "padding") if getattr(self, name)]
        return "-".join(parts) + (f"-tile{self.tile}" if self.tile else "")

    def tensors(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Inputs whose logits are a few units wide. The cosine scale stays in float32, as models keep it."""
        n = self.window[0] * self.window[1]
        wide = torch.promote_types(dtype, torch.float32)
        tensors = {"qkv": 1.5 * torch.randn(self.batch, *self.map, 3, self.heads, self.d)}
        if self.bias:
            tensors["bias"] = torch.randn(self.heads, n, n)
        if self.cosine:
            tensors["cosine_scale"] = 1 + 9 * torch.rand(self.heads)
        if self.padding:
            tensors["padding"] = torch.randn(3, self.heads, self.d)
        return {k: v.to(device, wide if k == "cosine_scale" else dtype) for k, v in tensors.items()}

    def call(self, implementation: Any = None) -> Any:
        def run(tensors: dict[str, Tensor]) -> Tensor:
            return window_attention(**tensors, window=self.window, shift=self.shift, implementation=implementation)

        return run

    def plain(self, tensors: dict[str, Tensor]) -> Tensor:
        return textbook(**tensors, window=self.window, shift=self.shift)


def textbook(
    qkv: Tensor,
    bias: Tensor | None = None,
    cosine_scale: Tensor | None = None,
    padding: Tensor | None = None,
    *,
    window: Pair,
    shift: Pair,
) -> Tensor:
    """Window attention as models write it: pad, roll, partition, mask, and products in the dtype of the input."""
    B, H, W, _, h, d = qkv.shape
    (wh, ww), (sh, sw) = window, shift
    Hp, Wp = -(-H // wh) * wh, -(-W // ww) * ww
    full = qkv.new_zeros(B, Hp, Wp, 3, h, d) if padding is None else padding.to(qkv.dtype).expand(B, Hp, Wp, 3, h, d)
    full = torch.cat([torch.cat([qkv, full[:, :H, W:]], 2), full[:, H:]], 1).roll((-sh, -sw), (1, 2))
    q, k, v = partition(full.flatten(3), window).unflatten(-1, (3, h, d)).permute(2, 0, 3, 1, 4)
    if cosine_scale is None:
        logits = q * d**-0.5 @ k.mT
    else:
        logits = F.normalize(q, dim=-1, eps=1e-12) @ F.normalize(k, dim=-1, eps=1e-12).mT
        logits = logits * cosine_scale.to(q.dtype)[:, None, None]
    if bias is not None:
        logits = logits + bias
    label = torch.zeros(1, Hp, Wp, 1, device=qkv.device)
    for i, rows in enumerate((slice(0, Hp - wh), slice(Hp - wh, Hp - sh), slice(Hp - sh, Hp))):
        for j, cols in enumerate((slice(0, Wp - ww), slice(Wp - ww, Wp - sw), slice(Wp - sw, Wp))):
            label[:, rows, cols] = 3 * i + j
    label = partition(label, window)[..., 0]
    mask = -100.0 * (label[:, :, None] != label[:, None, :])
    logits = logits + mask.to(q.dtype).repeat(B, 1, 1)[:, None]
    out = (logits.softmax(-1) @ v).transpose(1, 2)
    out = out.reshape(B, Hp // wh, Wp // ww, wh, ww, h, d).transpose(2, 3).reshape(B, Hp, Wp, h, d)
    return out.roll((sh, sw), (1, 2))[:, :H, :W]


def partition(x: Tensor, window: Pair) -> Tensor:
    B, H, W, C = x.shape
    x = x.reshape(B, H // window[0], window[0], W // window[1], window[1], C)
    return x.transpose(2, 3).reshape(-1, window[0] * window[1], C)


def by_hand(
    qkv: Tensor,
    bias: Tensor | None = None,
    cosine_scale: Tensor | None = None,
    padding: Tensor | None = None,
    *,
    window: Pair,
    shift: Pair,
) -> Tensor:
    """The definition position by position, without a roll: which key does which query see, and with what logit?"""
    B, H, W, _, h, d = qkv.shape
    size = tuple(-(-a // b) * b for a, b in zip((H, W), window, strict=True))

    def vector(y: int, x: int, part: int) -> Tensor:
        if y < H and x < W:
            return qkv[:, y, x, part]
        return torch.zeros(B, h, d, dtype=qkv.dtype) if padding is None else padding[part].expand(B, h, d)

    def region(rolled: int, axis: int) -> int:
        return (rolled >= size[axis] - window[axis]) + (rolled >= size[axis] - shift[axis])

    def similarity(q: Tensor, k: Tensor) -> Tensor:
        if cosine_scale is None:
            return (q * k).sum(-1) * d**-0.5
        return (q * k).sum(-1) / q.norm(dim=-1).clamp_min(1e-12) / k.norm(dim=-1).clamp_min(1e-12) * cosine_scale

    out = qkv.new_empty(B, H, W, h, d)
    for y, x in itertools.product(range(H), range(W)):
        rolled = (y - shift[0]) % size[0], (x - shift[1]) % size[1]
        corner = tuple(r // w * w for r, w in zip(rolled, window, strict=True))
        logits, values = [], []
        for place, (ky, kx) in enumerate(itertools.product(range(window[0]), range(window[1]))):
            key = corner[0] + ky, corner[1] + kx
            at = (key[0] + shift[0]) % size[0], (key[1] + shift[1]) % size[1]
            logit = similarity(vector(y, x, 0), vector(*at, 1))
            if bias is not None:
                logit = logit + bias[:, (rolled[0] - corner[0]) * window[1] + rolled[1] - corner[1], place]
            if any(region(rolled[axis], axis) != region(key[axis], axis) for axis in (0, 1)):
                logit = logit - 100
            logits.append(logit)
            values.append(vector(*at, 2))
        out[:, y, x] = (torch.stack(logits).softmax(0)[..., None] * torch.stack(values)).sum(0)
    return out


TINY = [
    Case((5, 7), (3, 4), (1, 2), heads=2, batch=2, padding=True),
    Case((5, 7), (3, 4), (2, 1), heads=2, cosine=True, padding=True),
    Case((6, 9), (2, 3), (0, 2), d=24, bias=False),
    Case((8, 4), (4, 4), (1, 0), d=24, cosine=True, bias=False),
    Case((4, 4), (4, 4), (2, 2)),
    Case((2, 3), (4, 4), (3, 2), padding=True),  # padding reaches into the last window but one after the roll
    Case((5, 3), (4, 4), (2, 2), heads=2),  # beyond the map are zeros
]
TILED = [
    Case((6, 7), (5, 5), (2, 1), heads=2, d=24, padding=True, tile=16),
    Case((5, 10), (5, 5), (0, 2), cosine=True, tile=16),
    Case((4, 4), (5, 5), (1, 1), cosine=True, padding=True, tile=16, bias=False),
    Case((4, 8), (4, 8), (2, 4), batch=2, bias=False, tile=16),
]
LARGE = [
    Case((28, 28), (7, 7), (3, 3), heads=3, d=32, batch=4),
    Case((25, 42), (7, 7), (3, 3), heads=3, d=32, batch=2, padding=True),
    Case((16, 24), (8, 8), (4, 4), heads=2, d=32, batch=2, cosine=True),
    Case((30, 20), (12, 12), (6, 6), heads=2, d=32, batch=2, padding=True),
    Case((32, 32), (16, 16), (8, 8), heads=2, d=32, batch=2, cosine=True),
    Case((50, 40), (24, 24), (12, 12), heads=2, d=32, cosine=True, padding=True),
    Case((33, 32), (32, 32), (16, 16), heads=1, d=32, bias=False),
    Case((20, 40), (4, 32), (2, 7), heads=2, d=64, padding=True),
    *[Case((14, 14), (7, 7), (3, 3), heads=2, d=d, cosine=d == 96) for d in (16, 24, 48, 64, 96, 128)],
    *[Case((20, 20), (10, 10), (5, 5), heads=2, d=d, cosine=d == 24) for d in (16, 24, 48, 64, 96, 128)],
]
SMALL = [*TINY, *TILED]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
KERNEL = [*SMALL, *[pytest.param(case, marks=pytest.mark.gpu, id=str(case)) for case in LARGE]]


@pytest.fixture
def tiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrinks the tiles where the test's case asks for it."""
    side = request.getfixturevalue("case").tile
    if side is not None:
        monkeypatch.setattr(tiles, "WHOLE_LIMIT", 0)
        monkeypatch.setattr(tiles, "tiled", lambda d, itemsize: tiles.Tile(side, side, warps=4, stages=1, per_sm=4))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_reference_is_the_definition(case: Case) -> None:
    tensors = case.tensors(torch.float64)
    expected = by_hand(**tensors, window=case.window, shift=case.shift)
    torch.testing.assert_close(case.call("reference")(tensors), expected)
    torch.testing.assert_close(case.plain(tensors), expected)


@pytest.mark.parametrize("case", [Case((3, 5), (2, 3), (1, 1), d=2, padding=True, cosine=c) for c in (False, True)])
def test_reference_gradients(case: Case, checks: Any) -> None:
    checks.gradients(case.call("reference"), case.tensors(torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", KERNEL, ids=str)
@pytest.mark.usefixtures("tiled")
def test_kernels(case: Case, dtype: torch.dtype, device: torch.device, checks: Any) -> None:
    tensors = case.tensors(dtype, device)
    checks.factor_two(case.call("triton"), case.plain, case.call("reference"), tensors)


@pytest.mark.parametrize("case", [TINY[1], TILED[2]], ids=str)
@pytest.mark.usefixtures("tiled")
def test_kernels_take_any_strides(case: Case, device: torch.device, checks: Any) -> None:
    tensors = case.tensors(torch.float32, device)
    incoming = torch.randn(case.batch, *case.map, case.heads, case.d, device=device)
    expected = checks.values_and_gradients(case.call("triton"), tensors, incoming)
    spread = {name: checks.scattered(tensor) for name, tensor in tensors.items()}
    leaves = {name: tensor.requires_grad_() for name, tensor in spread.items()}
    out = case.call("triton")(leaves)
    gradients = torch.autograd.grad(out, list(leaves.values()), checks.scattered(incoming))
    for name, value in zip(("output", *leaves), (out, *gradients), strict=True):
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("case", [TINY[0], TINY[3], TILED[1]], ids=str)
@pytest.mark.usefixtures("tiled")
def test_operator_is_registered_well(case: Case, device: torch.device) -> None:
    tensors = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float32, device).items()}
    optional = [tensors.get(name) for name in ("bias", "cosine_scale", "padding")]
    torch.library.opcheck(function._forward, (tensors["qkv"], *optional, case.window, case.shift, 0.25))


def test_gradients_nobody_asked_for_are_not_computed(device: torch.device) -> None:
    case = Case((4, 4), (3, 3), (1, 1), padding=True)
    tensors = case.tensors(torch.float32, device)
    all_of_them = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    case.call("triton")(all_of_them).sum().backward()
    tensors["qkv"].requires_grad_()
    case.call("triton")(tensors).sum().backward()
    torch.testing.assert_close(tensors["qkv"].grad, all_of_them["qkv"].grad, rtol=0, atol=0)
    assert tensors["bias"].grad is None


def registered(tensors: dict[str, Tensor], case: Case) -> Tensor:
    optional = [tensors.get(name) for name in ("bias", "cosine_scale", "padding")]
    return torch.ops.vizoo.window_attention(tensors["qkv"], *optional, case.window, case.shift, case.d**-0.5)[0]


@pytest.mark.parametrize("case", [TINY[0], TINY[3], TILED[1]], ids=str)
@pytest.mark.usefixtures("tiled")
def test_direct_launch_equals_the_registered_operator(case: Case, device: torch.device, checks: Any) -> None:
    tensors = case.tensors(torch.float32, device)
    incoming = torch.randn(case.batch, *case.map, case.heads, case.d, device=device)
    direct = checks.values_and_gradients(case.call("triton"), tensors, incoming)
    for name, value in checks.values_and_gradients(lambda x: registered(x, case), tensors, incoming).items():
        torch.testing.assert_close(direct[name], value, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(case.call("triton")(tensors), direct["output"], rtol=0, atol=0)


def test_tracers_see_the_registered_operator(device: torch.device) -> None:
    case = Case((4, 4), (4, 4))
    traced = make_fx(lambda qkv: window_attention(qkv, window=4, implementation="triton"))
    assert "torch.ops.vizoo.window_attention" in traced(case.tensors(torch.float32, device)["qkv"]).code


@pytest.mark.parametrize("direct", [True, False])
def test_second_derivative_is_refused(direct: bool, device: torch.device) -> None:
    case = Case((2, 2), (2, 2), bias=False)
    tensors = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float32, device).items()}
    out = case.call("triton")(tensors) if direct else registered(tensors, case)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"once_differentiable|autograd formula"):
        torch.autograd.grad(out.square().sum(), tensors["qkv"], create_graph=True)[0].sum().backward()


class Severed(torch.autograd.Function):
    """Hands on its input, and no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> None:
        return None


@pytest.mark.parametrize("direct", [True, False])
def test_no_gradient_gives_none(direct: bool, device: torch.device) -> None:
    case = Case((2, 2), (2, 2), bias=False)
    tensors = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float32, device).items()}
    out = case.call("triton")(tensors) if direct else registered(tensors, case)
    Severed.apply(out).sum().backward()
    assert tensors["qkv"].grad is None


def test_kernels_mix_dtypes(device: torch.device) -> None:
    """Under autocast the projection gives halves, while parameters stay in float32."""
    case = Case((4, 5), (3, 3), (1, 1), padding=True)
    tensors = case.tensors(torch.float32, device)
    half = {name: tensor.half() if name == "qkv" else tensor for name, tensor in tensors.items()}
    leaves = {name: tensor.requires_grad_() for name, tensor in half.items()}
    out = case.call("triton")(leaves)
    out.float().square().sum().backward()
    assert out.dtype == torch.float16
    assert {name: leaf.grad.dtype for name, leaf in leaves.items()} == {name: x.dtype for name, x in half.items()}
    torch.testing.assert_close(out.float(), case.call("reference")(tensors), rtol=0, atol=4e-3)


@pytest.mark.parametrize("case", [Case((6, 6), (5, 5), (2, 2)), Case((6, 6), (5, 5), (2, 2), tile=16)], ids=str)
@pytest.mark.usefixtures("tiled")
def test_large_logits_stay_finite_in_half_precision(case: Case, device: torch.device) -> None:
    tensors = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float16, device).items()}
    with torch.no_grad():
        tensors["qkv"][..., :2, :, :] = torch.randn_like(tensors["qkv"][..., :2, :, :]).sign() * 60**0.5 / 2
    out = case.call("triton")(tensors)
    out.sum().backward()
    exact = case.call("reference")({name: tensor.detach().double() for name, tensor in tensors.items()})
    assert (out.double() - exact).norm() < 2e-3 * exact.norm()
    assert all(tensor.grad.isfinite().all() for tensor in tensors.values())


def test_empty_batch(device: torch.device) -> None:
    case = Case((4, 5), (3, 3), (1, 1), batch=0, padding=True)
    for implementation in ("reference", "triton"):
        tensors = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float32, device).items()}
        out = case.call(implementation)(tensors)
        out.sum().backward()
        assert out.shape == (0, 4, 5, 1, 16)
        assert tensors["qkv"].grad.shape == (0, 4, 5, 3, 1, 16)


class Block(nn.Module):
    """A projection and window attention; like Swin's classification model, no shift where one window covers a side."""

    def __init__(self, shrink: bool = False) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.shrink = shrink

    def forward(self, x: Tensor) -> Tensor:
        side = smaller(x.shape[1], x.shape[2])
        window = smaller(4, side) if self.shrink else 4
        shift = 2 * smaller(1, larger(0, side - 4))
        place = torch.arange(window * window, dtype=x.dtype, device=x.device)
        bias = torch.sin(place[:, None] - 0.3 * place).expand(2, -1, -1)
        padding = self.project.bias.view(3, 2, 4)
        qkv = self.project(x).unflatten(-1, (3, 2, 4))
        return window_attention(qkv, bias, window=window, shift=shift, padding=padding).flatten(3)


SIZES = [(2, 8, 9), (1, 4, 4), (1, 3, 4), (3, 4, 9), (1, 3, 7), (2, 12, 12), (1, 5, 5)]


@pytest.mark.parametrize("shrink", [False, True])
def test_export_keeps_sizes_and_shift_free(shrink: bool) -> None:
    block = Block(shrink).eval()
    free = {axis: torch.export.Dim(name, min=1) for axis, name in enumerate(("batch", "height", "width"))}
    exported = torch.export.export(block, (torch.randn(2, 8, 9, 8),), dynamic_shapes=(free,)).module()
    for size in SIZES:
        x = torch.randn(*size, 8)
        torch.testing.assert_close(exported(x), block(x))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_compiles_without_graph_breaks(implementation: Any, device: torch.device) -> None:
    torch.compiler.reset()
    block = Block().to(device)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    with ops.use(implementation):
        for size in SIZES[:3]:
            x = torch.randn(*size, 8, device=device)
            out = compiled(x)
            torch.testing.assert_close(out, block(x))
            gradient = torch.autograd.grad(out.square().sum(), block.project.weight)
            torch.testing.assert_close(gradient, torch.autograd.grad(block(x).square().sum(), block.project.weight))


@pytest.mark.gpu
def test_compiles_with_inductor_on_the_gpu() -> None:
    torch.compiler.reset()
    block, x = Block().cuda(), torch.randn(2, 8, 9, 8, device="cuda")
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x))


@pytest.mark.gpu
def test_backward_needs_little_memory() -> None:
    case = Case((56, 56), (7, 7), (3, 3), heads=3, d=32, batch=64)
    tensors = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.bfloat16, "cuda").items()}
    out = case.call("triton")(tensors)
    incoming = torch.randn_like(out)
    torch.cuda.synchronize()
    needed = 2 * sum(tensor.nbytes for tensor in tensors.values()) + 2 * out.nbytes
    base = torch.cuda.memory_allocated()
    del out
    torch.cuda.reset_peak_memory_stats()
    out = case.call("triton")(tensors)
    torch.autograd.backward(out, incoming)
    inputs = sum(tensor.nbytes for tensor in tensors.values()) + incoming.nbytes
    peak = torch.cuda.max_memory_allocated() - (base - inputs - out.nbytes)
    assert peak <= 1.05 * needed


@pytest.mark.parametrize("case", [Case((5, 7), (3, 4), (1, 2), heads=2, padding=True)], ids=str)
def test_operations_are_counted(case: Case, device: torch.device) -> None:
    counts = []
    for implementation in ("reference", "triton"):
        tensors = case.tensors(torch.float32, device)
        # Torch has no count for its fused attention on a CPU.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            case.call(implementation)(tensors)
        counts.append(counter.get_total_flops())
    windows, n = 2 * 2, 12
    assert counts == [2 * 2 * windows * case.heads * n * n * case.d] * 2


QKV = torch.randn(1, 4, 4, 3, 2, 8)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"qkv must be floating point, got torch\.int64", {"qkv": QKV.long()}),
        (ValueError, r"must have the shape \(B, H, W, 3, heads, d\), got \(1, 4, 4, 3, 16\)", {"qkv": QKV.flatten(4)}),
        (ValueError, r"qkv must have .*, got \(1, 4, 4, 2, 2, 8\)", {"qkv": QKV[:, :, :, :2]}),
        (ValueError, r"give one of them, got both", {"scale": 1.0, "cosine_scale": torch.ones(2)}),
        (ValueError, r"window must be at least 1 a side, got 0 columns", {"window": (2, 0)}),
        (ValueError, r"window must be one number or \(rows, columns\), got \(2, 2, 2\)", {"window": (2, 2, 2)}),
        (ValueError, r"shift must satisfy 0 <= shift < window, got shift 2 for 2 columns", {"shift": (1, 2)}),
        (ValueError, r"shift must satisfy 0 <= shift < window, got shift -1 for 2 rows", {"shift": -1}),
        (ValueError, r"bias must have the shape .* = \(2, 4, 4\), got \(2, 3, 3\)", {"bias": torch.ones(2, 3, 3)}),
        (ValueError, r"cosine_scale must .* \(heads,\) = \(2,\), got \(3,\)", {"cosine_scale": torch.ones(3)}),
        (ValueError, r"padding must have the shape .* = \(3, 2, 8\), got \(3, 16\)", {"padding": torch.ones(3, 16)}),
        (ValueError, r"bias must be on the device of qkv, cpu, got meta", {"bias": torch.ones(2, 4, 4, device="meta")}),
    ],
)  # fmt: skip
def test_refuses_what_breaks_a_rule(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        window_attention(**{"qkv": QKV, "window": 2, **arguments})


def test_explains_what_the_kernels_cannot_take() -> None:
    def reasons(qkv: Tensor, window: Any = 2) -> str:
        return "; ".join(ops.explain(window_attention, qkv, window=window)["triton"])

    assert "float16, bfloat16 and float32, the input is torch.float64" in reasons(QKV.double())
    assert "may have 1024 positions, this has 33 x 32" in reasons(QKV, (33, 32))
    assert "may have 128 channels, this has 144" in reasons(torch.zeros(1, 4, 4, 3, 1, 144))
    assert "one image of qkv" in reasons(torch.zeros(1, device="meta").expand(1, 2**14, 2**14, 3, 1, 8))
    assert "the interpreter has no bfloat16" in reasons(QKV.bfloat16())
    assert ops.explain(window_attention, QKV, window=2)["reference"] == []


def test_device_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"implementation 'triton' cannot run: .* need an NVIDIA GPU"):
        window_attention(QKV, window=2, implementation="triton")
    monkeypatch.setattr(gpu, "TRITON_INSTALLED", False)
    assert ops.explain(window_attention, QKV, window=2)["triton"] == ["triton is not installed"]
