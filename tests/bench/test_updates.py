from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import KINDS_PLANTED, planted_update

from lowra.bench.updates import KINDS, Update, lora
from lowra.errors import LowraError


def update(**changes: object) -> Update:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 30, generator=generator), torch.randn(20, 4, generator=generator)
    return Update(**{"name": "x", "rank": 4, "alpha": 6.0, "A": a, "B": b} | changes)  # type: ignore[arg-type]


def test_apply_is_the_merge_of_the_committed_results() -> None:
    # The operations, in their order, that made every committed number: mm, then the scale, then W.
    made, weight = update(), torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    expected = torch.mm(made.B, made.A).mul_(6 / 4).add_(weight)
    assert torch.equal(made.apply(weight), expected)
    out = torch.empty(20, 30)
    assert made.apply(weight, out=out) is out
    assert torch.equal(out, expected)


def test_scales_of_both_kinds() -> None:
    assert update().scale == 6 / 4
    stabilised = update(kind="rslora")
    assert stabilised.scale == pytest.approx(6 / 4**0.5)
    assert stabilised.lora_alpha / stabilised.rank == stabilised.scale
    assert torch.allclose(stabilised.delta(), 2 * update().delta())
    with pytest.raises(LowraError, match="Unknown kind of update 'boft'; known: dora, full, ia3, loha, lokr, lora, o"):
        update(kind="boft")


def test_delta_is_computed_in_float32_or_better() -> None:
    made = update()
    exact = (made.B.double() @ made.A.double()) * 1.5
    assert torch.equal(made.delta(torch.float64), exact)
    # Sums of four products near 1: a few roundings of 2^-24 relative to the largest.
    assert (made.delta().double() - exact).abs().max() < 2**-21 * exact.abs().max()
    assert torch.equal(made.delta(torch.bfloat16), made.delta().bfloat16())


@pytest.mark.parametrize("rank", [0, -1, 1.5, "4", None, [4], float("nan"), 10**400, True])
def test_ranks_that_are_none(rank: object) -> None:
    with pytest.raises(LowraError, match=r"The rank of LoRA 'x' is .*; expected a whole number, 1 or more"):
        update(rank=rank)


@pytest.mark.parametrize("alpha", ["4", None, [4.0], float("nan"), float("inf"), 1e300, 10**400, False])
def test_alphas_that_are_none(alpha: object) -> None:
    with pytest.raises(LowraError, match=r"The alpha of LoRA 'x' is .*; expected a finite number"):
        update(alpha=alpha)


# ---- Other kinds ------------------------------------------------------------------------------------------------

D, K = 12, 8


def by_hand(made: Update, weight: torch.Tensor) -> np.ndarray:
    """W' by the papers' formulas, in NumPy's float64 and entry by entry where that is how they are written."""
    w = weight.double().numpy()
    t = {name: tensor.double().numpy() for name, tensor in made.tensors.items()}
    if made.kind in ("lora", "rslora", "dora"):
        root = made.rank**0.5 if made.kind == "rslora" else made.rank
        moved = w + made.alpha / root * made.B.double().numpy() @ made.A.double().numpy()
        if made.kind != "dora":
            return moved
        m = t["magnitude"]
        if m.shape[1] == 1:
            return np.stack([m[i, 0] / np.sqrt((row**2).sum()) * row for i, row in enumerate(moved)])
        return np.stack([m[0, j] / np.sqrt((x**2).sum()) * x for j, x in enumerate(moved.T)], axis=1)
    if made.kind == "ia3":
        c = t["scale"]
        return np.diag(c[:, 0]) @ w if c.shape[1] == 1 else w @ np.diag(c[0])
    if made.kind == "oft":
        ((name, stacked),) = t.items()
        size = stacked.shape[1]
        rotation = np.zeros((len(stacked), len(stacked)))
        for i in range(0, len(stacked), size):
            rotation[i : i + size, i : i + size] = stacked[i : i + size]
        return w @ rotation if name == "input_blocks" else rotation @ w
    result = w.copy()
    for i in range(D):
        for j in range(K):
            if made.kind == "loha":
                result[i, j] += (t["w1_a"][i] @ t["w1_b"][:, j]) * (t["w2_a"][i] @ t["w2_b"][:, j])
            elif made.kind == "lokr":
                q, q_ = t["w2"].shape
                result[i, j] += t["w1"][i // q, j // q_] * t["w2"][i % q, j % q_]
            else:
                result[i, j] += t["difference"][i, j]
    return result


@pytest.mark.parametrize("kind", KINDS_PLANTED)
def test_every_kind_merges_by_its_formula(kind: str) -> None:
    made, weight = planted_update(kind, D, K), torch.randn(D, K, generator=torch.Generator().manual_seed(1))
    expected = by_hand(made, weight)
    found = made.apply(weight)
    assert found.dtype == torch.float32
    largest = np.abs(expected).max()
    # Sums of up to a dozen products in float32: a few roundings of 2^-24 of the largest entry.
    assert np.abs(found.double().numpy() - expected).max() < 1e-6 * largest
    assert np.abs(made.apply(weight.double()).numpy() - expected).max() < 1e-13 * largest
    out = torch.empty(D, K)
    assert made.apply(weight, out=out) is out
    assert torch.equal(out, found)
    change = made.difference(weight, torch.float64).numpy()
    assert np.abs(change - (expected - weight.double().numpy())).max() < 1e-13 * largest
    before = {name: tensor.clone() for name, tensor in made.tensors.items()}
    made.difference(weight).add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.tensors.items())


@pytest.mark.parametrize("kind", KINDS_PLANTED)
def test_what_was_done_is_undone_and_turned(kind: str) -> None:
    made, weight = planted_update(kind, D, K), torch.randn(D, K, generator=torch.Generator().manual_seed(1))
    back = made.undo(made.apply(weight.double()), weight)
    assert (back - weight.double()).abs().max() < 1e-12  # float64; the worst-conditioned scale planted is near .3
    turned = made.T
    assert turned.misfit(K, D) is None
    assert torch.allclose(turned.apply(weight.mT), made.apply(weight).mT, atol=1e-5)
    assert not made.idle
    assert made.limit(D, K) == (made.rank if made.factors else min(made.rank or K, K))


def test_the_planted_kinds_are_all_there_are() -> None:
    assert {kind.split()[0] for kind in KINDS_PLANTED} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS_PLANTED)
def test_layers_of_another_shape_are_misfits(kind: str) -> None:
    made = planted_update(kind, D, K)
    assert made.misfit(D, K) is None
    assert made.misfit(K + 1, D + 2) is not None


def test_kronecker_factors_that_do_not_multiply_to_the_layer() -> None:
    made = Update.of("x", "lokr", {"w1": torch.ones(3, 2), "w2": torch.ones(5, 4)})
    assert made.misfit(15, 8) is None
    assert made.misfit(D, K) == (
        "with w1 (3, 2), w2 (5, 4), where LoKr has w1 (p, p'), w2 (q, q') with p q = d and p' q' = k"
    )


@pytest.mark.parametrize(
    ("kind", "tensors", "message"),
    [
        ("dora", {}, r"The DoRA update 'x' holds no tensors beside A and B; expected .*magnitude \(d, 1\)"),
        ("lokr", {"w1": torch.ones(2, 2)}, r"The LoKr update 'x' holds w1 \(2, 2\) beside"),
        ("oft", {"blocks": torch.ones(2, 2)}, r"expected input_blocks \(k, b\) or output_blocks \(d, b\)"),
        ("lora", {"magnitude": torch.ones(2, 1)}, r"The LoRA update 'x' holds magnitude"),
    ],
)
def test_tensors_that_are_not_the_kinds(kind: str, tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(LowraError, match=message):
        update(kind=kind, tensors=tensors)


def test_updates_that_were_never_trained_are_idle() -> None:
    eye = torch.eye(4).repeat(D // 4, 1)
    assert Update.of("x", "ia3", {"scale": torch.ones(D, 1)}).idle
    assert Update.of("x", "oft", {"output_blocks": eye}).idle
    assert not Update.of("x", "oft", {"output_blocks": 1.001 * eye}).idle
    assert Update.of("x", "lokr", {"w1": torch.zeros(3, 2), "w2": torch.ones(4, 4)}).idle
    assert Update.of("x", "full", {"difference": torch.zeros(D, K)}).idle
    assert update(B=torch.zeros(20, 4)).idle
    assert update(alpha=0).idle


@pytest.mark.parametrize("kind", ["ia3", "oft"])
def test_kinds_that_multiply_have_no_part_that_is_added(kind: str) -> None:
    with pytest.raises(LowraError, match="multiplies the weight and adds nothing to it"):
        planted_update(kind, D, K).delta()


def test_factors_of_a_rank_above_the_layers_are_multiplied_out() -> None:
    generator = torch.Generator().manual_seed(2)
    for d, k in ((5, 9), (9, 5)):
        a, b = torch.randn(20, k, generator=generator), torch.randn(d, 20, generator=generator)
        made = lora("x", a, b, scale=0.3)
        assert (made.rank, made.misfit(d, k)) == (5, None)
        assert torch.allclose(made.delta(), 0.3 * b @ a, atol=1e-5)


def test_the_part_taken_out_of_the_base_first_is_part_of_the_update() -> None:
    made = update()
    a0, b0 = torch.ones(4, 30), torch.ones(20, 4)
    whole = made.less(a0, b0)
    assert whole.rank == 8
    weight = torch.zeros(20, 30)
    assert torch.allclose(whole.apply(weight), made.scale * (made.B @ made.A - b0 @ a0), atol=1e-5)
