"""What scripts/half_precision.py sets beside the methods: bounds that know more than anybody can."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from scripts_as_modules import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("half_precision")


@pytest.mark.parametrize(
    ("base", "merges", "mu"),
    [("bf16", "bf16", 20.0), ("fp16", "fp16", 300.0), ("bf16", "fp16", 3000.0), ("fp16", "bf16", 20.0)],
)
def test_the_share_of_who_knows_the_updates_is_that_of_trying_all_numbers(
    script: ModuleType, base: str, merges: str, mu: float
) -> None:
    case = script.Case("sizes", (12, 8), (2, 2, 2), mu, base=base, merges=(merges,))
    layer = script.planted(case, 1)
    grid, format_ = script.DTYPES[base], script.DTYPES[merges]
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(grid)
    numbers = numbers[numbers.isfinite()].double().unique()
    # Of the numbers that all three merges can come from, each is as likely as what is rounded to it is wide.
    width = torch.zeros_like(numbers)
    width[1:-1] = (numbers[2:] - numbers[:-2]) / 2
    shares = []
    for i in range(12):
        for j in range(8):
            merged = [(numbers + update[i, j].double()).to(format_) == layer.stack[m, i, j].to(format_)
                      for m, update in enumerate(layer.updates)]  # fmt: skip
            found = width[torch.stack(merged).all(0)]
            shares.append(float(found.max() / found.sum()) if len(found) else 1.0)
    assert min(shares) < 0.9  # some weights stay open
    # torch rounds float64 to half precision by way of float32, which may move a number at the edge of a cell.
    assert script.share_of_known(case, layer) == pytest.approx(sum(shares) / len(shares), abs=2e-3)


def test_begun_at_the_true_updates_ours_stays_below_who_knows_them(script: ModuleType) -> None:
    case = script.Case("phase", (96, 96), (3, 3, 3), 4.0)
    layer = script.planted(case, 0)
    share = float((script.from_truth(case, layer) == layer.weight).double().mean())
    assert 0.95 < share < script.share_of_known(case, layer) < 1.0
