"""Passes over the blocks of a layer, on all threads that torch may use.

A block's operations are too short to be shared out among threads, and wait for each other where other work takes one
of the processors; whole blocks are not. Sums are taken part by part, and the parts are the same for any number of
threads, so the results are too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TypeVar

import torch

# Parts that the blocks of a layer are shared out in: each has sums of its own.
PARTS = 8

T = TypeVar("T")

_POOL: ContextVar[ThreadPoolExecutor | None] = ContextVar("pool", default=None)


@contextmanager
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


def in_parts(work: Callable[[list[slice]], T], blocks: Iterable[slice]) -> list[T]:
    """The results of `work` on each part of the blocks, in order."""
    blocks = list(blocks)
    size = math.ceil(len(blocks) / PARTS)
    parts = [blocks[start : start + size] for start in range(0, len(blocks), size)]
    pool = _POOL.get()
    if pool is None or len(parts) == 1:
        return [work(part) for part in parts]
    # Modes belong to threads: without the caller's, tensors made in inference mode could not be written to.
    return list(pool.map(partial(_within, work, torch.is_inference_mode_enabled()), parts))


def _within(work: Callable[[list[slice]], T], inference: bool, part: list[slice]) -> T:
    with torch.no_grad(), torch.inference_mode(inference):
        return work(part)


def spans(size: int, step: int) -> Iterator[slice]:
    """Slices of so many lines each, the last one shorter."""
    return (slice(start, min(start + step, size)) for start in range(0, size, step))
