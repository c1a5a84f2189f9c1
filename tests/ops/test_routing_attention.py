from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from vizoo import ops
from vizoo.ops import region_affinity, region_routes, routing_attention
from vizoo.ops.routing_attention import function, launch, reference, tiles
from vizoo.ops.routing_attention.function import FLOPS

Pair = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """One use of the operator. `pooled` is the map of keys and values, if not that of the queries.

    `tile` shrinks the tiles, so that even tiny regions are walked over tile by tile, and takes them for large ones.
    """

    map: Pair
    region: Pair
    k: int = 2
    heads: int = 1
    d: int = 16
    e: int | None = None
    batch: int = 1
    packed: bool = True
    pooled: Pair | None = None
    per_head: bool = False
    weights: bool = False
    tile: int | None = None

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.map)), "r" + "x".join(map(str, self.region))]
        parts.append(f"k{self.k}b{self.batch}h{self.heads}d{self.d}" + (f"e{self.e}" if self.e else ""))
        parts += ["p" + "x".join(map(str, self.pooled))] if self.pooled else []
        return "-".join([*parts, *(n for n in ("packed", "per_head", "weights") if getattr(self, n))]) + (
            f"-tile{self.tile}" if self.tile else ""
        )

    @property
    def regions(self) -> int:
        return -(-self.map[0] // self.region[0]) * -(-self.map[1] // self.region[1])

    def tensors(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Inputs whose logits are a few units wide."""
        if self.packed:
            tensors = {"query": 1.5 * torch.randn(self.batch, *self.map, 3, self.heads, self.d)}
        else:
            keys = (self.batch, *(self.pooled or self.map), self.heads)
            tensors = {
                "query": 1.5 * torch.randn(self.batch, *self.map, self.heads, self.d),
                "key": 1.5 * torch.randn(*keys, self.d),
                "value": torch.randn(*keys, self.e or self.d),
            }
        if self.weights:
            tensors["route_weights"] = torch.rand(self.table) + 0.2
        return {name: tensor.to(device, dtype) for name, tensor in tensors.items()}

    @property
    def table(self) -> tuple[int, ...]:
        return (self.batch, *((self.heads,) if self.per_head else ()), self.regions, self.k)

    def routes(self) -> Tensor:
        """Different regions for each query region, the same ones at each call; some are nobody's, some are many's."""
        order = torch.rand(*self.table[:-1], self.regions, generator=torch.Generator().manual_seed(1))
        order[..., 0] += 0.5
        return order.topk(self.k).indices

    def call(self, implementation: Any = None) -> Any:
        def run(tensors: dict[str, Tensor]) -> Tensor:
            routes = self.routes().to(tensors["query"].device)
            return routing_attention(**tensors, routes=routes, region_size=self.region, implementation=implementation)

        return run

    def plain(self, tensors: dict[str, Tensor]) -> Tensor:
        return self.call("reference")(tensors)


def by_hand(query: Tensor, key: Tensor, value: Tensor, routes: Tensor, region: Pair, weights: Tensor | None) -> Tensor:
    """The definition query by query: which positions does it see, and with what logit?"""
    B, H, W, heads, d = query.shape
    down, across = -(-H // region[0]), -(-W // region[1])
    same = key.shape[1:3] == query.shape[1:3]
    rows, cols = region if same else (key.shape[1] // down, key.shape[2] // across)
    out = query.new_empty(B, H, W, heads, value.shape[-1])
    for b, y, x, head in itertools.product(*map(range, (B, H, W, heads))):
        place = y // region[0] * across + x // region[1]
        row = (b, place) if routes.ndim == 3 else (b, head, place)
        logits, values = [], []
        for slot, target in enumerate(routes[row].tolist()):
            for i, j in itertools.product(range(rows), range(cols)):
                ky, kx = target // across * rows + i, target % across * cols + j
                if ky < key.shape[1] and kx < key.shape[2]:
                    factor = 1.0 if weights is None else weights[(*row, slot)]
                    logits.append((query[b, y, x, head] * key[b, ky, kx, head]).sum() * factor * d**-0.5)
                    values.append(value[b, ky, kx, head] * factor)
                else:
                    logits.append(query.new_zeros(()))
                    values.append(torch.zeros_like(value[b, 0, 0, head]))
        out[b, y, x, head] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


ROUTED = [
    Case((4, 6), (2, 3), k=1, heads=2, batch=2),
    Case((4, 6), (2, 2), k=3, heads=2, per_head=True),
    Case((5, 7), (2, 3), k=4, d=24),  # regions are cut short by the border
    Case((5, 4), (3, 3), k=2, heads=2, d=24, e=40, packed=False),
    Case((6, 6), (3, 3), k=3, packed=False, pooled=(4, 2), e=16),
    Case((4, 6), (2, 3), k=2, heads=2, weights=True),
    Case((5, 6), (2, 3), k=3, heads=2, packed=False, per_head=True, weights=True),
]
LARGE_REGIONS = [
    Case((5, 8), (3, 4), k=2, heads=2, d=24, tile=16),
    Case((8, 8), (4, 8), k=1, d=16, e=8, packed=False, pooled=(4, 4), weights=True, tile=16),
]
DENSE = [
    Case((6, 6), (1, 2), k=5, heads=2, d=24, batch=2),
    Case((5, 7), (2, 2), k=6, e=24, packed=False, per_head=True, heads=2),
    Case((4, 6), (2, 2), k=6, packed=False, pooled=(2, 6)),
]
SMALL = [*ROUTED, *LARGE_REGIONS, *DENSE]
LARGE = [
    Case((56, 56), (8, 8), k=1, heads=2, d=32, batch=2),
    Case((28, 28), (4, 4), k=4, heads=4, d=32, batch=2),
    Case((14, 14), (2, 2), k=16, heads=8, d=32, batch=4),
    Case((14, 14), (2, 2), k=16, heads=2, d=32, batch=2, packed=False, per_head=True, weights=True),
    Case((7, 7), (1, 1), k=16, heads=3, d=32, batch=2),
    Case((30, 41), (5, 6), k=5, heads=2, d=32, batch=2),
    Case((20, 21), (3, 3), k=4, heads=2, d=32, e=48, packed=False, per_head=True, weights=True),
    Case((64, 80), (9, 11), k=16, heads=2, d=32),
    Case((64, 64), (16, 16), k=3, heads=2, d=32, packed=False, pooled=(16, 32), weights=True),
    Case((56, 56), (8, 8), k=1, heads=2, d=32, packed=False, pooled=(14, 14)),
    Case((28, 28), (4, 4), k=4, heads=2, d=32, packed=False, pooled=(14, 14)),
    Case((14, 14), (2, 2), k=16, heads=2, d=32, packed=False, pooled=(7, 7)),
    *[Case((32, 32), (8, 8), k=3, heads=2, d=d) for d in (16, 24, 48, 64, 96, 128)],
    *[Case((28, 28), (4, 4), k=3, heads=2, d=d, packed=False) for d in (16, 24, 48, 64, 96, 128)],
    *[Case((7, 7), (1, 1), k=16, heads=2, d=d) for d in (16, 24, 48, 64, 96, 128)],
]
KERNEL = [*SMALL, *[pytest.param(case, marks=pytest.mark.gpu, id=str(case)) for case in LARGE]]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def shrunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends a test's case to the kernels it is for."""
    case = request.node.callspec.params.get("case") if hasattr(request.node, "callspec") else None
    if case is not None and case not in DENSE and case not in LARGE:
        monkeypatch.setattr(tiles, "DENSE_REGIONS", 0)
    if case is not None and case.tile:
        monkeypatch.setattr(tiles, "SMALL_REGION", 0)
        monkeypatch.setattr(tiles, "side", lambda d, itemsize: case.tile)


def expected(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    q, k, v = tensors["query"].unbind(3) if case.packed else (tensors[name] for name in ("query", "key", "value"))
    return by_hand(q, k, v, case.routes(), case.region, tensors.get("route_weights"))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_reference_is_the_definition(case: Case) -> None:
    tensors = case.tensors(torch.float64)
    torch.testing.assert_close(case.call("reference")(tensors), expected(case, tensors))


def test_reference_with_many_keys_is_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "MANY_KEYS", 0)
    tensors = ROUTED[1].tensors(torch.float64)
    torch.testing.assert_close(ROUTED[1].call("reference")(tensors), expected(ROUTED[1], tensors))


@pytest.mark.parametrize(
    "case",
    [
        Case((3, 4), (2, 2), k=2, heads=2, d=2, weights=True),
        Case((4, 4), (2, 2), k=3, d=3, e=2, packed=False, pooled=(2, 4), per_head=True),
    ],
    ids=str,
)
def test_reference_gradients(case: Case, checks: Any) -> None:
    checks.gradients(case.call("reference"), case.tensors(torch.float64))


def test_all_regions_are_plain_attention() -> None:
    case = Case((4, 6), (2, 2), k=6, heads=2)
    tensors = case.tensors(torch.float64)
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in tensors["query"].unbind(3))
    out = case.call("reference")(tensors).flatten(1, 2).transpose(1, 2)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize(
    ("stage", "dense"), [((49, 64, 64, 1), False), ((49, 16, 16, 4), False), ((49, 4, 4, 16), True)]
)
def test_only_small_regions_of_small_maps_are_held_at_once(stage: tuple[int, ...], dense: bool) -> None:
    assert tiles.is_dense(*stage, d=32, itemsize=2) == dense
    assert not tiles.is_dense(65, *stage[1:], d=32, itemsize=2)
    assert not tiles.is_dense(*stage, d=64, itemsize=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", KERNEL, ids=str)
def test_kernels(case: Case, dtype: torch.dtype, device: torch.device, checks: Any) -> None:
    tensors = case.tensors(dtype, device)
    checks.factor_two(case.call("triton"), case.plain, case.call("reference"), tensors)


@pytest.mark.parametrize("case", [ROUTED[0], ROUTED[6], LARGE_REGIONS[1], DENSE[1]], ids=str)
def test_kernels_take_any_strides(case: Case, device: torch.device, checks: Any) -> None:
    tensors = case.tensors(torch.float32, device)
    incoming = torch.randn(case.batch, *case.map, case.heads, case.e or case.d, device=device)
    expected = checks.values_and_gradients(case.call("triton"), tensors, incoming)
    spread = {name: checks.scattered(tensor) for name, tensor in tensors.items()}
    leaves = {name: tensor.requires_grad_() for name, tensor in spread.items()}
    out = case.call("triton")(leaves)
    gradients = torch.autograd.grad(out, list(leaves.values()), checks.scattered(incoming))
    for name, value in zip(("output", *leaves), (out, *gradients), strict=True):
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("case", [ROUTED[0], ROUTED[2], DENSE[0]], ids=str)
def test_packed_is_the_same_as_apart(case: Case, device: torch.device) -> None:
    packed = case.tensors(torch.float32, device)["query"].requires_grad_()
    views = dict(zip(("query", "key", "value"), packed.unbind(3), strict=True))
    for name, view in views.items():
        assert launch._pitched(view)[0] is view, f"{name} is copied"
    out, apart = case.call("triton")({"query": packed}), case.call("triton")(views)
    torch.testing.assert_close(out, apart, rtol=0, atol=0)
    for way in (out, apart):
        way.square().sum().backward()
        grad, packed.grad = packed.grad, None
        if way is out:
            first = grad
    torch.testing.assert_close(first, grad, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2, 3, 1, 1, 4), (1, 1, 3, 2, 4), (1, 3, 4, 1, 4)], ids=str)
def test_sizes_of_one_lie_anywhere(shape: tuple[int, ...], device: torch.device) -> None:
    wide = torch.randn(*shape[:-1], 3, shape[-1], device=device)
    routes = torch.zeros(shape[0], shape[1] * shape[2], 1, dtype=torch.int64, device=device)
    q, k, v = wide.unbind(-2)
    for implementation in ("reference", "triton"):
        out = routing_attention(q, k, v, routes=routes, region_size=1, implementation=implementation)
        torch.testing.assert_close(out, v[:, :1, :1].expand_as(v))


@pytest.mark.parametrize("case", [Case((4, 6), (2, 3), k=2)], ids=str)
def test_routes_beyond_the_map_lead_to_nothing(case: Case, device: torch.device) -> None:
    """The reference refuses them; the kernels, which cannot, must at least not read memory that is not theirs."""
    query = case.tensors(torch.float32, device)["query"].requires_grad_()
    routes = torch.tensor([[[0, 4], [5, 2], [9, 1], [3, 2]]], device=device)
    out = routing_attention(query, routes=routes, region_size=case.region, implementation="triton")
    nothing = by_hand(*query.unbind(3), routes, case.region, None)
    torch.testing.assert_close(out, nothing, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(way.square().sum(), query)[0] for way in (out, nothing)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_kernels_take_an_empty_batch(device: torch.device) -> None:
    case = Case((4, 6), (2, 3), k=2, batch=0, weights=True)
    tensors = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float32, device).items()}
    case.call("triton")(tensors).sum().backward()
    assert tensors["query"].grad.shape == (0, 4, 6, 3, 1, 16)
    assert tensors["route_weights"].grad.shape == (0, 4, 2)


def registered(tensors: dict[str, Tensor], case: Case) -> Tensor:
    return torch.ops.vizoo.routing_attention(*positional(tensors, case), case.region, case.d**-0.5)[0]


def positional(tensors: dict[str, Tensor], case: Case) -> tuple[Tensor | None, ...]:
    routes = case.routes().to(tensors["query"].device)
    return tensors["query"], tensors.get("key"), tensors.get("value"), routes, tensors.get("route_weights")


EACH = [ROUTED[1], ROUTED[6], LARGE_REGIONS[0], DENSE[0], DENSE[1]]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("case", EACH, ids=str)
def test_operator_is_registered_well(case: Case, device: torch.device) -> None:
    tensors = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float32, device).items()}
    torch.library.opcheck(function._forward, (*positional(tensors, case), case.region, 0.25))


@pytest.mark.parametrize("case", EACH, ids=str)
def test_direct_launch_equals_the_registered_operator(case: Case, device: torch.device, checks: Any) -> None:
    tensors = case.tensors(torch.float32, device)
    incoming = torch.randn(case.batch, *case.map, case.heads, case.e or case.d, device=device)
    direct = checks.values_and_gradients(case.call("triton"), tensors, incoming)
    for name, value in checks.values_and_gradients(lambda x: registered(x, case), tensors, incoming).items():
        torch.testing.assert_close(direct[name], value, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(case.call("triton")(tensors), direct["output"], rtol=0, atol=0)


def test_tracers_see_the_registered_operator(device: torch.device) -> None:
    case = ROUTED[0]
    routes = case.routes().to(device)
    traced = make_fx(
        lambda query: routing_attention(query, routes=routes, region_size=case.region, implementation="triton")
    )
    assert "torch.ops.vizoo.routing_attention" in traced(case.tensors(torch.float32, device)["query"]).code


@pytest.mark.parametrize("direct", [True, False])
def test_second_derivative_is_refused(direct: bool, device: torch.device) -> None:
    case = ROUTED[0]
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
    case = ROUTED[0]
    tensors = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float32, device).items()}
    out = case.call("triton")(tensors) if direct else registered(tensors, case)
    Severed.apply(out).sum().backward()
    assert tensors["query"].grad is None


def test_gradients_nobody_asked_for_are_none(device: torch.device) -> None:
    case = Case((4, 6), (2, 3), heads=2, packed=False, weights=True)
    tensors = case.tensors(torch.float32, device)
    all_of_them = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    case.call("triton")(all_of_them).sum().backward()
    tensors["key"].requires_grad_()
    case.call("triton")(tensors).sum().backward()
    torch.testing.assert_close(tensors["key"].grad, all_of_them["key"].grad, rtol=0, atol=0)
    assert all(tensors[name].grad is None for name in ("query", "value", "route_weights"))


def test_kernels_mix_dtypes(device: torch.device) -> None:
    """Under autocast the projection gives halves, while routing computes its weights in float32."""
    case = Case((4, 6), (2, 3), heads=2, weights=True)
    tensors = case.tensors(torch.float32, device)
    half = {name: tensor.half() if name == "query" else tensor for name, tensor in tensors.items()}
    leaves = {name: tensor.requires_grad_() for name, tensor in half.items()}
    out = case.call("triton")(leaves)
    out.float().square().sum().backward()
    assert out.dtype == torch.float16
    assert {name: leaf.grad.dtype for name, leaf in leaves.items()} == {name: x.dtype for name, x in half.items()}
    torch.testing.assert_close(out.float(), case.call("reference")(tensors), rtol=0, atol=4e-3)


@pytest.mark.parametrize("case", [ROUTED[2], LARGE_REGIONS[0], DENSE[0]], ids=str)
def test_large_logits_stay_finite_in_half_precision(case: Case, device: torch.device) -> None:
    query = case.tensors(torch.float16, device)["query"]
    query[..., :2, :, :] = torch.randn_like(query[..., :2, :, :]).sign() * (60 * case.d**-0.5) ** 0.5
    query.requires_grad_()
    out = case.call("triton")({"query": query})
    out.sum().backward()
    exact = case.call("reference")({"query": query.detach().double()})
    assert (out.double() - exact).norm() < 2e-3 * exact.norm()
    assert query.grad.isfinite().all()


class Block(nn.Module):
    """A projection, routing and attention: 3 x 2 regions of any map, padded to as much as they take."""

    def __init__(self, soft: bool = False) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.soft = soft

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        size = (H + 2) // 3, (W + 1) // 2
        x = F.pad(x, (0, 0, 0, 2 * size[1] - W, 0, 3 * size[0] - H))
        qkv = self.project(x).unflatten(-1, (3, 2, 4))
        if self.soft:
            logits, routes = region_affinity(qkv, region_size=size, scale=0.3).topk(2)
            weights = logits.softmax(-1)
        else:
            weights, routes = None, region_routes(qkv, region_size=size, topk=2)
        out = routing_attention(qkv, routes=routes, region_size=size, route_weights=weights)
        return F.pad(out.flatten(3), (0, 0, 0, W - x.shape[2], 0, H - x.shape[1]))  # a slice would compare sizes


SIZES = [(2, 9, 8), (1, 5, 6), (3, 7, 4), (2, 12, 12)]


@pytest.mark.parametrize("soft", [False, True])
def test_export_keeps_sizes_free(soft: bool) -> None:
    block = Block(soft).eval()
    free = {
        0: torch.export.Dim("batch", min=1),
        1: torch.export.Dim("height", min=4),
        2: torch.export.Dim("width", min=3),
    }
    exported = torch.export.export(block, (torch.randn(2, 9, 8, 8),), dynamic_shapes=(free,)).module()
    for size in SIZES:
        x = torch.randn(*size, 8)
        torch.testing.assert_close(exported(x), block(x))


@pytest.mark.parametrize(("implementation", "soft"), [("reference", False), ("triton", True)])
def test_compiles_without_graph_breaks(implementation: Any, soft: bool, device: torch.device) -> None:
    torch.compiler.reset()
    block = Block(soft).to(device)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    with ops.use(implementation):
        for size in SIZES[:2]:
            x = torch.randn(*size, 8, device=device)
            out = compiled(x)
            torch.testing.assert_close(out, block(x))
            gradient = torch.autograd.grad(out.square().sum(), block.project.weight)
            torch.testing.assert_close(gradient, torch.autograd.grad(block(x).square().sum(), block.project.weight))


@pytest.mark.gpu
@pytest.mark.parametrize("soft", [False, True])
def test_compiles_with_inductor_on_the_gpu(soft: bool) -> None:
    torch.compiler.reset()
    block, x = Block(soft).cuda(), torch.randn(2, 9, 8, 8, device="cuda")
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x))


@pytest.mark.gpu
@pytest.mark.parametrize("region", [(8, 8), (32, 32)], ids=str)
def test_large_maps_need_little_memory(region: Pair) -> None:
    """64 channels of 256 x 256 positions, cut into regions of 8 x 8 positions or into 8 x 8 regions."""
    case = Case((256, 256), region, k=4, heads=2, d=32)
    query = case.tensors(torch.float32, "cuda")["query"].requires_grad_()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    routes = region_routes(query, region_size=region, topk=4)
    routing_attention(query, routes=routes, region_size=region, implementation="triton").sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2**30


@pytest.mark.parametrize("case", [ROUTED[3], DENSE[2]], ids=str)
def test_operations_are_counted(case: Case, device: torch.device) -> None:
    case = replace(case, map=(6, 6), pooled=None)  # of whole regions, as the formulas count
    counts = []
    for implementation in ("reference", "triton"):
        tensors = case.tensors(torch.float32, device)
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            case.call(implementation)(tensors)
        counts.append(counter.get_total_flops())
    logits = 36 * case.heads * case.k * case.region[0] * case.region[1]
    assert counts == [2 * logits * (case.d + (case.e or case.d))] * 2


# Routing


def affinity_by_hand(query: Tensor, key: Tensor, region: Pair) -> Tensor:
    """Products of means, region by region, over what lies on the map: (B, heads, R, R)."""
    B, H, W, heads, _ = query.shape
    places = list(itertools.product(range(0, H, region[0]), range(0, W, region[1])))
    result = query.new_empty(B, heads, len(places), len(places))
    for (i, (y, x)), (j, (v, u)) in itertools.product(enumerate(places), repeat=2):
        mean = query[:, y : y + region[0], x : x + region[1]].mean((1, 2))
        other = key[:, v : v + region[0], u : u + region[1]].mean((1, 2))
        result[:, :, i, j] = (mean * other).sum(-1)
    return result


@pytest.mark.parametrize("region", [(2, 3), (3, 2), (4, 7), (1, 1)], ids=str)
@pytest.mark.parametrize("packed", [True, False])
def test_affinity_is_the_definition(region: Pair, packed: bool) -> None:
    qkv = torch.randn(2, 5, 6, 3, 2, 4, dtype=torch.float64)
    arguments = (qkv,) if packed else (qkv[:, :, :, 0], qkv[:, :, :, 1])
    each = affinity_by_hand(qkv[:, :, :, 0], qkv[:, :, :, 1], region)
    torch.testing.assert_close(region_affinity(*arguments, region_size=region, per_head=True), each)
    torch.testing.assert_close(region_affinity(*arguments, region_size=region, scale=0.3), 0.3 * each.sum(1))


def test_affinity_gradients(checks: Any) -> None:
    tensors = {"query": torch.randn(1, 3, 4, 2, 2).double(), "key": torch.randn(1, 3, 4, 2, 2).double()}
    checks.gradients(lambda given: region_affinity(**given, region_size=2, scale=0.7), tensors)


@pytest.mark.parametrize("per_head", [False, True])
def test_routes_are_the_largest_affinities(per_head: bool) -> None:
    qkv = torch.randn(2, 7, 6, 3, 2, 4)
    affinity = region_affinity(qkv, region_size=2, per_head=per_head)
    routes = region_routes(qkv.requires_grad_(), region_size=2, topk=5, per_head=per_head)
    assert routes.dtype == torch.int64
    assert routes.shape == (2, 2, 12, 5) if per_head else (2, 12, 5)
    torch.testing.assert_close(routes.sort().values, affinity.argsort(-1)[..., -5:].sort().values)


def test_a_map_with_few_regions_has_all_of_them_routed() -> None:
    routes = region_routes(torch.randn(1, 2, 3, 3, 1, 4), region_size=2, topk=16)
    assert routes.sort().values.tolist() == [[[0, 1]] * 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_routing_keeps_its_precision(dtype: torch.dtype) -> None:
    """Sums of halves are not rounded to halves, and neither autocast nor a setting for products lowers them."""
    qkv = torch.randn(1, 32, 32, 3, 2, 8).to(dtype)
    exact = region_affinity(qkv.double(), region_size=16)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            affinity = region_affinity(qkv, region_size=16)
    finally:
        torch.set_float32_matmul_precision(before)
    assert affinity.dtype == torch.float32
    torch.testing.assert_close(affinity.double(), exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_autocast_changes_nothing(implementation: Any) -> None:
    case = ROUTED[0]
    tensors = case.tensors(torch.float32)
    plain = case.call(implementation)(tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(case.call(implementation)(tensors), plain, rtol=0, atol=0)


QKV = torch.randn(1, 4, 6, 3, 2, 8)
MAP = QKV[:, :, :, 0]
ROUTES = torch.zeros(1, 6, 1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"query must be floating point, got torch\.int64", {"query": QKV.long()}),
        (ValueError, r"without key must have .*\(B, H, W, 3, heads, d\), got \(1, 4, 6, 2, 8\)", {"query": MAP}),
        (ValueError, r"query must have the shape \(B, H, W, heads, d\), got", {"key": MAP, "value": MAP}),
        (ValueError, r"a row, a column, a head and a channel at least, got \(1, 0, 6,", {"query": QKV[:, :0]}),
        (ValueError, r"key and value go together: got key alone", {"key": MAP}),
        (ValueError, r"key and value go together: got value alone", {"value": MAP}),
        (TypeError, r"key must have the dtype of query, torch\.float32, got torch\.float64",
         {"query": MAP, "key": MAP.double(), "value": MAP}),
        (ValueError, r"key must have the shape .* = \(1, 4, 6, 2, 8\), got \(1, 4, 6, 1, 8\)",
         {"query": MAP, "key": MAP[:, :, :, :1], "value": MAP}),
        (ValueError, r"value must have .* map of the keys = \(1, 4, 6, 2, 8\), got \(1, 4, 4, 2, 8\)",
         {"query": MAP, "key": MAP, "value": MAP[:, :, :4]}),
        (ValueError, r"got 4 columns for 3 regions; the nearest are 3 and 6",
         {"query": MAP, "key": MAP[:, :, :4], "value": MAP[:, :, :4]}),
        (ValueError, r"region_size must be at least 1 a side, got 0 columns", {"region_size": (2, 0)}),
        (ValueError, r"region_size must be one number or \(rows, columns\), got \(2, 2, 2\)",
         {"region_size": (2, 2, 2)}),
        (TypeError, r"routes must be int64, got torch\.int32", {"routes": ROUTES.int()}),
        (ValueError, r"routes must have .* = \(1, 6, k\) or .* = \(1, 2, 6, k\) .* got \(1, 4, 1\)",
         {"routes": ROUTES[:, :4]}),
        (ValueError, r"routes must have .* k at least 1, got \(1, 6, 0\)", {"routes": ROUTES[..., :0]}),
        (ValueError, r"routes must be on the device of query, cpu, got meta", {"routes": ROUTES.to("meta")}),
        (TypeError, r"route_weights must be floating point, got torch\.int64", {"route_weights": ROUTES}),
        (ValueError, r"route_weights must have the shape of routes, \(1, 6, 1\), got \(1, 6\)",
         {"route_weights": torch.ones(1, 6)}),
    ],
)  # fmt: skip
def test_refuses_what_breaks_a_rule(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        routing_attention(**{"query": QKV, "region_size": 2, "routes": ROUTES, **arguments})


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"key must be floating point, got torch\.int64", {"query": MAP, "key": MAP.long()}),
        (ValueError, r"key must have the shape of query, \(1, 4, 6, 2, 8\), got \(1, 4, 5, 2, 8\)",
         {"query": MAP, "key": MAP[:, :, :5]}),
        (ValueError, r"topk must be at least 1, got 0", {"topk": 0}),
        (ValueError, r"region_size must be at least 1 a side, got -1 rows", {"region_size": (-1, 2)}),
    ],
)  # fmt: skip
def test_routing_refuses_what_breaks_a_rule(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        region_routes(**{"query": QKV, "region_size": 2, "topk": 1, **arguments})


def test_explains_what_the_kernels_cannot_take() -> None:
    def reasons(query: Tensor, **arguments: Any) -> str:
        return "; ".join(ops.explain(routing_attention, query, region_size=2, routes=ROUTES, **arguments)["triton"])

    assert "float16, bfloat16 and float32, the input is torch.float64" in reasons(QKV.double())
    assert "torch.float32, torch.float64" in reasons(QKV, route_weights=torch.ones(ROUTES.shape).double())
    assert "may have 128 channels, this has 144" in reasons(torch.zeros(1, 4, 6, 3, 1, 144))
    assert "the interpreter has no bfloat16" in reasons(QKV.bfloat16())
    assert ops.explain(routing_attention, QKV, region_size=2, routes=ROUTES)["reference"] == []
