"""Chooses which implementation of an operator runs, and says why another one cannot.

An operator has two: `reference`, plain torch that runs everywhere, and `triton`, fused kernels. Left alone, a tensor on
a GPU takes the kernels and everything else the reference; an `implementation=` argument or `use` forces one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, get_args

import torch

ImplementationName = Literal["reference", "triton"]
IMPLEMENTATIONS: tuple[ImplementationName, ...] = get_args(ImplementationName)
Result = TypeVar("Result")

# A plain global, not a ContextVar: that breaks the graph of a compiled model at every operator up to torch 2.11.
_forced: ImplementationName | None = None
_reported: set[tuple[str, str]] = set()


@dataclass(frozen=True, kw_only=True)
class Operator(Generic[Result]):
    """What the dispatcher knows of one operator.

    The functions after `prepare` all take the keyword arguments that `prepare` returns.

    Attributes:
        name: Name of the public function.
        prepare: Takes the public function's arguments (without `implementation`), checks them, fills in defaults.
        reference: The definition in plain torch.
        triton: The fused kernels.
        unsupported: Why the kernels cannot take these arguments; empty when they can. It must not raise for checked
            arguments: an exception here is a bug, and is not taken for an answer.
        compilers_fuse_reference: Whether a compiler merges the reference with its neighbours, so that it is the faster
            one there. Then it is what compilation and export get, unless the kernels are forced.
        proven: Whether the kernels have passed all of their tests on a GPU. Until then they run where they are forced.
    """

    name: str
    prepare: Callable[..., dict[str, Any]]
    reference: Callable[..., Result]
    triton: Callable[..., Result]
    unsupported: Callable[..., list[str]]
    compilers_fuse_reference: bool = False
    proven: bool = True


UNPROVEN = "its kernels have not passed all of their tests on a GPU yet; implementation='triton' runs them"

_operators: dict[Callable[..., Any], Operator[Any]] = {}


def register(function: Callable[..., Any], operator: Operator[Any]) -> None:
    """Makes an operator known to `explain` under its public function."""
    if function in _operators:
        raise ValueError(f"operator {operator.name} is registered twice")
    _operators[function] = operator


@contextmanager
def use(implementation: ImplementationName) -> Iterator[None]:
    """Forces one implementation for every operator called in this context, in all threads of the process.

    `use("reference")` is what export needs. An `implementation=` argument of a single call wins over it.

    Raises:
        ValueError: There is no such implementation.
    """
    global _forced
    _check_name(implementation)
    before, _forced = _forced, implementation
    try:
        yield
    finally:
        _forced = before


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[ImplementationName, list[str]]:
    """Says, for each implementation of an operator, what keeps it from running on these arguments.

    Args:
        op: A public function of `vizoo.ops`.
        args: Arguments as for the function itself.
        kwargs: Likewise, without `implementation`.

    Returns:
        Reasons by implementation; an empty list where it can run.

    Raises:
        ValueError: `op` is not an operator, or the arguments are invalid for every implementation.
    """
    if op not in _operators:
        known = ", ".join(sorted(operator.name for operator in _operators.values()))
        raise ValueError(f"{op!r} is not an operator of vizoo.ops; there are: {known}")
    operator = _operators[op]
    return {"reference": [], "triton": operator.unsupported(**operator.prepare(*args, **kwargs))}


def call(
    operator: Operator[Result],
    implementation: ImplementationName | None,
    device: torch.device,
    arguments: dict[str, Any],
) -> Result:
    """Runs an operator on prepared arguments by the forced implementation, or by the best one that can.

    Raises:
        ValueError: The forced implementation does not exist or cannot take the arguments.
    """
    if implementation is not None:
        _check_name(implementation)
    choice = _forced if implementation is None else implementation
    if choice is None and operator.compilers_fuse_reference and torch.compiler.is_compiling():
        choice = "reference"
    # The meta device computes nothing, so there is nothing to be slow at and nothing to warn of.
    if choice == "reference" or (choice is None and device.type in ("cpu", "meta")):
        return operator.reference(**arguments)
    reasons = operator.unsupported(**arguments) if operator.proven or choice == "triton" else [UNPROVEN]
    if not reasons:
        return operator.triton(**arguments)
    if choice == "triton":
        raise ValueError(f"{operator.name}: implementation 'triton' cannot run: {'; '.join(reasons)}")
    _report(operator.name, reasons)
    return operator.reference(**arguments)


def _check_name(implementation: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        names = " or ".join(repr(name) for name in IMPLEMENTATIONS)
        raise ValueError(f"implementation must be {names}, got {implementation!r}")


def _report(name: str, reasons: list[str]) -> None:
    """Warns of each reason once in the life of the process."""
    if torch.compiler.is_compiling():  # a warning would break the graph
        return
    for reason in reasons:
        if (name, reason) not in _reported:
            _reported.add((name, reason))
            warnings.warn(f"{name} runs its reference, which is slower: {reason}", stacklevel=4)
