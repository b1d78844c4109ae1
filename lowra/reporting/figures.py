"""Figures from records, for where people would rather look than read. Each is a PNG and an SVG.

One style: eight colours that the colour-blind tell apart (Okabe and Ito) with line styles and markers of their own, so
that a print in grey can be read; legends above the axes, off the curves; no mathtext, so that any name can be shown.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib  # not its pyplot, which takes longer to import than a figure to draw, and keeps every figure
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowra.metrics.weight_error import EXACT
from lowra.reporting.escape import plot_text
from lowra.reporting.numbers import number
from lowra.reporting.views import View

STYLE: Any = {
    "figure.dpi": 130,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "font.size": 9,
    "text.parse_math": False,
    "text.usetex": False,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "svg.hashsalt": "lowra",  # equal figures give equal bytes
    "svg.fonttype": "path",
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 3)))
MARKERS = "osD^vP*X"
FORMATS = ("png", "svg")
WIDTH = 6.0  # inches
PART = "mean of part of the draws: layers of the others failed"

Draw = Callable[[Sequence[View]], "Figure | None"]


def look(i: int) -> dict[str, Any]:
    """Colour, line style and marker of the i-th row of a view; after eight the combinations go on changing."""
    turn = i // len(COLOURS)
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": LINES[(i + turn) % len(LINES)],
        "marker": MARKERS[(i + 3 * turn) % len(MARKERS)],
    }


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's settings for every figure and grid of the project, put back afterwards."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in another script is drawn as boxes
        yield


def _figure(height: float, title: str, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)
    figure.suptitle(plot_text(title, 90), fontsize=9)
    return figure, axes[0] if columns > 1 else axes[0, 0]


def _legend(figure: Figure, axes: Axes) -> None:
    """The legend in a strip of its own below the axes."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    # Error bars come after lines in matplotlib's own order; the note on hollow points goes last.
    entries = sorted(zip(handles, labels, strict=True), key=lambda entry: entry[1] == PART)
    handles, labels = [handle for handle, _ in entries], [label for _, label in entries]
    wide = max(map(len, labels)) > 34
    figure.set_figheight(figure.get_figheight() + 0.19 * math.ceil(len(labels) / (1 if wide else 2)))
    figure.legend(handles, labels, loc="outside lower center", ncols=1 if wide else min(len(labels), 2), frameon=False)


def _count_axis(axes: Axes, values: Sequence[int]) -> None:
    """Ticks at the numbers of models there are, and nowhere else."""
    axes.set_xticks(sorted(set(map(int, values))))
    axes.set_xlabel("number of LoRA models n")


def cumulative(views: Sequence[View]) -> Figure | None:
    """Share of layers a method recovers to a given W-Error or better (the form of Fig. 6), for the largest n.

    Every layer of every draw counts: one that failed or came out infinite lifts no step, so the curve ends below 100%.
    """
    view = views[0]
    n = int(view.layers["n_loras"].max())
    chosen = view.at(n)
    figure, axes = _figure(3.0, f"{view.heading}, n = {n}")
    finite = chosen.layers["w_error"].replace([np.inf, -np.inf], np.nan)
    if finite.notna().sum() == 0:
        return None
    low, high = finite.min(), finite.max()
    margin = max(0.03 * (high - low), 0.2)
    for i, row in enumerate(view.rows):
        mine = chosen.layers[chosen.layers["row"] == row]
        if mine.empty:
            continue
        errors = np.sort(mine["w_error"].replace([np.inf, -np.inf], np.nan).dropna().to_numpy(float))
        lost = len(mine) - len(errors)
        label = plot_text(row) + (f" ({lost} of {len(mine)} layers failed)" if lost else "")
        shares = 100 * np.arange(1, len(errors) + 1) / len(mine)
        x = np.concatenate([[low - margin], errors, [high + margin]])
        y = np.concatenate([[0], shares, [shares[-1] if len(shares) else 0]])
        looks = look(i)
        axes.step(x, y, where="post", label=label, markevery=(i % 4, max(1, len(x) // 6)), ms=4, **looks)
    axes.set(xlim=(low - margin, high + margin), ylim=(0, 103))
    axes.set_xlabel("W-Error of a layer (log10 MSE; further left is better)")
    axes.set_ylabel("layers at least this good (%)")
    _legend(figure, axes)
    return figure


def _against_models(figure: Figure, axes: Axes, view: View, column: str, name: Callable[[str], str]) -> None:
    failed_points = False
    for i, row in enumerate(view.rows):
        mine = view.trials[view.trials["row"] == row]
        groups = mine.groupby("n_loras")[column]
        mean, deviation = groups.mean(), groups.std().fillna(0)
        looks = look(i)
        axes.errorbar(mean.index, mean, deviation, ms=4, capsize=2, elinewidth=0.8, label=name(row), **looks)
        holes = mean[groups.apply(lambda values: values.isna().any()) & mean.notna()]
        if len(holes):
            failed_points = True
            axes.plot(holes.index, holes, looks["marker"], ms=5, mfc="white", mec=looks["color"], zorder=5)
    _count_axis(axes, view.trials["n_loras"])
    if failed_points:
        axes.plot([], [], "o", mfc="white", mec="black", label=PART)


def by_models(views: Sequence[View]) -> Figure | None:
    """W-Error against the number of models (the form of Fig. 7); None without a sweep."""
    view = views[0]
    if view.trials["n_loras"].nunique() < 2 or view.trials["w_error"].notna().sum() == 0:
        return None
    figure, axes = _figure(3.0, view.heading)
    _against_models(figure, axes, view, "w_error", plot_text)
    axes.set_ylabel("W-Error (log10 MSE)")
    _legend(figure, axes)
    return figure


def semantic_by_models(views: Sequence[View]) -> Figure | None:
    """Semantic score against the number of models (the form of Figs. 8 to 11); None without a sweep or scores."""
    view = views[0]
    scored = [c for c in view.columns if view.trials.loc[view.trials[c].notna(), "n_loras"].nunique() > 1]
    if not scored:
        return None
    figure, axes = _figure(3.0, view.heading, len(scored))
    for panel, column in zip(np.atleast_1d(axes), scored, strict=True):
        _against_models(figure, panel, view, column, plot_text)
        panel.set_ylabel(plot_text(view.columns[column]))
    _legend(figure, np.atleast_1d(axes)[0])
    return figure


def predicted(views: Sequence[View]) -> Figure | None:
    """A method's own predicted W-Error against the true one; None where no method predicts."""
    view = views[0]
    # What is returned is predicted where a method says so; else what it had before a weighted fit and rounding.
    column = next((c for c in ("stat_expected_w_error", "stat_predicted_w_error") if c in view.layers), None)
    if column is None:
        return None
    known = view.layers[["row", column, "w_error"]].copy()
    known[column] = pd.to_numeric(known[column], errors="coerce")
    known = known.replace([np.inf, -np.inf], np.nan).dropna()
    if known.empty:
        return None
    figure, axes = _figure(4.4, view.heading)
    for i, row in enumerate(view.rows):
        chosen = known[known["row"] == row]
        if len(chosen):
            looks = look(i)
            axes.plot(
                chosen[column],
                chosen["w_error"],
                looks["marker"],
                ms=3,
                alpha=0.5,
                color=looks["color"],
                label=plot_text(row),
            )
    both = known[[column, "w_error"]].replace(EXACT, np.nan)  # an exact layer has no error to predict
    low, high = both.min().min() - 0.5, both.max().max() + 0.5
    exact = int((known["w_error"] <= EXACT).sum())
    axes.plot([low, high], [low, high], lw=0.8, color="grey")
    axes.fill_between([low, high], [low, high], [low, low], color="#009E73", alpha=0.08, lw=0)
    at = {"transform": axes.transAxes, "fontsize": 8, "color": "#555555"}
    axes.text(0.97, 0.04, "better than predicted", ha="right", **at)
    axes.text(0.03, 0.94, "worse than predicted", **at)
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.locator_params(nbins=5)  # long numbers must not run into each other
    note = f"\n({exact} exactly recovered layers are below the axes)" if exact else ""
    of = "of what is returned" if column == "stat_expected_w_error" else "before a weighted fit and rounding to a grid"
    axes.set_xlabel(f"W-Error predicted without the truth,\n{of}{note}")
    axes.set_ylabel("W-Error of what is returned")
    _legend(figure, axes)
    return figure


def histogram(views: Sequence[View]) -> Figure | None:
    """Histogram of the layers' W-Error for one draw (the form of Fig. 4): what the logarithm is for.

    The legend gives each row's MSE (mean of the layers'), W-Error and semantic score. The first draw of the smallest n
    that all rows have.
    """
    view = views[0]
    n = int(view.layers["n_loras"].min())
    trial = int(view.trials.loc[view.trials["n_loras"] == n, "trial"].min())
    chosen = view.at(n).only(trial=[trial])
    errors = chosen.layers["w_error"].replace([np.inf, -np.inf], np.nan)
    if errors.notna().sum() == 0:
        return None
    figure, axes = _figure(3.0, f"{view.heading}, n = {n}, draw {trial}")
    bins = np.histogram_bin_edges(errors.dropna(), 40)
    for i, row in enumerate(view.rows):
        mine = chosen.layers[chosen.layers["row"] == row]
        if mine.empty:
            continue
        values = mine["w_error"].replace([np.inf, -np.inf], np.nan)
        scores = chosen.trials[chosen.trials["row"] == row].iloc[0]
        facts = [f"W-Error {number(values.mean())}", f"MSE {(10**values).mean():.3e}"]
        facts += [f"{h} {number(scores[c])}" for c, h in view.columns.items() if pd.notna(scores[c])]
        lost = int(values.isna().sum())
        facts += [f"{lost} of {len(mine)} layers failed"] if lost else []
        looks = look(i)
        axes.hist(
            values.dropna(),
            bins,
            label=f"{plot_text(row, 40)}: " + ", ".join(facts),
            color=looks["color"],
            alpha=0.35,
            histtype="stepfilled",
            edgecolor=looks["color"],
            linestyle=looks["linestyle"],
            linewidth=1.4,
        )
    axes.set_xlabel("W-Error of a layer (log10 MSE)")
    axes.set_ylabel("number of layers")
    axes.yaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes)
    return figure


def iterations(views: Sequence[View]) -> Figure | None:
    """W-Error against the iteration, for methods that kept a history (the form of Fig. 5).

    The mean over layers and draws, with their standard deviation as a band; methods without a history are level lines.
    """
    view = views[0]
    if not len(view.history) or "w_error" not in view.history:
        return None
    history = view.history[view.history["w_error"].notna()]
    n = int(history["n_loras"].min())
    history, chosen = history[history["n_loras"] == n], view.at(n)
    figure, axes = _figure(3.2, f"{view.heading}, n = {n}")
    last = int(history["step"].max()) + 1
    for i, row in enumerate(view.rows):
        looks = look(i)
        steps = history[history["row"] == row].groupby("step")["w_error"]
        if steps.ngroups:
            mean, deviation = steps.mean(), steps.std().fillna(0)
            axes.plot(mean.index + 1, mean, markevery=max(1, len(mean) // 8), ms=4, label=plot_text(row), **looks)
            axes.fill_between(
                mean.index + 1, mean - deviation, mean + deviation, color=looks["color"], alpha=0.15, lw=0
            )
        elif row in chosen.rows and view.is_plain(row) and view.method(row) in BASELINES:
            level = chosen.trials.loc[chosen.trials["row"] == row, "w_error"].mean()
            axes.plot([1, last], [level, level], markevery=[], label=plot_text(row), **looks)
    axes.set_xlabel("iteration")
    axes.set_ylabel("W-Error (log10 MSE); band: deviation over layers")
    _legend(figure, axes)
    return figure


def _correlated(
    title: str, x: pd.Series, y: pd.Series, x_name: str, y_name: str, label: str, row: int
) -> Figure | None:
    if len(x) < 3 or x.nunique() < 2 or y.nunique() < 2:
        return None
    figure, axes = _figure(3.6, title)
    looks = look(row)
    correlation = float(np.corrcoef(x, y)[0, 1])
    axes.plot(
        x, y, looks["marker"], ms=4, alpha=0.6, color=looks["color"], label=f"{label} (correlation {correlation:.3f})"
    )
    axes.set(xlabel=x_name, ylabel=y_name)
    _legend(figure, axes)
    return figure


def error_against_loss(views: Sequence[View]) -> Figure | None:
    """W-Error against the logarithm of the loss over the iterations, with the correlation (the form of Fig. 12).

    A point per iteration: the means over layers. Of the row whose history is shortest: the paper shows 200 iterations.
    """
    view = views[0]
    if not len(view.history) or not {"w_error", "loss"} <= set(view.history):
        return None
    history = view.history[(view.history["loss"] > 0) & view.history["w_error"].notna()]
    if history.empty:
        return None
    row = history.groupby("row")["step"].max().idxmin()
    history = history[history["row"] == row]
    history = history[history["n_loras"] == history["n_loras"].min()]
    points = history.assign(log_loss=np.log10(history["loss"])).groupby("step")[["log_loss", "w_error"]].mean()
    return _correlated(
        f"{view.heading}, n = {history['n_loras'].iloc[0]}",
        points["log_loss"],
        points["w_error"],
        "log10 of the loss, mean over layers",
        "W-Error (log10 MSE)",
        f"{plot_text(row, 40)}, {len(points)} iterations",
        view.rows.index(row),
    )


def error_against_score(views: Sequence[View]) -> Figure | None:
    """W-Error against the semantic score over the iterations, with the correlation (the form of Fig. 13).

    A point per number of iterations after which the method was stopped (its option `stop_after`).
    """
    view = views[0]
    stopped = [row for row in view.rows if view.options(row).get("stop_after") is not None]
    points = view.trials[view.trials["row"].isin(stopped)]
    for column, heading in view.columns.items():
        scored = points[points[column].notna() & points["w_error"].notna()]
        means = scored.groupby("row")[[column, "w_error"]].mean()
        figure = _correlated(
            view.heading,
            means[column],
            means["w_error"],
            plot_text(heading),
            "W-Error (log10 MSE)",
            f"{len(means)} numbers of iterations",
            0,
        )
        if figure is not None:
            return figure
    return None


BASELINES = ("lora_ft", "mean_lora")


def all_subsets(views: Sequence[View]) -> Figure | None:
    """W-Error of one method against the number of models, a line per subset (Fig. 7); None without a sweep.

    The method is the paper's; where it was not run, the first row of each view.
    """
    swept = [view for view in views if view.trials["n_loras"].nunique() > 1 and view.trials["w_error"].notna().any()]
    if not swept:
        return None
    figure, axes = _figure(3.2, f"source={swept[0].source}")
    numbers: set[int] = set()
    for i, view in enumerate(swept):
        plain = [row for row in view.rows if view.is_plain(row)] or list(view.rows)
        row = next((row for row in plain if view.method(row) == "spectral_detuning"), plain[0])
        groups = view.trials[view.trials["row"] == row].groupby("n_loras")["w_error"]
        mean, deviation = groups.mean(), groups.std().fillna(0)
        numbers |= {int(n) for n in mean.index}
        label = f"{plot_text(view.title)}: {plot_text(row)}"
        axes.errorbar(mean.index, mean, deviation, ms=4, capsize=2, elinewidth=0.8, label=label, **look(i))
    _count_axis(axes, sorted(numbers))
    axes.set_ylabel("W-Error (log10 MSE)")
    _legend(figure, axes)
    return figure


FIGURES: dict[str, Draw] = {
    "cumulative": cumulative,
    "by_models": by_models,
    "semantic_by_models": semantic_by_models,
    "predicted": predicted,
    "iterations": iterations,
    "error_against_loss": error_against_loss,
    "error_against_score": error_against_score,
}
"""The figures of every run's folder, each where the records have the numbers for it."""


def drawn(draw: Draw, views: Sequence[View], kinds: Sequence[str]) -> dict[str, bytes]:
    """A figure as the bytes of a file of each kind; {} where the records have no numbers for it."""
    with style():
        figure = draw(views)
        if figure is None:
            return {}
        files = {}
        for kind in kinds:
            # No date or version in the file: equal figures give equal bytes.
            metadata: dict[str, Any] = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, metadata=metadata)
            files[kind] = buffer.getvalue()
        return files
