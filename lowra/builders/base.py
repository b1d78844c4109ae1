"""What a builder is, and how its work is kept.

A builder makes one subset: a base model, its LoRA fine-tunes and the data set of both in the LoWRA-Bench schema. Its
fields are the recipe, and the recipe is the key of the cache folder: another recipe is another folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lowra import __version__

MARKER = "stage.json"


@dataclass(frozen=True)
class Built:
    """A finished subset on disk.

    dataset: folder of LoWRA-Bench parquet. base: local folder or Hub id of the base model (diffusers layout for
    pipelines). evaluation: folder with what the semantic metric needs (images, prompts), or None when the metric's own
    configuration names it. report: numbers about the build (losses, accuracies), kept with the results.
    """

    dataset: Path
    base: str
    evaluation: Path | None = None
    report: dict[str, Any] = field(default_factory=dict)


class Builder(Protocol):
    """A builder is a frozen dataclass; its fields are the recipe."""

    def check(self) -> None:
        """Raise LowraError for anything that would stop the build later: paths, data, packages."""
        ...

    def build(self, folder: Path) -> Built:
        """Make the subset in `folder`, resuming what an earlier call finished."""
        ...


def recipe_key(builder: Any) -> str:
    """Twelve hex digits that name a recipe: the builder's class, all its fields and lowra's version.

    A field with `metadata={"recipe": False}` says what to build now, not what the subset is, and is left out.
    """
    recipe = dataclasses.asdict(builder)
    for spec in dataclasses.fields(builder):
        if not spec.metadata.get("recipe", True):
            del recipe[spec.name]
    text = json.dumps([__version__, type(builder).__qualname__, recipe], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def stage(folder: Path, work: Callable[[Path], dict[str, Any] | None]) -> dict[str, Any]:
    """Run `work` once to fill `folder`; later calls return what it reported.

    `work(partial)` gets `<folder>.partial`, which survives a kill: it may resume from what lies there (a Trainer's
    checkpoints) or write over it. Only a finished stage gets the final name, so a folder that exists is complete.
    """
    marker = folder / MARKER
    if marker.exists():
        return json.loads(marker.read_text())
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    report = work(partial) or {}
    (partial / MARKER).write_text(json.dumps(report, indent=1, default=str) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)
    return report
