from __future__ import annotations

import threading
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vizoo import ops
from vizoo.ops import dispatch


def double(x: Tensor) -> Tensor:
    """A public function, as an operator's folder has one."""
    return x * 2


def prepare(x: Tensor) -> dict[str, Any]:
    if x.ndim != 1:
        raise ValueError("x must have one axis")
    return {"x": x}


OPERATOR = dispatch.Operator(
    name="double",
    prepare=prepare,
    reference=lambda x: x * 2,
    triton=lambda x: x * 2 + 1,  # tells the two apart
    unsupported=lambda x: ["x is too short", "x is too odd"] if len(x) < 2 else [],
)
CPU, GPU = torch.device("cpu"), torch.device("cuda")  # only named: nothing runs there
LONG, SHORT = torch.ones(3), torch.ones(1)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_operators", {})
    monkeypatch.setattr(dispatch, "_reported", set())
    dispatch.register(double, OPERATOR)


def run(x: Tensor, device: torch.device = GPU, implementation: Any = None) -> float:
    return dispatch.call(OPERATOR, implementation, device, {"x": x})[0].item()


def test_cpu_runs_the_reference_and_gpu_the_kernels() -> None:
    assert run(LONG, CPU) == 2
    assert run(LONG, GPU) == 3


def test_call_forces_an_implementation() -> None:
    assert run(LONG, GPU, "reference") == 2
    assert run(LONG, CPU, "triton") == 3


def test_use_forces_an_implementation_and_a_call_wins_over_it() -> None:
    with ops.use("reference"):
        assert run(LONG) == 2
        with ops.use("triton"):
            assert run(LONG, CPU) == 3
        assert run(LONG, GPU, "triton") == 3
        assert run(LONG) == 2
    assert run(LONG) == 3


def test_use_is_undone_by_an_exception() -> None:
    with pytest.raises(KeyError), ops.use("reference"):
        raise KeyError
    assert run(LONG) == 3


def test_compilers_get_a_reference_they_fuse_unless_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = replace(OPERATOR, compilers_fuse_reference=True)
    arguments = {"x": LONG}
    assert dispatch.call(fused, None, GPU, arguments)[0] == 3
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert dispatch.call(fused, None, GPU, arguments)[0] == 2
    assert dispatch.call(fused, "triton", GPU, arguments)[0] == 3
    with ops.use("triton"):
        assert dispatch.call(fused, None, GPU, arguments)[0] == 3
    assert dispatch.call(OPERATOR, None, GPU, arguments)[0] == 3


def test_unproven_kernels_run_only_where_they_are_forced() -> None:
    unproven = replace(OPERATOR, proven=False)
    with pytest.warns(UserWarning, match="its kernels have not passed all of their tests on a GPU yet"):
        assert torch.equal(dispatch.call(unproven, None, GPU, {"x": LONG}), LONG * 2)
    assert torch.equal(dispatch.call(unproven, "triton", GPU, {"x": LONG}), LONG * 2 + 1)
    with ops.use("triton"):
        assert torch.equal(dispatch.call(unproven, None, GPU, {"x": LONG}), LONG * 2 + 1)


def test_use_holds_in_every_thread() -> None:
    seen: list[float] = []
    with ops.use("reference"):
        thread = threading.Thread(target=lambda: seen.append(run(LONG)))
        thread.start()
        thread.join()
    assert seen == [2]


@pytest.mark.parametrize("forced", ["call", "context"])
def test_forced_kernels_never_fall_back(forced: str) -> None:
    refusal = "double: implementation 'triton' cannot run: x is too short; x is too odd"
    if forced == "call":
        with pytest.raises(ValueError, match=refusal):
            run(SHORT, GPU, "triton")
    else:
        with ops.use("triton"), pytest.raises(ValueError, match=refusal):
            run(SHORT)


def test_fallback_warns_once_for_each_reason() -> None:
    with pytest.warns(UserWarning, match="double runs its reference") as caught:
        assert run(SHORT) == 2
    assert [str(warning.message) for warning in caught] == [
        "double runs its reference, which is slower: x is too short",
        "double runs its reference, which is slower: x is too odd",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(SHORT) == 2


def test_cpu_falls_back_in_silence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(SHORT, CPU) == 2


def test_failing_probe_is_not_taken_for_a_refusal() -> None:
    def broken(x: Tensor) -> list[str]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        dispatch.call(replace(OPERATOR, unsupported=broken), None, GPU, {"x": LONG})


def test_explain_lists_reasons() -> None:
    assert ops.explain(double, LONG) == {"reference": [], "triton": []}
    assert ops.explain(double, x=SHORT) == {"reference": [], "triton": ["x is too short", "x is too odd"]}


def test_explain_checks_the_arguments() -> None:
    with pytest.raises(ValueError, match="x must have one axis"):
        ops.explain(double, torch.ones(2, 2))


def test_explain_names_the_operators() -> None:
    with pytest.raises(ValueError, match=r"is not an operator of vizoo.ops; there are: double"):
        ops.explain(print)


def test_unknown_implementation() -> None:
    rule = "implementation must be 'reference' or 'triton', got 'cuda'"
    with pytest.raises(ValueError, match=rule):
        run(LONG, CPU, "cuda")
    with pytest.raises(ValueError, match=rule), ops.use("cuda"):  # type: ignore[arg-type]
        pass


def test_registering_twice() -> None:
    with pytest.raises(ValueError, match="operator double is registered twice"):
        dispatch.register(double, OPERATOR)
