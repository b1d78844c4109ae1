"""Methods compared on the same draws and layers."""

from __future__ import annotations

import numpy as np
import pytest

from lowra.reporting.statistics import compare, comparison_table, comparisons, interval
from lowra.reporting.views import View, views
from tests.reporting import fakes


def view(shift: float, noise: float, trials: int = 10, **changes: object) -> View:
    """Two methods whose draws differ a lot and whose differences are `shift`, give or take `noise` a draw."""
    generator = np.random.default_rng(0)
    easy = generator.normal(0, 3, trials)
    layers = []
    for method, label in (("a", "A"), ("b", "B")):
        for row in fakes.rows(method, label, -5.0, trials=trials):
            row["w_error"] = -5.0 + easy[row["trial"]] - row["depth"]
            if method == "b":
                row["w_error"] += shift + noise * generator.normal()
            layers.append(row)
    (found,) = views(fakes.records(layers, score=None))
    return found


def test_a_small_steady_difference_is_seen_through_draws_that_differ_a_lot() -> None:
    each = compare(view(-0.2, 0.05), "B", "A", 5)
    assert each.verdict == "better"
    assert each.low < -0.2 < each.high < 0
    assert (each.draws, each.layers, each.left_out) == (10, 2, 0)
    assert compare(view(-0.2, 0.05), "A", "B", 5).verdict == "worse"


def test_noise_is_no_difference() -> None:
    assert compare(view(0.0, 0.5), "B", "A", 5).verdict == "no difference shown"


def test_few_draws_give_no_verdict() -> None:
    assert compare(view(-9.0, 0.0, trials=2), "B", "A", 5).verdict == "too few draws (2)"


def test_failed_draws_are_left_out_of_both_and_counted() -> None:
    layers = fakes.rows("a", "A", -5.0, trials=6) + fakes.rows("b", "B", -7.0, trials=6)
    layers[0] |= {"failed": True, "w_error": np.nan}
    layers.pop()  # and one that B does not have
    (found,) = views(fakes.records(layers, score=None))
    each = compare(found, "B", "A", 5)
    assert (each.draws, each.left_out) == (4, 2)
    assert each.difference == -2.0
    table = comparison_table(comparisons(found, 5))
    assert table.loc[0, "left out"] == "2 draws"
    assert table.loc[0, "verdict"] == "better"


def test_a_method_that_is_not_there() -> None:
    layers = fakes.rows("a", "A", -5.0) + fakes.rows("b", "B", -7.0, failed=True)
    (found,) = views(fakes.records(layers, score=None))
    assert compare(found, "B", "A", 5).verdict == "nothing to compare"


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        low, high = interval(generator.normal(1.0, 1.0, 10))
        hits += low < 1.0 < high
    # The percentile bootstrap of 10 values is known to be a little narrow: about 90% for the 95% asked for.
    assert hits / 200 == pytest.approx(0.91, abs=0.06)
