"""Spectral DeTuning against a second, plain statement of the paper's Algorithm 2, and its joint-subspace option."""

import math
from dataclasses import replace

import pytest
import torch

from lowra.errors import LowraError
from lowra.methods import spectral_detuning
from lowra.methods.base import Observation
from lowra.methods.spectral_detuning import RankScheduler, SpectralDeTuning, joint_subspace, projection, svd_truncation

# ---- Algorithm 2, restated: lists and loops, nothing shared with the implementation ------------------------------


class PlainScheduler:
    """Appendix E and Table 9: ReduceLROnPlateau, increasing."""

    def __init__(self, start_rank, end_rank, total_steps, factor=2, patience=15, force_end_rank_percent=0.5):
        self.current_rank, self.end_rank, self.factor, self.patience = start_rank, end_rank, factor, patience
        self.forced_from = force_end_rank_percent * total_steps
        self.best, self.num_bad, self.t = float("inf"), 0, 0

    def step(self, loss):
        self.t += 1
        if loss < self.best:
            self.best, self.num_bad = loss, 0
        else:
            self.num_bad += 1
            if self.num_bad > self.patience:
                self.current_rank = min(self.current_rank * self.factor, self.end_rank)
                self.num_bad = 0
        if self.t >= self.forced_from:
            self.current_rank = self.end_rank


def randomised_svd(matrix, q):
    u, s, v = torch.svd_lowrank(matrix, q=q)
    return u, s, v


def exact_svd(matrix, q):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :q], s[:q], vh[:q].T


def algorithm_2(stack, rank, steps, svd=randomised_svd, scheduler=True):
    """Returns W and the (loss, rank) of every step."""
    merged = list(stack)
    ranks = PlainScheduler(1 if scheduler else rank, rank, steps)
    weight, history = torch.mean(torch.stack(merged), axis=0), []
    for _ in range(steps):
        updates = [w - weight for w in merged]
        for i in range(len(updates)):
            u, s, v = svd(updates[i], ranks.current_rank)
            updates[i] = (u @ torch.diag_embed(s)) @ v.T
        weight = torch.mean(torch.stack([w - m for w, m in zip(merged, updates, strict=True)]), axis=0)
        losses = [torch.mean((w - (weight + m)) ** 2) for w, m in zip(merged, updates, strict=True)]
        loss = torch.mean(torch.stack(losses), axis=0).item()
        history.append((loss, ranks.current_rank))
        ranks.step(loss)
    return weight, history


# ---- Data --------------------------------------------------------------------------------------------------------


def layer(n, d, k, rank, *, update=2e-3, decay=0.1, seed=0, dtype=torch.float32):
    """A weight (d, k) of rms 0.04 and the merged weights (n, d, k) of n rank-r updates of rms `update`."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d, k, generator=generator) * 0.04
    values = torch.logspace(0, math.log10(decay), rank, dtype=torch.float64)
    values *= update / values.norm()
    columns = torch.randn(n, d, rank, generator=generator).double()
    rows = torch.randn(n, rank, k, generator=generator).double()
    return weight, (weight.double() + (columns * values) @ rows).to(dtype)


def w_error(estimate, weight):
    return math.log10((estimate.double() - weight.double()).square().mean())


def exact_truncation(stack, rank, generators):
    u, s, vh = torch.linalg.svd(stack, full_matrices=False)
    return u[..., :rank] * s[..., None, :rank], vh[..., :rank, :].mT


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def exact(monkeypatch):
    """Both truncations become the exact one, so that runs differ by rounding alone."""
    monkeypatch.setattr(spectral_detuning, "svd_truncation", exact_truncation)
    monkeypatch.setattr(spectral_detuning, "projection", exact_truncation)


# ---- Against the restatement -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "scheduler"), [((4, 40, 28), True), ((4, 28, 40), True), ((3, 32, 32), False)])
def test_step_by_step_for_given_svds(exact, shape, scheduler):
    """For exact SVDs in float64 every step's loss and rank, and the result, agree with the restatement."""
    stack = layer(*shape, 4, dtype=torch.float64)[1]
    expected, history = algorithm_2(stack, 4, 80, exact_svd, scheduler)
    recovery = SpectralDeTuning(steps=80, scheduler=scheduler, keep_history=True).recover(Observation(stack, rank=4))
    assert [step["rank"] for step in recovery.history] == [rank for _, rank in history]
    # The same sums in another order: rounding of 1e-16 relative to W (0.04), amplified little by 80 contractive steps.
    torch.testing.assert_close(recovery.candidates[0], expected, rtol=0, atol=1e-14)
    for ours, (loss, _) in zip(recovery.history, history, strict=True):
        # Losses of 1e-5 to 1e-18 from differences that carry 1e-17 of rounding each.
        assert ours["loss"] == pytest.approx(loss, rel=1e-8, abs=1e-22)
    assert recovery.stats["loss"] == recovery.history[-1]["loss"]


@pytest.mark.parametrize(("n", "size", "rank"), [(5, 64, 2), (5, 128, 8), (3, 96, 4)])
def test_final_error_within_the_run_to_run_spread(n, size, rank):
    weight, stack = layer(n, size, size, rank)
    plain, ours = [], []
    for seed in range(5):
        torch.manual_seed(seed)
        plain.append(w_error(algorithm_2(stack, rank, 300)[0], weight))
        ours.append(w_error(SpectralDeTuning().recover(Observation(stack, rank, seed=seed)).candidates[0], weight))
    spread = max(plain) - min(plain)
    assert max(plain) < -17  # it has converged to the rounding of float32
    # Means of two samples of 5 draws: no further apart than one sample is wide, or than rounding tells (0.05).
    assert abs(sum(plain) - sum(ours)) / 5 <= max(spread, 0.05)


def test_truncation_is_svd_lowrank_for_the_same_draws():
    stack = layer(4, 30, 50, 6)[1]
    left, right = svd_truncation(stack, 5, [seeded(3)])
    for matrix, approximation in zip(stack, left @ right.mT, strict=True):
        torch.manual_seed(3)
        u, s, v = torch.svd_lowrank(matrix, q=5)
        # float32 rounding of products of rank 5 with entries near 0.04.
        torch.testing.assert_close(approximation, u @ torch.diag(s) @ v.T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 50, 30), (3, 30, 50)])
def test_projection_is_the_same_truncation(shape):
    stack = torch.randn(shape, dtype=torch.float64)
    left, right = svd_truncation(stack, 5, [seeded(3)])
    basis, rows = projection(stack, 5, [seeded(3)])
    torch.testing.assert_close(basis @ rows.mT, left @ right.mT, rtol=0, atol=1e-12)


# ---- The rank scheduler ------------------------------------------------------------------------------------------


def ranks_for(losses, end_rank=16, **settings):
    scheduler = RankScheduler(SpectralDeTuning(**{"steps": 1000, **settings}), end_rank)
    return [scheduler.current_rank] + [scheduler.step(loss) for loss in losses]


def test_scheduler_matches_torchs_plateau_rule():
    """ReduceLROnPlateau with threshold 0 halves its rate exactly when our rank doubles."""
    losses = torch.rand(400, generator=torch.Generator().manual_seed(0)).cumsum(0).sin().tolist()
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=15, threshold=0, eps=0)
    expected = [1]
    for loss in losses:
        plateau.step(loss)
        expected.append(round(1 / optimizer.param_groups[0]["lr"]))
    assert ranks_for(losses, end_rank=2**40) == expected
    assert expected[-1] > 16


def test_any_smaller_loss_is_an_improvement_and_an_equal_one_is_none():
    falling = [1 - 1e-12 * i for i in range(100)]
    assert set(ranks_for(falling)) == {1}
    # The first loss is the best so far; 15 equal ones are borne, the 16th raises the rank.
    assert ranks_for([1.0] * 17)[-2:] == [1, 2]


def test_rank_stops_at_the_end_rank_and_is_forced_there():
    assert ranks_for([1.0] * 200, end_rank=6, steps=1000)[-1] == 6
    assert set(ranks_for([1.0] * 200, end_rank=6)) == {1, 2, 4, 6}
    forced = ranks_for([1 / (i + 1) for i in range(20)], steps=20)
    assert forced == [1] * 10 + [16] * 11
    assert ranks_for([], end_rank=2, start_rank=8) == [2]


def test_settings_reach_the_scheduler():
    assert ranks_for([1.0] * 4, factor=3, patience=1) == [1, 1, 1, 3, 3]
    assert ranks_for([1.0], force_end_rank_percent=0.0) == [1, 16]
    assert ranks_for([], start_rank=4) == [4]


def test_history_holds_the_ranks_the_steps_used():
    stack = layer(3, 24, 24, 4)[1]
    with_schedule = SpectralDeTuning(steps=10, keep_history=True).recover(Observation(stack, rank=4))
    assert [step["rank"] for step in with_schedule.history] == [1] * 5 + [4] * 5
    without = SpectralDeTuning(steps=10, scheduler=False, keep_history=True).recover(Observation(stack, rank=4))
    assert [step["rank"] for step in without.history] == [4] * 10
    assert SpectralDeTuning(steps=2).recover(Observation(stack, rank=4)).history is None


# ---- compress ----------------------------------------------------------------------------------------------------

FIXED_SCHEDULES = [{"scheduler": False}, {"patience": 10**6}]  # full rank at once; rank 1, then r from half time


@pytest.mark.parametrize("settings", FIXED_SCHEDULES)
@pytest.mark.parametrize("shape", [(3, 60, 44), (3, 44, 60), (4, 48, 48)])
def test_compress_equals_full_for_a_fixed_schedule(exact, settings, shape):
    stack = layer(*shape, 3, dtype=torch.float64)[1]
    runs = [
        SpectralDeTuning(steps=30, compress=compress, keep_history=True, **settings).recover(Observation(stack, rank=3))
        for compress in (False, True)
    ]
    assert [run.stats["compressed"] for run in runs] == [False, True]
    # Iterates of size 0.04 in float64, in two bases; their distance to W at this point is 1e-6 or more.
    torch.testing.assert_close(runs[1].candidates, runs[0].candidates, rtol=0, atol=1e-13)
    for full, compressed in zip(runs[0].history, runs[1].history, strict=True):
        # Losses of 1e-6 to 1e-9 from differences that carry 1e-17 of rounding each.
        assert compressed["loss"] == pytest.approx(full["loss"], rel=1e-8)


def test_compress_reaches_the_same_error_or_better():
    weight, stack = layer(5, 128, 96, 4, decay=0.01)
    observation = Observation(stack, rank=4)
    full = SpectralDeTuning().recover(observation).candidates
    compressed = SpectralDeTuning(compress=True).recover(observation).candidates
    assert compressed.dtype == torch.float32
    assert w_error(compressed[0], weight) <= w_error(full[0], weight)


def test_compress_falls_back_where_the_subspace_is_no_smaller():
    stack = layer(4, 32, 40, 8)[1]
    observation = Observation(stack, rank=8)  # n r = 32 = min(d, k)
    compressed = SpectralDeTuning(steps=20, compress=True).recover(observation)
    assert compressed.stats["compressed"] is False
    assert torch.equal(compressed.candidates, SpectralDeTuning(steps=20).recover(observation).candidates)


@pytest.mark.parametrize("rank", [1, 5, 11])  # 11: n r = 33 of 40, and the sketches are wider than the layer
def test_joint_subspace_holds_the_differences(rank):
    n, d, k = 3, 40, 50
    stack = layer(n, d, k, rank)[1].double()
    left, right, mean, cores, outside = joint_subspace(stack, rank, seeded(0))
    m = n * rank
    assert (left.shape, right.shape, cores.shape) == ((d, m), (k, m), (n, m, m))
    identity = torch.eye(m, dtype=torch.float64)
    torch.testing.assert_close(left.mT @ left, identity, rtol=0, atol=1e-13)
    torch.testing.assert_close(right.mT @ right, identity, rtol=0, atol=1e-13)
    # Left out is only the rounding of the float32 merges: 40 x 50 numbers of rms 1e-9.
    torch.testing.assert_close(left @ cores @ right.mT, stack - mean, rtol=0, atol=2e-8)
    assert 0 <= outside < d * k * 1e-17


# ---- Layers side by side -----------------------------------------------------------------------------------------


def observations(*shapes, rank=2):
    """Layers of unlike signal, so that their schedulers raise the rank at different steps."""
    stacks = [layer(*shape, rank, update=3.0 ** -(i + 4), seed=i)[1] for i, shape in enumerate(shapes)]
    return [Observation(stack, rank=rank, seed=10 + i) for i, stack in enumerate(stacks)]


@pytest.mark.parametrize("scheduler", [True, False])
@pytest.mark.parametrize(
    "shapes",
    [
        [(5, 96, 96)] * 4,
        [(4, 64, 32)] * 3,
        [(3, 32, 80)] * 2,
        [(3, 17, 23)] * 3,  # begin at odd places: one by one
        [(4, 48, 40), (4, 40, 48), (3, 48, 40)],  # unlike: one by one
    ],
)
def test_layers_side_by_side_are_bit_for_bit_what_each_is_alone(shapes, scheduler):
    method = SpectralDeTuning(steps=80, scheduler=scheduler, keep_history=True)
    alone, shown, together = [], [], []
    for each in observations(*shapes):
        alone.append(method.recover(replace(each, watch=lambda weight: shown.append(weight.clone()))))
    watched = [[] for _ in shapes]
    seen = [
        replace(each, watch=lambda weight, at=at: watched[at].append(weight.clone()))
        for at, each in enumerate(observations(*shapes))
    ]
    together = method.recover_batch(seen)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.candidates, other.candidates)
        assert (one.stats, one.history) == (other.stats, other.history)
    flat = [weight for each in watched for weight in each]
    assert len(flat) == len(shown) == 80 * len(shapes)
    assert all(torch.equal(a, b) for a, b in zip(shown, flat, strict=True))


def test_layers_side_by_side_are_at_unlike_ranks_in_between():
    """What the test above is about: without it, layers would never be taken out of the stack."""
    method = SpectralDeTuning(steps=200, keep_history=True)
    first, last = (method.recover_batch(observations(*[(5, 96, 96)] * 4, rank=4))[i].history for i in (0, 3))
    assert [step["rank"] for step in first] != [step["rank"] for step in last]


def test_large_layers_and_compressed_ones_are_recovered_one_by_one(monkeypatch):
    calls = []
    real = SpectralDeTuning._recover
    monkeypatch.setattr(SpectralDeTuning, "_recover", lambda self, seen: calls.append(len(seen)) or real(self, seen))
    SpectralDeTuning(steps=2, compress=True).recover_batch(observations(*[(4, 32, 32)] * 2))
    SpectralDeTuning(steps=2).recover_batch(observations(*[(2, 256, 512)] * 2))
    assert calls == [1, 1, 1, 1]


# ---- Seeds, stacks with nothing in them, bad input ---------------------------------------------------------------


@pytest.mark.parametrize("compress", [False, True])
def test_seed_decides_and_the_global_generator_is_left_alone(compress):
    stack = layer(3, 48, 40, 4, decay=1e-3)[1]
    method = SpectralDeTuning(steps=25, compress=compress)
    state = torch.get_rng_state()
    first = method.recover(Observation(stack, rank=4, seed=7)).candidates
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(method.recover(Observation(stack, rank=4, seed=7)).candidates, first)
    assert not torch.equal(method.recover(Observation(stack, rank=4, seed=8)).candidates, first)


@pytest.mark.parametrize("compress", [False, True])
def test_identical_models_are_returned_as_they_are(compress):
    weight = torch.randn(32, 24)
    recovery = SpectralDeTuning(steps=40, compress=compress).recover(Observation(weight.expand(4, -1, -1), rank=2))
    assert torch.equal(recovery.candidates[0], weight)
    assert recovery.stats["loss"] == 0


def test_the_input_is_not_changed():
    stack = layer(3, 24, 24, 2)[1]
    before = stack.clone()
    SpectralDeTuning(steps=5).recover(Observation(stack, rank=2))
    SpectralDeTuning(steps=5, compress=True).recover(Observation(stack, rank=2))
    assert torch.equal(stack, before)


def test_rank_is_needed():
    assert SpectralDeTuning.needs_rank
    with pytest.raises(LowraError, match="needs the LoRA rank, and this setting does not grant it"):
        SpectralDeTuning().recover(Observation(torch.randn(3, 8, 8)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "at least 1 step; got steps=0"),
        ({"start_rank": 0}, "start_rank >= 1.*got start_rank=0"),
        ({"factor": 1}, "factor >= 2.*factor=1"),
        ({"patience": -1}, "patience >= 0.*patience=-1"),
        ({"force_end_rank_percent": 50}, "share of the steps, 0 to 1; got 50"),
    ],
)
def test_bad_hyperparameters_are_named(settings, message):
    with pytest.raises(LowraError, match=message):
        SpectralDeTuning(**settings)
