"""Makes functions that launch kernels known to torch as operators."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.autograd.function import once_differentiable

from vizoo.ops.gpu import interpreted

_state = threading.local()


def kernel_operator(name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> CustomOpDef:
    """Registers a function as a torch operator whose kernels compilers can see.

    `torch.compile` takes the body apart: it calls the kernels itself, without the tens of microseconds that the way
    through Python's side of the dispatcher costs, and fuses the torch code around them. Export, dispatch modes and
    `FakeTensorMode` keep the operator whole. `torch.library.triton_op` does the same, but imports triton to register.

    Args:
        name: `vizoo::<name>`.
        schema: Its arguments and results as torch writes them; torch 2.6 cannot read ours off the annotations.
        function: Allocates and launches through `launchable`. It must not return its inputs.
        fake: The same signature; makes empty outputs only.
    """
    operator = torch.library.custom_op(name, function, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    if not interpreted():  # compilers cannot call what is not compiled

        @operator.register_torch_dispatch(FunctionalTensorMode)
        def taken_apart(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
            if _exporting(mode):
                return mode.__torch_dispatch__(op, types, args, kwargs)
            with mode:
                return _recorded(function, *args, **kwargs)

    return operator


def direct_function(
    launch: Callable[..., Any], setup_context: Callable[..., None], gradients: Callable[..., tuple[Any, ...]]
) -> type[torch.autograd.Function]:
    """The short way in eager mode: an autograd function that launches without passing a registered operator.

    Args:
        launch: From the inputs to the output, or to several of which the first is the output.
        setup_context: As `torch.library.register_autograd` takes it.
        gradients: From the context and the output's gradient to those of the inputs.
    """

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = launch(*inputs)
            setup_context(ctx, inputs, output)
            return output[0] if isinstance(output, tuple) else output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad_out: Any) -> tuple[Any, ...]:
            return gradients(ctx, grad_out)

    return Direct


def register_flops(formulas: Mapping[Any, Callable[..., int]]) -> None:
    """Tells torch's `FlopCounterMode` what operators cost. Not on import: that module imports triton."""
    from torch.utils.flop_counter import register_flop_formula

    for operator, formula in formulas.items():
        register_flop_formula(operator)(formula)


def launchable(kernel: Any) -> Any:
    """The kernel as it is to be launched, `launchable(kernel)[grid](...)`: through the tracer where one looks on."""
    return torch.library.wrap_triton(kernel) if recording() else kernel


def recording() -> bool:
    """Whether kernels are handed to a tracer, and not launched."""
    return getattr(_state, "recording", False)


def bound(registers: int) -> dict[str, int]:
    """The option that bounds a thread's registers; none for 0, or where compilers launch, which cannot pass it on."""
    return {"maxnreg": registers} if registers and not recording() else {}


def _recorded(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls the function, whose kernels `launchable` hands to the tracer."""
    before, _state.recording = recording(), True
    try:
        return function(*args, **kwargs)
    finally:
        _state.recording = before


def _exporting(mode: FunctionalTensorMode) -> bool:
    from torch.export import _trace  # slow to import, and here by then

    whole = getattr(_trace, "custom_triton_ops_decomposition_disabled", None)
    return mode.export if whole is None else whole()
