"""From a stack in half precision to an answer: starts, the choice among them, the certificate, the fallbacks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lowra.allocator import temporaries_kept
from lowra.methods.subspace_intersection.answer import Estimate
from lowra.methods.subspace_intersection.half import levels
from lowra.methods.subspace_intersection.half.cavity import Decoded, Sweep
from lowra.methods.subspace_intersection.half.cells import format_of, grid_of
from lowra.methods.subspace_intersection.half.doubt import SecondLook
from lowra.methods.subspace_intersection.half.fit import FAINTEST, Factors, Variances, qr_of, relevances
from lowra.methods.subspace_intersection.half.parts import threads
from lowra.methods.subspace_intersection.half.rounds import (
    FROM_AFAR,
    FROM_NEARBY,
    LEFT_OVER,
    SLACK,
    Run,
    approached,
    converge,
)
from lowra.methods.subspace_intersection.half.signal import update_sizes
from lowra.methods.subspace_intersection.half.sites import MEDIAN, Cells, Sites, hold_out, plain_sites, unit
from lowra.methods.subspace_intersection.half.start import factored, unexplained, vote

# Ranks that nobody tells are over-estimated: at least this, and this many times what the closed form counts. Poor
# starts find their way in fewer steps with directions to spare.
RANK, OVER = 32, 1.5

# Rank that parts of a layer are sized for, at least.
LIKELY = 12

# A certificate needs three models, a misfit and a deviation of the held-out cells as these; and the variances must not
# have been far off before the held-out cells calibrated them, nor be both somewhat off and somewhat off still.
MODELS, MISFIT, DEVIATION, OVERCONFIDENCE = 3, 1.1, -0.05, -0.15

# An explanation that leaves more weights open than this is not certified where the updates hide in the rounding, which
# shows in a misfit below the second: what updates share, moved into W, predicts numbers held out as well there. (Of
# 1,264 layers certified with .965 and .8, 111 are not; three of the four among these that promised .02 too much, and
# four of the six with more than one in a thousand sure weights wrong.)
OPEN, HIDDEN = 0.988, 0.82

# Nor is one there of whose weights fewer than this stay sure when they are doubted. (Of 337 such layers one: .86 were
# sure, 3 in 1,000 of these were wrong, and .02 too much was promised, for a component that all of eight updates share
# had moved into W. The next has .91, and all of its sure weights are right.)
FEW_SURE = 0.9

# Nearness to a direction that all updates share (see `shared_direction`) from which nothing is certified. Independent
# updates have .4 to .7, with a cosine of .8 between their spaces .87, with one of .99 .993.
SHARED = 0.95

# The same from which a whole layer takes a few rounds more to come to rest, and the unknowns of an update over its
# equations.
CLOSE, DENSE = 0.75, 0.05

# Updates below this many cells, in root mean square, are fitted from the vote before they are from the closed form,
# which sees too few of their directions.
FAINT = 0.7

# Updates above this many cells: the first explanation that could be certified is taken.
CLEARLY_SEEN = 1.5

# Sizes of updates, in cells, up to which a vote is approached at a clip, the first that holds first: the fainter the
# updates, the more only the smallest weights show them. (Directions of the faintest are always looked for again.)
APPROACHES = ((FAINTEST, 1000.0), (0.6, 30.0), (math.inf, 3.0))

# Nats by which the held-out cells must prefer a base on no grid.
OFF_GRID = 0.06

# Cells that are asked whether a base under faint updates is on a grid, at most.
ASKED = 2**16

# Held-out cells that are predicted worse than expected by more nats than this: the sizes of updates, which correlate
# where they share a direction, were told wrong, and nothing follows. (Of 48 layers where they were not, -.42 is least.)
UNTOLD = -0.5

# Turns without a grid and with it, at most.
TURNS = 3

# Held-out cells that are predicted worse than expected by more nats than this, before calibration: a direction is
# missing, most often one that the part of a layer did not show.
LACKING = -0.02

# Share of the sure weights that lie on bfloat16's grid, in float16 merges, from which W is taken to be bfloat16.
COARSER = 0.6

# Nats by which held-out cells have to be against it: a few hundred of so many sure weights are evidence enough.
OPPOSED = 0.05

# Predicted share above which an answer that is certified is compared neither with other starts, nor with the vote, nor
# with a base on no grid.
EASY = 0.97

# The same of a part of a layer, which leaves more weights open than the whole will, where updates are not faint.
EASY_PART = 0.95

# Predicted share from which a fit that neither explains nor predicts, of updates close to each other, is better than a
# vote all the same. (Of 116 such layers whose updates share a direction six are beyond it and gain .15 to .6; of eight
# more beyond .92 one would lose .06.)
NOT_ASTRAY = 0.945

# Misfit from which one model is not explained at all: where no direction is shared, the others may be.
ONE_LEFT_OUT = 2.0

# Rounds in which added directions find their place before any is pruned, as a faint one needs the smallest weights,
# which are wrong as long as it is not known: pruned at once, it is lost again. And rounds after these.
SETTLING, GROWING = 6, 4

# Clips of the rounds where the updates are faintest, of those that finish what a part began, and of those where it has
# seen all directions.
AT_ONCE = (1000.0,)
FINISH = (30.0, 300.0, 3000.0)
FINISH_CLEAR = (100.0, 3000.0)

# Relevance from which a direction stands out. Where the faintest one found does, a part has seen all: of a spectrum
# that falls off gently the next would have been seen too, and one beyond a gap is worth no more than the noise in two
# others. Not of faint updates: what was pruned of them before the rounds came to rest leaves a gap where there is none.
CLEAR = 2.0

# Factor of the updates' variances, over what held-out cells ask for, under which a sure weight has to stay so.
WIDER = 2.0


@dataclass(frozen=True)
class HalfAnswer:
    """What the cells say of W.

    weight: (d, k) float32, the likeliest numbers. certain: (d, k) bool, which have a probability of at least `SURE`.
    predicted: expected share of them that is right on the bit. sure: share of certain ones. w_error: log10 of the
    expected mean square error. misfit: the largest chi of a model. likelihood: mean log probability of a held-out cell,
    deviation: less its expectation, overconfidence: the same had the held-out cells not calibrated the updates'
    variances. shared: see `shared_direction`. start: name of the start. grid: name of W's. certified: as the module
    says. crowded: see the function. settled: the rounds came to rest.
    """

    weight: Tensor
    certain: Tensor
    predicted: float
    sure: float
    w_error: float
    misfit: float
    likelihood: float
    deviation: float
    overconfidence: float
    shared: float
    ranks: tuple[int, ...]
    start: str
    grid: torch.dtype
    rounds: int
    certified: bool
    crowded: bool
    tried: dict[str, float] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """How far it can be trusted."""
        share = f"{self.predicted:.2%} of the weights are expected to be exact, {self.sure:.2%} are sure"
        if self.certified:
            return f"Certified by held-out cells: {share}."
        if not self.ranks:
            return (
                "Not certified: no updates of low rank were found that predict stored numbers held out; what most "
                f"models store is returned. {share[0].upper()}{share[1:]}."
            )
        if self.crowded:
            why = "needs updates of every rank that was looked for, and as free ones explain anything"
        elif self.shared >= SHARED:
            why = "has a direction that all updates share in columns or rows, along which others are as good"
        elif self.misfit > MISFIT:
            why = f"leaves a misfit of {self.misfit:.2f} times the rounding"
        elif self.predicted < OPEN and self.misfit < HIDDEN:
            why = "leaves many weights open, and one that moves what updates share into W may be as good"
        elif self.deviation < DEVIATION:
            why = f"predicts stored numbers held out worse than it should, by {-self.deviation:.2f} nats"
        elif self.overconfidence + min(0.0, self.deviation) < OVERCONFIDENCE:
            why = (
                f"fits the numbers it was made from much better than numbers held out ({-self.overconfidence:.2f} nats)"
            )
        else:
            why = "leaves few weights sure once they are doubted, and what updates share may have moved into W"
        return f"Not certified: the best explanation found {why}. If it is right: {share}."


def shared_direction(factors: Factors, among: Sequence[int] | None = None) -> float:
    """How nearly all updates have one direction of their column or row spaces in common: 1 where they do.

    among: some of them. The largest eigenvalue of the mean of the projectors on the spaces. Along such a direction
    nothing tells the updates from W but the grid, and a wrong explanation predicts stored numbers as well as the right
    one.
    """
    some = range(len(factors.ranks)) if among is None else among
    found = 0.0
    for side in (factors.left, factors.right):
        bases = torch.cat([qr_of(side[i])[0] for i in some], 1)
        found = max(found, float(torch.linalg.matrix_norm(bases, 2)) ** 2 / len(some))
    return found


def clearly_seen(run: Run) -> list[int] | None:
    """The updates of which a direction stands out from the noise, None where one at most does.

    What is found of others points anywhere: beside it, what all updates share would not show.
    """
    clear = [i for i, found in enumerate(relevances(run.factors, run.variances)) if float(found.max()) > CLEAR]
    return clear if len(clear) > 1 else None


def shares(run: Run, other: Run) -> bool:
    """Whether only the first has a direction that all updates share, which explains a base on no grid as well."""
    return shared_direction(run.factors) >= SHARED > shared_direction(other.factors)


def room(shape: tuple[int, ...] | torch.Size) -> int:
    """The largest rank that is looked for in a (d, k) layer."""
    return max(1, min(shape) // 4)


def crowded(factors: Factors, hint: int | None) -> bool:
    """Whether ranks that were found are all there is room for, so that none was seen to end; hint: where granted.

    Updates as free as that explain a base that they do not belong to, and cells held out are too few to tell.
    """
    shape = (factors.left[0].shape[0], factors.right[0].shape[0])
    return hint is None and max(factors.ranks) >= room(shape)


def certifiable(run: Run, models: int, hint: int | None, *, part: bool = False) -> bool:
    """Whether an explanation predicts what it has not seen as well as it says it would, and could not be another.

    part: of a part of a layer, which leaves more weights open than the whole will.
    """
    evidence = run.decoded.evidence
    return (
        not crowded(run.factors, hint)
        and models >= MODELS
        and shared_direction(run.factors, clearly_seen(run)) < SHARED
        and max(run.misfit) <= MISFIT
        and (part or run.decoded.predicted >= OPEN or max(run.misfit) >= HIDDEN)
        and evidence.calibrated_deviation >= DEVIATION
        and evidence.deviation + min(0.0, evidence.calibrated_deviation) >= OVERCONFIDENCE
    )


def doubt(cells: Cells, run: Run) -> None:
    """Take back that weights are sure where a second look, with larger variances of the updates, leaves doubts."""
    decoded = run.decoded
    assert decoded.weight is not None
    assert decoded.certain is not None
    factor = WIDER * decoded.evidence.factors[0]
    second = SecondLook.at(decoded.weight, decoded.certain)
    sweep = Sweep(cells, run.sites, run.factors, run.variances, run.misfit, MEDIAN, factor, second=second)
    sweep.run(keep=False, last=True)
    second.finish()
    decoded.sure = int(decoded.certain.count_nonzero()) / decoded.certain.numel()


def formats(stack: Tensor) -> tuple[torch.dtype, ...] | None:
    """The half-precision format of each model (n, d, k), None where one has numbers that lie on neither grid."""
    found = [format_of(weight) for weight in stack]
    return None if None in found else tuple(dtype for dtype in found if dtype is not None)


@dataclass(frozen=True)
class Start:
    """Where a run begins: an estimate of W (d, k), and the rank of the updates fitted to it.

    clip: of that fit (see `approached`); none where W is near enough without.
    """

    name: str
    weight: Tensor
    rank: int
    clip: float | None = None


@dataclass(frozen=True)
class Recoverer:
    """One layer, its starts and its choices.

    closed: the closed form's W in the scale it was worked on, None where it found nothing; determined: whether it was
    identified; one: what 1 is in that scale. counted: the largest rank it found. hint: rank where it was granted.
    """

    stack: Tensor
    dtypes: tuple[torch.dtype, ...]
    closed: Estimate | None
    determined: bool
    one: float
    counted: int
    hint: int | None
    generator: torch.Generator

    def recover(self) -> HalfAnswer | None:
        """The answer, None where the base weight lies on no half-precision grid."""
        with temporaries_kept(), threads(self.stack.device):
            return self._recovered()

    def _recovered(self) -> HalfAnswer | None:
        n, d, k = self.stack.shape
        scale = unit(self.stack, self.dtypes)
        base = torch.float16 if torch.bfloat16 not in self.dtypes else torch.bfloat16
        whole = Cells(self.stack, self.dtypes, scale, grid_of(base, scale), hold_out(self.stack, self.generator))
        tried: dict[str, float] = {}
        if n < MODELS:
            voted = self._unfitted(whole)
            assert voted.certain is not None
            # Two models share explanations that no probability within one of them knows of: nothing is sure.
            voted.certain.fill_(False)
            voted.sure = 0.0
            return self._answer(voted, "vote", base, scale, tried)
        part = levels.choose_part((d, k), self.hint or max(self.counted, LIKELY), self.generator, self.stack.device)
        cells = whole
        if part is not None:
            cells = replace(whole, stack=part.of(self.stack))
            cells = replace(cells, held=hold_out(cells.stack, self.generator))
        estimate, sizes = self._estimate(part), sizes_in_cells(cells)
        faint = sizes[1]  # the two smallest decide a vote
        name, run = self._chosen(cells, estimate, faint, tried)
        if max(run.misfit) > MISFIT:
            other = replace(cells, twice=True)
            again, rerun = self._chosen(other, estimate, faint, tried, " of updates rounded before")
            if rerun.likelihood > run.likelihood + SLACK:
                name, run, cells = again, rerun, other
        if base == torch.float16:
            cells, run, base = self._coarser(cells, run)
        doubted = not self._certifiable(cells, run) or run.decoded.predicted < self._easy(cells, faint)
        if doubted and (self._seems_off_grid(cells) if faint < FAINT else shared_direction(run.factors) < SHARED):
            # Without the grid lower ranks did: what the grid needs beyond them is a base that is not on it.
            fewer = self.determined and 0 < self.counted < room(cells.stack.shape[1:])
            excess = fewer and crowded(run.factors, self.hint)
            gridded = None if excess else self._on_grid(cells, run, faint)
            if gridded is None:
                return None
            run = gridded
        if part is not None:
            factors, explained = run.factors, max(run.misfit) <= MISFIT
            clear = run.edge > CLEAR and explained and faint >= FAINT
            cells = whole = replace(whole, base=cells.base, twice=cells.twice)
            del run, estimate  # of the part, up to a layer's worth of memory
            factors = levels.extended(whole, part, factors, self.generator)
            slow = max(factors.ranks) * (d + k) > DENSE * d * k or shared_direction(factors) >= CLOSE
            missing = max(0, (self.hint or 0) - min(factors.ranks))
            if self.hint is None and not clear:
                missing = 8 + max(factors.ranks) // 4
            first = AT_ONCE[0] if faint < FAINTEST else 1.0
            if missing:
                plain = plain_sites(whole, first * MEDIAN)
                factors = levels.extra_directions(whole, plain, factors, missing, self.generator)
                del plain
            if faint < FAINTEST:
                run = converge(whole, factors, AT_ONCE, most=GROWING, good=explained)
                run = self._grown(whole, run, AT_ONCE, good=explained)
                run = converge(whole, run.factors, AT_ONCE, good=explained, sites=run.sites)
            elif not explained:
                run = converge(whole, factors, FROM_NEARBY)
            else:
                clips = FINISH if missing else FINISH_CLEAR
                most = len(clips) + (3 if slow else 1)
                run = converge(whole, factors, clips, most=most, good=True, calm_rounds=1)
                if max(run.misfit) > LEFT_OVER or run.deviation < LACKING or not certifiable(run, n, self.hint):
                    run = self._grown(whole, run, FINISH[-1:], good=True)
        elif sizes[0] < FAINTEST or (run.deviation < LACKING and self._certifiable(cells, run)):
            run = self._grown(cells, run, FINISH[-1:], good=True)
            if base == torch.float16:  # asked again, now that more of the weights are right
                cells, run, base = self._coarser(cells, run)
        decoded, certified = run.decoded, certifiable(run, n, self.hint)
        doubt(cells, run)
        certified = certified and (decoded.sure >= FEW_SURE or max(run.misfit) >= HIDDEN)
        alone = self._unfitted(whole, run.sites) if not certified or decoded.predicted < EASY else None
        del run.sites  # more than half of all memory, before the answer takes some
        if alone is not None:
            # A fit that neither explains nor predicts has to be the more confident; along what all updates share it
            # goes anywhere.
            misfit, shared = max(run.misfit), shared_direction(run.factors)
            poor = misfit > MISFIT and decoded.evidence.calibrated_deviation < DEVIATION
            close = shared >= SHARED or (shared >= CLOSE and misfit < ONE_LEFT_OUT)
            astray = close and decoded.predicted < NOT_ASTRAY
            unsure = poor and (astray or alone.predicted > decoded.predicted)
            if unsure or alone.evidence.likelihood > run.likelihood:
                return self._answer(alone, "vote", base, scale, tried)
        return self._answer(decoded, name, base, scale, tried, run, certified=certified)

    def _grown(self, cells: Cells, run: Run, clips: Sequence[float], *, good: bool) -> Run:
        """A run of which directions are missing, with more as long as one stays or held-out cells are better predicted.

        Faint directions come only with the smallest weights, and the more are known, the more of them do.
        """
        while max(run.factors.ranks) < room(cells.stack.shape[1:]):
            count = 8 + max(run.factors.ranks) // 4
            more = levels.extra_directions(cells, run.sites, run.factors, count, self.generator)
            # Begun anew, for what was decoded without them is against them.
            sites = plain_sites(cells, clips[0] * MEDIAN, run.sites)
            most = SETTLING + GROWING
            again = converge(cells, more, clips, most=most, settling=SETTLING, good=good, sites=sites)
            gain = again.likelihood - run.likelihood
            # Few held-out cells feel a faint direction: one that stays is right unless they are against it.
            found = gain > -SLACK and sum(again.factors.ranks) > sum(run.factors.ranks)
            if gain > 0 or found:
                run = again
            if gain < SLACK and not found:
                break
        return run

    def _estimate(self, part: levels.Part | None) -> Tensor | None:
        """The closed form's W, of a part of the layer where one is solved first: of a large layer it is never whole."""
        if self.closed is None:
            return None
        found = self.closed.dense(torch.float64) if part is None else part.columns_of(self.closed.rows(part.rows))
        return found.mul_(self.one).float()

    def _answer(
        self,
        decoded: Decoded,
        name: str,
        base: torch.dtype,
        scale: float,
        tried: dict[str, float],
        run: Run | None = None,
        *,
        certified: bool = False,
    ) -> HalfAnswer:
        assert decoded.weight is not None
        assert decoded.certain is not None
        return HalfAnswer(
            weight=decoded.weight.float(),
            certain=decoded.certain,
            predicted=decoded.predicted,
            sure=decoded.sure,
            w_error=math.log10(max(decoded.square_error, 1e-300)) - 2 * math.log10(scale),
            misfit=max(run.misfit) if run else 0.0,
            likelihood=decoded.evidence.likelihood,
            deviation=decoded.evidence.calibrated_deviation,
            overconfidence=decoded.evidence.deviation,
            shared=shared_direction(run.factors, clearly_seen(run)) if run else 0.0,
            ranks=run.factors.ranks if run else (),
            start=name,
            grid=base,
            rounds=run.rounds if run else 0,
            certified=certified,
            crowded=crowded(run.factors, self.hint) if run else False,
            tried=tried,
        )

    def _chosen(
        self, cells: Cells, estimate: Tensor | None, faint: float, tried: dict[str, float], label: str = ""
    ) -> tuple[str, Run]:
        """The start whose rounds predict the held-out cells best."""
        best: tuple[str, Run] | None = None
        # The whole layer will have rounds of its own.
        clips, calm_rounds = (FROM_AFAR, 1) if self._is_part(cells) else (FROM_NEARBY, 2)
        enough = self._easy(cells, faint)
        for start, factors in self._starts(cells, estimate, faint):
            run = converge(cells, factors, clips, calm_rounds=calm_rounds)
            tried[start.name + label] = run.likelihood
            if best is None or (run.likelihood > best[1].likelihood and not (start.clip and shares(run, best[1]))):
                best = start.name + label, run
            # Of faint updates a false explanation may predict as well as it says, but another start predicts better.
            if self._certifiable(cells, best[1]) and (best[1].decoded.predicted >= enough or faint > CLEARLY_SEEN):
                break
            if start.clip and max(run.misfit) <= MISFIT and run.decoded.predicted >= enough:
                break  # all that a part of the layer shows
            if len(tried) > 2 and shared_direction(best[1].factors) >= SHARED:
                break  # no start finds what the merges do not show
        assert best is not None
        return best

    def _is_part(self, cells: Cells) -> bool:
        """Whether the cells are of a part of the layer."""
        return cells.stack.shape != self.stack.shape

    def _certifiable(self, cells: Cells, run: Run) -> bool:
        """Whether a run on some cells is, see `certifiable`."""
        return certifiable(run, len(cells.stack), self.hint, part=self._is_part(cells))

    def _easy(self, cells: Cells, faint: float) -> float:
        """The predicted share from which nothing else is tried."""
        return EASY_PART if self._is_part(cells) and faint >= FAINT else EASY

    def _starts(self, cells: Cells, estimate: Tensor | None, faint: float) -> Iterator[tuple[Start, Factors]]:
        """Each start and its factors, in the order of trying."""
        most = room(cells.stack.shape[1:])
        counted = math.ceil(OVER * self.counted) + 4
        rank = min(most, self.hint if self.hint is not None else max(RANK, counted))
        first, *more = (clip for bound, clip in APPROACHES if faint < bound)
        voted = vote(cells.stack)
        order = [Start("vote", voted, rank, first)]
        order += [Start("vote, again", voted, rank, clip) for clip in more[:1]]
        if estimate is not None and self.determined:
            fewer = min(most, self.hint if self.hint is not None else counted)
            closed = Start("closed form", estimate, fewer)
            order = [order[0], closed, *order[1:]] if faint < FAINT else [closed, *order]
            order.append(Start("closed form, approached", estimate, rank, first))
        elif estimate is not None:
            # Where updates are clearly seen, a fifth of the work leads from it that leads from a vote.
            order.insert(0 if faint > CLEARLY_SEEN else 1, Start("open closed form", estimate, rank, first))
        for start in order:
            factors = self._factored(cells, start.weight, start.rank)
            if start.weight is estimate and not self.determined:
                other = self._factored(cells, voted, start.rank)
                if unexplained(cells, estimate, factors) > unexplained(cells, voted, other):
                    continue
            if start.clip is not None:
                factors = approached(cells, factors, start.clip)
            yield start, factors

    def _factored(self, cells: Cells, weight: Tensor, rank: int) -> Factors:
        """Factors of what all models have beside a weight (d, k), in the units of the cells."""
        return factored(cells.stack * cells.scale, weight * cells.scale, [rank] * len(cells.stack), self.generator)

    def _coarser(self, cells: Cells, run: Run) -> tuple[Cells, Run, torch.dtype]:
        """W on bfloat16's grid rather than float16's, where most of its sure weights lie there: of others, few do.

        Held-out cells are to have nothing against it. They are about as well predicted on the finer grid, with more
        of the weights open.
        """
        assert run.decoded.weight is not None
        assert run.decoded.certain is not None
        sure = run.decoded.weight[run.decoded.certain]
        if len(sure) and float((sure.to(torch.bfloat16) == sure).float().mean()) > COARSER:
            other = replace(cells, base=grid_of(torch.bfloat16, cells.scale))
            again = converge(other, run.factors, FROM_NEARBY)
            if again.likelihood > run.likelihood - OPPOSED:
                return other, again, torch.bfloat16
        return cells, run, torch.float16

    def _unfitted(self, cells: Cells, sites: Sites | None = None) -> Decoded:
        """The vote, with what is to be expected of it where of the updates only their sizes are known.

        The most that can be had where no explanation by updates of low rank predicts what it has not seen.
        sites: any, that are overwritten.
        """
        assert cells.base is not None
        decoded = by_sizes(cells, sites)
        assert decoded.weight is not None
        assert decoded.certain is not None
        voted = (cells.base.nearest(vote(cells.stack) * cells.scale) / cells.scale).to(decoded.weight.dtype)
        decoded.certain &= voted == decoded.weight  # elsewhere the posterior prefers another number
        decoded.weight = voted
        return decoded

    def _seems_off_grid(self, cells: Cells) -> bool:
        """Whether models of faint updates disagree about other weights than they would if W were on the grid.

        Told by the sizes of updates alone, from a number of every weight. What is over a grid that W is not on looks
        like a direction that all updates share; and where they do share one, a fit on the grid goes astray.
        """
        asked = replace(cells, held=hold_out(cells.stack, self.generator, share=1, most=ASKED, limit=1))
        on, off = by_sizes(asked).evidence, by_sizes(replace(asked, base=None)).evidence
        return on.likelihood < off.likelihood and off.deviation > UNTOLD

    def _on_grid(self, cells: Cells, run: Run, faint: float) -> Run | None:
        """The run, or a better one, where W lies on the grid; None where held-out cells are predicted better without.

        A run that is wrong confirms itself on the grid, and may find its way without. Taken in turns, the two end in
        one that could be certified, or W is off the grid.
        """
        free = self._freed(cells, run)
        # What updates share makes a fit on the grid go wrong too, where the closed form finds W open. (Faint ones were
        # asked by their sizes.)
        shared = faint >= FAINT and shared_direction(free.factors) >= (SHARED if self.determined else CLOSE)
        if shared or free.likelihood <= run.likelihood + OFF_GRID:
            return run
        for _ in range(TURNS):
            again = converge(cells, free.factors, FROM_NEARBY)
            if again.likelihood <= run.likelihood + OFF_GRID:
                return None
            if self._certifiable(cells, again):
                return again
            run, free = again, self._freed(cells, again)
        return None

    def _freed(self, cells: Cells, run: Run) -> Run:
        """What comes of a run where W is on no grid."""
        return converge(replace(cells, base=None), run.factors, FROM_NEARBY, most=6)


def by_sizes(cells: Cells, sites: Sites | None = None) -> Decoded:
    """What the cells say of W where of the updates only their sizes are known. sites: any, that are overwritten."""
    n, d, k = cells.stack.shape
    new = cells.stack.new_zeros
    nothing = Factors(tuple(new(d, 0) for _ in range(n)), tuple(new(k, 0) for _ in range(n)))
    variance = update_sizes(cells).to(cells.stack).square()[:, None] / 2
    variances = Variances(variance.expand(n, d), variance.expand(n, k))
    sites = plain_sites(cells, MEDIAN * 1e-6, sites)
    return Sweep(cells, sites, nothing, variances, (0.0,) * n, MEDIAN).run(last=True)


def sizes_in_cells(cells: Cells) -> list[float]:
    """Root mean square of each update in cells, smallest first."""
    return sorted((update_sizes(cells) / cell_size(cells)).tolist())


def cell_size(cells: Cells) -> float:
    """Root mean square of the width of a cell."""
    rows = slice(0, cells.stack.shape[1], max(1, cells.stack.shape[1] // 256))
    half = cells.grid.cell(cells.stack[:, rows] * cells.scale)[1]
    return 2 * float(half.double().square().mean().sqrt())
