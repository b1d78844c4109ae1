from __future__ import annotations

import pytest
import torch

from lowra.bench.updates import Update
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
    with pytest.raises(LowraError, match="Unknown kind of update 'dora'; known: lora, rslora"):
        update(kind="dora")


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
