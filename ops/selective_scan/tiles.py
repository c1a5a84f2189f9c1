"""Launch parameters of the selective scan's kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from vizoo.ops.tracing import known

LONGEST = 256
"""Tokens of a flat tile at most."""
HELD = 16
"""Tokens of a tile where a thread holds all of them."""
MOST_WARPS = 8


class Tile(NamedTuple):
    """How a kernel is launched.

    Attributes:
        channels: Channels of a tile, a power of two; those of one program.
        warps: Warps of a program.
        dot: Whether sums over channels go through tensor cores, which takes 16 channels and cuts to tf32: for bfloat16.
    """

    channels: int
    warps: int
    dot: bool = False


def flat(states: int, tokens_together: bool) -> bool:
    """Whether tiles lie over threads as rows of tokens do in memory; else a thread has all tokens of a tile."""
    return states == 1 and tokens_together


def tokens(length: int, flat: bool) -> int:
    """Tokens of a tile, a power of two; forward and backward alike, for one keeps states for the other.

    Flat tiles are a few long rows; others have what a thread can hold.
    """
    size = HELD
    while flat and size < LONGEST and not known(length <= size):
        size *= 2
    return size


@lru_cache
def forward(tokens: int, states: int, each: int, flat: bool) -> Tile:
    """Tile of the kernel that scans; `each` is the number of channels of a group."""
    return _rows(tokens, each, numbers=1024) if flat else _lanes(tokens, states, each, numbers=64)


@lru_cache
def backward(tokens: int, states: int, each: int, flat: bool) -> Tile:
    """Tile of the kernel of the gradients. Few channels a tile are many parts of the gradients of B and C."""
    if flat:
        return _rows(tokens, each, numbers=2048)
    return _lanes(tokens, states, each, numbers=32 if states >= 8 else 16)  # what has no states takes registers, too


def _block(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _rows(tokens: int, each: int, numbers: int) -> Tile:
    """Flat tile of so many numbers, 8 of them a thread."""
    channels = max(1, min(_block(each), numbers // tokens))
    return Tile(channels, warps=max(1, min(MOST_WARPS, tokens * channels // 256)))


def _lanes(tokens: int, states: int, each: int, numbers: int) -> Tile:
    """A channel a lane, and as many warps as leave a thread so many numbers: all tokens of a few states."""
    channels, column = min(32, _block(each)), tokens * _block(states)
    while channels > 1 and column * channels > 32 * MOST_WARPS * numbers:
        channels //= 2
    return Tile(channels, warps=max(1, min(MOST_WARPS, column * channels // (32 * numbers))))


def splits(programs: int, tiles: int, multiprocessors: int) -> int:
    """In how many parts a sequence is cut for several programs: in none while there are programs for the whole GPU.

    What has been cut is read twice; parts shorter than 8 tiles are not worth it.
    """
    if programs >= multiprocessors:
        return 1
    return max(1, min(4 * multiprocessors // programs, tiles // 8))
