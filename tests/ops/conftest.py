"""What every operator is held to. A test file lists cases; the checks are here, as methods of the fixture `checks`.

Kernels run on the GPU where there is one, else in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
Function = Callable[[dict[str, Tensor]], Tensor]


class Checks:
    """Checks of one function of named tensors against another."""

    def values_and_gradients(self, function: Function, tensors: Tensors, incoming: Tensor) -> dict[str, Tensor]:
        """Output of a function and the gradient of each tensor; zeros where a tensor did not matter."""
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
        out = function(leaves)
        gradients = torch.autograd.grad(out, list(leaves.values()), incoming.to(out.dtype), allow_unused=True)
        results = {"output": out.detach()}
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            results[name] = torch.zeros_like(leaf) if gradient is None else gradient
        return results

    def gradients(self, function: Function, tensors: Tensors) -> None:
        """Compares analytic gradients with finite differences; the tensors must be small and in float64."""
        names = list(tensors)

        def positional(*values: Tensor) -> Tensor:
            return function(dict(zip(names, values, strict=True)))

        torch.autograd.gradcheck(positional, [tensor.clone().requires_grad_() for tensor in tensors.values()])

    def factor_two(self, kernel: Function, plain: Function, exact: Function, tensors: Tensors) -> None:
        """The kernel's error, in the output and every gradient, is at most twice that of plain torch in its dtype.

        Errors are norms relative to the exact result, where that is not zero. The floor is a few roundings of float32,
        the precision of sums.
        """
        wide = {name: tensor.double() for name, tensor in tensors.items()}
        incoming = torch.randn_like(exact(wide)).to(next(iter(tensors.values())).dtype)
        truth = self.values_and_gradients(exact, wide, incoming.double())
        yardstick = self.values_and_gradients(plain, tensors, incoming)
        with self.poisoned():
            measured = self.values_and_gradients(kernel, tensors, incoming)
        for name, value in truth.items():
            norm = value.norm() if value.any() else 1.0
            allowed = 2 * (yardstick[name].double() - value).norm() / norm + 32 * torch.finfo(torch.float32).eps
            error = (measured[name].double() - value).norm() / norm
            assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"

    @contextmanager
    def poisoned(self) -> Iterator[None]:
        """Memory comes filled with NaN, so that what a kernel forgets to write shows."""
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.utils.deterministic.fill_uninitialized_memory
            assert torch.empty(8).isnan().all()
            yield
        finally:
            torch.use_deterministic_algorithms(False)

    def scattered(self, tensor: Tensor) -> Tensor:
        """The same values in memory that is not contiguous along any axis, NaN between them."""
        spread = torch.full((*(2 * size for size in tensor.shape),), float("nan"), dtype=tensor.dtype)
        view = spread.to(tensor.device)[tuple(slice(None, None, 2) for _ in tensor.shape)]
        return view.copy_(tensor)


@pytest.fixture(scope="session")
def checks() -> Checks:
    return Checks()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where kernels run: in the interpreter on a CPU, or on the GPU."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("where there is a GPU, the kernels are compiled for it")
    return torch.device(request.param)
