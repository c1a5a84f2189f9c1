"""Norms that train as LayerNorm and are deployed as numbers of a neighbouring layer (SLAB's, ICML 2024).

LayerNorm takes statistics of each token, also in evaluation. A batch norm takes none there and folds into the linear
layer beside it, but transformers do not train well with it. So a model starts with LayerNorm, and while it trains, its
share of the output goes to zero in favour of a batch norm, to which a multiple of the input is added.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .fusing import scale_and_shift
from .layers import BatchNorm, LayerNorm


class TokenBatchNorm(BatchNorm):
    """Batch norm of tokens (N, C): the statistics of a channel are those of all tokens of all images."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim != 2:
            raise ValueError(f"tokens must have the shape (N, C), got {tuple(input.shape)}")


class RepBN(nn.Module):
    """Batch norm of the last axis plus a learned multiple of the input: y = BN(x) + alpha x.

    In evaluation it multiplies each channel by a constant and adds one; `fusing` folds these into a neighbour.

    Args:
        channels: Length of the last axis.
        keep_float32: Give float32 under autocast, as `LayerNorm` does; for a norm that no linear layer follows.
    """

    def __init__(self, channels: int, keep_float32: bool = False) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.bn = TokenBatchNorm(channels)
        self.keep_float32 = keep_float32

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) to the same shape."""
        return self.wide(x).to(self.output_dtype(x))

    def wide(self, x: Tensor) -> Tensor:
        """The same before it is rounded to the dtype of the output."""
        if self.bn.training:
            tokens = x.flatten(0, -2)
            return torch.addcmul(self.bn(tokens), tokens, self.alpha).view(x.shape)
        # One pass over the map instead of three.
        mean, variance = cast(Tensor, self.bn.running_mean), cast(Tensor, self.bn.running_var)
        scale = self.bn.weight * (variance + self.bn.eps).rsqrt()
        shift = self.bn.bias - scale * mean
        return torch.addcmul(shift, x, scale + self.alpha)

    def output_dtype(self, x: Tensor) -> torch.dtype:
        """What the layer behind reads: under autocast its dtype, unless float32 is kept."""
        device = x.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return x.dtype
        return torch.float32 if self.keep_float32 else torch.get_autocast_dtype(device)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Factor and summand of each channel in evaluation, (channels,), in float64."""
        scale, shift = scale_and_shift(self.bn)
        return scale + self.alpha.detach().double(), shift


class ProgressiveNorm(nn.Module):
    """LayerNorm that turns into a `RepBN` over the first so many training steps.

    A call in training is a step. It gives g LayerNorm(x) + (1 - g) RepBN(x), where g = iter / total_step is 1 at first,
    and counts `iter` down to 0. Both norms learn from the first step on. Evaluation is RepBN alone, at any time.

    The counters are part of the state dict: a model that is loaded goes on where it was. Recomputation in backward
    (gradient checkpointing) repeats its step and does not count. Where gradients accumulate over several batches, each
    of these would count; the hook `vizoo.train.hooks_norm.NormSchedule` counts updates.

    Args:
        channels: Length of the last axis.
        steps: Steps until LayerNorm has no share left.
        warmup: Steps with LayerNorm alone before these, in which the batch norm collects no statistics.
        eps: Of LayerNorm; that of the batch norm is 1e-5.
        keep_float32: As for `LayerNorm`.

    Raises:
        ValueError: No steps, or a negative number of them for the warm-up.
    """

    warm: Tensor
    iter: Tensor
    total_step: Tensor

    def __init__(
        self, channels: int, steps: int, warmup: int = 0, eps: float = 1e-5, keep_float32: bool = False
    ) -> None:
        super().__init__()
        check_steps(steps, warmup=warmup)
        self.warmup = warmup
        self.register_buffer("warm", torch.tensor(warmup))
        self.register_buffer("iter", torch.tensor(steps))
        self.register_buffer("total_step", torch.tensor(steps))
        self.norm1 = LayerNorm(channels, keep_float32=True, eps=eps)
        self.norm2 = RepBN(channels, keep_float32)
        self._share = torch.ones(())

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) to the same shape."""
        if not self.training:
            return self.norm2(x)
        dtype = self.norm2.output_dtype(x)
        if self.warmup and self.warm > 0:
            self.warm -= 1
            return self.norm1(x).to(dtype)
        early, late, share = self.norm1(x), self.norm2.wide(x), self._next_share()
        wide = torch.promote_types(late.dtype, torch.float32)  # in half precision, small shares would be lost
        return torch.lerp(late.to(wide), early.to(wide), share.to(wide)).to(dtype)

    def _next_share(self) -> Tensor:
        """LayerNorm's share of this step, a number; counts the step."""
        if in_backward():
            return self._share
        share = self.iter / self.total_step
        self.iter.sub_(1).clamp_(min=0)
        if not torch.compiler.is_compiling():
            self._share = share
        return share

    @property
    def finished(self) -> bool:
        """Whether LayerNorm has no share left."""
        return int(self.warm) == int(self.iter) == 0

    def set_schedule(self, steps: int, done: int = 0) -> None:
        """Fade over so many steps, the warm-up not counted, as if `done` steps, the warm-up counted, were behind.

        Raises:
            ValueError: No steps, or a negative number of them done.
        """
        check_steps(steps, done=done)
        self.total_step.fill_(steps)
        self.warm.fill_(max(0, self.warmup - done))
        self.iter.fill_(min(steps, max(0, steps + self.warmup - done)))

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Factor and summand of each channel in evaluation, (channels,), in float64."""
        return self.norm2.scale_and_shift()


def check_steps(steps: int, **others: int) -> None:
    """What a schedule must hold.

    Raises:
        ValueError: It has no steps, or another number of steps is negative.
    """
    if steps < 1:
        raise ValueError(f"a norm needs 1 step or more to turn into another, got {steps}")
    for name, number in others.items():
        if number < 0:
            raise ValueError(f"{name} must be 0 or more, got {number}")


def in_backward() -> bool:
    """Whether a forward pass is repeated inside a backward pass, as gradient checkpointing does."""
    # torch.utils.checkpoint itself asks this. A compiler repeats what it traced once, so there nothing is asked.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
