"""Tables from records: mean and deviation over draws, the paper's numbers in columns of their own."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib import resources
from typing import Any

import pandas as pd

from lowra.reporting.results import Results


def paper_numbers(subset: str) -> dict[str, Any] | None:
    """What the paper reports for a subset, with the names of its columns, or None."""
    paper = json.loads(resources.files("lowra.reporting").joinpath("paper.json").read_text())
    table = paper["tables"].get(subset)
    return table and table | {"columns": paper["columns"]}


def number(value: float) -> str:
    """Three decimals, or one digit and an exponent where three decimals would show nothing."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    return f"{value:.3f}" if abs(value) >= 0.005 else f"{value:.0e}"


def pair(mean: float, deviation: float) -> str:
    """`mean ± deviation`, both with three decimals unless the mean is too small to show so."""
    if not math.isfinite(deviation):
        return number(mean)
    if abs(mean) >= 0.005 or not math.isfinite(mean):
        return f"{mean:.3f} ± {deviation:.3f}"
    return f"{number(mean)} ± {number(deviation)}"


def main_table(results: Results) -> pd.DataFrame:
    """One row per number of models and method: W-Error, exactness, semantic metrics, time, and the paper's numbers.

    ± is the standard deviation over draws; the deviation over layers has a column of its own, since the paper's ± is
    wider than draws alone explain. The paper's columns appear for its own number of models only.
    """
    paper = paper_numbers(results.run["subset"])
    columns = {m["column"]: m["pretty"] for m in results.run["metrics"].values()}
    rows = []
    for n, at_n in results.trials.groupby("n_loras"):
        for method in results.methods:
            trials = at_n[at_n["method"] == method]
            if trials.empty:
                continue
            row = {"Method": results.pretty(method), "n": str(n)}
            row["W-Error ↓"] = pair(trials["w_error"].mean(), trials["w_error"].std())
            row["± layers"] = number(trials["w_error_layer_std"].mean())
            floor = results.layers.query("n_loras == @n and method == @method")["floor_w_error"].mean()
            row["floor"] = number(floor)
            row["exact layers"] = f"{trials['exact_layers'].mean():.1f}/{trials['layers'].max()}"
            row["exact weights"] = f"{100 * trials['exact_fraction'].mean():.6g}%"
            for column, pretty in columns.items():
                if column in trials:
                    row[f"{pretty} ↓"] = pair(trials[column].mean(), trials[column].std())
            row["s/layer"] = f"{(trials['seconds'] / trials['layers']).mean():.3g}"
            if int(trials["failed_layers"].sum()):
                row["failed"] = str(int(trials["failed_layers"].sum()))
            if paper and paper["n_loras"] in set(results.trials["n_loras"]):
                reported = paper["rows"].get(method, {}) if n == paper["n_loras"] else {}
                row["paper W-Error"] = pair(*reported["w_error"]) if "w_error" in reported else ""
                for column in columns:
                    heading = f"paper {paper['columns'].get(column, column)}"
                    row[heading] = pair(*reported[column]) if column in reported else ""
            rows.append(row)
    return pd.DataFrame(rows).fillna("")


def summary(folders: Sequence[Results]) -> pd.DataFrame:
    """The main tables of several results folders below each other, without the paper's numbers."""
    rows = []
    for results in folders:
        headings = [f"{m['pretty']} ↓" for m in results.run["metrics"].values()]
        for row in main_table(results).to_dict("records"):
            semantic = ", ".join(f"{heading[:-2]} {row[heading]}" for heading in headings if heading in row)
            kept = {key: row[key] for key in ("n", "Method", "W-Error ↓", "exact weights", "s/layer")}
            rows.append(
                {"Subset": f"{results.title}, {results.run['source']}"} | kept | {"semantic metric ↓": semantic}
            )
    return pd.DataFrame(rows)


def breakdown(results: Results, by: str) -> pd.DataFrame:
    """Mean W-Error per method (rows: `layer_type` or `depth`, with the component where there are several)."""
    layers = results.layers
    index = [by] if layers["layer_model"].nunique() == 1 else ["layer_model", by]
    several = layers["n_loras"].nunique() > 1
    table = layers.pivot_table(index=(["n_loras"] if several else []) + index, columns="method", values="w_error")
    table = table[[m for m in results.methods if m in table]].rename(columns=results.pretty)
    return table.map(number).reset_index().astype(str)


def markdown(table: pd.DataFrame) -> str:
    """A table as GitHub Markdown."""
    lines = ["| " + " | ".join(map(str, table.columns)) + " |", "|" + "---|" * len(table.columns)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in table.to_numpy()])


def plain(table: pd.DataFrame) -> str:
    """A table for the terminal, columns aligned."""
    cells: list[Sequence[str]] = [list(map(str, table.columns)), *[list(map(str, r)) for r in table.to_numpy()]]
    widths = [max(len(row[c]) for row in cells) for c in range(len(table.columns))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
