"""Records as tables and figures take them: one view for each setting, its rows named and in order.

What belongs to different data or settings never meets in one row: a view holds the records of one subset, source and
data set, one precision and order of merging, one grant of the rank and one seed. Rows of a view are method variants
(and kinds of device, where a variant ran on several).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from lowra.records import LAYER_NAME, SETTING, Records, trials
from lowra.reporting.escape import clean, slug
from lowra.reporting.numbers import count
from lowra.reporting.paper import paper_numbers

LAYER = list(LAYER_NAME)

ORDERS = {
    "twice": "each update rounded before it is added",
    "once, 1 foreign": "one of the models is of another base",
}
"""Orders of merging in words; others are shown as they are."""


def in_words(order: str) -> str:
    """An order of merging, with the defence that follows it, in words."""
    plain, _, defence = order.partition("once, ")
    if not plain and defence and not defence.endswith("foreign"):
        return f"released after a defence, {defence}"
    return ORDERS.get(order, order)


WRONG = 1.0  # decades by which a certified layer may miss what its method predicts before the certificate is wrong


@dataclass(frozen=True)
class View:
    """The records of one setting. Every frame has a column `row`, the name under which its variant is shown.

    rows: those names, in the order of tables and legends. columns: the semantic metrics' columns and their headings.
    layer_count: the layers known of this setting; a draw with fewer is a partial one. slug: a part for file names that
    tells the view from the others of a report; "" for the only one, and for the one in the paper's setting.
    """

    layers: pd.DataFrame
    trials: pd.DataFrame
    history: pd.DataFrame
    contexts: dict[str, dict[str, Any]]
    setting: dict[str, Any]
    rows: tuple[str, ...]
    columns: dict[str, str]
    layer_count: int
    slug: str

    @property
    def subset(self) -> str:
        """The subset's config key."""
        return str(self.setting["subset"])

    @property
    def source(self) -> str:
        """The source's config key."""
        return str(self.setting["source"])

    @property
    def context(self) -> dict[str, Any]:
        """What is known of the command that made the newest of the records."""
        newest = self.layers.loc[self.layers["finished"].idxmax(), "context"]
        return self.contexts.get(newest) or {}

    @property
    def title(self) -> str:
        """The subset's name for captions."""
        return str(self.context.get("title") or self.subset)

    @property
    def kind_of_tuning(self) -> str:
        """How the models were fine-tuned: "lora", or another of the builders' kinds."""
        builder = (self.context.get("config") or {}).get("builder") or {}
        return str(builder.get("kind") or "lora")

    @property
    def heading(self) -> str:
        """The view in a few words: subset, source and what of its setting is not the paper's."""
        return ", ".join([f"{self.title}, source={self.source}", *self.deviations()])

    def deviations(self) -> list[str]:
        """What of the setting differs from the paper's, in words."""
        words = []
        if self.setting["merge_dtype"] != "float32":
            words.append(f"merges stored in {self.setting['merge_dtype']}")
        if self.setting["merge_order"] != "once":
            words.append(in_words(str(self.setting["merge_order"])))
        if self.kind_of_tuning != "lora":
            words.append(f"fine-tuned by {self.kind_of_tuning}")
        if not self.setting["knows_rank"]:
            words.append("rank not given")
        if self.setting["seed"] != 0:
            words.append(f"seed {self.setting['seed']}")
        return words

    @property
    def caption(self) -> str:
        """Where the numbers come from, in sentences a reader cannot miss; **bold** is Markdown's."""
        models = self.context.get("models") or []
        draws = self.trials.groupby("n_loras")["draw"].nunique()
        counts = sorted(set(draws))
        many = count(counts[0], "draw") if len(counts) == 1 else f"{counts[0]} to {counts[-1]} draws"
        if len(draws) > 1:
            many += f" of each of {len(draws)} numbers of models"
        facts = [f"{len(models)} LoRA models"] if models else []
        text = f"{self.title}, source={self.source}"
        about = str(self.context.get("caption") or "").rstrip(". ")
        text += f": {about}. " if about else ". "
        text += ", ".join([*facts, count(self.layer_count, "layer"), many]) + "."
        if self.setting["merge_dtype"] != "float32":
            text += f" Merged weights stored in {self.setting['merge_dtype']} (the paper's are float32)."
        if self.setting["merge_order"] != "once":
            text += f" Merges: {in_words(str(self.setting['merge_order']))}."
        if self.kind_of_tuning != "lora":
            text += f" The models were fine-tuned by {self.kind_of_tuning}, not by LoRA."
        if not self.setting["knows_rank"]:
            text += " The LoRA rank is not given to the methods."
        if self.setting["seed"] != 0:
            text += f" Draws of seed {self.setting['seed']}."
        return " ".join([text, *self.notes])

    @functools.cached_property
    def numbers(self) -> pd.DataFrame:
        """The rows of the view's table as numbers: see `rows_table`."""
        return rows_table(self)

    def at(self, n: int) -> View:
        """The part of the view with n models."""
        return self.only(n_loras=[n])

    def only(self, **values: Sequence[Any]) -> View:
        """The part of the view whose columns have one of the values given for them."""

        def cut(frame: pd.DataFrame) -> pd.DataFrame:
            for column, kept in values.items():
                frame = frame[frame[column].isin(list(kept))] if column in frame else frame
            return frame

        layers, cut_trials = cut(self.layers), cut(self.trials)
        there = set(cut_trials["row"])
        return View(
            layers,
            cut_trials,
            cut(self.history),
            {key: self.contexts[key] for key in self.contexts if key in set(layers["context"])},
            self.setting,
            tuple(row for row in self.rows if row in there),
            {c: h for c, h in self.columns.items() if cut_trials[c].notna().any()},
            self.layer_count,
            self.slug,
        )

    def method(self, row: str) -> str:
        """The config key of a row's method."""
        return str(self.trials.loc[self.trials["row"] == row, "method"].iloc[0])

    def is_plain(self, row: str) -> bool:
        """Whether a row is its method as shipped, the one the paper's numbers stand beside."""
        first = self.layers[self.layers["row"] == row].iloc[0]
        return str(first["label"]) == str(first["pretty"])

    def options(self, row: str) -> dict[str, Any]:
        """The options of a row's method."""
        text = self.layers.loc[self.layers["row"] == row, "options"].iloc[0]
        found = json.loads(text) if isinstance(text, str) and text else {}
        return found if isinstance(found, dict) else {}

    @property
    def notes(self) -> tuple[str, ...]:
        """What the commands that made the records say of their data, where it is special."""
        return tuple(sorted({str(context.get("note") or "") for context in self.contexts.values()} - {""}))

    @property
    def is_papers_setting(self) -> bool:
        """Whether data, merges, grant of the rank and seed are the paper's (at any source)."""
        return not self.deviations() and not self.notes


def draw_name(models: Sequence[int]) -> str:
    """The models of a draw as a text: draws are the same if their models are."""
    return ",".join(str(int(m)) for m in models)


def views(records: Records, methods_order: Sequence[str] | None = None) -> list[View]:
    """One view for each setting, in the order of subset, source and setting; [] if there are no records.

    methods_order: labels of variants or config keys of methods in the order of their rows, by default the order in
    which the commands that made the records list the methods; the others follow as they first appear.
    """
    layers = records.layers
    if layers.empty:
        return []
    layers = layers.assign(draw=layers["models"].map(draw_name).astype(object), row=_row_names(layers).astype(object))
    summed = trials(layers, records.scores)
    identity = layers[[*SETTING, "variant", "device", "row"]].drop_duplicates()
    summed = summed.merge(identity, on=[*SETTING, "variant", "device"], how="left")
    summed["draw"] = summed["models"].map(draw_name)
    headings = {}
    if len(records.scores):
        # A metric's own column; what else it measured stands in trials.parquet.
        shown = records.scores
        shown = shown[shown["headline"].astype(bool)] if "headline" in shown else shown
        headings = dict(zip(shown["column"].map(str), shown["heading"].map(str), strict=True))
    known = list(methods_order or _configured(records.contexts))
    found = []
    for key, part in layers.groupby(list(SETTING), sort=True):
        setting = dict(zip(SETTING, key, strict=True))
        mine = summed[_same(summed, setting)]
        history = records.history
        if len(history):
            history = history[_same(history, setting)].merge(
                identity[_same(identity, setting)][["variant", "device", "row"]], on=["variant", "device"], how="left"
            )
            history = history.assign(draw=history["models"].map(draw_name))
        firsts = part.drop_duplicates("row").set_index("row")
        names = known + [m for m in dict.fromkeys(part["method"]) if m not in known]
        plain = firsts["label"] == firsts["pretty"]
        place = {
            row: names.index(first["label"] if first["label"] in names else first["method"])
            for row, first in firsts.iterrows()
        }
        rows = sorted(firsts.index, key=lambda row: (place[row], not plain[row], row))
        found.append(
            View(
                part,
                mine,
                history,
                {c: records.contexts.get(c, {}) for c in dict.fromkeys(part["context"])},
                setting,
                tuple(rows),
                {c: h for c, h in headings.items() if c in mine and mine[c].notna().any()},
                int(part.drop_duplicates(LAYER).shape[0]),
                "",
            )
        )
    return _with_slugs(found)


def _configured(contexts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The methods as commands listed them, the longest list first."""
    lists = [list((context.get("config") or {}).get("methods") or []) for context in contexts.values()]
    return list(dict.fromkeys(str(name) for names in sorted(lists, key=len, reverse=True) for name in names))


def _same(frame: pd.DataFrame, setting: Mapping[str, Any]) -> pd.Series:
    same = pd.Series(True, index=frame.index)
    for column, value in setting.items():
        same &= frame[column] == value
    return same


def _row_names(layers: pd.DataFrame) -> pd.Series:
    """A name for each variant and device that no other one of its setting has: its label, with more only where needed.

    Two variants of one label differ in code alone: an edited method beside what it was.
    """
    names = layers["label"].map(clean)
    setting = [layers[c] for c in SETTING]
    if (layers["variant"].groupby([*setting, names]).nunique() > 1).any():
        several = layers["variant"].groupby([*setting, names]).transform("nunique") > 1
        names = names.where(~several, names + " [code " + layers["variant"].map(str).str[:6] + "]")
    several = layers["device"].groupby([*setting, names]).transform("nunique") > 1
    return names.where(~several, names + " on " + layers["device"].map(str))


def _with_slugs(found: list[View]) -> list[View]:
    """Name what differs between the views of one report, for file names; the paper's setting needs no name."""
    if len(found) < 2:
        return found
    differs = [c for c in SETTING if len({str(view.setting[c]) for view in found}) > 1]
    words = {"knows_rank": {True: "rank-known", False: "rank-unknown"}}

    def name(view: View) -> str:
        if view.is_papers_setting and sum(each.is_papers_setting for each in found) == 1:
            return ""
        parts = [words.get(c, {}).get(view.setting[c], view.setting[c]) for c in differs]
        return "_".join(slug(part) for part in parts)

    return [replace(view, slug=name(view)) for view in found]


def rows_table(view: View) -> pd.DataFrame:
    """One row per number of models and method variant, all numbers: what the printed, LaTeX and CSV tables show.

    Means and sample deviations are over whole draws without a failed layer (`draws` of them); `failed_draws` and
    `partial_draws` were left out. Where all draws without failures are partial, they are the mean (`only_partial`).
    Shares of layers and weights count a failed layer as not recovered. `known_draws` is how many draws any row of that
    number of models has, and `all_draws` whether more cannot be drawn.
    """
    models = len(view.context.get("models") or [])
    paper = paper_numbers(view.subset)
    rows = []
    for n, at_n in view.trials.groupby("n_loras"):
        known = at_n["draw"].nunique()
        for row in view.rows:
            mine = at_n[at_n["row"] == row]
            if mine.empty:
                continue
            layers = view.layers[(view.layers["n_loras"] == n) & (view.layers["row"] == row)]
            partial = mine["layers"] < view.layer_count
            failed = mine["failed_layers"] > 0
            good = mine[~partial & ~failed]
            only_partial = good.empty and not mine[~failed].empty
            good = mine[~failed] if only_partial else good
            entry = {
                "method": view.method(row),
                "label": row,
                "variant": mine["variant"].iloc[0],
                "n_loras": int(n),
                "draws": good["draw"].nunique(),
                "only_partial": only_partial,
                "known_draws": known,
                "all_draws": bool(models) and math.comb(models, int(n)) <= known,
                "failed_draws": int(failed.sum()),
                "partial_draws": 0 if only_partial else int((partial & ~failed).sum()),
                "w_error": good["w_error"].mean(),
                "w_error_std": good["w_error"].std(),
                "w_error_layer_std": good["w_error_layer_std"].mean(),
                "floor_w_error": layers["floor_w_error"].mean(),
                "exact_layers": float(layers["exact_layer"].fillna(False).astype(bool).sum() / len(mine)),
                "layers": view.layer_count,
                "exact_fraction": layers["exact_fraction"].astype(float).fillna(0).mean()
                if not layers["failed"].all()
                else math.nan,
                "seconds_per_layer": layers.loc[~layers["failed"].astype(bool), "seconds"].mean(),
                "failed_layers": int(layers["failed"].sum()),
                "missing_layers": int(known * view.layer_count - len(layers)),
            }
            for column in view.columns:
                entry[column] = mine[column].mean()
                entry[f"{column}_std"] = mine[column].std()
                entry[f"{column}_draws"] = int(mine[column].notna().sum())
            entry |= certificates(layers)
            reported = {}
            if paper and view.is_papers_setting and view.is_plain(row) and int(n) == paper["n_loras"]:
                reported = paper["rows"].get(view.method(row), {})
            for column, (mean, deviation) in reported.items():
                entry |= {f"paper_{column}": mean, f"paper_{column}_std": deviation}
            rows.append(entry)
    return pd.DataFrame(rows)


def certificates(layers: pd.DataFrame) -> dict[str, Any]:
    """How many layers a method certifies, and how many of those miss its prediction by more than `WRONG` decades.

    {} for a method that certifies nothing. A method certifies by the statistics `certificate` ("certified") and
    `predicted_w_error`; an error below the prediction is no miss.
    """
    if "stat_certificate" not in layers or layers["stat_certificate"].isna().all():
        return {}
    certified = layers["stat_certificate"] == "certified"
    predicted = pd.to_numeric(
        layers.get("stat_predicted_w_error", pd.Series(np.nan, index=layers.index)), errors="coerce"
    )
    expected = np.fmax(predicted, layers["floor_w_error"].astype(float))
    wrong = certified & ~layers["failed"].astype(bool) & (layers["w_error"] > expected + WRONG)
    return {"certified_share": float(certified.mean()), "wrong_certificates": int(wrong.sum())}
