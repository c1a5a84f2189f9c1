from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from vizoo import ops
from vizoo.ops import (
    CONTINUOUS_ROUTES,
    ROW_AND_COLUMN_ROUTES,
    ROW_ROUTES,
    Route,
    gpu,
    selective_scan,
    selective_scan_2d,
)
from vizoo.ops.selective_scan_2d import function, tiles
from vizoo.ops.selective_scan_2d.function import FLOPS

Tensors = dict[str, Tensor]
ROWS, COLUMNS = Route(), Route(columns=True)


@dataclass(frozen=True)
class Case:
    """Sizes of a scan of a map, its routes, and which of the optional tensors it has."""

    shape: tuple[int, int, int, int]
    routes: tuple[Route, ...] = ROW_AND_COLUMN_ROUTES
    states: int = 1
    rank: int = 3
    shared: bool = False
    without: frozenset[str] = frozenset()
    softplus: bool = True
    routed: bool = True
    seed: int = 1

    def __str__(self) -> str:
        kinds = {ROW_AND_COLUMN_ROUTES: "rows_columns", ROW_ROUTES: "rows", CONTINUOUS_ROUTES: "continuous"}
        parts = ["x".join(map(str, self.shape)), kinds.get(self.routes, f"{len(self.routes)}routes"), f"n{self.states}"]
        flags = {"shared": self.shared, "linear": not self.softplus, "by_step": not self.routed}
        return "-".join([*parts, *(name for name, on in flags.items() if on), *sorted(self.without)])

    def tensors(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensors:
        generator = torch.Generator().manual_seed(self.seed)
        B, H, W, d = self.shape
        K, N = 1 if self.shared else len(self.routes), self.states
        sizes = {
            "x": self.shape,
            "delta": (B, H, W, K, d if "delta_weight" in self.without else self.rank),
            "A": (K, d, N),
            "B": (B, H, W, K, N),
            "C": (B, H, W, K, N),
            "D": (K, d),
            "delta_weight": (K, d, self.rank),
            "delta_bias": (K, d),
            "direction_B": (5, N),
        }
        drawn = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
        drawn["A"] = -drawn["A"].exp()
        if not self.softplus:
            drawn["delta"] = drawn["delta"].abs() / 3
            drawn["delta_weight"], drawn["delta_bias"] = drawn["delta_weight"].abs(), drawn["delta_bias"].abs()
        absent = self.without if all(route.continuous for route in self.routes) else self.without | {"direction_B"}
        return {name: tensor.to(dtype).to(device) for name, tensor in drawn.items() if name not in absent}

    def call(self, implementation: Any, **options: Any) -> Callable[[Tensors], Tensor]:
        settings = {"softplus": self.softplus, "routes": self.routes, "routed_parameters": self.routed, **options}
        return lambda tensors: selective_scan_2d(**tensors, **settings, implementation=implementation)


def path(route: Route, H: int, W: int) -> list[tuple[int, int]]:
    """The pixels of a route, walked step by step."""
    lines, length = (W, H) if route.columns else (H, W)
    places = []
    for line in range(lines):
        steps = range(length)
        if route.continuous and line % 2:
            steps = range(length - 1, -1, -1)
        places += [(step, line) if route.columns else (line, step) for step in steps]
    return places[::-1] if route.reverse else places


def direction(places: list[tuple[int, int]], t: int) -> int:
    """0 at the start, then 1 right, 2 left, 3 up, 4 down."""
    if t == 0:
        return 0
    (row, column), (before, beside) = places[t], places[t - 1]
    return {(0, 1): 1, (0, -1): 2, (-1, 0): 3, (1, 0): 4}[row - before, column - beside]


def by_hand(case: Case, tensors: Tensors) -> Tensor:
    """One image, route, pixel and channel vector after the other."""
    x, get = tensors["x"], tensors.get
    images, H, W, d = x.shape
    out = torch.zeros_like(x)
    for b in range(images):
        for k, route in enumerate(case.routes):
            places, p, state = path(route, H, W), 0 if case.shared else k, x.new_zeros(d, case.states)
            for t, place in enumerate(places):
                at = (b, *place) if case.routed else (b, t // W, t % W)
                step = tensors["delta"][at][p]
                if get("delta_weight") is not None:
                    step = tensors["delta_weight"][p] @ step
                if get("delta_bias") is not None:
                    step = step + tensors["delta_bias"][p]
                step = F.softplus(step) if case.softplus else step
                drive = tensors["B"][at][p]
                if get("direction_B") is not None:
                    drive = drive + tensors["direction_B"][direction(places, t)]
                u = x[(b, *place)]
                state = torch.exp(step[:, None] * tensors["A"][p]) * state + (step * u)[:, None] * drive
                y = state @ tensors["C"][at][p]
                if get("D") is not None:
                    y = y + tensors["D"][p] * u
                out[(b, *place)] += y
    return out


PLAIN = frozenset({"D", "delta_weight", "delta_bias", "direction_B"})
SMALL = [
    Case((2, 3, 5, 6)),
    Case((1, 3, 3, 4), states=3, rank=5),
    Case((1, 1, 9, 3)),
    Case((1, 9, 1, 4), ROW_AND_COLUMN_ROUTES[1::2], states=2),
    Case((1, 1, 1, 3)),
    Case((2, 5, 2, 4), ROW_ROUTES, without=PLAIN),
    Case((1, 3, 4, 4), (COLUMNS, ROWS, ROWS), without=frozenset({"D"}), softplus=False),
    Case((1, 3, 4, 3), CONTINUOUS_ROUTES),
    Case((1, 3, 3, 4), CONTINUOUS_ROUTES, states=2, shared=True, routed=False),
    Case((1, 3, 1, 2), CONTINUOUS_ROUTES, shared=True, routed=False),
    Case((1, 1, 4, 2), CONTINUOUS_ROUTES, shared=True, without=frozenset({"direction_B"})),
    Case((1, 3, 4, 4), routed=False, without=frozenset({"delta_weight"})),
]
LARGE = [
    Case((4, 56, 56, 96), rank=6),
    Case((3, 27, 29, 192), rank=12),
    Case((8, 7, 7, 768), rank=48),
    Case((2, 14, 14, 200), states=16, rank=12),
    Case((1, 200, 334, 96), rank=6),
    Case((2, 12, 20, 224), ROW_ROUTES, rank=7),
    Case((2, 14, 15, 384), CONTINUOUS_ROUTES, states=16, rank=12, shared=True, routed=False),
    Case((1, 33, 30, 100), (COLUMNS, ROWS, ROWS), states=5, without=frozenset({"delta_weight"})),
]
# In the interpreter halves cost as much time as float32 and show little more.
KERNEL = [
    pytest.param(case, dtype, marks=[] if dtype in dtypes else pytest.mark.gpu, id=f"{case}-{dtype}")
    for case, dtypes in [
        *((case, (torch.float32, torch.float16) if case in SMALL[:6:5] else (torch.float32,)) for case in SMALL),
        *((case, ()) for case in LARGE),
    ]
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
]


@pytest.fixture
def tiny_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, which is slow: tiles so small that tiny maps have several."""
    if device.type == "cpu":
        for name in ("states", "walks", "outputs", "gradients"):
            monkeypatch.setattr(tiles, name, lambda d: tiles.Tile(8, 4, per_sm=3))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_reference_is_the_definition(case: Case) -> None:
    tensors = case.tensors(torch.float64)
    torch.testing.assert_close(case.call("reference")(tensors), by_hand(case, tensors))


@pytest.mark.parametrize(
    "case",
    [
        Case((1, 2, 3, 2), rank=2),
        Case((2, 3, 2, 2), CONTINUOUS_ROUTES[1:3], states=2, rank=1, shared=True, routed=False),
    ],
    ids=str,
)
def test_reference_gradients(case: Case, checks: Any) -> None:
    checks.gradients(case.call("reference"), case.tensors(torch.float64))


@pytest.mark.parametrize("routes", [ROW_AND_COLUMN_ROUTES, CONTINUOUS_ROUTES], ids=["rows_columns", "continuous"])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 1), (4, 3), (3, 4), (5, 5)])
def test_routes_are_walks_over_the_map(routes: tuple[Route, ...], size: tuple[int, int]) -> None:
    for route in routes:
        places = path(route, *size)
        assert route.pixels(*size).tolist() == [row * size[1] + column for row, column in places]
        if route.continuous:
            assert route.directions(*size).tolist() == [direction(places, t) for t in range(len(places))]
        assert Route.of(route.code) == route


def test_the_scan_of_sequences_agrees() -> None:
    """Copy the routes, scan, put back, add: what the operator does without copies."""
    case = Case((2, 5, 6, 4), states=2)
    tensors = case.tensors(torch.float64)
    steps = torch.einsum("bhwkr,kdr->bhwkd", tensors["delta"], tensors["delta_weight"])
    total = torch.zeros(2, 30, 4, dtype=torch.float64)
    for k, route in enumerate(case.routes):
        pixels = route.pixels(5, 6)
        u, delta, B, C = (
            tensor.flatten(1, 2)[:, pixels].mT
            for tensor in (tensors["x"], steps[:, :, :, k], tensors["B"][:, :, :, k], tensors["C"][:, :, :, k])
        )
        bias = tensors["delta_bias"][k]
        y = selective_scan(u, delta, tensors["A"][k], B, C, tensors["D"][k], delta_bias=bias, softplus=True)
        total[:, pixels] += y.mT
    torch.testing.assert_close(case.call("reference")(tensors), total.view(2, 5, 6, 4))


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize(("case", "dtype"), KERNEL)
def test_kernels(case: Case, dtype: torch.dtype, device: torch.device, checks: Any) -> None:
    reference = case.call("reference")  # which keeps states and sums in float32 for every dtype
    checks.factor_two(case.call("triton"), reference, reference, case.tensors(dtype, device))


@pytest.mark.parametrize("case", [Case((1, 3, 6, 20), ROW_AND_COLUMN_ROUTES[1:3], rank=16)], ids=str)
def test_kernels_with_their_own_tiles(case: Case, device: torch.device, checks: Any) -> None:
    reference = case.call("reference")
    checks.factor_two(case.call("triton"), reference, reference, case.tensors(torch.float32, device))


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("case", [Case((1, 5, 6, 3)), Case((1, 6, 4, 2), CONTINUOUS_ROUTES[1:3])], ids=str)
def test_long_sequences_are_cut(case: Case, device: torch.device, checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "segments", lambda programs, tiles, wanted: 3)
    reference = case.call("reference")
    checks.factor_two(case.call("triton"), reference, reference, case.tensors(torch.float32, device))


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize(
    "case",
    [
        *(SMALL[place] for place in (0, 6, 7, 11)),
        *(pytest.param(case, marks=pytest.mark.gpu) for case in LARGE if case.states == 1 and case.shape[0] > 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_images_walked_by_one_program(
    case: Case, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the other kernels give, and the states that gradients need."""
    tensors, names = case.tensors(torch.float32, device), ("x", "delta", "A", "B", "C", "D")
    optional = ("delta_weight", "delta_bias", "direction_B")
    arguments = (
        *(tensors.get(name) for name in (*names, *optional)),
        [route.code for route in case.routes], case.softplus, case.routed, dtype,
    )  # fmt: skip
    results = []
    for walked in (True, False):
        monkeypatch.setattr(tiles, "walked", lambda *_, walked=walked: walked)
        results.append(torch.ops.vizoo.selective_scan_2d(*arguments))
    for value, expected in zip(*results, strict=True):
        precision = 1e-3 if value.dtype == torch.float16 else 1e-5
        assert value.isfinite().all()
        assert (value - expected).float().norm() <= precision * expected.float().norm()


def test_images_are_walked_where_they_fill_the_card() -> None:
    assert tiles.walked(1536, 1, 132)
    assert not tiles.walked(1024, 1, 132)
    assert not tiles.walked(1536, 2, 132)


def test_segments_fill_the_card_and_no_more() -> None:
    assert tiles.segments(4096, 196, 1056) == 1
    assert tiles.segments(24, 4176, 1056) == 44
    assert tiles.segments(2, 4176, 1056) == tiles.MAX_SEGMENTS
    assert tiles.segments(12, 13, 1056) == 1


@pytest.mark.usefixtures("tiny_tiles")
def test_kernels_take_any_strides(device: torch.device, checks: Any) -> None:
    case = Case((2, 2, 3, 3), states=2)
    tensors = case.tensors(torch.float32, device)
    incoming = torch.randn(case.shape, device=device)
    expected = checks.values_and_gradients(case.call("triton"), tensors, incoming)
    leaves = {name: checks.scattered(tensor).requires_grad_() for name, tensor in tensors.items()}
    out = case.call("triton")(leaves)
    gradients = torch.autograd.grad(out, list(leaves.values()), checks.scattered(incoming))
    for name, value in zip(("output", *leaves), (out, *gradients), strict=True):
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


@pytest.mark.usefixtures("tiny_tiles")
def test_parts_of_one_projection_are_read_where_they_lie(device: torch.device) -> None:
    case = Case((2, 2, 3, 3), states=2)
    tensors = case.tensors(torch.float32, device)
    projected = torch.cat([tensors[name] for name in ("delta", "B", "C")], -1)
    parts = dict(zip(("delta", "B", "C"), projected.split([3, 2, 2], -1), strict=True))
    expected = case.call("triton")(tensors)
    torch.testing.assert_close(case.call("triton")({**tensors, **parts}), expected, rtol=0, atol=0)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("half", ["maps", "parameters"])
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_dtypes_mix(implementation: Any, half: str, device: torch.device) -> None:
    """Parameters may stay in float32 though maps are half, and the reverse; autocast leaves both as they are."""
    case = Case((1, 3, 2, 4))
    maps = {"x", "delta", "B", "C"}
    tensors = {
        name: tensor.half() if (name in maps) == (half == "maps") else tensor
        for name, tensor in case.tensors(torch.float32, device).items()
    }
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    with torch.autocast(device.type, dtype=torch.float16 if device.type == "cuda" else torch.bfloat16):
        out = case.call(implementation)(leaves)
    assert out.dtype == torch.float32
    out.sum().backward()
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    expected = case.call("reference")(wide)
    expected.sum().backward()
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-5)
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        torch.testing.assert_close(leaf.grad.double(), wide[name].grad, rtol=2e-3, atol=2e-3)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_dtype_of_the_output(implementation: Any, device: torch.device) -> None:
    case = Case((1, 3, 2, 4))
    tensors = case.tensors(torch.float16, device)
    wide = case.call(implementation)(tensors)
    assert wide.dtype == torch.float32
    narrow = case.call(implementation, dtype=torch.float16)(tensors)
    torch.testing.assert_close(narrow, wide.half(), rtol=0, atol=0)  # rounded once, after all routes


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_extreme_steps_stay_finite(implementation: Any, device: torch.device) -> None:
    """States that are forgotten at once, kept for ever, or driven beyond the range of half precision."""
    case = Case((1, 3, 4, 4), without=frozenset({"delta_weight"}))
    tensors = case.tensors(torch.float16, device)
    tensors["delta"] = torch.linspace(-300, 300, tensors["delta"].numel(), device=device).view_as(tensors["delta"])
    tensors["x"] = 100 * tensors["x"]
    leaves = {name: tensor.detach().float().requires_grad_() for name, tensor in tensors.items()}
    out = case.call(implementation)(leaves)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves.values())
    assert case.call(implementation)(tensors).isfinite().all()


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of infinities that meet zeros
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_infinity_stays_in_its_image(implementation: Any, device: torch.device) -> None:
    case = Case((2, 2, 3, 4), ROW_ROUTES)
    tensors = case.tensors(torch.float32, device)
    tensors["x"][0, 1, 1] = float("inf")
    out = case.call(implementation)(tensors)
    assert not out[0].isfinite().any()
    assert out[1].isfinite().all()


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_empty_batch(implementation: Any, device: torch.device) -> None:
    case = Case((0, 3, 4, 4))
    leaves = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float32, device).items()}
    out = case.call(implementation)(leaves)
    out.sum().backward()
    assert out.shape == case.shape
    for name, tensor in leaves.items():
        assert tensor.grad is not None or implementation == "reference", name
        assert tensor.grad is None or torch.equal(tensor.grad, torch.zeros_like(tensor)), name


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("wanted", [("x",), ("delta_weight",), ("B", "D")], ids=str)
def test_gradients_nobody_asked_for_are_none(wanted: tuple[str, ...], device: torch.device, checks: Any) -> None:
    case = Case((1, 2, 3, 4))
    tensors = case.tensors(torch.float32, device)
    everything = checks.values_and_gradients(case.call("triton"), tensors, torch.ones(case.shape, device=device))
    for name in wanted:
        tensors[name].requires_grad_()
    case.call("triton")(tensors).sum().backward()
    for name, tensor in tensors.items():
        if name in wanted:
            torch.testing.assert_close(tensor.grad, everything[name], rtol=0, atol=0)
        else:
            assert tensor.grad is None


def arguments(case: Case, tensors: Tensors) -> tuple[Any, ...]:
    """As the registered operator takes them."""
    names = ("x", "delta", "A", "B", "C", "D", "delta_weight", "delta_bias", "direction_B")
    codes = [route.code for route in case.routes]
    return *(tensors.get(name) for name in names), codes, case.softplus, case.routed, torch.float32


def registered(case: Case) -> Callable[[Tensors], Tensor]:
    return lambda tensors: torch.ops.vizoo.selective_scan_2d(*arguments(case, tensors))[0]


REGISTERED = [
    Case((1, 2, 3, 4)),
    Case((1, 3, 2, 3), ROW_ROUTES, without=PLAIN),
    Case((1, 2, 3, 2), CONTINUOUS_ROUTES[:2], routed=False),
]


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("case", REGISTERED, ids=str)
def test_operator_is_registered_well(case: Case, device: torch.device) -> None:
    tensors = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float32, device).items()}
    torch.library.opcheck(function._forward, arguments(case, tensors))


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("case", REGISTERED, ids=str)
def test_direct_launch_equals_the_registered_operator(case: Case, device: torch.device, checks: Any) -> None:
    tensors, incoming = case.tensors(torch.float32, device), torch.randn(case.shape, device=device)
    direct = checks.values_and_gradients(case.call("triton"), tensors, incoming)
    whole = checks.values_and_gradients(registered(case), tensors, incoming)
    for name, value in whole.items():
        torch.testing.assert_close(direct[name], value, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(case.call("triton")(tensors), whole["output"], rtol=0, atol=0)


@pytest.mark.usefixtures("tiny_tiles")
def test_tracers_see_the_registered_operator(device: torch.device) -> None:
    case = Case((1, 2, 3, 4))
    tensors = case.tensors(torch.float32, device)
    names, values = list(tensors), list(tensors.values())
    graph = make_fx(lambda *values: case.call("triton")(dict(zip(names, values, strict=True))))(*values)
    assert "torch.ops.vizoo.selective_scan_2d" in graph.code
    torch.testing.assert_close(graph(*values), case.call("triton")(tensors), rtol=0, atol=0)


@pytest.mark.usefixtures("tiny_tiles")
def test_second_derivative_is_refused(device: torch.device) -> None:
    case = Case((1, 1, 2, 2), ROW_ROUTES)
    leaves = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float32, device).items()}
    for call, message in ((case.call("triton"), "once_differentiable"), (registered(case), "autograd formula")):
        (gradient,) = torch.autograd.grad(call(leaves).square().sum(), leaves["x"], create_graph=True)
        with pytest.raises(RuntimeError, match=message):
            gradient.sum().backward()


class Mixer(nn.Module):
    """Projections of a map, and its scan, as VMamba has them."""

    def __init__(self, case: Case, routes: tuple[Route, ...]) -> None:
        super().__init__()
        tensors = case.tensors(torch.float32)
        self.routes, self.rank = routes, case.rank
        self.project = nn.Linear(case.shape[-1], len(routes) * (case.rank + 2))
        names = ("A", "D", "delta_weight", "delta_bias")
        self.parameters_of_the_scan = nn.ParameterDict({name: nn.Parameter(tensors[name]) for name in names})

    def forward(self, x: Tensor) -> Tensor:
        projected = self.project(x).unflatten(-1, (len(self.routes), self.rank + 2))
        delta, B, C = projected.split([self.rank, 1, 1], -1)
        scanned = self.parameters_of_the_scan
        y = selective_scan_2d(
            x.sin(), delta, scanned["A"], B, C, scanned["D"],
            delta_weight=scanned["delta_weight"], delta_bias=scanned["delta_bias"], routes=self.routes,
        )  # fmt: skip
        return y.cos()


SIZES = [(2, 4, 5), (1, 4, 4), (3, 2, 7)]


@pytest.mark.parametrize("routes", [ROW_AND_COLUMN_ROUTES, CONTINUOUS_ROUTES], ids=["rows_columns", "continuous"])
def test_exports_with_free_sizes(routes: tuple[Route, ...]) -> None:
    mixer = Mixer(Case((2, 4, 5, 6)), routes).eval()
    free = {axis: torch.export.Dim(name, min=1, max=4096) for axis, name in enumerate(("batch", "height", "width"))}
    exported = torch.export.export(mixer, (torch.randn(2, 4, 5, 6),), dynamic_shapes=(free,)).module()
    for size in (*SIZES, (1, 1, 1), (1, 20, 21)):
        x = torch.randn(*size, 6)
        torch.testing.assert_close(exported(x), mixer(x))


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_compiles_without_graph_breaks(implementation: Any, device: torch.device) -> None:
    torch.compiler.reset()
    mixer = Mixer(Case((2, 4, 5, 4)), ROW_AND_COLUMN_ROUTES).to(device)

    def bounded(x: Tensor) -> Tensor:
        torch._check(x.shape[1] <= 32)  # the reference is traced in steps enough for any length that is allowed;
        torch._check(x.shape[2] <= 32)  # export, above, has all of them
        return mixer(x)

    compiled = torch.compile(bounded, fullgraph=True, dynamic=True, backend="aot_eager")
    with ops.use(implementation):
        for size in SIZES if implementation == "reference" or device.type == "cuda" else SIZES[1:]:
            x = torch.randn(*size, 4, device=device)
            out, expected = compiled(x), mixer(x)
            torch.testing.assert_close(out, expected)
            gradients = torch.autograd.grad(out.square().sum(), list(mixer.parameters()))
            wanted = torch.autograd.grad(expected.square().sum(), list(mixer.parameters()))
            torch.testing.assert_close(gradients, wanted)


@pytest.mark.gpu
def test_compiles_with_inductor_on_the_gpu() -> None:
    torch.compiler.reset()
    mixer, x = Mixer(Case((2, 9, 8, 40)), ROW_AND_COLUMN_ROUTES).cuda(), torch.randn(2, 9, 8, 40, device="cuda")
    out, expected = torch.compile(mixer, fullgraph=True)(x), mixer(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(out.square().sum(), list(mixer.parameters()))
    wanted = torch.autograd.grad(expected.square().sum(), list(mixer.parameters()))
    torch.testing.assert_close(gradients, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("tiny_tiles")
def test_operations_are_counted(device: torch.device) -> None:
    case = Case((1, 2, 3, 4), states=2)
    leaves = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float32, device).items()}
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        case.call("triton")(leaves).sum().backward()
    forward = 2 * (2 * 3 * 4 * 4) * (9 * 2 + 3)  # pixels, channels and routes; states and rank
    assert counter.get_flop_counts()["Global"][torch.ops.vizoo.selective_scan_2d] == forward
    assert counter.get_flop_counts()["Global"][torch.ops.vizoo.selective_scan_2d_backward] == 2 * forward


X = Case((2, 4, 5, 8)).tensors(torch.float32)


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, r"x must be floating point, got torch\.int64", {"x": X["x"].long()}),
        (TypeError, r"D must be floating point, got torch\.int64", {"D": X["D"].long()}),
        (TypeError, r"dtype must be floating point, got torch\.int32", {"dtype": torch.int32}),
        (ValueError, r"B must be on the device of x, cpu, got meta", {"B": X["B"].to("meta")}),
        (ValueError, r"x must have the shape \(B, H, W, d\) .*, got \(4, 5, 8\)", {"x": X["x"][0]}),
        (ValueError, r"a row, a column and a channel at least, got \(2, 0, 5, 8\)", {"x": X["x"][:, :0]}),
        (ValueError, r"A must have the shape \(K, d, N\) = \(4, 8, N\), .*, got \(3, 8, 1\)", {"A": X["A"][:3]}),
        (ValueError, r"A must have .* N at least 1, got \(4, 8, 0\)", {"A": X["A"][..., :0]}),
        (ValueError, r"A must have the shape \(K, d, N\) = \(4, 8, 1\), got \(4, 7, 1\)", {"A": X["A"][:, 1:]}),
        (
            ValueError,
            r"delta must have the shape \(B, H, W, K, r\) = \(2, 4, 5, 4, 3\), got \(2, 4, 5, 4, 2\)",
            {"delta": X["delta"][..., :2]},
        ),
        (
            ValueError,
            r"delta must have the shape \(B, H, W, K, d\) = \(2, 4, 5, 4, 8\), got \(2, 4, 5, 4, 3\)",
            {"delta_weight": None},
        ),
        (
            ValueError,
            r"B must have the shape \(B, H, W, K, N\) = \(2, 4, 5, 4, 1\), got \(2, 4, 5, 4\)",
            {"B": X["B"][..., 0]},
        ),
        (ValueError, r"C must have .* = \(2, 4, 5, 4, 1\), got \(2, 4, 4, 4, 1\)", {"C": X["C"][:, :, 1:]}),
        (ValueError, r"D must have the shape \(K, d\) = \(4, 8\), got \(1, 8\)", {"D": X["D"][:1]}),
        (
            ValueError,
            r"delta_weight must have the shape \(K, d, r\) = \(4, 8, 3\), got \(4, 7, 3\)",
            {"delta_weight": X["delta_weight"][:, 1:]},
        ),
        (ValueError, r"delta_bias must have .* = \(4, 8\), got \(8, 4\)", {"delta_bias": X["delta_bias"].T}),
        (ValueError, r"routes must hold one route at least, got none", {"routes": ()}),
        (TypeError, r"routes must hold Route\(.*\) only, got 'rows'", {"routes": ("rows",)}),
        (
            ValueError,
            r"direction_B needs continuous routes, .*, got Route\(columns=False",
            {"direction_B": torch.zeros(5, 1)},
        ),
        (
            ValueError,
            r"direction_B must have the shape \(5, N\) = \(5, 1\), got \(4, 1\)",
            {"direction_B": torch.zeros(4, 1), "routes": CONTINUOUS_ROUTES},
        ),
    ],
)
def test_refuses_what_breaks_a_rule(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        selective_scan_2d(**{**X, **changed})


def test_explains_what_the_kernels_cannot_take() -> None:
    def reasons(**changed: Any) -> str:
        return "; ".join(ops.explain(selective_scan_2d, **{**X, **changed})["triton"])

    def stretched(H: int, W: int) -> Tensors:
        one = torch.zeros(1, device="meta")
        maps = {name: one.expand(1, H, W, *X[name].shape[3:]) for name in ("x", "delta", "B", "C")}
        return {**{name: tensor.to("meta") for name, tensor in X.items()}, **maps}

    assert "float16, bfloat16 and float32, these are torch.float32, torch.float64" in reasons(x=X["x"].double())
    assert "these are torch.float32, torch.float64" in reasons(dtype=torch.float64)
    assert "the interpreter has no bfloat16" in reasons(x=X["x"].bfloat16())
    assert "there may be 10 routes, these are 11" in reasons(
        **{name: X[name][:1] for name in ("A", "D", "delta_weight", "delta_bias")},
        **{name: X[name][:, :, :, :1] for name in ("delta", "B", "C")},
        routes=(ROWS,) * 11,
    )
    many = {name: torch.zeros(*X[name].shape[:-1], 63) for name in ("A", "B", "C")}
    assert "twice the states and what steps are projected from may be 128, this is 129" in reasons(**many)
    assert "pixels times the longer side may be 2**32 - 1, this map is 2048 x 1024" in reasons(**stretched(2048, 1024))
    assert ops.explain(selective_scan_2d, **X)["reference"] == []


def test_device_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"selective_scan_2d: implementation 'triton' cannot run: .* an NVIDIA GPU"):
        selective_scan_2d(**X, implementation="triton")
    monkeypatch.setattr(gpu, "TRITON_INSTALLED", False)
    assert ops.explain(selective_scan_2d, **X)["triton"] == ["triton is not installed"]
