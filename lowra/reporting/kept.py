"""Reports made before: what went into one decides what comes out of it, so that nothing is drawn twice.

A report is a function of the records it shows and of the code that shows it. Its files are kept below the cache folder
under a digest of both, one archive a report, and taken from there when the same is asked for again: whatever became of
the folder meanwhile, it gets the right files. The cache only saves time: a read-only or broken one is as good as none,
and any number of processes may use it at once.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lowra
from lowra import paths
from lowra.code import digest
from lowra.errors import LowraError
from lowra.files import replacing
from lowra.packages import versions

KEPT = 256  # reports, of some 0.3 MB each; the ones asked for last stay

_TEXT = ".text"  # of an archive: what is no file of the folder
_PACKAGES = ("numpy", "pandas", "pyarrow", "matplotlib", "pillow", "jinja2", "markupsafe")


@dataclass(frozen=True)
class Made:
    """A report that is still to be written. files: their contents by name. text: what the terminal is told."""

    files: dict[str, bytes]
    text: str

    def put(self, folder: Path) -> None:
        """Write the files into a folder, each whole or not at all. Raises LowraError where that cannot be."""
        for name, content in self.files.items():
            with replacing(folder / name) as temporary:
                temporary.write_bytes(content)


def made(given: Any, make: Callable[[], Made]) -> Made:
    """What `make` makes, or made before of the same.

    given: all that decides the report beside lowra's code and the packages it is drawn with, as JSON can hold it.
    Errors of `make` pass and are not kept.
    """
    name = digest(json.dumps([_CODE, sys.version, versions(_PACKAGES), given], default=str))
    place = paths.cache_dir() / "reports" / f"{name}.zip"
    with contextlib.suppress(Exception):  # missing, cut short, not ours: whatever it is, it is made again
        report = _unpacked(place.read_bytes())
        os.utime(place)
        return report
    report = make()
    with contextlib.suppress(LowraError, OSError):
        with replacing(place) as temporary:
            temporary.write_bytes(_packed(report))
        _forget(place.parent)
    return report


def _packed(report: Made) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**report.files, _TEXT: report.text.encode()}.items():
            archive.writestr(name, content)
    return digest(buffer.getvalue()).encode() + buffer.getvalue()


def _unpacked(content: bytes) -> Made:
    """The report of an archive. Raises ValueError, or whatever zipfile raises, for a damaged one."""
    name, archived = content[:16], content[16:]
    if digest(archived).encode() != name:
        raise ValueError("checksum")
    with zipfile.ZipFile(io.BytesIO(archived)) as archive:
        files = {each: archive.read(each) for each in archive.namelist()}
    return Made(files, files.pop(_TEXT).decode())


def _forget(folder: Path) -> None:
    """Delete all but the reports asked for last, and with them what killed processes left half written."""
    there = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
    for path in there[:-KEPT]:
        path.unlink(missing_ok=True)


def _code() -> str:
    """A digest of lowra's whole source with its data: which of it decides a report is nothing to be mistaken about."""
    root = Path(lowra.__file__).parent
    files = sorted(path for path in root.rglob("*") if path.suffix in (".py", ".json", ".j2"))
    return digest(b"".join(f"{path.relative_to(root)}\n".encode() + path.read_bytes() for path in files))


_CODE = _code()  # read before the modules that draw are imported: what is edited later must not count as drawn by it
