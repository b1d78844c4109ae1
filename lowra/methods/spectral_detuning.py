"""Spectral DeTuning (Horwitz et al. 2024, Algorithm 2 of Appendix H), the paper's recovery method.

Alternate two closed-form steps until the time is up: given W, each update M_i is the best rank-r approximation of
W'_i - W (Eq. 5); given the M_i, W is the mean of W'_i - M_i (Eq. 7). A scheduler raises the rank from 1 to r.

Where this differs from the pseudocode (nothing but rounding and the random draws changes):

1. The truncation is `torch.svd_lowrank` written out (`svd_truncation`): the same numbers to rounding, and on small
   layers, where calls cost more than arithmetic, half the time. There the n truncations of a step also run as one
   batch and share a Gaussian test matrix instead of drawing n of them, and several layers step side by side
   (`recover_batch`), each with its own scheduler and random numbers: bit for bit what they give one by one.
2. M_i is subtracted as the factors it comes in. The loss takes (W'_i - M_i) - W, which the W-step has at hand, for
   W'_i - (W + M_i).
3. The random numbers come from a generator with the observation's own seed.
4. Only with `compress`: the iteration runs in the joint subspace (`joint_subspace`), its last steps in float64
   (`FLOAT64_SHARE`), and the truncation leaves out an SVD that cancels (`projection`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowra.checks import check_fields
from lowra.errors import LowraError
from lowra.methods.base import Observation, Recovery, check_observation

# The default `niter` of torch.svd_lowrank, which Algorithm 2 leaves as it is.
SUBSPACE_ITERATIONS = 2

# Extra columns per model in the sketches of the joint subspace: the usual 5 to 10 of randomised range finders (Halko
# et al. 2011, section 4.2).
OVERSAMPLING = 8

# Share of the steps, the last ones, that a compressed run takes in float64. Earlier ones are in the paper's float32, a
# third of the time at 4096 x 4096, and leave rounding of 2^-24 of an update; where updates are as large as W, that is
# 100 times the squared error of float64, and a few exact steps remove it: a tenth of 300 measured as well as all.
FLOAT64_SHARE = 0.1

# Models are truncated together while they hold at most this many numbers in all. One batch saves most of the time of a
# small layer, which is the overhead of calls; larger matrices, one by one, stay in the cache and are as fast or faster.
BATCH_ENTRIES = 2**17

# Layers step side by side where each one's parts begin at multiples of so many numbers, as they do by themselves: BLAS
# and LAPACK sum in another order from elsewhere.
ALIGNED = 16

# What gives rank-r factors of matrices (m, a, b), with a generator for each layer they are of.
Truncation = Callable[[Tensor, int, Sequence[torch.Generator]], tuple[Tensor, Tensor]]

# Rows of a layer that are in float64 at a time: 256 x 4096 numbers are 8 MB, near the caches, where a whole layer is
# 128 MB and its traffic costs as much as the products.
BLOCK_ROWS = 256


@dataclass(frozen=True)
class SpectralDeTuning:
    """Spectral DeTuning with the rank scheduler of Table 9, whose names the fields keep.

    steps: total optimisation steps. 300 for ViT and Stable Diffusion, 1000 for Mistral (Appendix E; Table 9 itself
        says 200 where the appendix says 300).
    scheduler: raise the rank from `start_rank` on plateaus; False uses the end rank from the first step (ablation).
        The end rank is the LoRA rank the setting grants.
    start_rank, factor, patience, force_end_rank_percent: see `RankScheduler`.
    compress: run the same iteration in the joint subspace of the differences (see `joint_subspace`). Falls
        back to the full space where that subspace is no smaller than the layer.
    keep_history: return the loss and the rank of every step in `Recovery.history`, each W shown to the judge, who adds
        its W-Error.
    stop_after: end after so many steps of the schedule that `steps` lays out (for curves over steps); None runs all.
    """

    steps: int = 300
    scheduler: bool = True
    start_rank: int = 1
    factor: int = 2
    patience: int = 15
    force_end_rank_percent: float = 0.5
    compress: bool = False
    keep_history: bool = False
    stop_after: int | None = None

    pretty: ClassVar[str] = "Spectral DeTuning"
    reference: ClassVar[str] = "Horwitz et al. 2024, Algorithm 2, https://arxiv.org/abs/2402.10208"
    needs_rank: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self, "methods.spectral_detuning")
        if self.steps < 1:
            raise LowraError(f"Spectral DeTuning runs at least 1 step; got steps={self.steps}.")
        if self.stop_after is not None and not 1 <= self.stop_after <= self.steps:
            raise LowraError(f"stop_after is 1 to steps={self.steps}, or null for all; got {self.stop_after}.")
        if self.start_rank < 1 or self.factor < 2 or self.patience < 0:
            raise LowraError(
                "Spectral DeTuning's scheduler needs start_rank >= 1, factor >= 2 and patience >= 0; got "
                f"start_rank={self.start_rank}, factor={self.factor}, patience={self.patience}."
            )
        if not 0 <= self.force_end_rank_percent <= 1:
            raise LowraError(
                f"force_end_rank_percent is a share of the steps, 0 to 1; got {self.force_end_rank_percent}."
            )

    def recover(self, observation: Observation) -> Recovery:
        """Estimate W by Algorithm 2.

        Returns one candidate (1, d, k), in the dtype of the stack, with the last step's loss (mean squared
        residual, Algorithm 2), its rank and whether the subspace was used in the stats.
        Raises LowraError for a stack no method can work on, or when no rank is given.
        """
        return self._recover([observation])[0]

    def recover_batch(self, observations: Sequence[Observation]) -> list[Recovery]:
        """What `recover` gives for each of several layers, in less time where they are small and of one shape."""
        kinds = {(each.merged.shape, each.merged.dtype, each.merged.device, each.rank) for each in observations}
        n, d, k = observations[0].merged.shape
        together = n * d * k <= BATCH_ENTRIES and n * d % ALIGNED == n * k % ALIGNED == 0
        if len(kinds) == 1 and together and not self.compress:
            return self._recover(observations)
        return [self.recover(observation) for observation in observations]

    def _recover(self, observations: Sequence[Observation]) -> list[Recovery]:
        """Layers side by side; more than one only where a layer's models are one batch, and without `compress`."""
        for observation in observations:
            check_observation(observation)
        first = observations[0]
        rank = first.rank
        if rank is None:
            raise LowraError("Spectral DeTuning needs the LoRA rank, and this setting does not grant it.")
        n, d, k = first.merged.shape
        compressed = self.compress and n * rank < min(d, k)
        generators = [torch.Generator(first.merged.device).manual_seed(each.seed) for each in observations]
        watches = [each.watch if self.keep_history else None for each in observations]
        with torch.inference_mode():  # without autograd's book-keeping, a tenth of the time of a small layer
            if compressed:
                stack, watch = first.merged, watches[0]  # one layer
                left, right, mean, cores, outside = joint_subspace(stack, rank, generators[0])

                def lifted(core: Tensor) -> Tensor:
                    # In float32, as Algorithm 2 works: W is a float32 weight, and rounding to its grid only helps.
                    return (mean + left @ core.to(left.dtype) @ right.mT).to(stack.dtype)  # (d, k)

                seen = [(lambda core: watch(lifted(core))) if watch else None]
                found, histories = self._iterate(
                    cores.unsqueeze(0), rank, projection, stack.dtype, generators, seen, entries=d * k, outside=outside
                )
                weights = lifted(found[0]).unsqueeze(0)  # (1, d, k)
            else:
                stacks = first.merged.unsqueeze(0)  # (1, n, d, k)
                if len(observations) > 1:
                    stacks = torch.stack([each.merged for each in observations])  # (l, n, d, k)
                weights, histories = self._iterate(
                    stacks, rank, svd_truncation, stacks.dtype, generators, watches, entries=d * k
                )
        return [
            Recovery(
                weight.clone().unsqueeze(0),  # an ordinary tensor again
                stats={
                    "loss": history[-1]["loss"],
                    "final_rank": int(history[-1]["rank"]),
                    "compressed": compressed,
                },
                history=history if self.keep_history else None,
            )
            for weight, history in zip(weights, histories, strict=True)
        ]

    def _iterate(
        self,
        stacks: Tensor,
        rank: int,
        truncate: Truncation,
        early_dtype: torch.dtype,
        generators: Sequence[torch.Generator],
        watches: Sequence[Callable[[Tensor], None] | None],
        *,
        entries: int,
        outside: float = 0.0,
    ) -> tuple[Tensor, list[list[dict[str, float]]]]:
        """Algorithm 2 on the stacks (l, n, a, b) of l layers: the merged weights, or their cores in the joint subspace.

        All steps but the last (`FLOAT64_SHARE`) run in `early_dtype`, those in the dtype of the stacks. `entries` is
        the number of weights of a layer and `outside` the squared norm per model that the stack leaves out: with them
        the loss is the full layer's in either space. Returns W (l, a, b) and, of each layer, the loss and the rank of
        every step.
        """
        count, n, a, b = stacks.shape
        schedulers = [RankScheduler(self, rank) for _ in range(count)] if self.scheduler else []
        ranks = [scheduler.current_rank for scheduler in schedulers] or [rank] * count
        size = min(n, max(1, BATCH_ENTRIES // (a * b)))
        parts = [slice(start, start + size) for start in range(0, n, size)]
        work = _Work.of(stacks.to(early_dtype), parts)
        weight = work.merged.mean(1)  # (l, a, b)
        histories: list[list[dict[str, float]]] = [[] for _ in range(count)]
        for step in range(self.steps if self.stop_after is None else self.stop_after):
            if step == self.steps - math.ceil(FLOAT64_SHARE * self.steps) and stacks.dtype != early_dtype:
                work, weight = _Work.of(stacks, parts), weight.to(stacks.dtype)
            # M-step (Eq. 5): W'_i - M_i, of the layers that are at one rank together.
            for current in sorted(set(ranks)):
                layers = [i for i in range(count) if ranks[i] == current]
                work.without_updates(weight, layers, truncate, current, [generators[i] for i in layers])
            # W-step (Eq. 7), and the loss with the new W.
            weight = work.rest.mean(1)  # (l, a, b)
            for i, squares in enumerate(work.squares(weight)):
                loss = (squares / n * (a * b) + outside) / entries
                histories[i].append({"loss": loss, "rank": float(ranks[i])})
                if watch := watches[i]:
                    watch(weight[i])
                if schedulers:
                    ranks[i] = schedulers[i].step(loss)
        return weight, histories


@dataclass(frozen=True)
class _Work:
    """What a step works on, made once: new memory at every step takes half the time of a difference.

    merged: (l, n, a, b). rest: like it, what the rank-r updates leave of the merged weights. differences: (l, c, a, b),
    W'_i - W of c models at a time. parts: those models.
    """

    merged: Tensor
    rest: Tensor
    differences: Tensor
    parts: Sequence[slice]

    @classmethod
    def of(cls, merged: Tensor, parts: Sequence[slice]) -> _Work:
        """For a stack, so many models at a time."""
        return cls(merged, torch.empty_like(merged), torch.empty_like(merged[:, parts[0]]), parts)

    def without_updates(
        self,
        weight: Tensor,
        layers: Sequence[int],
        truncate: Truncation,
        rank: int,
        generators: Sequence[torch.Generator],
    ) -> None:
        """Put W'_i - M_i of some layers into `rest`. weight: W of all layers (l, a, b)."""
        if len(layers) == len(self.merged):
            merged, rest = self.merged, self.rest
        else:
            merged, weight = self.merged[layers], weight[layers]
            rest = torch.empty_like(merged)
        weight = weight.unsqueeze(1)  # (l, 1, a, b)
        for part in self.parts:
            taken = merged[:, part]  # (l, c, a, b)
            difference = self.differences[: len(layers), : taken.shape[1]]
            torch.sub(taken, weight, out=difference)
            left, right = truncate(difference.flatten(0, 1), rank, generators)  # (l c, a, r), (l c, b, r)
            torch.baddbmm(taken.flatten(0, 1), left, right.mT, alpha=-1, out=rest[:, part].flatten(0, 1))
        if rest is not self.rest:
            self.rest[layers] = rest

    def squares(self, weight: Tensor) -> list[float]:
        """Of each layer the sum over models of the mean square of (W'_i - M_i) - W; `rest` is used up."""
        found = [0.0] * len(self.rest)
        for part in self.parts:
            off = self.rest[:, part].sub_(weight.unsqueeze(1)).square_()
            for i, layer in enumerate(off):
                found[i] += float(layer.mean()) * len(layer)
        return found


class RankScheduler:
    """The rank of the next step: multiplied by `factor` when the loss has stopped falling (Table 9).

    `torch.optim.lr_scheduler.ReduceLROnPlateau` turned upside down, as the paper says of its own: `patience` steps
    without a smaller loss are borne, the next one raises the rank and clears the count. Any smaller loss counts as an
    improvement (relative threshold 0). After `force_end_rank_percent` of all steps the rank is the end rank.
    """

    def __init__(self, settings: SpectralDeTuning, end_rank: int) -> None:
        self.settings = settings
        self.end_rank = end_rank
        self.current_rank = min(settings.start_rank, end_rank)
        self.best = math.inf
        self.bad_steps = 0
        self.steps_done = 0

    def step(self, loss: float) -> int:
        """Take the loss of the step just done and return the rank of the next one."""
        self.steps_done += 1
        if loss < self.best:
            self.best = loss
            self.bad_steps = 0
        else:
            self.bad_steps += 1
        if self.bad_steps > self.settings.patience:
            self.current_rank = min(self.current_rank * self.settings.factor, self.end_rank)
            self.bad_steps = 0
        if self.steps_done >= self.settings.force_end_rank_percent * self.settings.steps:
            self.current_rank = self.end_rank
        return self.current_rank


def leading_columns(stack: Tensor, rank: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Orthonormal (m, a, r) that nearly span the leading r columns of matrices (m, a, b), as `torch.svd_lowrank` does.

    A randomised range finder with subspace iteration (Halko et al. 2011, Alg. 4.4). Products are written with the thin
    factor's transpose on the left: QR returns columns, and rows of a batch are multiplied three times as fast.
    generators: one for each layer; the matrices are the layers' in turn, as many of each.
    """
    b = stack.shape[2]
    layers = stack.split(len(stack) // len(generators))
    products = [
        torch.bmm(gaussian(b, rank, stack, generator).mT.expand(len(layer), rank, b), layer.mT)
        for layer, generator in zip(layers, generators, strict=True)
    ]
    basis = torch.linalg.qr((torch.cat(products) if len(products) > 1 else products[0]).mT).Q  # (m, a, r)
    for _ in range(SUBSPACE_ITERATIONS):
        basis = torch.linalg.qr(torch.bmm(basis.mT, stack).mT).Q  # (m, b, r)
        basis = torch.linalg.qr(torch.bmm(basis.mT, stack.mT).mT).Q  # (m, a, r)
    return basis


def gaussian(rows: int, columns: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """A random matrix of the dtype and device of another tensor."""
    return torch.randn(rows, columns, dtype=like.dtype, device=like.device, generator=generator)


def svd_truncation(stack: Tensor, rank: int, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """Rank-r approximations of a stack (m, a, b) as Algorithm 2 computes them: U S (m, a, r) and V (m, b, r)."""
    if stack.shape[-2] < stack.shape[-1]:
        left, right = svd_truncation(stack.mT, rank, generators)
        return right, left
    basis = leading_columns(stack, rank, generators)
    # Lying down, as torch takes it, LAPACK needs twice as long.
    standing = torch.bmm(basis.mT, stack).mT  # (m, b, r)
    right, values, turn = torch.linalg.svd(standing, full_matrices=False)  # (m, b, r), (m, r), (m, r, r)
    return torch.bmm(basis, turn.mT).mul_(values.unsqueeze(-2)), right


def projection(stack: Tensor, rank: int, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """The same approximations as `svd_truncation`, to rounding, without its inner SVD: factors Q and A^T Q.

    `torch.svd_lowrank(A, q=r)` finds an orthonormal Q of r columns and then the SVD of the small Q^T A. All its r
    singular values are kept, so U S V^T is Q Q^T A whatever that SVD is. It is a third of the time of a step on the
    small cores; in float32 it also rounds better than the paper's own, so the full space, which is to show what the
    paper's algorithm does, keeps the SVD.
    """
    if stack.shape[-2] < stack.shape[-1]:
        left, right = projection(stack.mT, rank, generators)
        return right, left
    basis = leading_columns(stack, rank, generators)
    return basis, torch.bmm(basis.mT, stack).mT


def joint_subspace(
    stack: Tensor, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Bases of everything the iteration can reach, and the stack seen in them.

    Algorithm 2 starts at the mean, and each step adds combinations of columns and rows of W'_i - mean: all iterates are
    mean + L X R^T, where the orthonormal L and R span the columns and the rows of the differences, n r dimensions
    each. So the iteration may run on the cores C_i = L^T (W'_i - mean) R of size n r instead of on the layer.

    Holds if no update has a rank above r; if one has, the m leading directions are kept and the iterates differ.

    stack: (n, d, k), n r < min(d, k). Returns L (d, m), R (k, m), the mean (d, k), the cores (n, m, m) with m = n r,
    and the mean over models of the squared norm that the cores leave out. All are float64: differences are small beside
    the weights, and their rounding should stay below that which the merged weights already carry.
    """
    n, d, k = stack.shape
    m = n * rank
    # The n differences sum to zero: n - 1 sketches have to fill the m dimensions.
    width = math.ceil(m / (n - 1)) + OVERSAMPLING
    mean = stack.mean(0, dtype=torch.float64)  # (d, k)
    rows = [slice(start, start + BLOCK_ROWS) for start in range(0, d, BLOCK_ROWS)]

    def times(merged: Tensor, right: Tensor) -> Tensor:  # (d, k) (k, c) -> (d, c)
        return torch.cat([(merged[block] - mean[block]) @ right for block in rows])

    def transpose_times(merged: Tensor, left: Tensor) -> Tensor:  # (k, d) (d, c) -> (k, c)
        return sum((merged[block] - mean[block]).mT @ left[block] for block in rows)  # type: ignore[return-value]

    def test(size: int) -> Tensor:
        return gaussian(size, width, mean, generator)

    def leading(pieces: list[Tensor]) -> Tensor:
        q, r = torch.linalg.qr(torch.cat(pieces, dim=1))  # (a, n width)
        return q @ torch.linalg.svd(r).U[:, :m]  # (a, m)

    left = leading([times(merged, test(k)) for merged in stack])
    # Two half steps of subspace iteration, one pass over the data each, bring the bases to rounding.
    right = leading([transpose_times(merged, left @ test(m)) for merged in stack])
    left = leading([times(merged, right @ test(m)) for merged in stack])
    cores = torch.stack([left.mT @ times(merged, right) for merged in stack])  # (n, m, m)
    whole = sum(float((merged[block] - mean[block]).square_().sum()) for merged in stack for block in rows)
    return left, right, mean, cores, max(whole - float(cores.square().sum()), 0.0) / n
