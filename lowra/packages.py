"""Packages that only some commands need: asked for before any work, missing ones told in one sentence."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Iterable

from lowra.errors import LowraError

# What making models takes: the extra `builders`.
BUILDERS = ("accelerate", "datasets", "diffusers", "peft", "scikit-learn", "torchvision", "transformers", "trl")
_MODULES = {"scikit-learn": "sklearn"}  # imported under another name than pip's


def require(what: str, *names: str) -> None:
    """Raise LowraError with the `pip install` that helps unless these packages are there and new enough.

    what: who asks, as a sentence begins ("Metric sbert"). names: as pip knows them. Versions are compared with what
    lowra's own metadata declares, the one place for floors. Nothing is imported: that would take seconds.
    """
    from packaging.requirements import Requirement

    declared: dict[str, Requirement] = {}
    for line in _declared():
        requirement = Requirement(line)
        declared.setdefault(requirement.name, requirement)
    wrong, found = [], []
    for name in names:
        wanted = declared.get(name, Requirement(name))
        if importlib.util.find_spec(_MODULES.get(name, name.replace("-", "_"))) is None:
            found.append(f"{name} is not installed")
        elif (version := _version(name)) and not wanted.specifier.contains(version, prereleases=True):
            found.append(f"{name} is {version}")
        else:
            continue
        wrong.append(f"'{wanted.name}{wanted.specifier}'" if wanted.specifier else wanted.name)
    if wrong:
        raise LowraError(
            f"{what} needs other packages than there are: {', '.join(found)}; pip install {' '.join(wrong)}"
        )


def versions(names: Iterable[str]) -> dict[str, str]:
    """The installed versions of those of some packages that pip knows."""
    return {name: version for name in names if (version := _version(name))}


def _declared() -> list[str]:
    try:
        return importlib.metadata.requires("lowra") or []
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that nobody installed
        return []


@functools.cache
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # a module on the path that pip does not know
        return None
