"""Which method is better, and whether the draws show it.

Layers of one draw share their models and are not independent; draws are. So methods are compared on the draws and
layers they both have, and the interval of the mean difference comes from a bootstrap over draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd

from lowra.reporting.numbers import count, number
from lowra.reporting.views import LAYER, View

RESAMPLES = 10_000
LEVEL = 0.95
ENOUGH = 4  # draws below which an interval from resampling them says nothing: 3 draws have 10 distinct resamples


@dataclass(frozen=True)
class Comparison:
    """The W-Error of row `a` minus that of row `b`, on the same draws and layers; negative means `a` is better.

    draws, layers: how many were compared. left_out: draws that one of the two failed in or does not have. low, high:
    the 95% interval of the mean difference; NaN where draws are too few.
    """

    a: str
    b: str
    n_loras: int
    difference: float
    low: float
    high: float
    draws: int
    layers: int
    left_out: int

    @property
    def verdict(self) -> str:
        """`a` is "better", "worse", or "no difference shown"; or why nothing is said."""
        if self.draws == 0:
            return "nothing to compare"
        if np.isnan(self.low):
            return f"too few draws ({self.draws})"
        if self.high < 0:
            return "better"
        return "worse" if self.low > 0 else "no difference shown"


def compare(view: View, a: str, b: str, n: int) -> Comparison:
    """Compare two rows of a view at n models, layer by layer within each draw."""
    chosen = view.layers[(view.layers["n_loras"] == n) & view.layers["row"].isin([a, b])]
    wide = chosen.pivot_table(index=["draw", *LAYER], columns="row", values="w_error", dropna=False, aggfunc="mean")
    known = chosen["draw"].nunique()
    if not {a, b} <= set(wide):
        return Comparison(a, b, n, np.nan, np.nan, np.nan, 0, 0, known)
    lost = chosen.loc[chosen["failed"].astype(bool), "draw"].unique()
    wide = wide.replace([np.inf, -np.inf], np.nan)
    unequal = wide.index[wide[[a, b]].isna().any(axis=1)].get_level_values("draw")
    wide = wide[~wide.index.get_level_values("draw").isin({*lost, *unequal})]
    per_draw = (wide[a] - wide[b]).groupby(level="draw").mean().sort_index().to_numpy()
    draws = len(per_draw)
    low, high = interval(per_draw)
    layers = wide.reset_index().drop_duplicates(LAYER).shape[0]
    mean = float(per_draw.mean()) if draws else np.nan
    return Comparison(a, b, n, mean, low, high, draws, layers, known - draws)


def interval(per_draw: np.ndarray) -> tuple[float, float]:
    """The percentile bootstrap's interval of the mean of (draws,) values; NaN for fewer than `ENOUGH` draws."""
    if len(per_draw) < ENOUGH:
        return np.nan, np.nan
    generator = np.random.default_rng(0)  # the interval is part of a report: the same records give the same one
    chosen = generator.integers(0, len(per_draw), (RESAMPLES, len(per_draw)))
    means = per_draw[chosen].mean(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def comparisons(view: View, n: int) -> list[Comparison]:
    """All pairs of a view's rows at n models, in the order of its rows."""
    rows = view.at(n).rows
    return [compare(view, b, a, n) for a, b in combinations(rows, 2)]


def comparison_table(found: list[Comparison]) -> pd.DataFrame:
    """The comparisons as people read them."""
    lines = []
    for each in found:
        between = f"{number(each.low)} to {number(each.high)}" if np.isfinite(each.low) else ""
        line = {
            "method": each.a,
            "against": each.b,
            "n": str(each.n_loras),
            "difference in W-Error": number(each.difference),
            "95% interval": between,
            "verdict": each.verdict,
            "compared": f"{count(each.draws, 'draw')} of {count(each.layers, 'layer')}" if each.draws else "",
            "left out": count(each.left_out, "draw") if each.left_out else "",
        }
        lines.append(line)
    table = pd.DataFrame(lines)
    return table.drop(columns=["left out"]) if len(table) and (table["left out"] == "").all() else table
