"""Batches of images of like shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import Sampler, Subset


@DATA_SAMPLERS.register_module()
class AspectBatches(Sampler[list[int]]):
    """Puts wide images with wide ones and tall with tall ones, so that padding a batch adds little.

    Order, epochs and the share of each process come from the sampler inside, whose indices are put together as they
    come; the last of each kind, if too few, share a batch at the end. So every process has the same number of batches
    in every epoch, and the same epoch gives the same batches, as resuming inside an epoch needs.

    In a config: `batch_sampler=dict(type=AspectBatches)` beside `batch_size` and `sampler`.

    Args:
        sampler: Gives the indices; its `dataset` has `sizes`, heights and widths (N, 2).
        batch_size: Images in a batch, on each process.
        drop_last: Leave out a last batch that is not full.

    Raises:
        ValueError: A batch size below 1.
        TypeError: The data set states no sizes.
    """

    def __init__(self, sampler: Any, batch_size: int, drop_last: bool = True) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        self.sampler, self.batch_size, self.drop_last = sampler, batch_size, drop_last
        sizes = _sizes(getattr(sampler, "dataset", None))
        self._tall = sizes[:, 0] > sizes[:, 1]

    def __len__(self) -> int:
        count = len(self.sampler)
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        waiting: tuple[list[int], list[int]] = ([], [])
        for index in self.sampler:
            group = waiting[int(self._tall[index])]
            group.append(index)
            if len(group) == self.batch_size:
                yield group.copy()
                group.clear()
        rest = waiting[0] + waiting[1]
        for start in range(0, len(rest), self.batch_size):
            batch = rest[start : start + self.batch_size]
            if len(batch) == self.batch_size or not self.drop_last:
                yield batch


def _sizes(dataset: Any) -> np.ndarray:
    if isinstance(dataset, Subset):
        return _sizes(dataset.dataset)[np.asarray(dataset.indices)]
    sizes = getattr(dataset, "sizes", None)
    if sizes is None:
        raise TypeError(
            f"grouping by shape needs a data set with `sizes` (heights and widths), {type(dataset).__name__} has none"
        )
    return np.asarray(sizes)
