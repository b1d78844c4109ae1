"""The weakest baseline: take the fine-tuned weights as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowra.methods.base import Observation, Recovery, check_observation


@dataclass(frozen=True)
class LoraFT:
    """The row "LoRA FT" of Tables 2 to 4: the n merged weights are the candidates, the scores averaged."""

    pretty: ClassVar[str] = "LoRA FT"
    reference: ClassVar[str] = "Horwitz et al. 2024, Recovering the Pre-Fine-Tuning Weights of Generative Models"
    needs_rank: ClassVar[bool] = False

    def recover(self, observation: Observation) -> Recovery:
        """Return the stack itself: candidates (n, d, k)."""
        check_observation(observation)
        return Recovery(observation.merged)
