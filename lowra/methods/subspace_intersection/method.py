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
4. Wide cores: three models first, then one step over all. Low signal: Spectral DeTuning. Small layers: a fit weighted
   entry by entry.
5. Merges in half precision say in which cell each number lay, and the base weight lies on a grid (`half`).

How far an answer can be trusted is one of eight `certificates`. The steps, a module each: `problem` (with `noise`),
`closed_form` (with `screen`, `ranges`, `intersection`, `solve`, `certify`) or `low_signal`, then `grid` and `refine`.
Merges stored in half precision of a base on such a grid go on to `half`, which has a certificate of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowra.errors import LowraError, unknown
from lowra.methods.base import Observation, Recovery, Stat, check_observation
from lowra.methods.subspace_intersection import grid as grids
from lowra.methods.subspace_intersection.answer import Answer, Estimate
from lowra.methods.subspace_intersection.certificates import Certificate
from lowra.methods.subspace_intersection.closed_form import closed_form
from lowra.methods.subspace_intersection.expected import Expected, expected
from lowra.methods.subspace_intersection.grid import Grid
from lowra.methods.subspace_intersection.half import HalfAnswer, Recoverer, formats
from lowra.methods.subspace_intersection.low_signal import low_signal
from lowra.methods.subspace_intersection.problem import Problem, pose
from lowra.methods.subspace_intersection.ranges import OVERSAMPLING, Difference, projected, triplets
from lowra.methods.subspace_intersection.refine import weighted_refinement
from lowra.methods.subspace_intersection.screen import distinct_models
from lowra.methods.subspace_intersection.solve import CLEAR_EDGE

# `refine: auto` refines layers up to this size, which takes a fraction of a second, and all half-precision merges.
REFINE_ENTRIES = 2**18

# Noise of so many times the rounding of float32 merges is theirs and that of their sums, which all entries have alike.
LOUD = 1.1


@dataclass(frozen=True)
class SubspaceIntersection:
    """Closed-form recovery from n >= 3 merges, with a certificate and without ranks.

    snap: round the estimate to the grid of the base weights: "auto" detects it, "bf16", "fp16" or "fp32" name it,
        "none" returns float64.
    refine: "weighted" re-fits W and the updates with every entry weighted by its own rounding (see `refine`), "none"
        does not; "auto" does where it is cheap or pays most: small layers, and half-precision merges of a finer base.
        Nothing is refined where a coarse grid has already settled every weight. Half-precision merges of a base on
        such a grid are solved cell by cell (see `half`) where `refine` and `snap` are both "auto".
    heads: of the attention that the layer belongs to, where releases may have been rotated head by head (a defence); W
        is then returned in the frame of the first. None thinks of no such thing.
    """

    snap: str = "auto"
    refine: str = "auto"
    heads: int | None = None

    pretty: ClassVar[str] = "Subspace intersection"
    reference: ClassVar[str] = "lowra"
    needs_rank: ClassVar[bool] = False
    needs_models: ClassVar[int] = 3  # two leave a block of W open

    def __post_init__(self) -> None:
        if self.snap not in ("auto", "none", *grids.GRIDS):
            raise unknown("snap", self.snap, ("auto", "none", *grids.GRIDS))
        if self.refine not in ("auto", "none", "weighted"):
            raise unknown("refine", self.refine, ("auto", "none", "weighted"))
        if self.heads is not None and (type(self.heads) is not int or self.heads < 1):
            raise LowraError(f"heads is {self.heads!r}; expected a number of attention heads, or null.")

    def recover(self, observation: Observation) -> Recovery:
        """Estimate W (1, d, k): float32 on the grid found, or float64 where `snap` is "none".

        Stats: `predicted_w_error` (log10 of the mean squared error before `refine` and `snap`, None where W is not
        identified), `expected_w_error` (the same of what is returned), `predicted_exact` (the share of its weights
        expected to be exact, None on no grid), `lambda_min`, `discrepancy`, `ranks`, `grid`, `certificate`, `outlier`
        (models of another base, counted from 0). Of half-precision merges solved cell by cell also `sure_share`, `chi`
        (misfit of the worst model, 1 where its cells explain it), `held_out_deviation` (nats by which held-out numbers
        are predicted worse than expected) and `start`; None or "" elsewhere.
        Of merges with scales: `scales` ("rows" or "columns", or "heads" that were rotated) and `scales_settled`, the
        share of them that is known. Of Kronecker updates: `blocks`, how many down and across.
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
        stored = formats(stack)
        if stored is None and observation.storage != torch.float32:
            # Not what the file's header says; the finest format is believed of numbers that lie on no coarser grid.
            observation = replace(observation, storage=torch.float32)
        problem = replace(pose(observation), heads=self.heads).subset(kept)
        half: HalfAnswer | None = None
        told: Expected | None = None
        by_cells = stored is not None and self.snap == self.refine == "auto"
        solved = self._solve_cells(problem, stack, stored) if stored is not None and by_cells else None
        if solved is not None:
            answer, half = solved
            weight = half.weight
        else:
            weight, answer, told = self._solve(problem)
            if problem.unit != 1:
                weight = weight * problem.unit
            if by_cells:
                answer = off_grid(answer)
        stats: dict[str, Stat] = {
            "predicted_w_error": half.w_error if half else problem.in_units(answer.predicted),
            "expected_w_error": half.w_error if half else problem.in_units(told.w_error if told else None),
            "lambda_min": answer.lambda_min,
            "discrepancy": answer.discrepancy,
            "ranks": ",".join(map(str, answer.ranks)),
            "grid": answer.grid,
            "certificate": answer.certificate.value,
            "outlier": ",".join(map(str, answer.outliers)),
            "predicted_exact": half.predicted if half else told.exact if told else None,
            "sure_share": half.sure if half else None,
            "chi": half.misfit if half else None,
            "held_out_deviation": half.deviation if half else None,
            "start": half.start if half else "",
            "scales": answer.scaled,
            "scales_settled": answer.settled,
            "blocks": "x".join(map(str, answer.blocks or ())),
        }
        sure = half.certain if half else answer.sure
        return Recovery(weight.unsqueeze(0), answer.status, stats, sure=sure)

    def _solve_cells(
        self, problem: Problem, stack: Tensor, stored: tuple[torch.dtype, ...]
    ) -> tuple[Answer, HalfAnswer] | None:
        """Half-precision merges, cell by cell; None where the base is finer, or the updates are not plain."""
        # A good start even where `low_signal` would not trust it.
        answer = closed_form(replace(problem, rough=True))
        if answer.scaled or answer.blocks:
            return None
        used = [label for label in problem.labels if label not in answer.outliers]
        solver = Recoverer(
            stack if len(used) == len(stack) else stack[used],
            tuple(stored[i] for i in used),
            answer.estimate if any(answer.ranks) else None,  # where no update was found, that is the mean
            answer.predicted is not None,
            problem.unit,
            max(answer.ranks, default=0),
            problem.hint,
            problem.generator,
        )
        half = solver.recover()
        if half is None:
            return None
        certificate = Certificate.CERTIFIED if half.certified else Certificate.UNCERTIFIED
        status = half.sentence
        if len(used) == 2:
            certificate = Certificate.TOO_FEW_MODELS
            status = (
                "Too few models: 2 distinct merges are explained as well by W + M_1 + M_2, rounded, and the updates "
                "-M_2 and -M_1; at least 3 are needed. The vote of the models is returned."
            )
        if answer.outliers:
            status = f"{status} Of another base and left out (models from 0): {', '.join(map(str, answer.outliers))}."
        name = next(name for name, dtype in grids.GRIDS.items() if dtype == half.grid)
        return replace(answer, certificate=certificate, status=status, ranks=half.ranks, grid=name), half

    def _solve(self, problem: Problem) -> tuple[Tensor, Answer, Expected | None]:
        """Solve, detect the grid, refine where it pays, round: W (d, k), the answer, and what error to expect of W."""
        answer = low_signal(problem) or closed_form(problem)
        estimate = answer.estimate
        grid = grids.detected(answer, problem) if self.snap == "auto" else Grid(self.snap)
        half = problem.storage != torch.float32
        ranks = refinable_ranks(answer, problem.hint, half=half, coarse=grid.coarse)
        _, d, k = problem.merged.shape
        wanted = self.refine == "weighted" or (self.refine == "auto" and (half or d * k <= REFINE_ENTRIES))
        # A coarse grid settles the weights of float32 merges; nothing is left to refine.
        refine = wanted and any(ranks) and not (grid.coarse and not half)
        refine = refine and not answer.scaled and answer.blocks is None
        excess: list[float] = []
        if refine:
            used = problem.subset([i for i, label in enumerate(problem.labels) if label not in answer.outliers])
            excess = [] if half else beyond_rounding(answer.noise, used)
            weight = refined(used, estimate.dense(torch.float64), ranks, excess)
            estimate = Estimate.of(weight)
        weight = grid.rounded(estimate)
        foreseen = refine and not any(excess)  # what weighing gains of loud merges is not
        return weight, replace(answer, grid=grid.name), expected(answer, problem, grid, weight, refined=foreseen)


def beyond_rounding(found: tuple[float, ...], problem: Problem) -> list[float]:
    """The variance of each model's noise beyond the rounding of its format: of float32 sums, where it is much.

    found: standard deviations of the noise, of some models where all together were solved from these.
    """
    if len(found) < len(problem.noise):
        found = (max(found, default=0.0),) * len(problem.noise)
    pairs = zip(found, problem.noise, strict=True)
    return [std**2 - own.std**2 if std > LOUD * own.std else 0.0 for std, own in pairs]


def off_grid(answer: Answer) -> Answer:
    """The answer where no base weight on a half-precision grid explains the merges: never certified.

    A base that is finer looks like this, and so does one plus a component that several updates share.
    """
    if answer.certificate not in (Certificate.CERTIFIED, Certificate.WEAK):
        return answer
    sentence = (
        "Not certified: no base weight on the grid of the merges explains them. It is finer than they are, or several "
        f"updates share a component. In the first case: {answer.status}"
    )
    certificate = Certificate.UNCERTIFIED
    return replace(answer, certificate=certificate, status=certificate.sentence(sentence=sentence))


def refinable_ranks(answer: Answer, hint: int | None, *, half: bool, coarse: bool) -> tuple[int, ...]:
    """Ranks of the updates for the weighted fit; empty where it would do harm.

    A fit of too low a rank pushes what it lacks into W, so a low signal is refined only with the rank granted, and only
    where a coarse grid takes in the greater scatter. In half precision the last singular values hide in the noise:
    unless the ranks found end in a clear edge, the granted rank is used.
    """
    if answer.certificate is Certificate.LOW_SIGNAL:
        return answer.ranks if hint is not None and coarse else ()
    if answer.certificate not in (Certificate.CERTIFIED, Certificate.WEAK, Certificate.SHARED):
        return ()
    if half and hint is not None and answer.edge < CLEAR_EDGE:
        return tuple(max(rank, hint) for rank in answer.ranks)
    return answer.ranks


def refined(problem: Problem, weight: Tensor, ranks: tuple[int, ...], excess: list[float]) -> Tensor:
    """The weighted fit from an estimate (d, k), all models and their ranks given. excess: see `weighted_refinement`."""
    factors = []
    for model, rank in zip(problem.merged, ranks, strict=True):
        columns = min(rank + OVERSAMPLING, *weight.shape)
        rest = Difference(model, weight, torch.float64)
        rows = torch.linalg.qr(projected(rest, columns, problem.generator)).Q
        left, values, right = triplets(rest, rows)
        root = values[:rank].sqrt()
        factors.append((left[:, :rank] * root, right[:, :rank] * root))
    return weighted_refinement(problem.merged, factors, problem.storage, excess)
