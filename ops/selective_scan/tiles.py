"""Launch parameters of the selective scan's kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from vizoo.ops.tracing import known

LONGEST = 256
"""Tokens of a tile at most."""


class Tile(NamedTuple):
    """How a kernel is launched.

    Attributes:
        channels: Channels of a tile, a power of two; those of one program.
        warps: Warps of a program.
    """

    channels: int
    warps: int


def tokens(length: int, states: int, tokens_together: bool) -> int:
    """Tokens of a tile, a power of two; forward and backward alike, for one keeps states for the other.

    With one state and tokens together in memory a tile is a few long rows, with channels together many short ones.
    With more states it is what a thread can hold in registers.
    """
    longest = (LONGEST if tokens_together else 64) if states == 1 else 16
    size = 16
    while size < longest and not known(length <= size):
        size *= 2
    return size


@lru_cache
def forward(tokens: int, states: int, each: int) -> Tile:
    """Tile of the kernel that scans: 8 to 16 numbers a thread."""
    return _sized(tokens, states, each, numbers=1024 if states == 1 else 4096)


@lru_cache
def backward(tokens: int, states: int, each: int) -> Tile:
    """Tile of the kernel of the gradients. Few channels a tile are many parts of the gradients of B and C."""
    return _sized(tokens, states, each, numbers=2048 if states == 1 else 4096)


def _sized(tokens: int, states: int, each: int, numbers: int) -> Tile:
    """As many channels as make a tile of so many numbers, or all of a group; 32 numbers a thread with many states."""
    block = 1 << (states - 1).bit_length()
    most = 1 << (each - 1).bit_length()
    channels = max(1, min(most, 128, max(numbers // (tokens * block), 4 if states == 1 else 16)))
    warps = tokens * block * channels // ((8 if states == 1 else 32) * 32)
    return Tile(channels, max(1, min(8, warps)))


def splits(programs: int, tiles: int, multiprocessors: int) -> int:
    """In how many parts a sequence is cut for several programs: in none while there are programs for the whole GPU.

    What has been cut is read twice; parts shorter than 8 tiles are not worth it.
    """
    if programs >= multiprocessors:
        return 1
    return max(1, min(4 * multiprocessors // programs, tiles // 8))
