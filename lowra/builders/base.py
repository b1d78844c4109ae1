"""What a builder is, and what names its work.

A builder makes one subset: a base model, its LoRA fine-tunes and the data set of both in the LoWRA-Bench schema. Its
fields are the recipe, and the recipe is the key of the cache folder: another recipe is another folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lowra import __version__
from lowra.code import code_digest
from lowra.errors import unknown


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
    """A builder is a frozen dataclass; its fields are the recipe, annotated with what they may be (`lowra.checks`)."""

    @property
    def base(self) -> str | None:
        """The base model's Hub id or folder; None where a miniature makes its own."""
        ...

    def check(self) -> None:
        """Raise LowraError for anything that would stop the build later: paths, data, packages."""
        ...

    def build(self, folder: Path) -> Built:
        """Make the subset in `folder`, resuming what an earlier call finished."""
        ...


def recipe_key(builder: Any) -> str:
    """Twelve hex digits that name a recipe: the builder's class, its code, all its fields and lowra's version.

    Of the code what is in this package counts: full-size models are not trained again for a change in what reads them.
    A field with `metadata={"recipe": False}` says what to build now, not what the subset is, and is left out.
    """
    recipe = dataclasses.asdict(builder)
    for spec in dataclasses.fields(builder):
        if not spec.metadata.get("recipe", True):
            del recipe[spec.name]
    kind = type(builder)
    parts = [__version__, kind.__qualname__, code_digest(kind.__module__, within="lowra.builders"), recipe]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


# Names that transformers' Trainer has had for years: to look them up it would be imported, for seconds, in every run.
_OPTIMIZERS, _SCHEDULES = ("adamw_torch", "adamw_torch_fused"), ("linear", "cosine", "constant")


def check_trainer_names(optimizer: tuple[str, str], scheduler: tuple[str, str]) -> None:
    """Raise LowraError, with those there are, for an optimiser or a schedule (setting, value) that Trainer lacks."""
    if optimizer[1] in _OPTIMIZERS and scheduler[1] in _SCHEDULES:
        return
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames

    for (setting, value), known in ((optimizer, OptimizerNames), (scheduler, SchedulerType)):
        if value not in (names := [str(one.value) for one in known]):
            raise unknown(f"builder.{setting}", value, names)
