"""The parts of a build: each made once, by one process, resumed after a kill, and known to be whole.

A part is a folder. While it is made its name ends in `.partial` and one process holds a lock on a file inside, which
the system takes back when that process dies; a part is finished when it has lost the ending. Its marker lists its files
with their digests, so that a file deleted or changed later is noticed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lowra import signals
from lowra.digests import file_digest, visible_files
from lowra.errors import LowraError

Work = Callable[[Path], dict[str, Any] | None]

MARKER = "stage.json"
_LOCK = ".lock"

_POLL_S = 1.0
# The owner of a part shows every `_BEAT_S` that it is alive. A lock whose owner has not for `_PATIENCE_S` may be one
# that a file server kept after its machine died: whoever waits then makes a copy of the part for itself.
_BEAT_S = 20.0
_PATIENCE_S = 300.0


def stage(folder: Path, work: Work) -> dict[str, Any]:
    """Fill `folder` by `work`, once; later calls, and other processes, return what it reported.

    `work(partial)` gets `<folder>.partial`, which survives a kill: it may resume from what lies there (a Trainer's
    checkpoints) or write over it. Where another process makes the same part, this one waits for it and takes what it
    made. Where the file system knows no locks, or a lock's owner shows no life, it makes the part in a folder of its
    own; the first that is finished is everybody's.
    Raises LowraError for a finished part of which files are missing or changed.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    waited = _Wait(folder)
    while (report := finished(folder)) is None:
        signals.check()
        with _locked(partial) as lock:
            if lock == "busy" and not waited.enough(partial / _LOCK):
                time.sleep(_POLL_S)
            elif lock != "ours":
                report = _fill_own(folder, work)
            elif (report := finished(folder)) is None:  # nobody was faster since we looked
                report = _fill(partial, folder, work)
            else:
                shutil.rmtree(partial, ignore_errors=True)
        if report is not None:
            return report
    return report


def finished(folder: Path) -> dict[str, Any] | None:
    """What the work of a finished part reported; None where it is not finished.

    Raises LowraError where its marker cannot be read, or a file that it lists is missing or changed.
    """
    marker = folder / MARKER
    advice = f"Delete {folder} to have it built again."
    try:
        entry = json.loads(marker.read_text(encoding="utf-8"))
        report, files = entry["report"], entry["files"]
        if not (isinstance(report, dict) and isinstance(files, dict)):
            raise ValueError("no report and files")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise LowraError(f"{str(marker)[:120]} cannot be read ({error.strerror}); check cache_dir.") from None
    except (ValueError, KeyError, TypeError):
        raise LowraError(f"{marker} is damaged. {advice}") from None
    for name, digest in files.items():
        try:
            found = file_digest(folder / name)
        except FileNotFoundError:
            raise LowraError(f"{folder / name} is missing since it was built. {advice}") from None
        except OSError as error:
            raise LowraError(f"{folder / name} cannot be read ({error.strerror}). {advice}") from None
        if found != digest:
            raise LowraError(f"{folder / name} was changed since it was built. {advice}")
    return report


def _fill(partial: Path, folder: Path, work: Work) -> dict[str, Any] | None:
    """Do the work in `partial` and give the part its final name; returns the report, None if another was first."""
    report = work(partial) or {}
    files = {path.relative_to(partial).as_posix(): file_digest(path) for path in visible_files(partial)}
    files.pop(MARKER, None)
    text = json.dumps({"report": report, "files": files}, indent=1, default=str) + "\n"
    (partial / MARKER).write_text(text, encoding="utf-8")
    if folder.exists() and not (folder / MARKER).exists():
        shutil.rmtree(folder)  # whatever it is, it is no finished part
    try:
        os.replace(partial, folder)
    except OSError:
        if not (folder / MARKER).exists():
            raise
        shutil.rmtree(partial, ignore_errors=True)
        return None
    (folder / _LOCK).unlink(missing_ok=True)
    return json.loads(text)["report"]


def _fill_own(folder: Path, work: Work) -> dict[str, Any] | None:
    """As `_fill`, in a folder that no other process knows; it cannot be resumed."""
    whose = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    partial = folder.with_name(f"{folder.name}.{whose}.partial")
    partial.mkdir(parents=True)
    try:
        return _fill(partial, folder, work)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[str]:
    """Hold the lock of a partial folder: "ours", "busy" where another process has it, "unknown" without locks."""
    partial.mkdir(parents=True, exist_ok=True)
    path = partial / _LOCK
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:  # the part was finished just now
        yield "busy"
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield "busy"
            return
        except OSError:  # a file system without locks
            yield "unknown"
            return
        try:
            ours = os.path.samestat(os.fstat(handle), os.stat(path))
        except FileNotFoundError:
            ours = False  # the folder got its final name between opening and locking
        if not ours:
            yield "busy"
            return
        with _beating(path):
            yield "ours"
    finally:
        os.close(handle)


@contextlib.contextmanager
def _beating(path: Path) -> Iterator[None]:
    """Touch the lock file every now and then while its owner lives."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(_BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class _Wait:
    """Waiting for another process: says so once, and knows when it was long enough."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: int | None = None
        self.since = 0.0

    def enough(self, lock: Path) -> bool:
        """Whether the lock's owner has shown no life for too long, by this machine's clock alone."""
        with contextlib.suppress(FileNotFoundError):
            beat = lock.stat().st_mtime_ns
            if self.seen is None:
                print(f"another process is building {self.folder.name}; waiting for it.", file=sys.stderr)
            if beat != self.seen:
                self.seen, self.since = beat, time.monotonic()
        return self.seen is not None and time.monotonic() - self.since > _PATIENCE_S
