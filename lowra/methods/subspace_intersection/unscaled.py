"""Recovery from merges whose rows or columns were rescaled: levelled, solved as plain ones, and scaled back.

See `scales` for how the relative scales are found. Here: which models are siblings up to scales, the closed form on
what they are without them, and the one scale per row that is left then.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.answer import Answer, Estimate
from lowra.methods.subspace_intersection.certificates import EXPECTED, Certificate
from lowra.methods.subspace_intersection.grid import GRIDS
from lowra.methods.subspace_intersection.noise import joined, sampled_rows, ulp
from lowra.methods.subspace_intersection.problem import Problem
from lowra.methods.subspace_intersection.ranges import Difference, row_space
from lowra.methods.subspace_intersection.scales import TINY, row_ratio, squares

# Models need no scale between them where no row's ratio differs from 1 by more than this many standard errors. Those of
# one model against another that was trained are thousands.
ALIKE = 20.0

# Levelled models whose differences are at most so many times their rounding have no updates.
ROUNDING = 1.5

# A model's scales are taken for ones where their mean square is below so many standard errors of its estimate.
UNSCALED = 4.0

# The scale of a row is looked for up to half an octave to either side of the best guess; grids of floats repeat with
# every octave.
# Entries within `NEAR` standard errors of the grid count as on it, and of a row's entries this share must.
NEAR = 5.0
ON_GRID = 0.95

# Powers of two pass unnoticed on a grid. Rows are sure where so many standard deviations of the guess do not reach
# them.
SPREAD = 5.0

# Layers up to so many entries are looked at in float64, all models at once: others a few rows at a time.
SMALL = 2**20

# Entries tell a grid only where fewer than this share of all numbers lie as near to it. Candidates are tried on so many
# of the largest entries: a third of the numbers of a grid stay on it when they are taken times 4 / 3.
CHANCE = 0.2
ENTRIES = 24

# They are looked for among so many of a row.
LOOKED = 256

# Every sixth of them is tried with all factors (the largest are often equal), the rest with as many as are likely then:
# by chance a wrong factor brings all four onto the grid once in 600 times. They are tried in float32, whose rounding of
# the entry, the factor and their product is at most so many ulp.
FIRST = slice(None, None, 6)
LIKELY = 8
HASTE = 1.5 * torch.finfo(torch.float32).eps

# Rows that tell whether there is a grid at all, and the share of them that has to be on it.
PROBES = 64
MOST = 0.5


@dataclass(frozen=True)
class Siblings:
    """Models of one base up to scales of rows: positions in the problem, and c_i / c_first of each, (n, d) float64.

    spans: see `Problem`, of the merges without these scales.
    """

    members: list[int]
    ratios: Tensor
    spans: tuple[Tensor | None, ...]

    @property
    def scaled(self) -> bool:
        """Whether any scale differs from one."""
        return bool((self.ratios != 1).any())


def unscaled(problem: Problem, odd: int, solve: Callable[[Problem], Answer]) -> Answer | None:
    """The answer where most models are siblings up to scales of their rows, or of their columns; None otherwise.

    odd: the first model that differs from model 0 by a large rank. solve: the closed form for plain merges.
    """
    for side in ("rows", "columns"):
        turned = problem if side == "rows" else replace(problem, merged=problem.merged.mT.contiguous())
        groups = sibling_groups(turned, odd)
        first = groups[0]
        if first.scaled and 2 * len(first.members) > len(problem.labels):
            answer = solved_level(turned, first, solve, side)
            if side == "columns":
                answer = replace(answer, estimate=answer.estimate.mT)
            return with_strangers(answer, problem, first)
    return None


def sibling_groups(problem: Problem, odd: int) -> list[Siblings]:
    """The models in groups of siblings up to scales of rows, the largest first.

    A model joins the first group whose first member it differs from by a low rank, its rows scaled where need be.
    odd: see `unscaled`.
    """
    groups: list[list[tuple[int, Tensor]]] = []
    _, d, _ = problem.merged.shape
    one = torch.ones(d, dtype=torch.float64, device=problem.merged.device)
    known: dict[int, Tensor] = {}
    spans: dict[int, Tensor] = {}
    models = problem.merged.double() if problem.merged[0].numel() <= SMALL else problem.merged

    def ratio_of(i: int, first: int) -> Tensor | None:
        """What the rows of model i are to those of the first of a group, (d,); None where no scales explain it."""
        noise = joined(problem.noise[first], problem.noise[i])
        difference = Difference(problem.merged[first], problem.merged[i], problem.dtype)

        def plain() -> bool:
            if first == 0 and i <= odd:
                return i < odd
            return not row_space(difference, noise, problem.guess, problem.generator, doublings=1).full

        # Scaled models come together: once one is found, scales are thought of first. Those of a plain one are ones.
        scaled = bool(known)
        if not scaled and plain():
            return one
        found = row_ratio(models[i], models[first], noise, problem.generator, known.get(first))
        if found is None:
            return one if scaled and plain() else None
        known.setdefault(first, found.right)
        spans[i] = found.span
        return one if bool(((found.values - 1).abs() < ALIKE * found.error).all()) else found.values

    for i in range(len(problem.merged)):
        for group in groups:
            ratio = ratio_of(i, group[0][0])
            if ratio is not None:
                group.append((i, ratio))
                break
        else:
            groups.append([(i, one)])
    groups.sort(key=lambda group: -len(group))
    found = [([i for i, _ in group], torch.stack([ratio for _, ratio in group])) for group in groups]
    return [Siblings(members, ratios, tuple(map(spans.get, members))) for members, ratios in found]


def with_strangers(answer: Answer, problem: Problem, siblings: Siblings) -> Answer:
    """The answer with the models of another base named; its own outliers are labels already."""
    outliers = tuple(label for i, label in enumerate(problem.labels) if i not in siblings.members)
    if not outliers:
        return answer
    note = f" Of another base and left out (models from 0): {', '.join(map(str, outliers))}."
    return replace(answer, status=answer.status + note, outliers=tuple(sorted(outliers + answer.outliers)))


def solved_level(problem: Problem, siblings: Siblings, solve: Callable[[Problem], Answer], side: str) -> Answer:
    """The models divided by their relative scales, solved, and the scales that are left over settled."""
    used = problem.subset(siblings.members)
    ratios = siblings.ratios[:, :, None]  # (n, d, 1)
    size = (1 / siblings.ratios).square().mean(1).sqrt()  # of the noise, once divided
    noise = tuple(level.scaled(float(by)) for level, by in zip(used.noise, size, strict=True))
    level = replace(used, merged=used.merged.double().mul_(1 / ratios), noise=noise, spans=siblings.spans)
    answer = without_updates(level) or solve(level)
    estimate = Estimate.of(answer.estimate.dense(torch.float64))  # looked at more than once
    kept = [i for i, label in enumerate(used.labels) if label not in answer.outliers]
    scale = settled(level.subset(kept), estimate, siblings.ratios[kept], answer.predicted)
    weight = estimate.models[0].mul_(scale.factor[:, None])
    if scale.entries is not None and scale.grid is not None:  # the other rows may hide the grid from who looks at all
        weight.copy_(torch.where(scale.entries, rounded(weight, scale.grid), weight))
    named = f"The {side} of the models differ by scales (as DoRA's or (IA)^3's); {scale.sentence(side)}."
    status = f"{named} Their merges without these: {answer.status}"
    certificate, predicted = answer.certificate, answer.predicted
    if scale.told != "twins" and not bool(scale.sure.all()):
        predicted = None
        if certificate in (Certificate.CERTIFIED, Certificate.WEAK):
            certificate = Certificate.UP_TO_SCALE
    sure = scale.entries if answer.certificate is Certificate.CERTIFIED else None
    if sure is not None and side == "columns":
        sure = sure.mT
    return replace(
        answer,
        estimate=estimate,
        certificate=certificate,
        status=status,
        predicted=predicted,
        scaled=side,
        settled=float(scale.sure.double().mean()),
        sure=sure,
    )


def without_updates(level: Problem) -> Answer | None:
    """The mean, where levelled models differ by no more than their rounding, as (IA)^3's do; None elsewhere."""
    _, d, k = level.merged.shape
    rows = sampled_rows(d, k, level.merged.device)
    first = level.merged[0, rows]
    for model, noise in zip(level.merged[1:], level.noise[1:], strict=True):
        rest = float((model[rows] - first).square().mean().sqrt())
        if rest > ROUNDING * joined(level.noise[0], noise).std:
            return None
    predicted = -math.log10(sum(noise.std**-2 for noise in level.noise))
    expected = EXPECTED.format(predicted=level.in_units(predicted))
    status = f"Certified: but for scales the models agree to their rounding; {expected}."
    return Answer(level.mean(), Certificate.CERTIFIED, status, (0,) * len(level.labels), predicted)


@dataclass(frozen=True)
class Scale:
    """What the rows of diag(c_first) W are multiplied by to be W's, (d,), and how it is known.

    told: "twins", models with equal scales; "grid"; "anchor", a model whose scales look like ones; or "mean".
    sure: (d,) rows for which it is known. entries: (d, k) those of them that are surely the numbers of the grid.
    """

    factor: Tensor
    told: str
    sure: Tensor
    entries: Tensor | None = None
    grid: torch.dtype | None = None

    def sentence(self, side: str) -> str:
        """How the scales are known, in words."""
        one = side.removesuffix("s")
        if self.told == "twins":
            return "those of the models that need none between them are taken as ones"
        if self.told == "grid":
            rest = int((~self.sure).sum())
            but = f" but for {rest} {side}, which are known up to their scale" if rest else ""
            return f"the grid of the base weights tells them{but}"
        if self.told == "anchor":
            return f"one model's look like ones and are taken so, which nothing proves: W is known up to one per {one}"
        return f"nothing tells one of them per {one}, up to which W is known: their geometric mean is taken as one"


def settled(level: Problem, estimate: Estimate, ratios: Tensor, predicted: float | None) -> Scale:
    """The scale per row that the models' relative scales (n, d) leave open."""
    none = torch.zeros(ratios.shape[1], dtype=torch.bool, device=ratios.device)
    sizes = torch.stack([squares(model) for model in level.merged]).sqrt().clamp_min(TINY)  # |W + M_i| by row, (n, d)
    error = math.sqrt(2) * level.noise[0].std / sizes[0]
    for one in ratios:
        if int(((ratios - one).abs() < ALIKE * error).all(1).sum()) > 1:
            return Scale(one, "twins", ~none)
    grown = sizes.log() - estimate.row_sizes().clamp_min(TINY).log()  # (n, d)
    anchor = unscaled_model(ratios.log(), grown)
    # DoRA trains the norms of the rows from those of W on, and they move little: each model's are a guess at W's.
    start = ratios[anchor] if anchor is not None else (ratios.log() + grown).mean(0).exp()
    if predicted is None:
        predicted = math.log10(sum(noise.std**2 for noise in level.noise) / len(level.noise))
    found = on_grid(estimate, start, math.sqrt(10**predicted), level.storage)
    if found is not None:
        return found
    return Scale(start, "mean" if anchor is None else "anchor", none)


def unscaled_model(scales: Tensor, grown: Tensor) -> int | None:
    """The model whose scales look like ones; None where none does.

    scales: logarithms (n, d) of all models' up to a common one per row. grown: those of |W + M_i| / |W| by row. If
    model a is not scaled, DoRA's trained norms over those of W are u_b = s_b - s_a + g_b for the others, small and
    independent, and products u_b u_c of two models are zero in the mean. Of a scaled model's they are s_a^2.
    """
    n, d = scales.shape
    if n < 3:
        return None
    moments = []
    for a in range(n):
        norms = torch.cat([scales[:a] + grown[:a], scales[a + 1 :] + grown[a + 1 :]]) - scales[a]  # (n - 1, d)
        products = (norms.sum(0).square() - norms.square().sum(0)) / ((n - 1) * (n - 2))  # (d,)
        moments.append((float(products.mean()), float(products.std()) / math.sqrt(d)))
    order = sorted(range(n), key=lambda a: moments[a][0])
    least, second = moments[order[0]], moments[order[1]]
    apart = second[0] - least[0] > UNSCALED * math.hypot(least[1], second[1])
    return order[0] if least[0] < UNSCALED * least[1] and apart else None


def on_grid(estimate: Estimate, start: Tensor, error: float, storage: torch.dtype) -> Scale | None:
    """The factors that put the rows of an estimate (d, k) on the grid of a half-precision format; None if none does.

    start: (d,), where to look. error: standard error of an entry.
    """
    d = start.shape[0]
    probed = torch.linspace(0, d - 1, min(d, PROBES), device=start.device).long()
    for dtype in (GRIDS["bf16"], GRIDS["fp16"]):
        _, sure, _ = grid_factors(estimate.rows(probed), start[probed], error, storage, dtype)
        if float(sure.double().mean()) < MOST:
            continue
        step = max(1, 2**22 // (estimate.models.shape[2] * 8))
        parts = [
            grid_factors(estimate.rows(rows), start[rows], error, storage, dtype)
            for rows in torch.arange(d, device=start.device).split(step)
        ]
        factors, found, entries = (torch.cat(part) for part in zip(*parts, strict=True))
        away = (factors / start).log()
        # The standard deviation, if it is normal, and what it has to be for the farthest to be normal, too: rows that
        # a common start has changed much are few, and wrong by an octave where that is not asked.
        far = away[found].abs()
        spread = max(1.5 * float(far.median()), float(far.max()) / math.sqrt(2 * math.log(max(2, len(far)))))
        sure = found & (away.abs() < math.log(2) - SPREAD * spread)
        # A wrong octave is worse than the guess.
        return Scale(torch.where(sure, factors, start), "grid", sure, entries & sure[:, None], dtype)
    return None


def grid_factors(
    rows: Tensor, start: Tensor, error: float, storage: torch.dtype, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """For each of some rows (r, k) float64 the factor that puts it on the grid of `dtype`, and whether there is one.

    Third, (r, k), which entries surely are the numbers of the grid that they are nearest to then.

    The largest entry times the factor is one of the grid's numbers, of which there are 2^7 (2^10) to the octave.
    """
    octave = 2 ** round(-math.log2(torch.finfo(dtype).eps))
    rows = rows * start[:, None]

    def tolerances(numbers: Tensor) -> tuple[Tensor, Tensor]:
        """How near to the grid a number on it is found, float32, and which numbers that tells something of."""
        spacing = ulp(numbers, storage)
        within = (spacing * (NEAR / math.sqrt(12))).clamp_(min=NEAR * error)
        fine, coarse = torch.finfo(storage), torch.finfo(dtype)
        steps = spacing.mul_(coarse.eps / fine.eps).clamp_(min=coarse.tiny * coarse.eps)
        return within, steps > within * (2 / CHANCE)

    seen = rows[:, :: max(1, rows.shape[1] // LOOKED)]
    within, telling = tolerances(seen)
    entries, places = torch.where(telling, seen, 0).abs().topk(min(ENTRIES, seen.shape[1]), dim=1)  # (r, t)
    near = within.gather(1, places)
    largest = entries[:, :1].clamp_min(TINY)
    near += entries / largest * near[:, :1]  # the factor is as far off as the entry that it is found by
    mantissa = largest / torch.exp2(largest.log2().floor())  # [1, 2)
    numbers = 1 + torch.arange(octave, dtype=rows.dtype, device=rows.device) / octave
    factors = numbers / mantissa  # (r, octave)
    factors = torch.where(factors < math.sqrt(0.5), 2 * factors, factors)
    factors = torch.where(factors >= math.sqrt(2.0), factors / 2, factors)
    # A few entries rule out most factors.
    likely = factors.gather(1, aligned(factors, entries, near, dtype, FIRST).topk(LIKELY, dim=1).indices)
    best = likely.gather(1, aligned(likely, entries, near, dtype).argmax(1, keepdim=True))[:, 0]
    # Those entries by the factor that fits all of them best; then the whole row.
    y = rounded(best[:, None] * entries, dtype)
    best = (y * entries).sum(1) / entries.square().sum(1).clamp_min(TINY)
    within, telling = tolerances(rows)
    hits = (off(best[:, None] * rows, dtype) < within.mul_(best[:, None])) & telling
    zero = ~rows.any(1)
    sure = (hits.sum(1) > ON_GRID * telling.sum(1).clamp_min(1)) | zero
    return torch.where(zero, 1.0, best) * start, sure, sure[:, None] & telling


def aligned(factors: Tensor, entries: Tensor, near: Tensor, dtype: torch.dtype, tried: slice = slice(None)) -> Tensor:
    """How many of the entries (r, t) tried each factor (r, f) brings onto the grid of a format, (r, f) float32.

    near: (r, t), by how much an entry on it may miss it.
    """
    factors, within = factors.float(), (near + HASTE * entries).float()
    total = torch.zeros_like(factors)
    for entry, margin in zip(entries.float().T[tried], within.T[tried], strict=True):
        total += off(factors * entry[:, None], dtype) < factors * margin[:, None]
    return total


def off(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """How far numbers are from the grid of a format, float32."""
    numbers = numbers.float()
    return (numbers - numbers.to(dtype)).abs_()


def rounded(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest numbers of a grid, as float64."""
    return numbers.to(dtype).double()
