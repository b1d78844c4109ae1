"""Passes over the tiles of a layer, on all threads that torch may use.

A tile's operations are too short to be shared out among threads, and wait for each other where other work takes one
of the processors; whole tiles are not. Sums are taken part by part, and the parts are the same for any number of
threads, so the results are too.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import TypeVar

import torch

# Parts that a layer is shared out in: each has sums of its own.
PARTS = 8

# A layer of more columns than this is cut lengthwise too, into tiles of about so many. Products of some rows with all
# columns would read a whole factor for every few rows.
WIDE, WIDTH = 1024, 512

T = TypeVar("T")
B = TypeVar("B")

# Some rows and columns, as an index of a matrix.
Tile = tuple[slice, slice]

_POOL: ContextVar[ThreadPoolExecutor | None] = ContextVar("pool", default=None)


@contextlib.contextmanager
def threads(device: torch.device) -> Iterator[None]:
    """Within, passes take as many threads as torch had, and all else one; without it, passes take one too."""
    count = torch.get_num_threads()
    if count == 1 or device.type != "cpu":
        yield
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count, "blocks", torch.set_flush_denormal, (True,)) as pool:
            token = _POOL.set(pool)
            try:
                yield
            finally:
                _POOL.reset(token)
    finally:
        torch.set_num_threads(count)


def in_parts(work: Callable[[list[B]], T], blocks: Iterable[B]) -> list[T]:
    """The results of `work` on each part of the blocks, in order."""
    return list(each_part(work, blocks))


def each_part(work: Callable[[list[B]], T], blocks: Iterable[B]) -> Iterator[T]:
    """The same one by one, for results that are not to be held all at once."""
    blocks = list(blocks)
    size = math.ceil(len(blocks) / PARTS)
    parts = [blocks[start : start + size] for start in range(0, len(blocks), size)]
    pool = _POOL.get()
    if pool is None or len(parts) == 1:
        yield from map(work, parts)
        return
    # Modes belong to threads: without the caller's, tensors made in inference mode could not be written to.
    yield from pool.map(partial(_within, work, torch.is_inference_mode_enabled()), parts)


def _within(work: Callable[[list[B]], T], inference: bool, part: list[B]) -> T:
    with torch.no_grad(), torch.inference_mode(inference):
        return work(part)


def spans(size: int, step: int) -> Iterator[slice]:
    """Slices of so many lines each, the last one shorter."""
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def strips(shape: tuple[int, int], entries: int) -> Iterator[list[Tile]]:
    """The tiles of a matrix, strip by strip of rows; a tile has about so many entries.

    Strips are of one height, and shared out evenly: an even number, or a multiple of the parts where they are many.
    """
    rows, columns = shape
    width = columns if columns <= WIDE else math.ceil(columns / round(columns / WIDTH))
    count = math.ceil(rows / max(1, entries // width))
    if count > 1:
        share = 2 if count <= PARTS // 2 else PARTS
        count = share * math.ceil(count / share)
    across = list(spans(columns, width))
    return ([(part, other) for other in across] for part in spans(rows, math.ceil(rows / count)))
