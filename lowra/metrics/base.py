"""What a semantic metric is: it compares the recovered model's behaviour with the true pre-fine-tuning model's.

Nothing heavy is imported here, nor by a metric's module before its first model is needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from lowra.files import replacing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Weights: TypeAlias = "Mapping[tuple[str, str], Tensor]"
"""Recovered weights: (component, checkpoint layer name) to a (d, k) matrix. Layers not in it are the base model's."""

REFERENCE = "reference"
"""The label of the base model's own outputs."""


class Scorer(Protocol):
    """A metric bound to one base model: reference outputs are computed once, recovered models are scored one by one."""

    def score(self, weights: Weights, label: str | None) -> dict[str, float]:
        """Score one recovered model: a value per column of the metric, and extra columns if it likes.

        label: a name that belongs to these weights alone (a digest of them), under which the model's texts or images
        are kept below the scorer's artifact folder; None keeps none.
        """
        ...


class Metric(Protocol):
    """A semantic metric is a frozen dataclass; its fields are its settings.

    A field that only says where something lies (a folder, a file) is named in `places`, if there is one: what lies
    there decides scores through `inputs`, where it lies does not. One whose scorer keeps outputs to be shown, texts or
    images, has `keeps_outputs = True`.
    """

    @property
    def column(self) -> str:
        """Column in `trials.parquet`."""
        ...

    @property
    def pretty(self) -> str:
        """Heading in tables."""
        ...

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of model it can score, as `conf/subset` names them: image_classifier, causal_lm, text_to_image."""
        ...

    def ready(self) -> None:
        """Raise LowraError for what is wrong or missing whatever the data: settings, packages, judging models."""
        ...

    def check(self, base: str, evaluation: Path | None, device: torch.device) -> None:
        """Raise LowraError for anything about this base that would stop scoring on `device`: missing files, memory.

        base: a local folder or a Hub id; "" where it is not known yet. Where the evaluation inputs are the builder's,
        called once they are there.
        """
        ...

    def inputs(self, evaluation: Path | None) -> str:
        """Sixteen hex digits of all that decides scores beside settings, base and weights.

        The prompts or images it will use, and the judging model.
        """
        ...

    def scorer(self, base: str, evaluation: Path | None, device: torch.device, artifacts: Path | None) -> Scorer:
        """Load the base model and compute the reference outputs.

        evaluation: the builder's folder of evaluation inputs, None when the metric's own fields name them.
        artifacts: a folder for kept outputs, of this base, these inputs and settings alone; None keeps none.
        """
        ...

    def gallery(self, artifacts: Path, columns: Mapping[str, str], folder: Path, title: str) -> list[Path]:
        """Write kept outputs side by side into `folder` and return the files; none where there is nothing to show.

        columns: label to heading, in order, the reference first. Raises LowraError for a label without outputs.
        """
        ...


# ---- Digests and files ------------------------------------------------------------------------------------------


def digest(*parts: Any) -> str:
    """Sixteen hex digits of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
