"""What glibc does with memory that tensors give back: kept for the next one where it is a temporary.

Left to itself it learns from what was freed before, and hands a temporary's pages back to the system only to fetch them
again, zeroed, a moment later: up to a third of the time of passes over small pieces.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator

# Bytes from which an allocation is the system's (what glibc comes to by itself, and where layers are worked on tile by
# tile, so that whole layers go back), and of what is kept beside; the names are those of C's malloc.h.
USUAL, LAYERS, KEPT = 2**25, 2**23, 2**26
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8


def keep_temporaries(smaller_than: int = USUAL) -> None:
    """From now on, freed memory of smaller allocations is kept for the next ones. Nothing with another C library."""
    if (mallopt := _glibc("mallopt")) is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT)
        mallopt(M_MMAP_THRESHOLD, smaller_than)
        mallopt(M_ARENA_MAX, 1)  # what one thread keeps is for all


def trim() -> bool:
    """Give back to the system what is kept; False with another C library, where nothing happens."""
    if (malloc_trim := _glibc("malloc_trim")) is None:
        return False
    malloc_trim(0)
    return True


def _glibc(name: str) -> Callable[..., int] | None:
    """A function that is glibc's alone."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


@contextlib.contextmanager
def temporaries_kept() -> Iterator[None]:
    """Within, a tile's temporaries are kept for the next ones, and those of whole layers given back."""
    keep_temporaries(LAYERS)
    try:
        yield
    finally:
        keep_temporaries()
