"""The one exception a user's mistake raises: a sentence, never a traceback."""

from __future__ import annotations

from collections.abc import Iterable


class LowraError(Exception):
    """A mistake the user can mend.

    The message is one clear sentence or two: what came, what was expected, what to do. The command line
    prints it alone and exits with status 2; every other exception is a bug of ours and keeps its traceback.
    """


def unknown(kind: str, name: object, known: Iterable[str], advice: str = "") -> LowraError:
    """The error for a name nobody knows, with the known ones listed in order."""
    listed = ", ".join(sorted(known)) or "none"
    return LowraError(f"Unknown {kind} {name!r}; known: {listed}.{' ' + advice if advice else ''}")
