from __future__ import annotations

import importlib.util
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from vizoo import ops
from vizoo.ops import gpu, neighborhood_attention
from vizoo.ops.neighborhood_attention import function, tiles
from vizoo.ops.neighborhood_attention.function import FLOPS
from vizoo.ops.neighborhood_attention.tiles import Tile

HERE = Path(__file__).resolve().parent
GOLDENS = json.loads((HERE / "goldens" / "neighborhood_attention.json").read_text())["cases"]
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One use of the operator. `places` shrinks tiles and blocks, so that even tiny maps have several."""

    space: Sizes
    kernel: int | Sizes
    dilation: int | Sizes = 1
    stride: int | Sizes = 1
    causal: bool | tuple[bool, ...] = False
    heads: int = 1
    d: int = 16
    batch: int = 1
    bias: bool = True
    packed: bool = True
    places: int | None = 16

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.space)), f"k{self.kernel}", f"b{self.batch}h{self.heads}d{self.d}"]
        for name, usual in (("dilation", 1), ("stride", 1), ("causal", False)):
            if getattr(self, name) != usual:
                parts.append(f"{name}{getattr(self, name)}")
        parts += [name for name in ("bias", "packed") if getattr(self, name)]
        return "-".join(parts).replace(" ", "").replace(",", "_").translate({40: None, 41: None})

    @property
    def sizes(self) -> dict[str, Any]:
        """What the operator takes beside tensors."""
        return {"kernel_size": self.kernel, "dilation": self.dilation, "stride": self.stride, "causal": self.causal}

    def each(self, value: Any) -> tuple[Any, ...]:
        return value if isinstance(value, tuple) else (value,) * len(self.space)

    @property
    def axes(self) -> list[tuple[int, int, int, int, bool]]:
        """Length, kernel size, dilation, stride and causality of each axis."""
        return list(zip(self.space, *map(self.each, self.sizes.values()), strict=True))

    def tensors(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Inputs whose logits are a few units wide."""
        shape = self.heads, self.d
        if self.packed:
            tensors = {"query": 1.5 * torch.randn(self.batch, *self.space, 3, *shape)}
        else:
            names = "query", "key", "value"
            tensors = {name: 1.5 * torch.randn(self.batch, *self.space, *shape) for name in names}
        if self.bias:
            tensors["bias"] = torch.randn(self.heads, *(2 * K - 1 for K in self.each(self.kernel)))
        return {name: tensor.to(device, dtype) for name, tensor in tensors.items()}

    def call(self, implementation: Any = None) -> Any:
        return lambda tensors: neighborhood_attention(**tensors, **self.sizes, implementation=implementation)

    def plain(self, tensors: dict[str, Tensor]) -> Tensor:
        return textbook(self, **tensors)


def neighbors(i: int, L: int, K: int, dilation: int, stride: int, causal: bool) -> list[int]:
    """Positions of an axis that position i attends to, word by word as the operator is defined."""
    group = [j for j in range(L) if j % dilation == i % dilation]
    p = group.index(i)
    together = range(p // stride * stride, p // stride * stride + stride)
    if causal:
        leader = min(together[-1], len(group) - 1)
        return [group[j] for j in range(p + 1) if leader - j < K]
    leader = min(together[stride // 2], len(group) - 1)
    start = leader - K // 2
    while start < 0:
        start += 1
    while start + K > len(group):
        start -= 1
    return group[start : start + K]


def by_hand(
    case: Case, query: Tensor, key: Tensor | None = None, value: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """The definition position by position: which keys does which query see, and with what logit?"""
    if key is None or value is None:
        query, key, value = query.unbind(-3)
    space, d = query.shape[1:-2], query.shape[-1]
    axes = case.axes
    out = torch.empty_like(value)
    for place in itertools.product(*map(range, space)):
        logits, values = [], []
        for other in itertools.product(*(neighbors(i, *axis) for i, axis in zip(place, axes, strict=True))):
            logit = (query[(slice(None), *place)] * key[(slice(None), *other)]).sum(-1) * d**-0.5
            if bias is not None:
                offset = [(j - i) // axis[2] + axis[1] - 1 for i, j, axis in zip(place, other, axes, strict=True)]
                logit = logit + bias[(slice(None), *offset)]
            logits.append(logit)
            values.append(value[(slice(None), *other)])
        out[(slice(None), *place)] = (torch.stack(logits).softmax(0)[..., None] * torch.stack(values)).sum(0)
    return out


def textbook(
    case: Case, query: Tensor, key: Tensor | None = None, value: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Plain torch in the dtype of the input: full attention of the map, and a mask made from `neighbors`."""
    if key is None or value is None:
        query, key, value = query.unbind(-3)
    B, *space, h, d = query.shape
    axes = len(space)
    mask = torch.ones((1,) * 2 * axes, dtype=torch.bool)
    index = torch.zeros((1,) * 2 * axes, dtype=torch.long)
    for axis, (L, K, dilation, *rest) in enumerate(case.axes):
        seen = torch.tensor([[j in neighbors(i, L, K, dilation, *rest) for j in range(L)] for i in range(L)])
        offset = torch.arange(L)[None, :] // dilation - torch.arange(L)[:, None] // dilation + K - 1
        shape = [1] * 2 * axes
        shape[axis] = shape[axes + axis] = L
        mask = mask & seen.view(shape)
        index = index * (2 * K - 1) + offset.clamp(0, 2 * K - 2).view(shape)
    n = math.prod(space)
    q, k, v = (x.reshape(B, n, h, d).transpose(1, 2) for x in (query, key, value))
    logits = q * d**-0.5 @ k.mT
    if bias is not None:
        logits = logits + bias.flatten(1)[:, index.expand(*space, *space).reshape(n, n).to(bias.device)]
    logits = logits.masked_fill(~mask.expand(*space, *space).reshape(n, n).to(query.device), float("-inf"))
    return (logits.softmax(-1) @ v).transpose(1, 2).reshape(B, *space, h, d)


TINY = [
    Case((7, 10), 3, heads=2, batch=2),
    Case((6, 7), (5, 3), (1, 2), d=24, packed=False),
    Case((5, 5), 5, bias=False),  # each query sees the whole map
    Case((9, 7), (4, 3), (2, 1), (3, 2), bias=False),
    Case((7, 6), (3, 4), 1, (1, 4), (True, False), heads=2),
    Case((19,), 6, 2, 3, d=40),
    Case((37,), 5, 1, 3, True, packed=False),
    Case((23,), 2, heads=2, batch=2),
    Case((4, 5, 6), (3, 2, 3), (1, 1, 2), (1, 2, 1), (True, False, False)),
    Case((3, 4, 5), (1, 3, 5), bias=False, packed=False),
]
LARGE = [
    Case((56, 56), 7, heads=2, d=32, batch=4, places=None),
    Case((28, 28), 7, heads=4, d=32, batch=4, places=None),
    Case((14, 14), 7, heads=8, d=32, batch=4, places=None),
    Case((56, 56), 7, 8, heads=2, d=32, batch=2, places=None),
    Case((25, 42), 7, (3, 6), heads=3, d=32, batch=2, places=None, packed=False),
    Case((33, 29), 7, heads=2, d=32, bias=False, places=None),
    Case((64, 48), 13, heads=2, d=64, places=None),
    Case((40, 40), 11, (1, 3), heads=2, d=48, places=None),
    Case((30, 41), (6, 8), 1, (2, 3), (False, True), heads=2, d=32, places=None),
    Case((32, 32), 16, 1, 16, heads=2, d=32, places=None),
    Case((500,), 65, 2, heads=2, d=64, batch=2, places=None),
    Case((300,), 32, 1, 8, True, heads=2, d=32, places=None, packed=False),
    Case((8, 14, 14), (3, 7, 7), (2, 1, 1), heads=2, d=32, places=None),
    Case((6, 11, 13), (3, 5, 4), (1, 2, 1), (1, 1, 2), (True, False, False), heads=2, d=32, places=None),
    *[Case((20, 20), 7, heads=2, d=d, places=None) for d in (16, 24, 48, 64, 96, 128)],
]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
KERNEL = [*TINY, *[pytest.param(case, marks=pytest.mark.gpu, id=str(case)) for case in LARGE]]


@pytest.fixture(autouse=True)
def tiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Shrinks the tiles where the test's case asks for it."""
    case = request.node.callspec.params.get("case") if hasattr(request.node, "callspec") else None
    if isinstance(case, Case) and case.places is not None:
        monkeypatch.setattr(tiles, "places", lambda d, itemsize: case.places)
        monkeypatch.setattr(tiles, "FEWEST_IMAGES", 1)
    tiles.tiled.cache_clear()
    yield
    tiles.tiled.cache_clear()


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    """The module that makes the inputs of official outputs and compares with them."""
    spec = importlib.util.spec_from_file_location("vizoo_parity_ops", HERE.parent / "parity" / "parity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((8, 3, 1, 1, False), ["012", "012", "123", "234", "345", "456", "567", "567"]),
        ((8, 4, 1, 1, False), ["0123", "0123", "0123", "1234", "2345", "3456", "4567", "4567"]),
        ((8, 4, 1, 2, False), ["0123", "0123", "1234", "1234", "3456", "3456", "4567", "4567"]),
        ((8, 3, 1, 3, False), ["012", "012", "012", "345", "345", "345", "567", "567"]),
        ((9, 3, 2, 1, False), ["024", "135", "024", "135", "246", "357", "468", "357", "468"]),
        ((8, 4, 1, 2, True), ["0", "01", "012", "0123", "234", "2345", "456", "4567"]),
        ((7, 3, 2, 1, True), ["0", "1", "02", "13", "024", "135", "246"]),
    ],
    ids=str,
)
def test_loops_see_the_published_neighbors(sizes: Any, expected: list[str]) -> None:
    assert ["".join(map(str, neighbors(i, *sizes))) for i in range(sizes[0])] == expected


@pytest.mark.parametrize("case", TINY, ids=str)
def test_reference_is_the_definition(case: Case) -> None:
    tensors = case.tensors(torch.float64)
    expected = by_hand(case, **tensors)
    torch.testing.assert_close(case.call("reference")(tensors), expected)
    torch.testing.assert_close(case.plain(tensors), expected)


def test_reference_is_the_definition_on_any_sizes() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(40):
        axes = draw(1, 3)
        kernel = tuple(draw(1, 5) for _ in range(axes))
        dilation = tuple(draw(1, 3) for _ in range(axes))
        space = tuple(K * d + draw(0, (20, 3, 1)[axes - 1]) for K, d in zip(kernel, dilation, strict=True))
        stride = tuple(draw(1, K) for K in kernel)
        causal = tuple(draw(0, 2) == 0 for _ in range(axes))
        case = Case(space, kernel, dilation, stride, causal, d=2)
        tensors = case.tensors(torch.float64)
        assert (case.call("reference")(tensors) - case.plain(tensors)).abs().max() < 1e-12, case


@pytest.mark.parametrize("golden", GOLDENS, ids=[golden["name"] for golden in GOLDENS])
def test_official_outputs(golden: dict[str, Any], parity: ModuleType, device: torch.device) -> None:
    made = {name: parity.image(value["shape"], value["seed"]).to(device) for name, value in golden["inputs"].items()}
    given = golden["args"]
    arguments = {
        "query": made["q"],
        "key": made["k"],
        "value": made["v"],
        "extra_key": made.get("additional_keys"),
        "extra_value": made.get("additional_values"),
        **{name: given[name] for name in ("kernel_size", "dilation", "stride")},
        "causal": [bool(flag) for flag in given["is_causal"]],
    }
    exact = {key: value.double() if isinstance(value, Tensor) else value for key, value in arguments.items()}
    parity.check(golden, "out", neighborhood_attention(**exact, implementation="reference").cpu(), rtol=1e-6)
    reasons = ops.explain(neighborhood_attention, **arguments)["triton"]
    assert bool(reasons) == (golden["name"] in ("na2d_extra_kv", "na2d_gqa"))
    if not reasons:
        parity.check(golden, "out", neighborhood_attention(**arguments, implementation="triton").cpu(), rtol=1e-5)


@pytest.mark.parametrize(
    "case",
    [Case((4, 5), 3, d=2, heads=2), Case((5,), 2, 2, 2, True, d=2), Case((2, 3, 3), (2, 3, 2), d=1, packed=False)],
    ids=str,
)
def test_reference_gradients(case: Case, checks: Any) -> None:
    checks.gradients(case.call("reference"), case.tensors(torch.float64))


def test_gradients_of_grouped_heads_and_extra_keys(checks: Any) -> None:
    shapes = {"query": (1, 4, 4, 2), "key": (1, 4, 2, 2), "value": (1, 4, 2, 3), "extra_key": (1, 2, 2, 2)}
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    tensors["extra_value"] = torch.randn(1, 2, 2, 3, dtype=torch.float64)
    checks.gradients(lambda tensors: neighborhood_attention(**tensors, kernel_size=3), tensors)


def test_heads_of_keys_and_extra_keys_by_hand() -> None:
    """Query head i takes keys of head i * heads_kv // heads, and extra keys in the same softmax."""
    q, k, v = torch.randn(1, 3, 4, 2), torch.randn(1, 3, 2, 2), torch.randn(1, 3, 2, 5)
    more_k, more_v = torch.randn(1, 2, 2, 2), torch.randn(1, 2, 2, 5)
    out = neighborhood_attention(q, k, v, kernel_size=3, scale=0.3, extra_key=more_k, extra_value=more_v)
    for head in range(4):
        keys, values = torch.cat((k, more_k), 1)[0, :, head // 2], torch.cat((v, more_v), 1)[0, :, head // 2]
        expected = (q[0, :, head] * 0.3 @ keys.mT).softmax(-1) @ values
        torch.testing.assert_close(out[0, :, head], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", KERNEL, ids=str)
def test_kernels(case: Case, dtype: torch.dtype, device: torch.device, checks: Any) -> None:
    tensors = case.tensors(dtype, device)
    checks.factor_two(case.call("triton"), case.plain, case.call("reference"), tensors)


@pytest.mark.parametrize(
    "case",
    [
        Case((12, 11), 7, batch=2, d=32),
        Case((19, 13), 5, (2, 1), causal=(False, True), packed=False, bias=False),
        Case((2, 11, 9), (2, 5, 3), d=24),
    ],
    ids=str,
)
def test_keys_in_two_blocks(case: Case, device: torch.device, checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A box of keys a little larger than a block takes a second one of few rows."""
    chosen = []

    def whole(*arguments: Any) -> Tile | None:
        chosen.append(before(*arguments))
        return chosen[-1]

    before = tiles.whole
    monkeypatch.setattr(tiles, "whole", whole)
    checks.factor_two(case.call("triton"), case.plain, case.call("reference"), case.tensors(torch.float16, device))
    assert any(tile is not None and tile.more for tile in chosen)


@pytest.mark.parametrize("keys", [1, 16, 49, 80, 100, 128, 140, 257])
def test_blocks_cover_the_keys_of_a_tile(keys: int) -> None:
    for block, more in tiles.covers(keys):
        assert block + more >= keys
        assert all(part & (part - 1) == 0 and (part >= 16 or part == 0) for part in (block, more))
    assert list(tiles.covers(140)) == [(256, 0), (128, 16)]


@pytest.mark.parametrize(
    ("case", "turns"),
    [
        (Case((11, 11), 3, heads=2, batch=2), True),
        (Case((5, 19), (3, 2), (1, 2), d=24, packed=False), True),
        (Case((22, 6), 3, (2, 1), causal=(False, True), bias=False), True),  # of both groups the last rows are few
        (Case((21, 6), 3, (2, 1)), True),  # of one group none are left
        (Case((2, 9, 9), (2, 3, 3)), False),
    ],
    ids=str,
)
def test_tiles_of_the_last_rows_turn(
    case: Case, turns: bool, device: torch.device, checks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of 8 x 4 queries leave few rows at the end, which have tiles of 4 x 8; others stay as they are."""
    tile = Tile((1, 8, 4), (1, 1, 1), warps=2, stages=2, keys=256, turns=turns)
    before = tiles.whole
    monkeypatch.setattr(tiles, "whole", lambda kind, *sizes: tile if kind == "forward" else before(kind, *sizes))
    checks.factor_two(case.call("triton"), case.plain, case.call("reference"), case.tensors(torch.float16, device))


def test_last_rows_turn_where_that_saves_tiles() -> None:
    assert tiles.whole("forward", (1, 28, 28), (1, 7, 7), 32, 2).turns
    assert not tiles.whole("forward", (1, 56, 56), (1, 7, 7), 32, 2).turns
    assert tiles._waste((1, 8, 4), (1, 28, 28), True) == 25 * 32 / 784  # three rows of seven tiles, and four wide ones


@pytest.mark.parametrize("scale", [0.0, -0.5, 0.3])
def test_any_scale(scale: float, device: torch.device) -> None:
    """What is added to logits is divided by a scale only if that is safe."""
    case = TINY[0]
    tensors = case.tensors(torch.float16, device)
    output, expected = (
        neighborhood_attention(**tensors, **case.sizes, scale=scale, implementation=name)
        for name in ("triton", "reference")
    )
    torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("stack", [1, 2])
def test_tiles_of_a_stack_are_tiles(stack: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = TINY[0].tensors(torch.float16, device)
    tile = Tile((1, 2, 8), (1, 1, 1), warps=stack, stages=2, stack=stack, keys=64)
    monkeypatch.setattr(tiles, "whole", lambda *arguments: tile)
    output = TINY[0].call("triton")(tensors)
    torch.testing.assert_close(output, TINY[0].call("reference")(tensors), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("fewest", [1, 9])
def test_gradient_of_the_bias_is_the_same_alone(
    fewest: int, device: torch.device, checks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few images have it made by a kernel of its own, many beside the gradient of the queries."""
    monkeypatch.setattr(tiles, "FEWEST_IMAGES", fewest)
    case = Case((7, 10), 3, (2, 1), heads=2, batch=5)
    checks.factor_two(case.call("triton"), case.plain, case.call("reference"), case.tensors(torch.float16, device))


def test_shares_of_images_fill_the_gpu() -> None:
    for programs, images, places in itertools.product((1, 7, 56, 224, 5000), (1, 8, 128), (1, 264, 396)):
        count = tiles.shares(programs, images, places)
        assert 1 <= count <= images
        rounds = math.ceil(programs * count / places)
        assert rounds * math.ceil(images / count) <= math.ceil(programs / places) * images
    assert tiles.shares(56, 128, 264) == 4  # one round of 224 programs; 5 shares would wait for 16 of a second


@pytest.mark.parametrize("case", [TINY[1], TINY[5]], ids=str)
def test_kernels_take_any_strides(case: Case, device: torch.device, checks: Any) -> None:
    tensors = case.tensors(torch.float32, device)
    incoming = torch.randn(case.batch, *case.space, case.heads, case.d, device=device)
    expected = checks.values_and_gradients(case.call("triton"), tensors, incoming)
    spread = {name: checks.scattered(tensor) for name, tensor in tensors.items()}
    leaves = {name: tensor.requires_grad_() for name, tensor in spread.items()}
    out = case.call("triton")(leaves)
    gradients = torch.autograd.grad(out, list(leaves.values()), checks.scattered(incoming))
    for name, value in zip(("output", *leaves), (out, *gradients), strict=True):
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_packed_projection_gets_one_gradient(device: torch.device) -> None:
    """Equal to that of three tensors, and in one piece."""
    case = Case((5, 6), 3)
    tensors = case.tensors(torch.float32, device)
    packed = tensors["query"].requires_grad_()
    apart = [x.detach().contiguous().requires_grad_() for x in packed.unbind(-3)]
    for inputs in ([packed], apart):
        neighborhood_attention(
            *inputs, **case.sizes, bias=tensors["bias"], implementation="triton"
        ).square().sum().backward()
    assert packed.grad.is_contiguous()
    torch.testing.assert_close(packed.grad, torch.stack([x.grad for x in apart], -3), rtol=0, atol=0)


def arguments(tensors: dict[str, Tensor], case: Case) -> tuple[Any, ...]:
    """What the registered operator takes."""
    sizes = (list(case.each(value)) for value in case.sizes.values())
    return (*(tensors.get(name) for name in ("query", "key", "value", "bias")), *sizes, case.d**-0.5)


def registered(tensors: dict[str, Tensor], case: Case) -> Tensor:
    return torch.ops.vizoo.neighborhood_attention(*arguments(tensors, case))[0]


SMALL = [Case((4, 5), 3), Case((5,), 2, 2, 2, True, packed=False), Case((2, 3, 3), (2, 3, 1), bias=False)]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_operator_is_registered_well(case: Case, device: torch.device) -> None:
    tensors = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float32, device).items()}
    torch.library.opcheck(function._forward, arguments(tensors, case))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_direct_launch_equals_the_registered_operator(case: Case, device: torch.device, checks: Any) -> None:
    tensors = case.tensors(torch.float32, device)
    incoming = torch.randn(case.batch, *case.space, case.heads, case.d, device=device)
    direct = checks.values_and_gradients(case.call("triton"), tensors, incoming)
    for name, value in checks.values_and_gradients(lambda x: registered(x, case), tensors, incoming).items():
        torch.testing.assert_close(direct[name], value, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(case.call("triton")(tensors), direct["output"], rtol=0, atol=0)


def test_gradients_nobody_asked_for_are_not_computed(device: torch.device) -> None:
    case = Case((4, 4), 3)
    tensors = case.tensors(torch.float32, device)
    all_of_them = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    case.call("triton")(all_of_them).sum().backward()
    tensors["query"].requires_grad_()
    case.call("triton")(tensors).sum().backward()
    torch.testing.assert_close(tensors["query"].grad, all_of_them["query"].grad, rtol=0, atol=0)
    assert tensors["bias"].grad is None


def test_tracers_see_the_registered_operator(device: torch.device) -> None:
    traced = make_fx(lambda query: neighborhood_attention(query, kernel_size=3, implementation="triton"))
    code = traced(Case((4, 4), 3).tensors(torch.float32, device)["query"]).code
    assert "torch.ops.vizoo.neighborhood_attention" in code


@pytest.mark.parametrize("direct", [True, False])
def test_second_derivative_is_refused(direct: bool, device: torch.device) -> None:
    case = Case((3,), 3, bias=False)
    tensors = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float32, device).items()}
    out = case.call("triton")(tensors) if direct else registered(tensors, case)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"once_differentiable|autograd formula"):
        torch.autograd.grad(out.square().sum(), tensors["query"], create_graph=True)[0].sum().backward()


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
    case = Case((3,), 3, bias=False)
    tensors = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float32, device).items()}
    out = case.call("triton")(tensors) if direct else registered(tensors, case)
    Severed.apply(out).sum().backward()
    assert tensors["query"].grad is None


def test_kernels_mix_dtypes(device: torch.device) -> None:
    """Under autocast the projection gives halves, while the bias stays in float32."""
    case = Case((4, 5), 3)
    tensors = case.tensors(torch.float32, device)
    leaves = {"query": tensors["query"].half().requires_grad_(), "bias": tensors["bias"].clone().requires_grad_()}
    out = case.call("triton")(leaves)
    out.float().square().sum().backward()
    assert out.dtype == torch.float16
    assert leaves["query"].grad.dtype == torch.float16
    assert leaves["bias"].grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), case.call("reference")(tensors), rtol=0, atol=1e-2)


def test_large_logits_stay_finite_in_half_precision(device: torch.device) -> None:
    case = Case((5, 6), 3)
    tensors = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float16, device).items()}
    with torch.no_grad():
        tensors["query"][..., :2, :, :] = torch.randn_like(tensors["query"][..., :2, :, :]).sign() * 60**0.5 / 2
    out = case.call("triton")(tensors)
    out.sum().backward()
    exact = case.call("reference")({name: tensor.detach().double() for name, tensor in tensors.items()})
    assert (out.double() - exact).norm() < 2e-3 * exact.norm()
    assert all(tensor.grad.isfinite().all() for tensor in tensors.values())


def test_empty_batch(device: torch.device) -> None:
    case = Case((4, 5), 3, batch=0)
    for implementation in ("reference", "triton"):
        tensors = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float32, device).items()}
        out = case.call(implementation)(tensors)
        out.sum().backward()
        assert out.shape == (0, 4, 5, 1, 16)
        assert tensors["query"].grad.shape == (0, 4, 5, 3, 1, 16)
        assert not tensors["bias"].grad.any()


class Block(nn.Module):
    """A projection and neighborhood attention, with windows of 3 x 3 at a distance of 2."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.bias = nn.Parameter(torch.randn(2, 5, 5))
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.project(x).unflatten(-1, (3, 2, 4))
        return neighborhood_attention(qkv, kernel_size=3, dilation=self.dilation, bias=self.bias).flatten(3)


SIZES = [(2, 8, 7), (1, 6, 6), (3, 17, 9), (1, 6, 19)]


@pytest.mark.parametrize("dilation", [1, 2])
def test_export_keeps_sizes_free(dilation: int) -> None:
    block = Block(dilation).eval()
    free = {0: torch.export.Dim("batch", min=1)}
    free |= {axis: torch.export.Dim(name, min=3 * dilation) for axis, name in ((1, "height"), (2, "width"))}
    exported = torch.export.export(block, (torch.randn(2, 17, 9, 8),), dynamic_shapes=(free,)).module()
    for size in SIZES:
        x = torch.randn(*size, 8)
        torch.testing.assert_close(exported(x), block(x))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_compiles_without_graph_breaks(implementation: Any, device: torch.device) -> None:
    torch.compiler.reset()
    block = Block(2).to(device)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    with ops.use(implementation):
        for size in SIZES[:2]:
            x = torch.randn(*size, 8, device=device)
            out = compiled(x)
            torch.testing.assert_close(out, block(x))
            gradient = torch.autograd.grad(out.square().sum(), block.bias)
            torch.testing.assert_close(gradient, torch.autograd.grad(block(x).square().sum(), block.bias))


@pytest.mark.gpu
def test_compiles_with_inductor_on_the_gpu() -> None:
    torch.compiler.reset()
    block, x = Block(2).cuda(), torch.randn(2, 8, 9, 8, device="cuda")
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x))


@pytest.mark.gpu
def test_backward_needs_little_memory() -> None:
    case = Case((56, 56), 7, heads=2, d=32, batch=64, places=None)
    tensors = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.bfloat16, "cuda").items()}
    incoming = torch.randn_like(case.call("triton")(tensors))
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = case.call("triton")(tensors)
    torch.autograd.backward(out, incoming)
    needed = sum(tensor.nbytes for tensor in tensors.values()) + out.nbytes  # gradients and output
    assert torch.cuda.max_memory_allocated() - base <= 1.25 * needed


def test_operations_are_counted(device: torch.device) -> None:
    case = Case((5, 7), (3, 5), heads=2)
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        case.call("triton")(case.tensors(torch.float32, device))
    assert counter.get_total_flops() == 2 * 2 * (5 * 7) * 2 * (3 * 5) * 16


PACKED = torch.randn(1, 4, 6, 3, 2, 8)
Q, KV = torch.randn(1, 4, 6, 4, 8), torch.randn(1, 4, 6, 2, 8)


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (TypeError, r"query must be floating point, got torch\.int64", {"query": PACKED.long()}),
        (ValueError, r"without key and value must have the shape \(B, \*space, 3, heads, d\) .* \(1, 4, 6, 2, 2, 8\)",
         {"query": PACKED[:, :, :, :2]}),
        (ValueError, r"query must have the shape \(B, \*space, heads, d\) with 1 to 3 axes of space, got \(1, 2, 8\)",
         {"query": KV[:, 0, 0], "key": KV, "value": KV}),
        (ValueError, r"key and value come together: value is given, key is not", {"value": KV}),
        (ValueError, r"extra_key and extra_value come together: extra_key is given", {"extra_key": KV}),
        (ValueError, r"key must have the shape of the queries with heads_kv heads = \(1, 4, 6, 2, 8\), got \(1, 4, 5,",
         {"query": Q, "key": KV[:, :, :5], "value": KV}),
        (ValueError, r"value must have the shape of the queries .*, got \(1, 4, 6, 1, 8\)",
         {"query": Q, "key": KV, "value": KV[..., :1, :]}),
        (ValueError, r"heads of the queries must be a multiple of those of the keys, got 4 and 3",
         {"query": Q, "key": Q[..., :3, :], "value": Q[..., :3, :]}),
        (ValueError, r"kernel_size must be one for all axes or one for each of 2, got \(3,\)", {"kernel_size": (3,)}),
        (ValueError, r"kernel_size and dilation must be at least 1, got 0 and 1 for axis 1", {"kernel_size": (1, 0)}),
        (ValueError, r"kernel_size and dilation must be at least 1, got 3 and 0 for axis 0", {"dilation": 0}),
        (ValueError, r"stride must satisfy 1 <= stride <= kernel_size, got 4 of 3 for axis 0", {"stride": 4}),
        (ValueError, r"may not exceed the map: 3 \* 2 > 4 on axis 0 of space; the largest dilation here is 1",
         {"dilation": 2}),
        (ValueError, r"may not exceed the map: 5 \* 1 > 4 .*; pad it to 5, or take a kernel_size of at most 4",
         {"kernel_size": 5}),
        (ValueError, r"bias must have the shape \(heads, .*\) = \(2, 5, 5\), got \(2, 3\)", {"bias": torch.ones(2, 3)}),
        (ValueError, r"bias must be on the device of query, cpu, got meta",
         {"bias": torch.ones(2, 5, 5, device="meta")}),
        (ValueError, r"extra_key must have the shape \(B, L, heads_kv, d\) = \(1, 5, 2, 8\), got \(1, 5, 1, 8\)",
         {"extra_key": torch.ones(1, 5, 1, 8), "extra_value": torch.ones(1, 5, 2, 8)}),
        (ValueError, r"extra_value must have the shape .* = \(1, 5, 2, 8\), got \(1, 4, 2, 8\)",
         {"extra_key": torch.ones(1, 5, 2, 8), "extra_value": torch.ones(1, 4, 2, 8)}),
    ],
)  # fmt: skip
def test_refuses_what_breaks_a_rule(error: type[Exception], message: str, given: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        neighborhood_attention(**{"query": PACKED, "kernel_size": 3, **given})


def test_explains_what_the_kernels_cannot_take() -> None:
    def reasons(*tensors: Tensor, **given: Any) -> str:
        return "; ".join(ops.explain(neighborhood_attention, *tensors, kernel_size=3, **given)["triton"])

    assert "float16, bfloat16 and float32, the input is torch.float64" in reasons(PACKED.double())
    assert "may have 128 channels, this has 144" in reasons(torch.zeros(1, 4, 4, 3, 1, 144))
    assert "of one image may have 2**31 - 1" in reasons(torch.zeros(1, device="meta").expand(1, 2**14, 2**14, 3, 1, 8))
    assert "the interpreter has no bfloat16" in reasons(PACKED.bfloat16())
    assert "as many heads of keys as of queries, not 2 and 4" in reasons(Q, KV, KV)
    assert "values as wide as keys, not 4 and 8 channels" in reasons(Q, Q, Q[..., :4])
    assert "take one dtype, not torch.float32, torch.float16 and torch.float32" in reasons(Q, Q.half(), Q)
    assert "no extra keys" in reasons(PACKED, extra_key=KV[:, 0], extra_value=KV[:, 0])
    assert reasons(PACKED) == ""
    assert ops.explain(neighborhood_attention, PACKED, kernel_size=3)["reference"] == []


def test_device_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"implementation 'triton' cannot run: .* need an NVIDIA GPU"):
        neighborhood_attention(PACKED, kernel_size=3, implementation="triton")
    monkeypatch.setattr(gpu, "TRITON_INSTALLED", False)
    assert ops.explain(neighborhood_attention, PACKED, kernel_size=3)["triton"] == ["triton is not installed"]
