"""From a problem to an answer: the steps in their order, for three models and more, for two, and among strangers."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch

from lowra.methods.subspace_intersection.answer import Answer
from lowra.methods.subspace_intersection.certificates import Certificate, verdict
from lowra.methods.subspace_intersection.certify import WELL_CONDITIONED, Evidence, certify
from lowra.methods.subspace_intersection.grid import detected
from lowra.methods.subspace_intersection.kronecker import rearranged
from lowra.methods.subspace_intersection.low_signal import spectral
from lowra.methods.subspace_intersection.noise import joined
from lowra.methods.subspace_intersection.noisy import noisy, with_arithmetic_noise
from lowra.methods.subspace_intersection.problem import Problem, first_parts, with_excess_noise
from lowra.methods.subspace_intersection.ranges import (
    MARGINS,
    OVERSAMPLING,
    Core,
    Difference,
    RowSpace,
    joint_core,
    outside_columns,
    row_space,
    triplets,
)
from lowra.methods.subspace_intersection.rotations import unrotated
from lowra.methods.subspace_intersection.screen import same_base
from lowra.methods.subspace_intersection.solve import (
    Solution,
    columns_matter,
    lift,
    polish,
    solve,
    solve_as_told,
    two_models,
    without_shared,
)
from lowra.methods.subspace_intersection.started import started
from lowra.methods.subspace_intersection.unscaled import unscaled

# A core wider than this is not solved whole: three models first, then one step over all (see `all_models`).
WIDE = 256

# Three models are solved first only if that is this well conditioned. So many threes are tried; then all at once.
LEAD_CONDITION = 0.05
LEADS = 3

# Three plain updates that fill more than this share of a layer by twos leave no room for the closed form.
LARGE_RANK = 0.5


def closed_form(problem: Problem, *, plain: bool = False) -> Answer:
    """Recover from all models that share a base, naming those that do not.

    plain: whether the merges are known to be W + M_i. Otherwise Kronecker updates, and rows or columns that were
    rescaled, are thought of where models differ by a full rank.
    """
    n = len(problem.labels)
    # Other kinds are tried as soon as the rank looks large, which it does not yet where singular values fall; without
    # any, a low one is looked for to the end.
    parts = first_parts(problem, min(n, 3) - 1, doublings=1)
    if parts[-1].full and parts[-1].falls:
        parts = first_parts(problem, min(n, 3) - 1, parts[:-1], doublings=2)
    if parts[-1].full:
        louder = with_arithmetic_noise(problem, parts[-1])
        if louder is not None:
            return closed_form(louder, plain=plain)
    if not plain and (parts[-1].full or parts[-1].rank > LARGE_RANK * min(problem.merged.shape[1:])):
        answer = other_kinds(problem, len(parts))
        if answer is not None:
            return answer
        plain = True
    if parts[-1].full:
        parts = first_parts(problem, min(n, 3) - 1)
    if not any(part.full for part in parts) and n > 4 and n * max(part.rank for part in parts) > 2 * WIDE:
        # Wide cores: each difference holds two updates.
        answer = well_conditioned_three(problem, parts)
        if answer is not None:
            return all_models(problem, answer)
    if not any(part.full for part in parts):
        parts = first_parts(problem, n - 1, parts)
    if any(part.full for part in parts):
        odd = next(i for i, part in enumerate(parts, 1) if part.full)
        answer = None if plain else other_kinds(problem, odd)
        return answer if answer is not None else without_outliers(problem)
    if n == 2:
        return from_two(problem, parts[0])
    return from_three(problem, parts)


def other_kinds(problem: Problem, odd: int) -> Answer | None:
    """The answer where the updates are of low rank once the merges are rearranged or rescaled.

    odd: a model that differs from the first by a large rank.
    """
    solve = partial(closed_form, plain=True)
    answer = rearranged(problem, odd, solve) or unscaled(problem, odd, solve)
    return answer or (unrotated(problem, problem.heads, solve) if problem.heads else None)


def without_outliers(problem: Problem) -> Answer:
    """Sort the models by base and recover from the largest group."""
    groups = same_base(problem.merged, problem.noise, problem.guess, problem.dtype, problem.generator)
    if len(groups[0]) == 1 or len(groups) == 1:
        answer = noisy(problem, partial(closed_form, plain=True))
        if answer is not None:
            return answer
        certificate = Certificate.NOT_IDENTIFIABLE
        reason = (
            "every two models differ by a matrix of full rank; the updates are not of low rank in a layer of this "
            "size, or no two models share a base"
        )
        return Answer(problem.mean(), certificate, certificate.sentence(reason=reason, returned="the mean is returned"))
    outliers = tuple(sorted(problem.labels[i] for group in groups[1:] for i in group))
    answer = closed_form(problem.subset(groups[0]))
    named = ", ".join(map(str, outliers))
    note = f"Of another base, differing from the others by a full rank, and left out (models from 0): {named}."
    found = tuple(sorted(outliers + answer.outliers))
    answer = replace(answer, status=f"{answer.status} {note}", outliers=found)
    if len(groups[1]) == len(groups[0]):
        certificate = Certificate.INCONSISTENT
        contradiction = "two bases with as many models each; one is as likely meant as the other"
        status = certificate.sentence(contradiction=contradiction, otherwise=answer.status)
        return replace(answer, certificate=certificate, status=status)
    return answer


def from_two(problem: Problem, part: RowSpace) -> Answer:
    """The best guess two models allow."""
    mean = problem.mean()
    left, values, right = triplets(Difference(problem.merged[1], problem.merged[0], problem.dtype), part.right)
    block = two_models(problem.merged[0], problem.merged[1], left, values, right)
    estimate = replace(mean, left=(left @ block).to(problem.dtype), right=right.to(problem.dtype))
    certificate = Certificate.TOO_FEW_MODELS
    return Answer(estimate, certificate, certificate.sentence(rank=part.rank))


def from_three(problem: Problem, parts: list[RowSpace]) -> Answer:
    """The closed form on three or more models, with its certificate."""
    problem, parts = with_excess_noise(problem, parts)
    differences = [Difference(model, problem.merged[0], problem.dtype) for model in problem.merged[1:]]
    attempts = solved(problem, differences, parts)
    if not attempts:
        return spectral(problem, 0)
    core, solution, evidence = attempts[-1] if attempts[-1][2].predicted is not None else attempts[0]
    counted = solution.tangents.ranks
    if problem.rough and evidence.predicted is None:
        # Where directions of the updates hide in the noise, the fewer are asked for, the nearer W is to the truth.
        core, solution, evidence = min(reversed(attempts), key=lambda a: a[2].shared_columns + a[2].shared_rows)
    if evidence.predicted is not None and evidence.predicted > evidence.mean_error:
        return spectral(problem, max(solution.tangents.ranks))
    hint, contradicted, simpler = problem.hint, False, None
    if hint is not None:
        told = as_told(core, solution, hint) if solution.exceeds(hint) else None
        if told is not None:
            simpler = solution.tangents.ranks
            solution, evidence = told
        contradicted = solution.exceeds(hint) or solution.falls_short(hint)
    determined = evidence.predicted is not None
    ranks = solution.tangents.ranks if determined or not problem.rough else counted
    joint_rows = core.right
    if evidence.shared_columns or evidence.shared_rows:
        # The hint is a rank of updates that hold what they share; it blurs which directions those are.
        unhinted = solution if problem.hint is None else polish(core, solve(core, None, rough=problem.rough))
        core = without_shared(core, unhinted.tangents)
        if core.matrices.numel():
            solution = polish(core, solve(core, None, rough=problem.rough))
            rest = certify(core, solution)
            determined = rest.lambda_min > WELL_CONDITIONED and not rest.ambiguous
    estimate = problem.mean()
    if determined or (problem.rough and not (evidence.shared_columns or evidence.shared_rows)):
        matter = determined and columns_matter(core, solution.tangents)
        left, right = lift(core, solution, outside_columns(differences, core.left, joint_rows) if matter else None)
        estimate = replace(estimate, left=left, right=right)
    certificate, sentence = verdict(
        replace(evidence, predicted=problem.in_units(evidence.predicted)),
        ranks,
        rest=determined,
        contradicted=hint if contradicted else None,
        simpler=simpler,
    )
    answer = Answer(
        estimate,
        certificate,
        sentence,
        ranks,
        evidence.predicted,
        evidence.lambda_min,
        evidence.discrepancy,
        evidence.edge,
        noise=tuple(level.std for level in problem.noise),
    )
    certified = certificate in (Certificate.CERTIFIED, Certificate.WEAK)
    return started(problem, answer, core.matrices - solution.x) if certified else answer


def solved(
    problem: Problem, differences: list[Difference], parts: list[RowSpace]
) -> list[tuple[Core, Solution, Evidence]]:
    """Cores, their solutions and the evidence, for growing margins until one identifies W: that is the last.

    Empty where no direction that the models differ in rises above the noise.
    """
    attempts = []
    for margin in MARGINS:
        core = joint_core(differences, parts, problem.noise, margin)
        if not core.matrices.numel():
            break
        solution = polish(core, solve(core, problem.hint, rough=problem.rough))
        attempts.append((core, solution, certify(core, solution)))
        if attempts[-1][2].predicted is not None:
            break
    return attempts


def as_told(core: Core, simplest: Solution, hint: int) -> tuple[Solution, Evidence] | None:
    """A solution whose updates do not exceed the rank granted, as the simplest one's do, if one is determined."""
    start = solve_as_told(core, simplest, hint)
    if start is None:
        return None
    solution = polish(core, start)
    evidence = certify(core, solution)
    return None if evidence.predicted is None or solution.exceeds(hint) else (solution, evidence)


def well_conditioned_three(problem: Problem, parts: list[RowSpace]) -> Answer | None:
    """The answer from the first three models that are well conditioned, the parts of the very first three known."""
    for start in range(0, min(3 * LEADS, len(problem.labels) - 2), 3):
        three = problem.subset([start, start + 1, start + 2])
        own = parts if start == 0 else first_parts(three, 2)
        if not any(part.full for part in own):
            answer = from_three(three, own)
            if answer.certificate is Certificate.CERTIFIED and (answer.lambda_min or 0) > LEAD_CONDITION:
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
    start = detected(lead, problem).rounded(lead.estimate)  # (d, k)
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
    if 2 * len(kept) <= len(problem.labels):
        return without_outliers(problem)  # the three are no majority
    used = problem.subset(kept)
    mean = used.mean()
    left = torch.cat([-weight * part for weight, part in zip(mean.weights, lefts, strict=True)], 1)  # (d, sum of ranks)
    share = sum(1 - (1 - r / d) * (1 - r / k) for r in ranks) / len(ranks)
    variance = 1 / sum(noise.std**-2 for noise in used.noise)
    assert lead.predicted is not None
    predicted = math.log10((1 - share) * variance + share * 10**lead.predicted)
    outliers = tuple(label for i, label in enumerate(problem.labels) if i not in kept)
    named = f" Models of another base, left out (counted from 0): {', '.join(map(str, outliers))}." if outliers else ""
    basis = f" on three models, then averaged over {len(ranks)}"
    return replace(
        lead,
        estimate=replace(mean, left=left, right=torch.cat(rights, 1)),
        status=lead.certificate.sentence(basis=basis, predicted=problem.in_units(predicted)) + named,
        ranks=tuple(ranks),
        predicted=predicted,
        outliers=outliers,
    )
