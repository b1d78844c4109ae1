"""Updates near the rounding of the merges: too few of their directions show for the closed form."""

from __future__ import annotations

import math

from torch import Tensor

from lowra.methods.base import Observation
from lowra.methods.spectral_detuning import SpectralDeTuning
from lowra.methods.subspace_intersection.answer import Answer, Estimate
from lowra.methods.subspace_intersection.certificates import Certificate
from lowra.methods.subspace_intersection.noise import sampled_rows
from lowra.methods.subspace_intersection.problem import Problem, first_parts, largest_difference, with_excess_noise

# Updates below this many times the rounding of the merges (its standard deviation; 7 is two ulp) have too few singular
# values above the noise for the closed form, and Spectral DeTuning's slow rank schedule regularises better. Chosen on
# bfloat16 merges of small LoRAs; no rule without ground truth was found that is right in every case.
LOW_SIGNAL = 7.0
SPECTRAL_STEPS = 300

# An estimate is as far from the mean as the mean is from W: the mean of n independent updates, whose square the spread
# of the models tells. One that is farther, by this factor in the square, is no nearer to W than the mean.
FAR = 2.0


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
    if far_from_mean(problem.merged, weight[0]):
        found = (
            "the updates are near the rounding of the merges, and nothing plausible explains them; the mean is returned"
        )
        return Answer(mean, certificate, certificate.sentence(found=found), (rank,) * len(problem.labels))
    found = "the updates are near the rounding of the merges; Spectral DeTuning's estimate, not certified"
    estimate = Estimate(weight, [1.0], mean.left, mean.right)
    return Answer(estimate, certificate, certificate.sentence(found=found), (rank,) * len(problem.labels))


def far_from_mean(stack: Tensor, weight: Tensor) -> bool:
    """Whether an estimate (d, k) is too far from the mean of the models (n, d, k) to be better than it."""
    n, d, k = stack.shape
    rows = sampled_rows(d, k, stack.device)
    models = stack[:, rows].double()
    mean = models.mean(0)
    expected = float((models - mean).square().mean()) / (n - 1)
    return float((weight[rows].double() - mean).square().mean()) > FAR * expected
