"""Merges that are no W + B A: rows or columns rescaled (DoRA, (IA)^3), Kronecker updates (LoKr)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lowra.bench.defences import Noise, Place, Rotation, applied
from lowra.errors import LowraError
from lowra.methods.base import Observation, Recovery
from lowra.methods.subspace_intersection import SubspaceIntersection
from lowra.methods.subspace_intersection.kronecker import by_blocks, from_blocks
from lowra.methods.subspace_intersection.noise import joined, rounding_noise
from lowra.methods.subspace_intersection.noisy import bulk_std, marchenko_pastur
from lowra.methods.subspace_intersection.scales import row_ratio
from lowra.methods.subspace_intersection.unscaled import grid_factors
from lowra.metrics.weight_error import weight_error

BASE_STD = 0.03
FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def draw(generator: torch.Generator, *size: int) -> Tensor:
    return torch.randn(*size, generator=generator, dtype=torch.float64)


def low_rank(generator: torch.Generator, shape: tuple[int, int], rank: int, size: float) -> Tensor:
    """An update (d, k) whose singular values fall to a hundredth, of a root mean square `size` times the base's."""
    d, k = shape
    update = draw(generator, d, rank) * torch.logspace(0, -2, rank, dtype=torch.float64) @ draw(generator, rank, k)
    return update * (size * BASE_STD / update.square().mean().sqrt())


class Dora:
    """Planted merges diag(m_i / |W + M_i|) (W + M_i), the formula of Liu et al. (2024); plain ones where `plain`."""

    def __init__(
        self,
        shape: tuple[int, int] = (160, 192),
        ranks: Sequence[int] = (6, 6, 6),
        *,
        size: float = 0.05,
        moved: float = 0.01,
        grid: str = "bf16",
        plain: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.base = (BASE_STD * draw(generator, *shape)).to(FORMATS[grid]).double()
        merged, scales = [], []
        for i, rank in enumerate(ranks):
            whole = self.base + low_rank(generator, shape, rank, size)
            magnitude = self.base.norm(dim=1) * (1 + moved * draw(generator, shape[0]))
            scale = torch.ones_like(magnitude) if i in plain else magnitude / whole.norm(dim=1)
            merged.append((scale[:, None] * whole).float())
            scales.append(scale)
        self.merged, self.scales = torch.stack(merged), torch.stack(scales)

    def exact(self, recovery: Recovery) -> float:
        return float((recovery.candidates[0] == self.base).double().mean())

    def error(self, recovery: Recovery) -> float:
        return weight_error(recovery.candidates[0], self.base)


def recover(merged: Tensor, rank: int | None = None) -> Recovery:
    return SubspaceIntersection().recover(Observation(merged, rank))


@pytest.mark.parametrize("moved", [1e-3, 0.01, 0.05])
@pytest.mark.parametrize("size", [0.05, 0.3, 1.0])
def test_three_dora_models_give_a_half_precision_base_away(size: float, moved: float) -> None:
    planted = Dora(size=size, moved=moved)
    recovery = recover(planted.merged)
    assert recovery.stats["certificate"] == "certified"
    assert (recovery.stats["scales"], recovery.stats["scales_settled"]) == ("rows", 1.0)
    assert recovery.stats["ranks"] == "6,6,6"
    # A few numbers next to zero have steps below the rounding of the merges; the mask knows them.
    assert planted.exact(recovery) > 0.9999
    assert recovery.sure is not None
    assert recovery.sure.double().mean() > 0.99
    assert bool((recovery.candidates[0] == planted.base)[recovery.sure].all())


def test_float16_bases_are_a_grid_too() -> None:
    planted = Dora(grid="fp16")
    recovery = recover(planted.merged)
    assert (recovery.stats["certificate"], recovery.stats["grid"]) == ("certified", "fp16")
    assert planted.exact(recovery) > 0.999  # its steps are finer, and those near zero finest


def test_mixed_and_granted_ranks() -> None:
    planted = Dora(ranks=(3, 8, 5, 6), size=0.3)
    assert recover(planted.merged).stats["ranks"] == "3,8,5,6"
    assert planted.exact(recover(planted.merged)) > 0.9999
    granted = Dora()
    assert recover(granted.merged, 6).stats["certificate"] == "certified"


def test_without_a_grid_the_base_is_known_up_to_a_scale_per_row() -> None:
    planted = Dora(grid="fp32", moved=0.01)
    recovery = recover(planted.merged)
    assert recovery.stats["certificate"] == "up_to_scale"
    assert recovery.stats["scales_settled"] == 0.0
    assert "up to which W is known" in recovery.status
    estimate = recovery.candidates[0].double()
    factor = (estimate * planted.base).sum(1) / estimate.square().sum(1)
    # Norms moved by a hundredth each, three models: the factors are wrong by 0.01 / sqrt(3).
    assert float((factor - 1).square().mean().sqrt()) == pytest.approx(0.01 / math.sqrt(3), rel=0.3)
    # Beside the factors nothing is left but the rounding of float32, 3e-19 in the mean square: of the merges averaged
    # over three, more of it where updates are, and once more of what is returned.
    assert weight_error(factor[:, None] * estimate, planted.base) < -18.0


def test_two_plain_models_settle_the_scale() -> None:
    planted = Dora(ranks=(6, 6, 6, 6), grid="fp32", size=0.3, plain=(1, 3))
    recovery = recover(planted.merged)
    assert recovery.stats["certificate"] == "certified"
    assert planted.error(recovery) < -18.5


@pytest.mark.parametrize("size", [0.05, 0.3, 1.0])
def test_one_plain_model_is_recognised(size: float) -> None:
    """Nothing proves it, and nothing is certified; the estimate is at the rounding of float32 all the same."""
    planted = Dora(grid="fp32", size=size, plain=(1,))
    recovery = recover(planted.merged)
    assert recovery.stats["certificate"] == "up_to_scale"
    assert "which nothing proves" in recovery.status
    assert planted.error(recovery) < -18.0


def test_columns() -> None:
    planted = Dora((192, 160))
    recovery = recover(planted.merged.mT.contiguous())
    assert (recovery.stats["certificate"], recovery.stats["scales"]) == ("certified", "columns")
    assert bool((recovery.candidates[0].mT == planted.base)[recovery.sure.mT].all())  # type: ignore[union-attr]


def test_scales_without_updates() -> None:
    """(IA)^3: W'_i = diag(c_i) W."""
    planted = Dora()
    generator = torch.Generator().manual_seed(1)
    merged = torch.stack([planted.base * (1 + 0.1 * draw(generator, 160, 1)) for _ in range(3)]).float()
    recovery = recover(merged)
    assert (recovery.stats["certificate"], recovery.stats["scales_settled"]) == ("certified", 1.0)
    assert recovery.stats["ranks"] == "0,0,0"
    assert planted.exact(recovery) > 0.9999
    finer = Dora(grid="fp32").base
    for n in (3, 5):
        merged = torch.stack([finer * (1 + 0.1 * draw(generator, 160, 1)) for _ in range(n)]).float()
        assert recover(merged).stats["certificate"] == "up_to_scale"


def test_a_row_is_found_on_its_grid_though_its_largest_numbers_are_few() -> None:
    """3 / 32 and three times 1 / 16: a third of all factors leave these on the grid."""
    generator = torch.Generator().manual_seed(0)
    row = (BASE_STD / 3 * draw(generator, 256)).bfloat16().double()
    row[:4] = torch.tensor([0.09375, 0.0625, 0.0625, 0.0625])
    rounding = 1e-9 * draw(generator, 256)
    found, sure, _ = grid_factors((row / 0.9926 + rounding)[None], torch.ones(1), 1e-9, torch.float32, torch.bfloat16)
    assert bool(sure)
    # The largest numbers tell it to their rounding.
    assert float(found) == pytest.approx(0.9926, rel=1e-7)


def test_what_is_called_sure_is_exact_where_few_rows_are() -> None:
    """Scales of a quarter leave most octaves open: the layer as a whole is on no grid then, the sure rows are."""
    planted = Dora()
    generator = torch.Generator().manual_seed(2)
    merged = torch.stack([planted.base * (0.25 * draw(generator, 160, 1)).exp() for _ in range(3)]).float()
    recovery = recover(merged)
    assert (recovery.stats["certificate"], recovery.stats["grid"]) == ("up_to_scale", "fp32")
    settled = recovery.stats["scales_settled"]
    assert isinstance(settled, float)
    assert 0 < settled < 0.5
    assert recovery.sure is not None
    assert recovery.sure.double().mean() > 0.9 * settled
    assert bool((recovery.candidates[0] == planted.base)[recovery.sure].all())


def test_strangers_are_told_from_scaled_siblings() -> None:
    planted, other = Dora(ranks=(6,) * 4), Dora(seed=5)
    merged = torch.cat([planted.merged[:2], other.merged[:1], planted.merged[2:]])
    recovery = recover(merged)
    assert recovery.stats["outlier"] == "2"
    assert "another base" in recovery.status
    assert planted.exact(recovery) > 0.9999


def test_plain_merges_pay_no_attention_to_scales() -> None:
    planted = Dora(plain=(0, 1, 2))
    recovery = recover(planted.merged)
    assert (recovery.stats["certificate"], recovery.stats["scales"]) == ("certified", "")
    assert recovery.stats["scales_settled"] is None


@pytest.mark.parametrize("made", ["unrelated", "full fine-tune", "permuted"])
def test_what_no_scale_explains(made: str) -> None:
    generator = torch.Generator().manual_seed(2)
    base = BASE_STD * draw(generator, 96, 128)
    changes: dict[str, Callable[[], Tensor]] = {
        "unrelated": lambda: BASE_STD * draw(generator, 96, 128),
        "full fine-tune": lambda: base + 0.01 * BASE_STD * draw(generator, 96, 128),
        "permuted": lambda: base[torch.randperm(96, generator=generator)],
    }
    recovery = recover(torch.stack([changes[made]().float() for _ in range(3)]))
    assert recovery.stats["certificate"] == "not_identifiable"
    assert recovery.stats["scales"] == recovery.stats["blocks"] == ""


@pytest.mark.parametrize(("shape", "rank"), [((96, 64), 3), ((160, 192), 10), ((64, 96), 3)])
def test_ratios_are_found_to_the_rounding(shape: tuple[int, int], rank: int) -> None:
    for seed in range(5):
        planted = Dora(shape, (rank, rank), size=0.3, moved=0.05, seed=seed)
        first, second = planted.merged
        noise = joined(*(rounding_noise(one, torch.float32) for one in (first, second)))
        ratio = row_ratio(second, first, noise, torch.Generator().manual_seed(0))
        assert ratio is not None
        error = (ratio.values / (planted.scales[1] / planted.scales[0]) - 1).abs()
        # The rounding of a row is 2^-25 of its numbers, and averaged over sqrt(k) of them; the worst of a hundred rows.
        assert float(error.max()) < 12 * 2**-25 / math.sqrt(shape[1] - 2 * rank)


# ---- Kronecker updates ------------------------------------------------------------------------------------------


def lokr(shape: tuple[int, int], blocks: tuple[int, int], rank: int, grid: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A base (d, k) and three merges with w1 (x) w2, w2 of a rank: full rank as they stand where it is large."""
    generator = torch.Generator().manual_seed(seed)
    (d, k), (p, q) = shape, blocks
    base = (BASE_STD * draw(generator, d, k)).to(FORMATS[grid]).double()
    merged = []
    for _ in range(3):
        inner = draw(generator, d // p, rank) @ draw(generator, rank, k // q)
        update = torch.kron(draw(generator, p, q), inner)
        merged.append(base + update * (0.05 * BASE_STD / update.square().mean().sqrt()))
    return base, torch.stack(merged).float()


@pytest.mark.parametrize(
    ("shape", "blocks", "rank"), [((128, 128), (8, 8), 16), ((96, 192), (4, 16), 12), ((160, 96), (16, 4), 10)]
)
def test_kronecker_updates_at_the_floor(shape: tuple[int, int], blocks: tuple[int, int], rank: int) -> None:
    base, merged = lokr(shape, blocks, rank, "fp32")
    recovery = recover(merged, 8)  # the rank granted is not one of the rearranged updates
    assert (recovery.stats["certificate"], recovery.stats["blocks"]) == ("certified", f"{blocks[0]}x{blocks[1]}")
    assert recovery.stats["ranks"] == "1,1,1"
    # Rounding of float32 at 0.03, mean square 5e-19, over three models, and little more where updates share rows.
    assert weight_error(recovery.candidates[0], base) < -18.5


def test_kronecker_updates_of_a_half_precision_base() -> None:
    base, merged = lokr((128, 128), (8, 8), 16, "bf16")
    recovery = recover(merged)
    assert recovery.stats["certificate"] == "certified"
    assert float((recovery.candidates[0] == base).double().mean()) > 0.9999


def test_blocks_and_back() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = draw(generator, 4, 6), draw(generator, 5, 7)
    whole = torch.kron(first, second)
    rows = by_blocks(whole, 4, 6)
    torch.testing.assert_close(rows, first.flatten()[:, None] * second.flatten())
    assert torch.equal(from_blocks(rows, 4, 6, 20, 42), whole)


# ---- Noise beyond the rounding of the format --------------------------------------------------------------------


def in_float32(kind: str, shape: tuple[int, int], rank: int, size: float, grid: str) -> tuple[Tensor, Tensor]:
    """A base (d, k) and three merges (3, d, k) summed in float32, as libraries do: B A alone errs by several ulps."""
    generator = torch.Generator().manual_seed(0)
    d, k = shape
    base = (BASE_STD * torch.randn(d, k, generator=generator)).to(FORMATS[grid]).float()
    merged = []
    for _ in range(3):
        left = torch.randn(d, rank, generator=generator) * torch.logspace(0, -1, rank)
        right = torch.randn(rank, k, generator=generator)
        left *= size * BASE_STD / (left @ right).square().mean().sqrt()
        whole = base + left @ right
        if kind == "dora":
            whole *= (base.norm(dim=1) * (0.98 + 0.04 * torch.rand(d, generator=generator)) / whole.norm(dim=1))[
                :, None
            ]
        merged.append(whole)
    return base, torch.stack(merged)


@pytest.mark.parametrize("size", [0.3, 1.0])
@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_updates_as_large_as_the_weights_summed_in_float32(kind: str, size: float) -> None:
    base, merged = in_float32(kind, (320, 384), 16, size, "bf16")
    recovery = recover(merged)
    assert recovery.stats["ranks"] == "16,16,16"
    assert recovery.stats["certificate"] in ("certified", "up_to_scale")  # where the norm of a row has grown by half
    assert recovery.stats["scales"] == ("rows" if kind == "dora" else "")
    same = recovery.candidates[0] == base
    if recovery.stats["certificate"] == "certified":
        assert float(same.double().mean()) > 0.9999
    else:
        assert recovery.sure is not None
        assert float(recovery.sure.double().mean()) > 0.95
        assert float(same[recovery.sure].double().mean()) > 0.9999


def test_what_sums_in_float32_err_by_is_predicted() -> None:
    base, merged = in_float32("plain", (320, 384), 16, 1.0, "fp32")
    recovery = recover(merged)
    assert recovery.stats["certificate"] == "certified"
    error = weight_error(recovery.candidates[0], base)
    assert error == pytest.approx(recovery.stats["predicted_w_error"], abs=0.2)  # the noise is told to some percent
    assert error == pytest.approx(recovery.stats["expected_w_error"], abs=0.2)  # no gain by weighing entries
    alone = rounding_noise(merged[0], torch.float32).std
    assert error > 2 * math.log10(alone) - math.log10(3) + 0.5  # well above the rounding of the format


def test_another_base_is_no_noise_of_sums() -> None:
    _, merged = in_float32("plain", (160, 192), 4, 1.0, "bf16")
    stranger = merged.mean(0) + 3e-6 * torch.randn(160, 192, generator=torch.Generator().manual_seed(9))
    recovery = recover(torch.cat([merged, stranger[None]]))
    assert recovery.stats["outlier"] == "3" or recovery.stats["certificate"] != "certified"


@pytest.mark.parametrize("size", [1e-4, 1e-3])
def test_noise_is_averaged_and_nothing_certified(size: float) -> None:
    planted = Dora(plain=(0, 1, 2), grid="fp32")
    merged = applied(Noise(size), planted.merged, "layer", (0, 1, 2), 0)
    recovery = recover(merged)
    assert recovery.stats["certificate"] == "uncertified"
    assert "noise" in recovery.status
    floor = 2 * math.log10(size * BASE_STD) - math.log10(3)
    # Where updates are, fewer models see a weight: a quarter of a decade for ranks of 18 in 160.
    assert floor - 0.1 < planted.error(recovery) < floor + 0.25
    assert recovery.stats["predicted_w_error"] == pytest.approx(planted.error(recovery), abs=0.1)


def test_full_fine_tunes_are_not_taken_for_noise() -> None:
    generator = torch.Generator().manual_seed(3)
    base = BASE_STD * draw(generator, 128, 128)
    merged = torch.stack([base + 0.02 * BASE_STD * draw(generator, 128, 128) for _ in range(3)]).float()
    recovery = recover(merged)
    assert recovery.stats["certificate"] == "not_identifiable"
    assert weight_error(recovery.candidates[0], base) <= weight_error(merged.double().mean(0), base) + 0.01


@pytest.mark.parametrize("ratio", [0.2, 0.6, 1.0])
def test_quantiles_of_the_singular_values_of_noise(ratio: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, shares = 600, (0.2, 0.5, 0.8)
    values = torch.linalg.svdvals(draw(generator, rows, int(ratio * rows))).square() / rows
    expected = torch.quantile(values, torch.tensor(shares, dtype=values.dtype))
    torch.testing.assert_close(marchenko_pastur(ratio, shares), expected, rtol=0.03, atol=1e-3)  # finite size


def test_the_noise_is_measured_beside_a_signal() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 1e-3 * draw(generator, 100, 80)
    for rank in (0, 5, 20):
        assert bulk_std(noise + low_rank(generator, (100, 80), rank or 1, rank / 5), 0 * noise) == pytest.approx(
            1e-3, rel=0.05
        )
    falling = draw(generator, 80, 80) * torch.logspace(0, -3, 80, dtype=torch.float64)
    assert bulk_std(falling @ draw(generator, 80, 80), 0 * falling) is None


# ---- Updates that were not started at zero ----------------------------------------------------------------------


def started(init: str, shape: tuple[int, int], drift: float, grid: str = "fp32") -> tuple[Tensor, Tensor]:
    """A base (d, k) and three merges W - B_0 A_0 + B A with B, A changed by `drift` times B_0 and A_0, of rank 6."""
    generator = torch.Generator().manual_seed(0)
    rank = 6
    base = BASE_STD * draw(generator, *shape) + low_rank(generator, shape, 20, 1.0)
    base = base.to(FORMATS[grid]).double()
    if init == "pissa":
        u, s, vt = torch.linalg.svd(base, full_matrices=False)
        left, right = u[:, :rank] * s[:rank].sqrt(), s[:rank, None].sqrt() * vt[:rank]
    elif init == "olora":
        q, r = torch.linalg.qr(base)
        left, right = q[:, :rank], r[:rank]
    else:
        left, right = 0.1 * draw(generator, shape[0], rank), 0.1 * draw(generator, rank, shape[1])
    rest = (base - left @ right).to(FORMATS[grid]).double()
    merged = []
    for _ in range(3):
        b = left + drift * left.square().mean().sqrt() * draw(generator, *left.shape)
        a = right + drift * right.square().mean().sqrt() * draw(generator, *right.shape)
        merged.append(rest + b @ a)
    return base, torch.stack(merged).float()


@pytest.mark.parametrize("shape", [(128, 128), (96, 160), (160, 96)])
@pytest.mark.parametrize("drift", [0.1, 0.5])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_part_taken_out_of_the_base_is_noticed_and_put_back(init: str, drift: float, shape: tuple[int, int]) -> None:
    base, merged = started(init, shape, drift)
    recovery = recover(merged)
    assert recovery.stats["certificate"] == "uncertified"
    assert "PiSSA" in recovery.status
    # Not exact: the changes are in it where they have room. Better than their mean all the same.
    gained = weight_error(merged.double().mean(0), base) - weight_error(recovery.candidates[0], base)
    assert gained > (0.4 if init == "pissa" else 0.1)


def test_a_part_taken_out_of_a_bfloat16_base_is_noticed() -> None:
    base, merged = started("pissa", (96, 160), 0.3, "bf16")
    recovery = recover(merged)
    assert "PiSSA" in recovery.status
    assert weight_error(recovery.candidates[0], base) < weight_error(merged.double().mean(0), base)


def test_updates_with_a_common_start_are_not_certified() -> None:
    merged = started("other", (128, 128), 0.1)[1]
    recovery = recover(merged)
    assert recovery.stats["certificate"] in ("shared", "weak", "not_identifiable")
    assert recovery.stats["certificate"] != "shared" or "common start" in recovery.status


def test_a_base_with_dead_rows_is_no_part_taken_out() -> None:
    planted = Dora(plain=(0, 1, 2), grid="fp32", size=0.05)
    generator = torch.Generator().manual_seed(0)
    base = BASE_STD * draw(generator, 96, 128)
    base[:8] = 0
    merged = torch.stack([base + low_rank(generator, (96, 128), 6, 0.05) for _ in range(3)]).float()
    assert recover(merged).stats["certificate"] == recover(planted.merged).stats["certificate"] == "certified"


# ---- Heads that were rotated ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.05, 0.3])
def test_rotated_heads_are_turned_into_one_frame(size: float) -> None:
    planted = Dora((96, 128), (4, 4, 4), size=size, grid="fp32", plain=(0, 1, 2))
    defence = Rotation(4)
    merged = applied(defence, planted.merged, "0.query.weight", (0, 1, 2), 0)
    assert recover(merged).stats["certificate"] == "not_identifiable"
    recovery = SubspaceIntersection(heads=4).recover(Observation(merged))
    assert (recovery.stats["certificate"], recovery.stats["scales"]) == ("up_to_rotation", "heads")
    frame = defence.release(planted.base.float(), Place("0.query.weight", 0, 0))  # of the first release
    # The rounding of float32 three times over: of the merge, of its rotation, and of the frame compared with.
    assert weight_error(recovery.candidates[0], frame.double()) < -17.5


def test_heads_are_not_thought_of_where_nothing_was_rotated() -> None:
    planted = Dora((96, 128), (4, 4, 4), plain=(0, 1, 2))
    assert SubspaceIntersection(heads=4).recover(Observation(planted.merged)).stats["certificate"] == "certified"
    other = Dora((96, 128), (4, 4, 4), seed=8)
    strangers = torch.cat([planted.merged[:1], other.merged[:1], Dora((96, 128), seed=9).merged[:1]])
    assert SubspaceIntersection(heads=4).recover(Observation(strangers)).stats["certificate"] == "not_identifiable"
    with pytest.raises(LowraError, match="number of attention heads"):
        SubspaceIntersection(heads=0)
