from __future__ import annotations

import pytest

from lowra.bench.draws import Draw, draws, parse
from lowra.errors import LowraError


def test_draws_are_these_on_every_machine() -> None:
    # Written down once: a library or a refactoring that changes them would change every published number.
    assert [d.models for d in draws("vit", 15, 5, 3, seed=0)] == [(2, 3, 5, 6, 7), (3, 5, 12, 13, 14), (0, 1, 3, 7, 10)]


def test_draws_are_without_replacement_and_differ() -> None:
    found = draws("vit", 15, 5, 10, seed=0)
    assert all(len(set(d.models)) == 5 and d.models == tuple(sorted(d.models)) for d in found)
    assert len({d.models for d in found}) > 5
    assert found != draws("vit", 15, 5, 10, seed=1)


def test_every_model_is_as_likely() -> None:
    counts = [0] * 15
    for d in draws("vit", 15, 5, 3000, seed=0):
        for m in d.models:
            counts[m] += 1
    # 1000 expected each, standard deviation sqrt(3000 * 1/3 * 2/3) = 26: five of them.
    assert all(abs(c - 1000) < 130 for c in counts)


def test_a_sweep_adds_models() -> None:
    for small, large in zip(draws("vit", 15, 3, 5, 0), draws("vit", 15, 8, 5, 0), strict=True):
        assert set(small.models) < set(large.models)


def test_a_draw_prints_and_parses() -> None:
    draw = Draw("mistral_sft", 3, (0, 4, 7))
    assert str(draw) == "mistral_sft/L03/t03"
    assert parse(str(draw)) == ("mistral_sft", 3, 3)
    with pytest.raises(LowraError, match="names no draw"):
        parse("vit/5/3")


@pytest.mark.parametrize(("n", "message"), [(1, "needs at least 2"), (16, "has 15 models; ask for 2 to 15")])
def test_impossible_numbers(n: int, message: str) -> None:
    with pytest.raises(LowraError, match=message):
        draws("vit", 15, n, 1, 0)
