"""Digests of files and folders, computed once per unchanged file.

A file is known again by its path, size, inode and times of change; what was computed from its bytes then is kept below
the cache folder, a small file an answer. The cache only saves time: a read-only or broken one is as good as none, and
any number of processes may use it at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lowra import paths

# A file changed again within the granularity of a file system's clock looks unchanged. As git does, what is younger
# than this is not remembered (seconds; FAT has two, network file systems one).
_RACY_S = 2.0


def file_digest(path: Path) -> str:
    """Sixteen hex digits of a file's SHA-256. Raises OSError when it cannot be read."""
    path = Path(path)
    return remembered("sha256", [path], lambda: _sha256(path))


def folder_digest(folder: Path) -> str:
    """Sixteen hex digits of the names and contents of all files below a folder; those with a leading dot are left out.

    Raises OSError when one cannot be read.
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    for path in visible_files(folder):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{file_digest(path)}\n".encode())
    return digest.hexdigest()[:16]


def visible_files(folder: Path) -> list[Path]:
    """All files below a folder in the order of their names; hidden ones and those in hidden folders are left out."""
    found = (path for path in Path(folder).rglob("*") if path.is_file())
    return sorted(path for path in found if not any(p.startswith(".") for p in path.relative_to(folder).parts))


def remembered(what: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
    """What `compute` says about files, asked again only when one of them has changed.

    what: names the question, and the version of the code that answers it. Errors of `compute` pass and are not kept.
    """
    before = _identity(files)
    place = paths.cache_dir() / "digests" / f"{hashlib.sha256(json.dumps([what, before[0]]).encode()).hexdigest()[:32]}"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        entry = json.loads(place.read_text())
        if entry["files"] == before and isinstance(entry["answer"], str):
            return entry["answer"]
    answer = compute()
    youngest = max((max(times[2:4]) for times in before[1]), default=0) / 1e9
    if time.time() - youngest > _RACY_S and _identity(files) == before:
        with contextlib.suppress(OSError):
            _write(place, json.dumps({"what": what, "files": before, "answer": answer}))
    return answer


def _identity(files: Sequence[Path]) -> list[list]:
    """The files' absolute paths, and what is known of each without reading it."""
    stats = [os.stat(path) for path in files]
    return [
        [os.path.abspath(path) for path in files],
        [[s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns] for s in stats],
    ]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _write(place: Path, text: str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
    try:
        with open(handle, "w") as file:
            file.write(text)
        os.replace(name, place)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
