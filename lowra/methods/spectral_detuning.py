"""Spectral DeTuning (Horwitz et al. 2024, Algorithm 2 of Appendix H), the paper's recovery method.

Alternate two closed-form steps until the time is up: given W, each update M_i is the best rank-r approximation of
W'_i - W (Eq. 5); given the M_i, W is the mean of W'_i - M_i (Eq. 7). A scheduler raises the rank from 1 to r.

Where this differs from the pseudocode (nothing but rounding and the random draws changes):

1. `torch.svd_lowrank(A, q=r)` finds an orthonormal Q of r columns, then the SVD of the small matrix Q^T A (r, k).
   All r singular values are kept, so the product U S V^T is Q Q^T A whatever that SVD is. We form Q Q^T A and leave the
   SVD out: it is most of the time on small layers.
2. The n truncations of a step run as one batch and share one Gaussian test matrix instead of drawing n of them.
3. The loss takes (W'_i - M_i) - W, which the W-step has at hand, for W'_i - (W + M_i).
4. Random numbers come from the observation's own seed; the global generator is not touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowra.errors import LowraError
from lowra.methods.base import Observation, Recovery, check_observation

# torch.svd_lowrank's default, which Algorithm 2 leaves as it is.
SUBSPACE_ITERATIONS = 2

# Extra columns per model in the sketches of the joint subspace: the usual 5 to 10 of randomised range finders (Halko
# et al. 2011, section 4.2).
OVERSAMPLING = 8


@dataclass(frozen=True)
class SpectralDeTuning:
    """Spectral DeTuning with the rank scheduler of Table 9, whose names the fields keep.

    steps: total optimisation steps. 300 for ViT and Stable Diffusion, 1000 for Mistral (Appendix E; Table 9 itself
        says 200 where the appendix says 300).
    scheduler: raise the rank from `start_rank` on plateaus; False uses the end rank from the first step (ablation).
        The end rank is the LoRA rank the setting grants.
    start_rank, factor, patience, force_end_rank_percent: see `RankScheduler`.
    compress: run the same iteration in the joint subspace of the differences (see `joint_subspace`) in float64.
        Falls back to the full space where that subspace is no smaller than the layer.
    keep_history: return the loss and the rank of every step in `Recovery.history`.
    """

    steps: int = 300
    scheduler: bool = True
    start_rank: int = 1
    factor: int = 2
    patience: int = 15
    force_end_rank_percent: float = 0.5
    compress: bool = False
    keep_history: bool = False

    pretty: ClassVar[str] = "Spectral DeTuning"
    reference: ClassVar[str] = "Horwitz et al. 2024, Algorithm 2, https://arxiv.org/abs/2402.10208"
    needs_rank: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise LowraError(f"Spectral DeTuning runs at least 1 step; got steps={self.steps}.")
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
        check_observation(observation)
        rank = observation.rank
        if rank is None:
            raise LowraError("Spectral DeTuning needs the LoRA rank, and this setting does not grant it.")
        stack = observation.merged
        n, d, k = stack.shape
        generator = torch.Generator().manual_seed(observation.seed)
        compressed = self.compress and n * rank < min(d, k)
        if compressed:
            left, right, mean, cores = joint_subspace(stack, rank, generator)
            outside = (sum((w.double() - mean).square().sum() for w in stack) - cores.square().sum()).clamp(min=0)
            estimate, history = self._iterate(cores, rank, generator, entries=d * k, outside=float(outside) / n)
            # Back in float32, in which Algorithm 2 works: W is a float32 weight, and rounding to its grid only helps.
            weight = (mean + left @ estimate @ right.mT).to(stack.dtype)  # (d, k)
        else:
            weight, history = self._iterate(stack, rank, generator, entries=d * k)
        last = history[-1]
        return Recovery(
            weight.unsqueeze(0),
            stats={"loss": last["loss"], "final_rank": int(last["rank"]), "compressed": compressed},
            history=history if self.keep_history else None,
        )

    def _iterate(
        self, stack: Tensor, rank: int, generator: torch.Generator, *, entries: int, outside: float = 0.0
    ) -> tuple[Tensor, list[dict[str, float]]]:
        """Algorithm 2 on a stack (n, a, b): the merged weights, or their cores in the joint subspace.

        `entries` is the number of weights of the layer and `outside` the squared norm per model that the stack leaves
        out: with them the loss is the full layer's in either space.
        """
        ranks = RankScheduler(self, rank) if self.scheduler else None
        current_rank = ranks.current_rank if ranks else rank
        weight = stack.mean(0)  # (a, b)
        history = []
        for _ in range(self.steps):
            # M-step (Eq. 5): what the rank-r updates leave of the merged weights, W'_i - M_i.
            rest = stack - low_rank_part(stack - weight, current_rank, generator)  # (n, a, b)
            # W-step (Eq. 7), and the loss with the new W.
            weight = rest.mean(0)  # (a, b)
            loss = (float((rest - weight).square_().mean()) * weight.numel() + outside) / entries
            history.append({"loss": loss, "rank": float(current_rank)})
            if ranks:
                current_rank = ranks.step(loss)
        return weight, history


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


def low_rank_part(stack: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """The product U S V^T of `torch.svd_lowrank(stack, q=rank)`, matrix by matrix (Halko et al. 2011, Alg. 4.4).

    stack: (n, a, b). Returns (n, a, b) of rank at most `rank`. The test matrix is drawn on the CPU, so that a seed
    means the same on every device.
    """
    if stack.shape[-2] < stack.shape[-1]:
        return low_rank_part(stack.mT, rank, generator).mT
    test = torch.randn(stack.shape[-1], rank, dtype=stack.dtype, generator=generator).to(stack.device)  # (b, r)
    basis = torch.linalg.qr(stack @ test).Q  # (n, a, r)
    for _ in range(SUBSPACE_ITERATIONS):
        basis = torch.linalg.qr(stack.mT @ basis).Q  # (n, b, r)
        basis = torch.linalg.qr(stack @ basis).Q  # (n, a, r)
    return basis @ (basis.mT @ stack)


def joint_subspace(stack: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bases of everything the iteration can reach, and the stack seen in them.

    Algorithm 2 starts at the mean, and each step adds combinations of columns and rows of W'_i - mean: all iterates are
    mean + L X R^T, where the orthonormal L and R span the columns and the rows of the differences, n r dimensions
    each. So the iteration may run on the cores C_i = L^T (W'_i - mean) R of size n r instead of on the layer.

    stack: (n, d, k), n r < min(d, k). Returns L (d, m), R (k, m), the mean (d, k) and the cores (n, m, m) with m = n r,
    all float64: the difference of two merged weights is small beside them, and the rounding of the pass should stay
    below the rounding that the weights already carry.
    """
    n, d, k = stack.shape
    m = n * rank
    mean = stack.mean(0, dtype=torch.float64)  # (d, k)

    def differences() -> Iterator[Tensor]:  # one float64 layer at a time
        for merged in stack:
            yield merged - mean

    def spanned(pieces: list[Tensor]) -> Tensor:
        """Orthonormal basis of the m leading left singular directions of (a, n q) columns."""
        q, r = torch.linalg.qr(torch.cat(pieces, dim=1))
        return q @ torch.linalg.svd(r).U[:, :m]  # (a, m)

    def gaussian(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, dtype=torch.float64, generator=generator).to(stack.device)

    # The n differences sum to zero, so n - 1 sketches must fill m dimensions.
    width = min(math.ceil(m / (n - 1)) + OVERSAMPLING, min(d, k) // n)
    width = max(width, math.ceil(m / n))
    left = spanned([diff @ gaussian(k, width) for diff in differences()])
    # Two half steps of subspace iteration: one pass over the data each, and with them the gap to exact bases closes.
    right = spanned([diff.mT @ (left @ gaussian(m, width)) for diff in differences()])
    left = spanned([diff @ (right @ gaussian(m, width)) for diff in differences()])
    cores = torch.stack([left.mT @ diff @ right for diff in differences()])  # (n, m, m)
    return left, right, mean, cores
