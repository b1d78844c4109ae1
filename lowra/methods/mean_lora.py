"""The obvious baseline: fine-tunes scatter around the weight they started from, so average them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowra.methods.base import Observation, Recovery, check_observation


@dataclass(frozen=True)
class MeanLora:
    """The row "Mean LoRA" of Tables 2 to 4: the mean of the n merged weights. Also where Spectral DeTuning starts."""

    pretty: ClassVar[str] = "Mean LoRA"
    reference: ClassVar[str] = "Horwitz et al. 2024, Recovering the Pre-Fine-Tuning Weights of Generative Models"
    needs_rank: ClassVar[bool] = False

    def recover(self, observation: Observation) -> Recovery:
        """Return one candidate (1, d, k), float32 as the paper's."""
        check_observation(observation)
        return Recovery(observation.merged.mean(0, keepdim=True))  # (1, d, k)
