"""The paper's tables and figures by their numbers, each made from whatever records there are of it.

An exhibit takes the views of one source: sources never meet in one table or figure. Its name is that of the experiment
that makes its records (`conf/experiment/`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from lowra.reporting.numbers import share
from lowra.reporting.paper import paper, paper_numbers
from lowra.reporting.tables import breakdown, main_table
from lowra.reporting.views import View

SUBSETS = ("vit", "stable_diffusion", "mistral_sft", "mistral_dpo")
TITLES = dict(zip(SUBSETS, ("ViT", "Stable Diffusion", "Mistral SFT", "Mistral DPO"), strict=True))


@dataclass(frozen=True)
class Shown:
    """What there is to show. views: where it comes from. tables: with a heading each. figure: its name in `figures`."""

    views: Sequence[View]
    tables: Sequence[tuple[str, pd.DataFrame]] = field(default=())
    figure: str | None = None
    gallery: str | None = None


Show = Callable[[Sequence[View]], Shown | None]


@dataclass(frozen=True)
class Exhibit:
    """A table or figure of the paper.

    place: where the paper has it. title: what it shows. says: what the paper prints of it as numbers, where no table
    has them. show: of the views of one source, None where they hold nothing of it.
    """

    place: str
    title: str
    says: str
    show: Show


def standard(views: Sequence[View], subset: str) -> View | None:
    """The view of a subset in the paper's setting; of several data sets the one with the newest records."""
    found = [view for view in views if view.subset == subset and view.is_papers_setting]
    return max(found, key=lambda view: str(view.layers["finished"].max()), default=None)


def plain(view: View) -> View:
    """The methods as shipped, without variants."""
    return view.only(row=[row for row in view.rows if view.is_plain(row)])


def _n(view: View) -> int | None:
    """The paper's number of models, if the view has it."""
    numbers = paper_numbers(view.subset)
    n = int(numbers["n_loras"]) if numbers else None
    return n if n in set(view.trials["n_loras"]) else None


def _summary(views: Sequence[View]) -> Shown | None:
    lines, used = [], []
    reported = paper()["table1"]
    for subset in SUBSETS:
        view = standard(views, subset)
        if view is None:
            continue
        used.append(view)
        models = len(view.context.get("models") or [])
        model, task, tuning, layers, tuned = reported["rows"][subset]
        line = {"Subset": view.title, "Pre-FT model": model, "Task": task, "Fine-tuning task": tuning}
        line |= {"Pre-FT layers": str(view.layer_count), "LoRA models": str(models)}
        line |= {"FT layers": str(view.layer_count * models), "paper Pre-FT layers": str(layers)}
        lines.append(line | {"paper FT layers": str(tuned)})
    return Shown(used, [("", pd.DataFrame(lines))]) if lines else None


def _main(subset: str) -> Show:
    def show(views: Sequence[View]) -> Shown | None:
        view = standard(views, subset)
        n = _n(view) if view else None
        if view is None or n is None:
            return None
        chosen = plain(view.at(n))
        return Shown([chosen], [("", main_table(chosen))], "cumulative") if chosen.rows else None

    return show


def _of_stable_diffusion(choose: Callable[[View], View | None], figure: str) -> Show:
    def show(views: Sequence[View]) -> Shown | None:
        view = standard(views, "stable_diffusion")
        chosen = choose(view) if view else None
        return Shown([chosen], figure=figure) if chosen and chosen.rows else None

    return show


def _histogram(view: View) -> View | None:
    n = _n(view)
    chosen = plain(view.at(n)) if n else None
    return chosen and chosen.only(row=[row for row in chosen.rows if chosen.method(row) != "lora_ft"])


def _with_history(view: View) -> View | None:
    if not len(view.history) or "w_error" not in view.history:
        return None
    steps = view.history.groupby("row")["step"].max()
    long = [row for row in steps.index if steps[row] == steps.max()]
    levels = [row for row in view.rows if view.is_plain(row) and view.method(row) in ("lora_ft", "mean_lora")]
    n = int(view.history.loc[view.history["row"].isin(long), "n_loras"].min())
    return view.at(n).only(row=[*long, *levels])


def _shortest_history(view: View) -> View | None:
    if not len(view.history) or not {"w_error", "loss"} <= set(view.history):
        return None
    row = view.history.groupby("row")["step"].max().idxmin()
    return view.only(row=[row])


def _stopped(view: View) -> View | None:
    rows = [row for row in view.rows if view.options(row).get("stop_after") is not None]
    chosen = view.only(row=rows)
    return chosen if chosen.columns else None


AT = -16  # W-Error at which the paper states the shares of Fig. 6


def _ablation(views: Sequence[View]) -> Shown | None:
    view = standard(views, "stable_diffusion")
    n = _n(view) if view else None
    if view is None or n is None:
        return None
    view = view.at(n)
    shipped = [row for row in view.rows if view.is_plain(row)]
    paper_rows = [row for row in shipped if view.method(row) == "spectral_detuning"]
    if not paper_rows:
        return None
    options = view.options(paper_rows[0]) | {"scheduler": False}
    without = [row for row in view.rows if view.options(row) == options]
    if not without:
        return None
    chosen = view.only(row=[*shipped, *without])
    lines = []
    for row in chosen.rows:
        errors = chosen.layers.loc[chosen.layers["row"] == row, "w_error"]
        lines.append({"Method": row, f"layers at W-Error {AT} or better": share(float((errors <= AT).mean()))})
    return Shown([chosen], [("", pd.DataFrame(lines))], "cumulative")


def _sweep(views: Sequence[View]) -> Shown | None:
    used = [view for subset in SUBSETS if (view := standard(views, subset)) is not None]
    used = [plain(view) for view in used if view.trials["n_loras"].nunique() > 1]
    return Shown(used, figure="all_subsets") if used else None


def _semantic(subset: str) -> Show:
    def show(views: Sequence[View]) -> Shown | None:
        view = standard(views, subset)
        chosen = plain(view) if view else None
        if chosen is None or not any(
            chosen.trials.loc[chosen.trials[c].notna(), "n_loras"].nunique() > 1 for c in chosen.columns
        ):
            return None
        return Shown([chosen], figure="semantic_by_models")

    return show


def _gallery(subset: str, kind: str) -> Show:
    def show(views: Sequence[View]) -> Shown | None:
        view = standard(views, subset)
        chosen = plain(view) if view else None
        return Shown([chosen], gallery=kind) if chosen and chosen.columns else None

    return show


def _per_layer(views: Sequence[View]) -> Shown | None:
    tables, used = [], []
    for subset in SUBSETS:
        view = standard(views, subset)
        if view is None:
            continue
        n = _n(view) or int(view.trials["n_loras"].max())
        chosen = plain(view.at(n))
        if chosen.rows:
            used.append(chosen)
            for by, words in (("layer_type", "type"), ("depth", "depth")):
                tables.append((f"{view.title}, n = {n}, by {words}", breakdown(chosen, by)))
    return Shown(used, tables) if used else None


def _exhibits() -> dict[str, Exhibit]:
    data = paper()

    def figure(name: str, title: str, show: Show) -> Exhibit:
        return Exhibit(data["figures"][name]["place"], title, data["figures"][name]["says"], show)

    def table(subset: str) -> Exhibit:
        n = data["tables"][subset]["n_loras"]
        return Exhibit(data["tables"][subset]["place"], f"{TITLES[subset]}, {n} models", "", _main(subset))

    stable = _of_stable_diffusion
    return {
        "table1": Exhibit(data["table1"]["place"], "The subsets, counted in the data", "", _summary),
        "table2": table("vit"),
        "table3": table("stable_diffusion"),
        "table4_sft": table("mistral_sft"),
        "table4_dpo": table("mistral_dpo"),
        "fig2": figure("fig2", "Texts side by side", _gallery("mistral_dpo", "texts")),
        "fig3": figure("fig3", "Pictures side by side", _gallery("stable_diffusion", "pictures")),
        "fig4": figure("fig4", "Why the logarithm in W-Error", stable(_histogram, "histogram")),
        "fig5": figure("fig5", "Convergence with and without the rank scheduler", stable(_with_history, "iterations")),
        "fig6": figure("fig6", "Share of layers with and without the rank scheduler", _ablation),
        "fig7": figure("fig7", "W-Error against the number of models", _sweep),
        "fig8": figure("fig8", "Semantic score against the number of models, ViT", _semantic("vit")),
        "fig9": figure("fig9", "The same, Stable Diffusion", _semantic("stable_diffusion")),
        "fig10": figure("fig10", "The same, Mistral SFT", _semantic("mistral_sft")),
        "fig11": figure("fig11", "The same, Mistral DPO", _semantic("mistral_dpo")),
        "fig12": figure("fig12", "W-Error against the loss", stable(_shortest_history, "error_against_loss")),
        "fig13": figure("fig13", "W-Error against LPIPS", stable(_stopped, "error_against_score")),
        "per_layer": Exhibit("Section 6.1", "W-Error by type and by depth of layer", "", _per_layer),
    }


EXHIBITS = _exhibits()


# ---- The leaderboard --------------------------------------------------------------------------------------------


TRACKS: Mapping[str, str] = {
    "paper": "The paper's setting: its number of models, float32 merges, the rank known.",
    "three": "Three models, and nobody says their rank.",
    "released": "Merges stored in bfloat16, as released models are, and nobody says their rank.",
    "one_short": "The paper's number of models, one of them of another base.",
    "defended": "LoRAs trained on one frozen A: W is not identifiable in their common row space.",
}


def track(view: View) -> str | None:
    """The track whose setting a view has, None where it has none's."""
    dtype, order, told = (view.setting[c] for c in ("merge_dtype", "merge_order", "knows_rank"))
    if view.setting["seed"] != 0 or view.kind_of_tuning != "lora":
        return None
    builders = [(c.get("config") or {}).get("builder") or {} for c in view.contexts.values()]
    if any(builder.get("shared_among") for builder in builders):
        return None
    shared = any(
        builder.get("shared_a") or (((c.get("config") or {}).get("source") or {}).get("table") or {}).get("shared_a")
        for builder, c in zip(builders, view.contexts.values(), strict=True)
    )
    if shared:
        return "defended" if (dtype, order, told) == ("float32", "once", True) else None
    if view.notes:
        return None
    settings: dict[tuple[Any, ...], str] = {
        ("float32", "once", True): "paper",
        ("float32", "once", False): "three",
        ("float32", "once, 1 foreign", True): "one_short",
        ("bfloat16", "once", False): "released",
        ("bfloat16", "twice", False): "released",
    }
    return settings.get((dtype, order, told))


def leaderboard(views: Sequence[View]) -> pd.DataFrame:
    """One row per track, subset, source and method, all numbers; `view` is the position of its view.

    Variants that were run for curves over iterations are no entries. The paper's number of models, three in the track
    `three`; the tracks `released` and `defended` show every number of models they have.
    """
    rows = []
    for position, view in enumerate(views):
        name = track(view)
        if name is None:
            continue
        numbers = paper_numbers(view.subset)
        wanted = 3 if name == "three" else numbers["n_loras"] if numbers else None
        table = view.numbers
        options = {row: view.options(row) for row in view.rows}
        curves = [row for row in view.rows if options[row].get("stop_after") or options[row].get("keep_history")]
        table = table[~table["label"].isin(curves)]
        if name not in ("released", "defended") and wanted is not None:
            table = table[table["n_loras"] == wanted]
        for row in table.to_dict("records"):
            column = next((c for c in view.columns if isinstance(row[c], float) and not math.isnan(row[c])), None)
            rows.append(
                {
                    "track": name,
                    "subset": view.title,
                    "source": view.source,
                    "view": position,
                    **row,
                    "score": row[column] if column else math.nan,
                    "score_std": row[f"{column}_std"] if column else math.nan,
                    "score_name": view.columns[column] if column else "",
                }
            )
    table = pd.DataFrame(rows)
    order = list(TRACKS)
    if len(table):
        table = table.sort_values(
            ["track", "source", "subset", "n_loras", "w_error"],
            key=lambda c: c.map(order.index) if c.name == "track" else c,
            kind="stable",
        )
    return table
