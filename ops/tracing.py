"""What code must mind that is also traced: sizes that stand for many, and autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

# False for 2.6, true for 2.11; those between were not tried.
DYNAMO_KNOWS_STATICALLY = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)


def known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition holds for every size the trace stands for. Adds no guard, but for Dynamo of older torch."""
    if isinstance(condition, bool) and not torch.compiler.is_compiling():  # Dynamo calls a symbolic truth a bool
        return condition
    if torch.compiler.is_dynamo_compiling() and not DYNAMO_KNOWS_STATICALLY:
        return True if condition else False  # noqa: SIM210 - there, Dynamo cannot call bool() on a symbol
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # pulls in sympy: only when tracing

    return statically_known_true(condition)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Context in which autocast leaves dtypes alone; for arithmetic whose range half precision cannot hold."""
    if device.type == "meta":  # on which sizes are counted; it knows no autocast
        return nullcontext()
    return torch.autocast(device.type, enabled=False)  # asking whether there is one breaks the graph in older torch
