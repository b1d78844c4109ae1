"""Heavy libraries imported without the collector of garbage: a third of their time is its vain search."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Import inside: torch makes a million objects that stay, and Python would look through them again and again.

    All there is at the end is left out of later collections, of those at the interpreter's end too.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
