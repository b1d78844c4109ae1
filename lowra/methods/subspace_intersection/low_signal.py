"""Updates near the rounding of the merges: too few of their directions show for the closed form."""

from __future__ import annotations

import math

from lowra.methods.base import Observation
from lowra.methods.spectral_detuning import SpectralDeTuning
from lowra.methods.subspace_intersection.answer import Answer, Estimate
from lowra.methods.subspace_intersection.certificates import Certificate
from lowra.methods.subspace_intersection.problem import Problem, first_parts, largest_difference, with_excess_noise

# Updates below this many times the rounding of the merges (its standard deviation; 7 is two ulp) have too few singular
# values above the noise for the closed form, and Spectral DeTuning's slow rank schedule regularises better. Chosen on
# bfloat16 merges of small LoRAs; no rule without ground truth was found that is right in every case.
LOW_SIGNAL = 7.0
SPECTRAL_STEPS = 300


def low_signal(problem: Problem) -> Answer | None:
    """The answer where the updates are near the rounding of the merges, None where they are well above it."""
    n = len(problem.labels)
    spread = largest_difference(problem.merged) / 2
    level = min(noise.std for noise in problem.noise)
    if n < 3 or spread - level**2 > (LOW_SIGNAL * level) ** 2:
        return None
    _, parts = with_excess_noise(problem, first_parts(problem, n - 1))
    return spectral(problem, problem.hint or math.ceil(max(part.rank for part in parts) / 2))


def spectral(problem: Problem, rank: int) -> Answer:
    """Spectral DeTuning from the mean, for updates too small for the closed form; the mean if nothing stands out."""
    mean, certificate = problem.mean(), Certificate.LOW_SIGNAL
    if rank == 0:
        found = "no update rises above the rounding of the merges; the mean is returned"
        return Answer(mean, certificate, certificate.sentence(found=found))
    seed = problem.generator.initial_seed()
    deeper = SpectralDeTuning(steps=SPECTRAL_STEPS)
    weight = deeper.recover(Observation(problem.merged, rank, seed)).candidates  # (1, d, k)
    found = "the updates are near the rounding of the merges; Spectral DeTuning's estimate, not certified"
    estimate = Estimate(weight, [1.0], mean.left, mean.right)
    return Answer(estimate, certificate, certificate.sentence(found=found), (rank,) * len(problem.labels))
