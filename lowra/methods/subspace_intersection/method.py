"""Subspace intersection: the shared weight of three or more LoRA merges in closed form.

W'_i = W + M_i + E_i with rank(M_i) <= r and E_i the rounding of the merge (the paper's Eq. 1 and 2, where the rounding
is left out). The difference W'_i - W'_j = M_i - M_j does not contain W, and generically its row space is
row(M_i) + row(M_j). So with three models

    row(M_1) = row(W'_1 - W'_2)  intersected with  row(W'_1 - W'_3),

two known subspaces (3 r <= min(d, k); columns alike). With V_i an orthonormal basis of row(M_i), the update vanishes
outside of it, (W'_i - W)(I - V_i V_i^T) = 0, and W is the solution of a linear least-squares problem. No iteration, no
start, no rank schedule. Spectral DeTuning minimises the same objective (Eq. 4) by alternating from the mean.

What cannot be had: a component that all updates share in rows and columns is part of the base weight as far as any
merge shows; a row (or column) space that all share leaves W open in it; and two models fit a whole family of weights.

Beyond the plain idea, each because it was measured to pay:

1. Ranks are counted against the rounding of the merges, never taken from the hint alone.
2. Models are weighted by the inverse variance of their rounding, which differs where updates outweigh the base.
3. The blocks of W inside only one of the joint subspaces are least squares too, not the mean (`solve.lift`).
4. Wide cores: three models first, then one step over all. Low signal: Spectral DeTuning. Small layers and
   half-precision merges: a fit weighted entry by entry.

Certificates: `certified`; `weak` (W is determined, its error well above the rounding); `shared` (probably exact, but
some updates share directions exactly and a second solution may exist); `inconsistent` (the hint contradicts the ranks,
or two bases have as many models); `not_identifiable`; `too_few_models`; `low_signal`.

The steps, a module each: `noise`, `screen`, `ranges`, `intersection`, `solve`, `certify`, `grid`, `refine`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowra.errors import LowraError, unknown
from lowra.methods.base import Observation, Recovery, Stat, check_observation
from lowra.methods.spectral_detuning import SpectralDeTuning
from lowra.methods.subspace_intersection import grid as grids
from lowra.methods.subspace_intersection.certify import WELL_CONDITIONED, Certificate, certify
from lowra.methods.subspace_intersection.noise import Noise, joined, rounding_noise, sampled_rows, stored_as
from lowra.methods.subspace_intersection.ranges import (
    MARGINS,
    OVERSAMPLING,
    Core,
    Difference,
    RowSpace,
    joint_core,
    outside_columns,
    projected,
    row_blocks,
    row_space,
    subtract,
    triplets,
)
from lowra.methods.subspace_intersection.refine import weighted_refinement
from lowra.methods.subspace_intersection.screen import distinct_models, same_base
from lowra.methods.subspace_intersection.solve import (
    Solution,
    columns_matter,
    lift,
    polish,
    solve,
    two_models,
    without_shared,
)

# Layers of at least this many entries run their passes in float32 where the updates are small enough (see below).
LARGE = 2**19

# float32 passes err by 2^-24 of the update; with updates this much smaller than the weights that is lost in the
# rounding of the merge itself.
SMALL_UPDATE = 1 / 50

# A core wider than this is not solved whole: three models first, then one step over all (see `all_models`).
WIDE = 256

# Updates below this many times the rounding of the merges (its standard deviation; 7 is two ulp) have too few singular
# values above the noise for the closed form, and Spectral DeTuning's slow rank schedule regularises better. Chosen on
# bfloat16 merges of small LoRAs; no rule without ground truth was found that is right in every case.
LOW_SIGNAL = 7.0
SPECTRAL_STEPS = 300

# Three models are solved first only if that is this well conditioned. So many threes are tried; then all at once.
LEAD_CONDITION = 0.05
LEADS = 3

# Singular values of the updates end in a clear edge, not in the noise, when the last one is this far above the cutoff.
CLEAR_EDGE = 30.0

# `refine: auto` refines layers up to this size, which takes a fraction of a second, and all half-precision merges.
REFINE_ENTRIES = 2**17


@dataclass(frozen=True)
class Estimate:
    """W as the weighted mean of the models plus a low-rank correction, formed row by row when it is asked for.

    models: (n, d, k), weights: n numbers that sum to 1, left: (d, q), right: (k, q); the product is taken in their
    dtype.
    """

    models: Tensor
    weights: list[float]
    left: Tensor
    right: Tensor

    def rows(self, picked: Tensor) -> Tensor:
        """Some rows, (rows, k) float64."""
        return replace(self, models=self.models[:, picked], left=self.left[picked]).dense(torch.float64)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """All of it (d, k): float64, or rounded to a grid and held in float32."""
        d, k = self.models.shape[1:]
        out = self.models.new_empty(d, k, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        right = self.right.mT
        blocks = row_blocks(d, k, right.dtype)
        scratch = right.new_empty(2, blocks[0].stop, k)
        for block in blocks:
            rest, total = scratch[:, : block.stop - block.start]
            if out.dtype == total.dtype:
                total = out[block]
            torch.mm(self.left[block], right, out=total)
            first = self.models[0][block]
            # Summed as differences to model 0, which are small and, in float32, exact where the passes are in float32.
            for model, weight in zip(self.models[1:], self.weights[1:], strict=True):
                total.add_(subtract(model[block], first, rest), alpha=weight)
            if dtype == torch.float64:
                out[block].copy_(total).add_(first)
            else:
                total.add_(first)
                out[block].copy_(total if dtype == total.dtype else total.to(dtype))
        return out


@dataclass(frozen=True)
class Answer:
    """An estimate with what is known about it, before any grid.

    certificate: short code, status: its sentence. ranks: of the updates, for the models used, in their order.
    predicted, lambda_min, discrepancy, edge: see `certify.Certificate`. outliers: models left out, counted from 0.
    """

    estimate: Estimate
    certificate: str
    status: str
    ranks: tuple[int, ...] = ()
    predicted: float | None = None
    lambda_min: float | None = None
    discrepancy: float | None = None
    edge: float = math.inf
    outliers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Problem:
    """The models of one layer that are worked on.

    merged: (n, d, k), noise: of each, dtype: of the passes over the data, guess: columns of the first sketches,
    hint: the rank where it was granted. labels: the models' numbers in the observation.
    """

    merged: Tensor
    noise: tuple[Noise, ...]
    labels: tuple[int, ...]
    dtype: torch.dtype
    hint: int | None
    guess: int
    generator: torch.Generator

    def subset(self, chosen: list[int]) -> Problem:
        """The same for some of the models."""
        return replace(
            self,
            merged=self.merged[: len(chosen)] if chosen == list(range(len(chosen))) else self.merged[chosen],
            noise=tuple(self.noise[i] for i in chosen),
            labels=tuple(self.labels[i] for i in chosen),
        )

    def mean(self) -> Estimate:
        """The inverse-variance weighted mean of the models."""
        precision = [noise.std**-2 for noise in self.noise]
        _, d, k = self.merged.shape
        empty = self.merged.new_zeros(0, dtype=self.dtype)
        weights = [p / sum(precision) for p in precision]
        return Estimate(self.merged, weights, empty.new_zeros(d, 0), empty.new_zeros(k, 0))


@dataclass(frozen=True)
class SubspaceIntersection:
    """Closed-form recovery from n >= 3 merges, with a certificate and without ranks.

    snap: round the estimate to the grid of the base weights: "auto" detects it, "bf16", "fp16" or "fp32" name it,
        "none" returns float64.
    refine: "weighted" re-fits W and the updates with every entry weighted by its own rounding (see `refine`), "none"
        does not; "auto" does where it is cheap or pays most: small layers and half-precision merges. Nothing is
        refined where a coarse grid has already settled every weight.
    """

    snap: str = "auto"
    refine: str = "auto"

    pretty: ClassVar[str] = "Subspace intersection"
    reference: ClassVar[str] = "lowra"
    needs_rank: ClassVar[bool] = False
    needs_models: ClassVar[int] = 3  # two leave a block of W open

    def __post_init__(self) -> None:
        if self.snap not in ("auto", "none", *grids.GRIDS):
            raise unknown("snap", self.snap, ("auto", "none", *grids.GRIDS))
        if self.refine not in ("auto", "none", "weighted"):
            raise unknown("refine", self.refine, ("auto", "none", "weighted"))

    def recover(self, observation: Observation) -> Recovery:
        """Estimate W (1, d, k): float32 on the grid found, or float64 where `snap` is "none".

        Stats: `predicted_w_error` (log10 of the mean squared error before `refine` and `snap`, None where W is not
        identified), `lambda_min`, `discrepancy`, `ranks`, `grid`, `certificate`, `outlier` (models of another base,
        counted from 0).
        Raises LowraError for a stack no method can work on, or one of identical models.
        """
        check_observation(observation)
        stack = observation.merged
        kept = distinct_models(stack)
        if len(kept) == 1:
            raise LowraError(
                f"All {stack.shape[0]} merged weights are identical, so nothing tells the update from the base weight; "
                "give fine-tunes of different tasks."
            )
        storage = stored_as(stack, observation.storage)
        problem = pose(stack, storage, observation).subset(kept)
        answer = low_signal(problem) or closed_form(problem)
        weight, grid = self._finish(answer, problem, storage)
        stats: dict[str, Stat] = {
            "predicted_w_error": answer.predicted,
            "lambda_min": answer.lambda_min,
            "discrepancy": answer.discrepancy,
            "ranks": ",".join(map(str, answer.ranks)),
            "grid": grid,
            "certificate": answer.certificate,
            "outlier": ",".join(map(str, answer.outliers)),
        }
        return Recovery(weight.unsqueeze(0), answer.status, stats)

    def _finish(self, answer: Answer, problem: Problem, storage: torch.dtype) -> tuple[Tensor, str]:
        """Detect the grid, refine where it pays, round: W (d, k) and the name of the grid."""
        grid, estimate = self.snap, answer.estimate
        if grid == "auto":
            grid = detected_grid(estimate, problem)
        half = storage != torch.float32
        coarse = grid in ("bf16", "fp16")
        ranks = refinable_ranks(answer, problem.hint, half=half, coarse=coarse)
        _, d, k = problem.merged.shape
        wanted = self.refine == "weighted" or (self.refine == "auto" and (half or d * k <= REFINE_ENTRIES))
        # A coarse grid settles the weights of float32 merges; nothing is left to refine.
        if wanted and any(ranks) and not (coarse and not half):
            used = problem.subset([i for i, label in enumerate(problem.labels) if label not in answer.outliers])
            weight = refined(used, estimate.dense(torch.float64), ranks, storage)
            estimate = Estimate(weight.unsqueeze(0), [1.0], weight.new_zeros(d, 0), weight.new_zeros(k, 0))
        return estimate.dense(torch.float64 if grid == "none" else grids.GRIDS[grid]), grid


def detected_grid(estimate: Estimate, problem: Problem) -> str:
    """The grid of the base weights, told from some rows of the estimate."""
    _, d, k = problem.merged.shape
    rows = sampled_rows(d, k, problem.merged.device)
    return grids.detect(estimate.rows(rows), problem.mean().rows(rows))


def refinable_ranks(answer: Answer, hint: int | None, *, half: bool, coarse: bool) -> tuple[int, ...]:
    """Ranks of the updates for the weighted fit; empty where it would do harm.

    A fit of too low a rank pushes what it lacks into W, so a low signal is refined only with the rank granted, and only
    where a coarse grid takes in the greater scatter. In half precision the last singular values hide in the noise:
    unless the ranks found end in a clear edge, the granted rank is used.
    """
    if answer.certificate == "low_signal":
        return answer.ranks if hint is not None and coarse else ()
    if answer.certificate not in ("certified", "weak", "shared"):
        return ()
    if half and hint is not None and answer.edge < CLEAR_EDGE:
        return tuple(max(rank, hint) for rank in answer.ranks)
    return answer.ranks


def refined(problem: Problem, weight: Tensor, ranks: tuple[int, ...], storage: torch.dtype) -> Tensor:
    """The weighted fit from an estimate (d, k), all models and their ranks given."""
    factors = []
    for model, rank in zip(problem.merged, ranks, strict=True):
        columns = min(rank + OVERSAMPLING, *weight.shape)
        rest = Difference(model, weight, torch.float64)
        rows = torch.linalg.qr(projected(rest, columns, problem.generator)).Q
        left, values, right = triplets(rest, rows)
        root = values[:rank].sqrt()
        factors.append((left[:, :rank] * root, right[:, :rank] * root))
    return weighted_refinement(problem.merged, factors, storage)


def pose(stack: Tensor, storage: torch.dtype, observation: Observation) -> Problem:
    """Measure the rounding of each model and choose the precision of the passes."""
    n, d, k = stack.shape
    size = float(stack[0, sampled_rows(d, k, stack.device)].double().square().mean())
    small = math.sqrt(largest_difference(stack)) < SMALL_UPDATE * math.sqrt(size)
    rank = observation.rank
    return Problem(
        merged=stack,
        noise=tuple(rounding_noise(weight, storage) for weight in stack),
        labels=tuple(range(n)),
        dtype=torch.float32 if d * k >= LARGE and small else torch.float64,
        hint=rank,
        guess=OVERSAMPLING + (2 * rank if rank is not None else min(d, k) // 32),
        generator=torch.Generator().manual_seed(observation.seed),
    )


def largest_difference(stack: Tensor) -> float:
    """The largest mean square of W'_i - W'_0, on some rows of the stack (n, d, k)."""
    _, d, k = stack.shape
    rows = sampled_rows(d, k, stack.device)
    first = stack[0, rows].double()
    return max(float((model[rows].double() - first).square().mean()) for model in stack[1:])


def first_parts(problem: Problem, count: int, known: Sequence[RowSpace] = ()) -> list[RowSpace]:
    """Row spaces of W'_i - W'_0 for the first `count` models after model 0, beyond those known."""
    parts = list(known)
    guess = problem.guess
    for i in range(len(parts) + 1, count + 1):
        guess = max([guess, *(part.rank + OVERSAMPLING // 2 for part in parts)])
        difference = Difference(problem.merged[i], problem.merged[0], problem.dtype)
        parts.append(row_space(difference, joined(problem.noise[0], problem.noise[i]), guess, problem.generator))
    return parts


def with_excess_noise(problem: Problem, parts: list[RowSpace]) -> tuple[Problem, list[RowSpace]]:
    """The noise corrected upwards, and the low-rank parts above it.

    What a difference leaves beyond its low rank is noise too: where it exceeds what the format explains (updates
    computed in float32, a base that was touched), the larger of the two counts.
    """
    expected = [joined(problem.noise[0], other).std for other in problem.noise[1:]]
    excess = [max(1.0, part.residual / std) for part, std in zip(parts, expected, strict=True)]
    scaled = tuple(level.scaled(x) for level, x in zip(problem.noise, [min(excess), *excess], strict=True))
    found = [joined(scaled[0], other).std for other in scaled[1:]]
    kept = [part.raised(now / before) for part, now, before in zip(parts, found, expected, strict=True)]
    return replace(problem, noise=scaled), kept


def closed_form(problem: Problem) -> Answer:
    """Recover from all models that share a base, naming those that do not."""
    n = len(problem.labels)
    parts = first_parts(problem, min(n, 3) - 1)
    if not any(part.full for part in parts) and n > 4 and n * max(part.rank for part in parts) > 2 * WIDE:
        # Wide cores: each difference holds two updates.
        answer = well_conditioned_three(problem, parts)
        if answer is not None:
            return all_models(problem, answer)
    if not any(part.full for part in parts):
        parts = first_parts(problem, n - 1, parts)
    if any(part.full for part in parts):
        return without_outliers(problem)
    if n == 2:
        return from_two(problem, parts[0])
    return from_three(problem, parts)


def without_outliers(problem: Problem) -> Answer:
    """Sort the models by base and recover from the largest group."""
    groups = same_base(problem.merged, problem.noise, problem.guess, problem.dtype, problem.generator)
    if len(groups[0]) == 1 or len(groups) == 1:
        return Answer(
            problem.mean(),
            "not_identifiable",
            "Not identifiable: every two models differ by a matrix of full rank; the updates are not of low rank in a "
            "layer of this size, or no two models share a base. The mean is returned.",
        )
    outliers = tuple(sorted(problem.labels[i] for group in groups[1:] for i in group))
    answer = closed_form(problem.subset(groups[0]))
    named = ", ".join(map(str, outliers))
    note = f"Of another base, differing from the others by a full rank, and left out (models from 0): {named}."
    found = tuple(sorted(outliers + answer.outliers))
    answer = replace(answer, status=f"{answer.status} {note}", outliers=found)
    if len(groups[1]) == len(groups[0]):
        status = f"Two bases with as many models each; one is as likely meant as the other. {answer.status}"
        return replace(answer, certificate="inconsistent", status=status)
    return answer


def from_two(problem: Problem, part: RowSpace) -> Answer:
    """The best guess two models allow."""
    mean = problem.mean()
    left, values, right = triplets(Difference(problem.merged[1], problem.merged[0], problem.dtype), part.right)
    block = two_models(problem.merged[0], problem.merged[1], left, values, right)
    estimate = replace(mean, left=(left @ block).to(problem.dtype), right=right.to(problem.dtype))
    return Answer(
        estimate,
        "too_few_models",
        f"Too few models: 2 distinct merges leave a {part.rank} x {part.rank} block of W open; at least 3 are needed. "
        "The rest of the layer is identified.",
    )


def from_three(problem: Problem, parts: list[RowSpace]) -> Answer:
    """The closed form on three or more models, with its certificate."""
    problem, parts = with_excess_noise(problem, parts)
    differences = [Difference(model, problem.merged[0], problem.dtype) for model in problem.merged[1:]]
    core, solution, certificate = solved(problem, differences, parts)
    if certificate.predicted is not None and certificate.predicted > certificate.mean_error:
        return spectral(problem, max(solution.tangents.ranks))
    determined = certificate.predicted is not None
    ranks, joint_rows = solution.tangents.ranks, core.right
    if certificate.shared_columns or certificate.shared_rows:
        # The hint is a rank of updates that hold what they share; it blurs which directions those are.
        unhinted = solution if problem.hint is None else polish(core, solve(core, None))
        core = without_shared(core, unhinted.tangents)
        if core.matrices.numel():
            solution = polish(core, solve(core, None))
            rest = certify(core, solution)
            determined = rest.lambda_min > WELL_CONDITIONED and not rest.ambiguous
    estimate = problem.mean()
    if determined:
        matter = columns_matter(core, solution.tangents)
        left, right = lift(core, solution, outside_columns(differences, core.left, joint_rows) if matter else None)
        estimate = replace(estimate, left=left, right=right)
    code, sentence = verdict(certificate, problem.hint, max(ranks), rest=determined)
    return Answer(
        estimate,
        code,
        sentence,
        ranks,
        certificate.predicted,
        certificate.lambda_min,
        certificate.discrepancy,
        certificate.edge,
    )


def solved(
    problem: Problem, differences: list[Difference], parts: list[RowSpace]
) -> tuple[Core, Solution, Certificate]:
    """The core, its solution and certificate, with the smallest margin that identifies W, else the first."""
    attempts = []
    for margin in MARGINS:
        core = joint_core(differences, parts, problem.noise, margin)
        solution = polish(core, solve(core, problem.hint))
        attempts.append((core, solution, certify(core, solution)))
        if attempts[-1][2].predicted is not None:
            return attempts[-1]
    return attempts[0]


def verdict(certificate: Certificate, hint: int | None, rank: int, *, rest: bool) -> tuple[str, str]:
    """Short code and sentence for what the certificate says. rest: all but the shared directions is determined."""
    if certificate.predicted is None:
        sides = ((certificate.shared_columns, "column"), (certificate.shared_rows, "row"))
        shared = " and ".join(f"{size} {side} direction{'s' * (size > 1)}" for size, side in sides if size)
        reason = (
            f"all updates share {shared}, in which any part of them may belong to W"
            if shared
            else "several weights explain the merges equally well (ranks too large for the layer or for so few models, "
            "or spaces shared by some of them)"
        )
        returned = "there the mean is returned, the other directions are recovered" if rest else "the mean is returned"
        return "not_identifiable", f"Not identifiable: {reason}; {returned}."
    expected = f"expected W-Error {certificate.predicted:.2f} before rounding to a grid"
    if hint is not None and rank < hint and certificate.edge > CLEAR_EDGE:
        return "inconsistent", (
            f"Inconsistent: the updates have rank {rank} at most, with a clear edge, not the granted {hint}; a "
            "component that all of them share would look like this and stay in the estimate. If there is none: "
            f"{expected}."
        )
    if certificate.ambiguous:
        return "shared", (
            "Not certified, though probably exact: some updates share directions of their column or row spaces "
            "exactly, and another weight may explain the merges by updates of equal rank. If this is the right one: "
            f"{expected}."
        )
    if certificate.lambda_min < WELL_CONDITIONED:
        return "weak", (
            "Precise but weakly conditioned: the updates nearly share a space or fill the layer (lambda_min "
            f"{certificate.lambda_min:.0e}), which raises the rounding of the merges; {expected}."
        )
    return "certified", f"Certified: W is determined by the merges; {expected}."


def well_conditioned_three(problem: Problem, parts: list[RowSpace]) -> Answer | None:
    """The answer from the first three models that are well conditioned, the parts of the very first three known."""
    for start in range(0, min(3 * LEADS, len(problem.labels) - 2), 3):
        three = problem.subset([start, start + 1, start + 2])
        own = parts if start == 0 else first_parts(three, 2)
        if not any(part.full for part in own):
            answer = from_three(three, own)
            if answer.certificate == "certified" and (answer.lambda_min or 0) > LEAD_CONDITION:
                return answer
    return None


def all_models(problem: Problem, lead: Answer) -> Answer:
    """From an estimate X out of three models to one out of all n: W = mean_i (W'_i - M_i), M_i from W'_i - X.

    One step of the paper's Eq. 5 and 7 from a point within rounding of the answer. With X on its grid, its error is
    mostly gone and the step averages n independent ones. To first order the new error is (I - A / n) of X's error plus
    sum_i P_Ui E_i P_Vi / n; the former survives in the updates' tangent spaces alone, a share t of all directions,
    which gives the prediction ((1 - t) s^2 / n + t s_X^2), s_X^2 the error of X.
    """
    _, d, k = problem.merged.shape
    start = lead.estimate.dense(grids.GRIDS[detected_grid(lead.estimate, problem)])  # (d, k)
    guess = max(lead.ranks) + OVERSAMPLING
    kept, ranks, lefts, rights = [], [], [], []
    for i, (model, noise) in enumerate(zip(problem.merged, problem.noise, strict=True)):
        update = Difference(model, start, problem.dtype)
        part = row_space(update, joined(noise, noise), guess, problem.generator)
        if not part.full:
            kept.append(i)
            ranks.append(part.rank)
            lefts.append(update.times(part.right))  # (d, r_i)
            rights.append(part.right.to(problem.dtype))  # (k, r_i)
    used = problem.subset(kept)
    mean = used.mean()
    left = torch.cat([-weight * part for weight, part in zip(mean.weights, lefts, strict=True)], 1)  # (d, sum of ranks)
    share = sum(1 - (1 - r / d) * (1 - r / k) for r in ranks) / len(ranks)
    variance = 1 / sum(noise.std**-2 for noise in used.noise)
    assert lead.predicted is not None
    predicted = math.log10((1 - share) * variance + share * 10**lead.predicted)
    outliers = tuple(label for i, label in enumerate(problem.labels) if i not in kept)
    named = f" Models of another base, left out (counted from 0): {', '.join(map(str, outliers))}." if outliers else ""
    return replace(
        lead,
        estimate=replace(mean, left=left, right=torch.cat(rights, 1)),
        status=f"Certified on three models, then averaged over {len(ranks)}; expected W-Error {predicted:.2f} before "
        f"rounding to a grid.{named}",
        ranks=tuple(ranks),
        predicted=predicted,
        outliers=outliers,
    )


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
    mean = problem.mean()
    if rank == 0:
        return Answer(
            mean, "low_signal", "Low signal: no update rises above the rounding of the merges; the mean is returned."
        )
    seed = problem.generator.initial_seed()
    weight = (
        SpectralDeTuning(steps=SPECTRAL_STEPS).recover(Observation(problem.merged, rank, seed)).candidates
    )  # (1, d, k)
    return Answer(
        Estimate(weight, [1.0], mean.left, mean.right),
        "low_signal",
        "Low signal: the updates are near the rounding of the merges; Spectral DeTuning's estimate, not certified.",
        (rank,) * len(problem.labels),
    )
