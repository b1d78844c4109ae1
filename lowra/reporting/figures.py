"""Figures from records, for where people would rather look than read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from lowra.metrics.weight_error import EXACT
from lowra.reporting.results import Results

_STYLE: Any = {"figure.dpi": 130, "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}


def _save(path: Path) -> Path:
    plt.tight_layout()
    temporary = path.with_name(f".{path.name}")
    plt.savefig(temporary, format="png")
    plt.close()
    temporary.replace(path)
    return path


def _mark(results: Results) -> str:
    return f"{results.title}, source={results.run['source']}"


def cumulative(results: Results, path: Path) -> Path:
    """The share of layers a method recovers to a given W-Error or better (the form of Fig. 6), for the largest n."""
    n = results.layers["n_loras"].max()
    plt.figure(figsize=(6, 3.2))
    for method in results.methods:
        chosen = results.layers[(results.layers["method"] == method) & (results.layers["n_loras"] == n)]
        errors = np.sort(chosen["w_error"].dropna().to_numpy())
        if len(errors):
            plt.step(
                errors, 100 * np.arange(1, len(errors) + 1) / len(errors), where="post", label=results.pretty(method)
            )
    plt.xlabel("W-Error of a layer (log10 MSE; further left is better)")
    plt.ylabel("layers at least this good (%)")
    plt.title(f"{_mark(results)}, n = {n}")
    plt.legend(frameon=False)
    return _save(path)


def by_models(results: Results, path: Path) -> Path | None:
    """W-Error against the number of models (the form of Fig. 7); None without a sweep."""
    if results.trials["n_loras"].nunique() < 2:
        return None
    plt.figure(figsize=(6, 3.2))
    for method in results.methods:
        groups = results.trials[results.trials["method"] == method].groupby("n_loras")["w_error"]
        plt.errorbar(
            groups.mean().index,
            groups.mean(),
            groups.std().fillna(0),
            marker="o",
            ms=3,
            capsize=2,
            label=results.pretty(method),
        )
    plt.xlabel("number of LoRA models n")
    plt.ylabel("W-Error (log10 MSE)")
    plt.title(_mark(results))
    plt.legend(frameon=False)
    return _save(path)


def predicted(results: Results, path: Path) -> Path | None:
    """A method's own predicted W-Error against the true one; None where no method predicts."""
    column = "stat_predicted_w_error"
    if column not in results.layers or results.layers[column].dropna().empty:
        return None
    plt.figure(figsize=(4, 4))
    known = results.layers[results.layers[column].notna()]
    for method, chosen in known.groupby("method"):
        plt.scatter(chosen[column], chosen["w_error"], s=6, alpha=0.5, label=results.pretty(str(method)))
    both = known[[column, "w_error"]].replace(EXACT, np.nan)  # an exact layer has no error to predict
    low, high = both.min().min() - 0.5, both.max().max() + 0.5
    plt.plot([low, high], [low, high], lw=0.8, color="grey")
    plt.xlim(low, high)
    plt.ylim(low, high)
    plt.xlabel("W-Error predicted without the truth,\nbefore the weighted fit and rounding to a grid")
    plt.ylabel("W-Error")
    plt.title(_mark(results))
    plt.legend(frameon=False)
    return _save(path)


FIGURES: dict[str, Callable[[Results, Path], Path | None]] = {
    "cumulative.png": cumulative,
    "by_models.png": by_models,
    "predicted.png": predicted,
}


def write_figures(results: Results) -> list[Path]:
    """Draw every figure the results have the numbers for, into their folder."""
    with plt.rc_context(_STYLE):
        made = [draw(results, results.folder / name) for name, draw in FIGURES.items()]
    return [path for path in made if path]
