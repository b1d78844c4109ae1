"""What code decides a number: digests of a module's source and of every module of ours that it imports.

A record is keyed by the source that made it, so an edited method, or an edited helper of a method, is never judged by
what an older version computed. Imports are read from the source (`ast`), wherever they stand in it, and followed
through `lowra` and through the modules that lie beside a user's own; installed packages are left to the versions that
each record carries.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sys
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_LOWRA = Path(__file__).resolve().parent
_UNREADABLE = uuid.uuid4().hex


def digest(text: str | bytes) -> str:
    """Sixteen hex digits of SHA-256."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:16]


def module_of(target: Any) -> str:
    """The name of the module an object, a function or a partial of either is defined in."""
    while hasattr(target, "func"):  # functools.partial
        target = target.func
    return str(getattr(target, "__module__", None) or type(target).__module__)


@functools.cache
def code_digest(module: str, within: str = "lowra") -> str:
    """Sixteen hex digits of the source of a module and of the modules it imports, transitively.

    within: of lowra's own modules only those of this package count.

    Code without a file (typed at a prompt) has a digest of its own in every process: nothing of it is ever reused.
    """
    path = _file_of(module)
    if path is None:
        return digest(f"{module}|{_UNREADABLE}")
    files = {
        name: file
        for name, file in closure(module).items()
        if not name.startswith("lowra.") or f"{name}.".startswith(f"{within}.")
    }
    return digest(b"".join(f"{name}\n".encode() + file.read_bytes() for name, file in sorted(files.items())))


def closure(module: str) -> dict[str, Path]:
    """The files of a module and of what it imports of `lowra` or from beside itself: dotted name to path."""
    found: dict[str, Path] = {}
    todo, seen = [module], {module}
    while todo:
        name = todo.pop()
        path = _file_of(name) if name == module else _locate(name, module, found[module])
        if path is None:
            continue
        found[name] = path
        new = set(_imports(name, path)) - seen  # a file names the same modules again and again
        todo += new
        seen |= new
    return found


def _file_of(module: str) -> Path | None:
    loaded = sys.modules.get(module)
    file = getattr(loaded, "__file__", None)
    if loaded is None:
        try:
            spec = find_spec(module)
        except (ImportError, ValueError):
            return None
        file = spec.origin if spec else None
    return Path(file) if file and file.endswith(".py") and Path(file).is_file() else None


def _locate(name: str, module: str, start: Path) -> Path | None:
    """The file of an imported module: of `lowra`, or from the folder the first module's package lies in."""
    # Its version is on every record, and what shows numbers decides none: a metric's gallery lies beside its scores.
    if name == "lowra" or f"{name}.".startswith("lowra.reporting."):
        return None
    if name.startswith("lowra."):
        return _candidate(_LOWRA.parent, name)
    root = start.parent
    while (root / "__init__.py").exists():
        root = root.parent
    if root.name in ("site-packages", "dist-packages") and name.split(".")[0] != module.split(".")[0]:
        return None
    return _candidate(root, name)


def _candidate(root: Path, name: str) -> Path | None:
    place = root.joinpath(*name.split("."))
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.is_file():
            return path
    return None


def _imports(name: str, path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, the packages around them, and what may be a module of a package."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for level, base, names in _import_statements(path.read_bytes()):
        if level:
            above = package.split(".")[: len(package.split(".")) - level + 1]
            base = ".".join([*above, *([base] if base else [])])
        for dotted in [base, *(f"{base}.{name}" for name in names)]:
            parts = dotted.split(".")
            yield from (".".join(parts[: i + 1]) for i in range(len(parts)))


@functools.cache
def _import_statements(source: bytes) -> tuple[tuple[int, str, tuple[str, ...]], ...]:
    """The import statements of a source: dots in front, module, names taken from it.

    Most of the time of a digest is in parsing, and methods share most of their modules.
    """
    found: list[tuple[int, str, tuple[str, ...]]] = []
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:  # statements alone, which lie in nothing but these: expressions are most of a file
        node = todo.pop()
        for inside in ("body", "orelse", "finalbody", "handlers", "cases"):
            todo += getattr(node, inside, ())
        if isinstance(node, ast.Import):
            found += [(0, alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or "", tuple(alias.name for alias in node.names)))
    return tuple(found)
