"""Tables from records: mean and deviation over draws, the paper's numbers in columns of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lowra.reporting.escape import latex_text, markdown_text
from lowra.reporting.numbers import count, duration, number, pair, share
from lowra.reporting.paper import paper_numbers
from lowra.reporting.views import View

LEGEND = (
    "W-Error is the mean over layers of log10 MSE (Eq. 8); an exactly recovered layer counts as -31.3. "
    "± is the standard deviation over draws, '± layers' that over layers; 'floor' is what the rounding of the merges "
    "leaves when every update is known. 'paper' columns are the paper's own full-size results."
)
SBERT_FLOOR = " SBERT is log10 of a cosine distance: -15.654 means identical texts."


def legend(views: Sequence[View]) -> str:
    """What the columns of the views' tables mean, and what their marks do."""
    text = LEGEND
    if any("sbert" in view.columns for view in views):
        text += SBERT_FLOOR
    tables = [view.numbers for view in views]
    if any(int(table["failed_layers"].sum()) for table in tables):
        text += (
            " Draws with failed layers are left out of the mean W-Error and counted beside it; in shares of layers and "
            "weights a failed layer counts as not recovered."
        )
    if any(int(table["missing_layers"].sum()) for table in tables):
        text += " Missing layers have no record (yet); a draw without all of its layers is partial."
    return text


def _error_cell(row: Mapping[str, Any]) -> str:
    text = pair(row["w_error"], row["w_error_std"])
    if not text:
        return "failed" if row["failed_layers"] else "missing"
    if row["only_partial"]:
        return f"{text} (partial)"
    return f"{text} ({row['draws']} of {row['draws'] + row['failed_draws']} draws)" if row["failed_draws"] else text


def _draws_cell(row: Mapping[str, Any]) -> str:
    whole = 0 if row["only_partial"] else row["draws"]
    mine = whole + row["failed_draws"]
    if mine < row["known_draws"]:
        return f"{mine} of {row['known_draws']}"
    return f"{mine} (all there are)" if row["all_draws"] else str(mine)


def main_table(view: View) -> pd.DataFrame:
    """One row per number of models and method variant, as people read it; "" where there is nothing to say.

    ± is the standard deviation over draws; the deviation over layers has a column of its own, since the paper's ± is
    wider than draws alone explain. The paper's columns appear for its own number of models, subset and methods only.
    """
    paper = paper_numbers(view.subset)
    rows = []
    numbers = view.numbers.astype(object)
    for row in numbers.to_dict("records"):
        cells = {
            "Method": row["label"],
            "n": str(row["n_loras"]),
            "draws": _draws_cell(row),
            "W-Error ↓": _error_cell(row),
            "± layers": number(row["w_error_layer_std"]),
            "floor": number(row["floor_w_error"]),
            "exact layers": f"{row['exact_layers']:.1f}/{row['layers']}",
            "exact weights": share(row["exact_fraction"]),
        }
        for column, heading in view.columns.items():
            text = pair(row[column], row[f"{column}_std"])
            scored = row[f"{column}_draws"]
            if text and scored < row["draws"]:
                text += f" ({scored} of {row['draws']} draws)"
            cells[f"{heading} ↓"] = text
        cells["time/layer"] = duration(row["seconds_per_layer"])
        cells["failed"] = count(row["failed_layers"], "layer") if row["failed_layers"] else ""
        cells["missing"] = count(row["missing_layers"], "layer") if row["missing_layers"] else ""
        for column in ["w_error", *view.columns]:
            heading = "W-Error" if column == "w_error" else paper["columns"].get(column, column) if paper else ""
            value = row.get(f"paper_{column}", math.nan)
            cells[f"paper {heading}"] = pair(value, row[f"paper_{column}_std"]) if value == value else ""
        rows.append(cells)
    table = pd.DataFrame(rows).fillna("")
    optional = ["failed", "missing", *[c for c in table if c.startswith("paper ")]]
    return table.drop(columns=[c for c in optional if (table[c] == "").all()])


def summary(views: Sequence[View]) -> pd.DataFrame:
    """The main tables of several views below each other, without the paper's numbers."""
    rows = []
    for view in views:
        where = ", ".join([view.title, view.source, *view.deviations()])
        for row in main_table(view).to_dict("records"):
            semantic = "; ".join(f"{h} {row[f'{h} ↓']}" for h in view.columns.values() if row.get(f"{h} ↓"))
            kept = {key: row[key] for key in ("n", "draws", "Method", "W-Error ↓", "exact weights", "time/layer")}
            rows.append({"Subset": where} | kept | {"semantic metric ↓": semantic})
    table = pd.DataFrame(rows)
    return table.drop(columns=[c for c in ("semantic metric ↓",) if (table[c] == "").all()])


HEADINGS = {"layer_type": "type", "depth": "depth", "layer_model": "component", "n_loras": "n"}


def breakdown(view: View, by: str) -> pd.DataFrame:
    """Mean W-Error per row of the view (lines: `layer_type` or `depth`, with the component where there are several).

    A cell over failed layers says how many of how many it leaves out.
    """
    layers = view.layers
    index = (["n_loras"] if layers["n_loras"].nunique() > 1 else []) + (
        [by] if layers["layer_model"].nunique() == 1 else ["layer_model", by]
    )
    lines = []
    for key, group in layers.groupby(index, sort=True):
        cells = {HEADINGS[c]: str(value) for c, value in zip(index, key, strict=True)}
        for row in view.rows:
            mine = group[group["row"] == row]
            failed = int(mine["failed"].sum())
            text = number(mine["w_error"].mean()) if len(mine) > failed else "failed" if failed else ""
            cells[row] = f"{text} ({failed} of {len(mine)} failed)" if 0 < failed < len(mine) else text
        lines.append(cells)
    return pd.DataFrame(lines)


def provenance(views: Sequence[View]) -> pd.DataFrame:
    """Which records came from where: one line per folder (where there are several), command and machine."""
    lines: dict[tuple[str, ...], dict[str, Any]] = {}
    for view in views:
        for (folder, key), mine in view.layers.groupby(["folder", "context"], sort=False):
            context = view.contexts.get(key) or {}
            line: dict[str, Any] = {
                "folder": short_folder(folder),
                "command": str(context.get("command") or "unknown"),
                "machine": machine_text(context),
                "versions": versions_text(context),
            }
            line = lines.setdefault(tuple(line.values()), line | {"methods": {}, "records": 0, "newest": ""})
            line["methods"] |= dict.fromkeys(mine["row"])
            line["records"] += len(mine)
            line["newest"] = max(line["newest"], str(mine["finished"].max())[:16])
    table = pd.DataFrame([line | {"methods": ", ".join(line["methods"])} for line in lines.values()])
    order = ["folder", "methods", "records", "newest", "command", "machine", "versions"]
    return table[order if table["folder"].nunique() > 1 else order[1:]].astype(str)


def short_folder(folder: object) -> str:
    """A folder as seen from here, or its last parts: where it lies on this machine is nobody else's business."""
    path = Path(str(folder))
    if path.is_absolute():
        path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else Path(*path.parts[-3:])
    return path.as_posix()


def machine_text(context: Mapping[str, Any]) -> str:
    """The machine of a command in a few words."""
    machine = context.get("machine") or {}
    facts = [str(machine["processor"])] if machine.get("processor") else []
    facts += [count(int(machine["cores"]), "core")] if machine.get("cores") else []
    facts += [str(gpu) for gpu in dict.fromkeys(machine.get("gpus") or [])]
    if context.get("threads"):
        processes = count(int(context.get("jobs") or 1), "process", "processes")
        facts.append(f"{processes} of {count(int(context['threads']), 'thread')}")
    return ", ".join(facts) or "unknown"


def versions_text(context: Mapping[str, Any]) -> str:
    """The versions a command ran with."""
    return ", ".join(f"{name} {version}" for name, version in (context.get("versions") or {}).items()) or "unknown"


def markdown(table: pd.DataFrame) -> str:
    """A table as GitHub Markdown; no cell is taken for markup."""
    return "\n".join(_lines(table, markdown_text))


def _lines(table: pd.DataFrame, escape: Callable[[object], str]) -> list[str]:
    rows = [list(map(escape, row)) for row in table.to_numpy()]
    head = list(map(escape, table.columns))
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *["| " + " | ".join(row) + " |" for row in rows]]


def latex(table: pd.DataFrame, caption: str, label: str) -> str:
    r"""A table as LaTeX, for `\usepackage{booktabs}`."""
    rows = [" & ".join(map(latex_text, row)) + r" \\" for row in table.to_numpy()]
    head = " & ".join(map(latex_text, table.columns)) + r" \\"
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{latex_text(caption.replace('**', ''))}}}",
        rf"  \label{{tab:{label}}}",
        rf"  \begin{{tabular}}{{{'l' * len(table.columns)}}}",
        r"    \toprule",
        f"    {head}",
        r"    \midrule",
        *[f"    {row}" for row in rows],
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def csv(views: Sequence[View]) -> str:
    """The numbers of all views' rows, full precision, a column for each part of the setting."""
    frames = [view.numbers.assign(**view.setting) for view in views]
    table = pd.concat(frames, ignore_index=True)
    first = list(views[0].setting) if views else []
    return table[first + [c for c in table if c not in first]].to_csv(index=False, lineterminator="\n")


def plain(table: pd.DataFrame) -> str:
    """A table for the terminal, columns aligned."""
    cells: list[Sequence[str]] = [list(map(str, table.columns)), *[list(map(str, r)) for r in table.to_numpy()]]
    widths = [max(len(row[c]) for row in cells) for c in range(len(table.columns))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
