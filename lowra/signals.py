"""The signals by which people, systems and clusters end a job: it stops cleanly, and says how it goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

_STOPPING = ("SIGINT", "SIGTERM", "SIGHUP")
_came: list[int] = []
_continued = [True]  # empty where a command that is stopped has to begin anew


class Stopped(KeyboardInterrupt):
    """A signal that asks to stop: finished work is kept."""


def leave() -> None:
    """From now on such a signal ends the process on the spot: while nothing is open that must be closed.

    Libraries that are being imported swallow an exception, or turn it into another.
    """
    _answer(_leave)


def stop() -> None:
    """From now on such a signal is raised as `Stopped`, wherever the program is."""
    _answer(_stop)


def check() -> None:
    """Raise `Stopped` if a signal came and whatever ran then swallowed it."""
    if _came:
        raise Stopped(signal.Signals(_came[0]).name)


def came() -> int | None:
    """The first signal that came."""
    return _came[0] if _came else None


def nothing_kept() -> None:
    """From now on the program makes what it keeps at its end only: no command continues it."""
    _continued.clear()


def sentence(number: int) -> str:
    """What the user is told."""
    by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    then = "the same command continues where this one stopped" if _continued else "nothing is written"
    return f"\nstopped{by}; {then}."


def _leave(number: int, frame: Any) -> None:
    os.write(2, (sentence(number) + "\n").encode())
    os._exit(128 + number)


def _stop(number: int, frame: Any) -> None:
    _came.append(number)
    raise Stopped(signal.Signals(number).name)


def _answer(handler: Callable[[int, Any], None]) -> None:
    # Where nobody else does: a launcher, or who had them ignored (nohup, a shell's `&`).
    free = (signal.SIG_DFL, signal.default_int_handler, _leave, _stop)
    for name in _STOPPING:
        number = getattr(signal, name, None)  # Windows knows no SIGHUP
        if number is not None and signal.getsignal(number) in free:
            signal.signal(number, handler)
