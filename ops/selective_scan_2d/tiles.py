"""Launch parameters of the kernels of the selective scan over routes.

Chosen by the README's account of instructions and bytes, and by a sweep on an H100 at the stages of VMamba-T.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_SEGMENTS = 64
"""Segments of a sequence at most: each program walks through the ends of those before its own."""


class Tile(NamedTuple):
    """How a kernel is launched.

    Attributes:
        tokens: Tokens of a tile, a power of two of at least 16, the least a matrix unit takes. All kernels of a call
            share it, for states are kept between tiles.
        channels: Channels of a block, a power of two; 32 and more keep the tokens of a tile within a thread.
        per_sm: Programs for each multiprocessor that are worth having.
    """

    tokens: int
    channels: int
    per_sm: int


def _channels(d: int) -> int:
    """A warp's width; more than one channel for a thread shares addresses among them, but takes more registers."""
    return 32 if d > 16 else 16


def states(d: int) -> Tile:
    """Tile of the kernel of the states before tiles, which walks along sequences: few programs, with work to each."""
    return Tile(16, _channels(d), per_sm=8)


def walks(d: int) -> Tile:
    """Tile of the kernel that walks all routes of an image, the alternative to `states` and `outputs`."""
    return Tile(16, _channels(d), per_sm=8)


def walked(programs: int, states: int, multiprocessors: int) -> bool:
    """Whether that kernel is the faster one: there are programs for all of the GPU. It knows one state."""
    return states == 1 and programs >= walks(32).per_sm * multiprocessors


def outputs(d: int) -> Tile:
    """Tile of the kernel of outputs, whose programs take tiles in turn."""
    return Tile(16, _channels(d), per_sm=48)


def gradients(d: int) -> Tile:
    """Tile of the kernel of gradients. Each program leaves sums for all parameters of its channels: of wide maps, whose
    programs have few tiles each, more programs end together, in a sweep on an H100 by a tenth earlier."""
    return Tile(16, _channels(d), per_sm=16 if d < 256 else 32)


def summed_within(rank: int, states: int) -> bool:
    """Whether the kernel of gradients takes those of steps back through their projection.

    As long as the sums over channels fit into one column of products. Wider ones do not fit into registers beside a
    tile; then torch multiplies what the kernel leaves.
    """
    return rank + 2 * states <= 16


def count(H: int, W: int, tokens: int) -> int:
    """Tiles of a map, the same along any order."""
    return -(-(H * W) // tokens)


def segments(programs: int, tiles: int, wanted: int) -> int:
    """Into how many segments sequences are cut, so that about so many programs run; 8 tiles to a segment at least."""
    return max(1, min(MAX_SEGMENTS, tiles // 8, wanted // programs))


def power_of_two(n: int, least: int = 16) -> int:
    """Smallest power of two that is at least n, and at least the least that a matrix unit takes."""
    return max(least, 1 << (n - 1).bit_length())
