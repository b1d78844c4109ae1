"""What a semantic metric is: it compares the recovered model's behaviour with the true pre-fine-tuning model's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

Weights = Mapping[tuple[str, str], Tensor]
"""Recovered weights: (component, checkpoint layer name) to a (d, k) matrix. Layers not in it are the base model's."""


class Scorer(Protocol):
    """A metric bound to one base model: reference outputs are computed once, recovered models are scored one by one."""

    def score(self, weights: Weights, label: str) -> dict[str, float]:
        """Score one recovered model: a value per column of the metric, and extra columns if it likes.

        label: where kept outputs (texts, images) of this model go: "reference", "spectral_detuning", "lora_ft/3"...
        A relative path below the scorer's artifact folder.
        """
        ...


class Metric(Protocol):
    """A semantic metric is a frozen dataclass; its fields are its settings."""

    @property
    def column(self) -> str:
        """Column in `trials.parquet`."""
        ...

    @property
    def pretty(self) -> str:
        """Heading in tables."""
        ...

    @property
    def families(self) -> tuple[str, ...]:
        """Subsets it can score."""
        ...

    def ready(self) -> None:
        """Raise LowraError for what is wrong or missing whatever the data: settings, packages, judging models."""
        ...

    def check(self, base: str, evaluation: Path | None) -> None:
        """Raise LowraError for anything about this base that would stop scoring later: missing files, memory.

        Where the evaluation inputs are the builder's, called once they are there.
        """
        ...

    def scorer(self, base: str, evaluation: Path | None, device: torch.device, artifacts: Path | None) -> Scorer:
        """Load the base model and compute the reference outputs.

        evaluation: the builder's folder of evaluation inputs, None when the metric's own fields name them.
        artifacts: a folder for kept outputs, or None to keep none.
        """
        ...
