from __future__ import annotations

import math

import pytest
import torch
from conftest import KINDS_PLANTED, planted_kinds, planted_layers

from lowra.bench.merging import merge
from lowra.metrics.weight_error import EXACT, exact_fraction, floor_error, weight_error


def test_w_error_is_the_log_of_the_mean_square() -> None:
    weight = torch.randn(50, 30)
    noise = torch.randn(50, 30) * 1e-3
    moved = weight.double() + noise.double()
    # float64 throughout, so only its summation order differs: 1e-12 is generous.
    assert weight_error(moved, weight) == pytest.approx(math.log10(noise.double().square().mean().item()), abs=1e-9)


def test_small_errors_survive_large_weights() -> None:
    weight = torch.full((10, 10), 1e3)
    assert weight_error(weight.double() + 1e-9, weight) == pytest.approx(-18, abs=1e-3)  # 1e3 + 1e-9 in float64


def test_exact_recovery_counts_as_float64_epsilon_squared() -> None:
    weight = torch.randn(4, 4)
    assert weight_error(weight, weight) == EXACT == math.log10(2.0**-104)


def test_recovery_that_is_not_finite() -> None:
    assert weight_error(torch.tensor([[math.nan]]), torch.zeros(1, 1)) == math.inf


def test_large_layers_are_summed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(37, 11), torch.randn(37, 11)
    whole = weight_error(a, b)
    monkeypatch.setattr("lowra.metrics.weight_error._CHUNK", 100)
    assert weight_error(a, b) == pytest.approx(whole, abs=1e-12)


def test_exact_fraction_is_bit_for_bit() -> None:
    weight = torch.tensor([[1.0, 2.0, 0.0, 3.0]])
    found = torch.tensor([[1.0, 2.0 + 2**-22, -0.0, 3.0]], dtype=torch.float64)
    assert exact_fraction(found, weight) == 0.5


def test_the_floor_is_the_rounding_of_the_merge() -> None:
    (layer,) = planted_layers(layers=1, models=4)
    stack = merge(layer)
    floor = floor_error(stack, layer)
    # Entries around 0.05 round with a standard deviation near 2^-29 / sqrt(12), over four models.
    assert -19.5 < floor < -17.5
    exact = torch.stack(
        [layer.weight.double() + lora.scale * lora.B.double() @ lora.A.double() for lora in layer.loras]
    )
    assert floor_error(exact, layer) < -31
    assert floor_error(merge(layer, torch.bfloat16), layer) > floor + 4


@pytest.mark.parametrize("kind", KINDS_PLANTED)
def test_the_floor_of_every_kind_is_rounding(kind: str) -> None:
    (layer,) = planted_kinds((kind,) * 4, layers=1)
    exact = torch.stack([update.apply(layer.weight.double()) for update in layer.loras])
    assert floor_error(exact, layer) < -28  # float64 all the way
    floor = floor_error(merge(layer), layer)
    # Merged entries up to about 2 round with 2^-25 / sqrt(3) or less, and scales of 1.3 and more divide that again.
    assert -20 < floor < -14
    assert floor_error(merge(layer, torch.bfloat16), layer) > floor + 4
    assert floor_error(merge(layer) + 1e-3, layer) > -8  # what is not the update's stays


def test_the_floor_of_mixed_kinds_is_that_of_their_mean() -> None:
    (layer,) = planted_kinds(("lora", "full"), layers=1)
    stack = merge(layer)
    rest = stack.double() - torch.stack([update.delta(torch.float64) for update in layer.loras])
    assert floor_error(stack, layer) == pytest.approx(weight_error(rest.mean(0), layer.weight), abs=1e-9)


def test_a_float64_recovery_is_left_as_it_is() -> None:
    recovered = torch.randn(20, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before, weight = recovered.clone(), torch.zeros(20, 30)
    assert weight_error(recovered, weight) == pytest.approx(math.log10(float(before.square().mean())))
    assert torch.equal(recovered, before)
