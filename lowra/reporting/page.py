"""One self-contained page of all there is: leaderboard, the paper's tables and figures by number, where it came from.

Everything is in the one HTML file: no network, no script but its own. The template escapes what it is given; only
captions (whose bold is meant) and marked texts come as markup made here.
"""

from __future__ import annotations

import base64
import io
import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lowra.errors import LowraError
from lowra.records import Records
from lowra.reporting import figures, tables
from lowra.reporting.escape import clean, html_caption
from lowra.reporting.exhibits import EXHIBITS, TRACKS, Exhibit, Shown, leaderboard, plain
from lowra.reporting.numbers import count, duration, number, pair, share
from lowra.reporting.paper import paper, paper_numbers
from lowra.reporting.statistics import RESAMPLES, comparison_table, comparisons
from lowra.reporting.texts import marked_html, read_texts
from lowra.reporting.views import View, views

TITLE = "Pre-fine-tuning weight recovery: results of lowra"
PROMPTS = 10  # of the texts shown, chosen as the paper chose Figure 17's: at random with seed 42
PICTURES = 12  # prompts whose pictures are shown
THUMBNAIL = 192  # pixels: larger pictures are scaled down to it


def page_of(records: Records) -> str:
    """The page of some records, of any subsets and sources.

    Texts and pictures are shown where the folders of the records still hold them. Raises LowraError when there are no
    records.
    """
    found = views(records)
    if not found:
        raise LowraError("There are no records to make a page of; run something first: python -m lowra.run --help.")
    environment = Environment(
        loader=PackageLoader("lowra.reporting", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )
    environment.filters["clean"] = clean
    contexts, anchors = _contexts(found)
    sources = [_source(name, found, records, anchors) for name in dict.fromkeys(view.source for view in found)]
    board = _board(found, anchors)
    contents = [("leaderboard", "Leaderboard")] if board["rows"] else []
    for source in sources:
        contents.append((f"source-{source['name']}", f"source={source['name']}"))
        contents += [(each["anchor"], each["heading"]) for each in source["exhibits"]]
        if source["comparisons"]:
            contents.append((f"compared-{source['name']}", "Methods compared pairwise"))
    contents += [("deviations", "Deviations"), ("records", "Where the records came from")]
    layers = len(records.layers)
    return environment.get_template("page.html.j2").render(
        title=TITLE,
        intro=f"Made from {layers:,} records of recovered layers, and from nothing else. Nothing on this page is the "
        "paper's own measurement except what is labelled as the paper's.",
        notes=records.notes,
        contents=contents,
        board=board,
        sources=sources,
        deviations=[each | {"measured": _measured(each["measured"], found)} for each in paper()["deviations"]],
        contexts=contexts,
        legend=tables.legend(found),
        resamples=f"{RESAMPLES:,}",
    )


# ---- Where records came from ------------------------------------------------------------------------------------

Anchors = Mapping[tuple[int, str], list[tuple[str, int]]]


def _contexts(found: Sequence[View]) -> tuple[list[dict[str, Any]], dict[str, tuple[str, int]]]:
    """The commands behind the records, numbered, and the anchor and number of each context."""
    lines: dict[tuple[str, ...], dict[str, Any]] = {}
    anchors: dict[str, tuple[str, int]] = {}
    for view in found:
        for (folder, key), mine in view.layers.groupby(["folder", "context"], sort=False):
            context = view.contexts.get(key) or {}
            facts = {
                "command": str(context.get("command") or "unknown"),
                "machine": tables.machine_text(context),
                "versions": tables.versions_text(context),
                "folder": tables.short_folder(folder),
            }
            line = lines.setdefault(tuple(facts.values()), facts | {"rows": {}, "records": 0, "newest": ""})
            line["rows"] |= dict.fromkeys(mine["row"])
            line["records"] += len(mine)
            line["newest"] = max(line["newest"], str(mine["finished"].max())[:16])
            line.setdefault("number", len(lines))
            line["anchor"] = f"record-{line['number']}"
            anchors[str(key)] = (line["anchor"], line["number"])
    return [line | {"methods": ", ".join(line["rows"])} for line in lines.values()], anchors


def _sources(layers: pd.DataFrame, anchors: Mapping[str, tuple[str, int]]) -> list[tuple[str, int]]:
    return sorted({anchors[str(key)] for key in layers["context"].unique()}, key=lambda each: each[1])


# ---- The leaderboard --------------------------------------------------------------------------------------------


def _board(found: Sequence[View], anchors: Mapping[str, tuple[str, int]]) -> dict[str, Any]:
    table = leaderboard(found)
    heads = ["method", "track", "subset", "source", "n", "draws", "W-Error ↓", "floor", "exact weights ↑", "score ↓"]
    heads += ["certified", "wrong certificates", "time/layer"]
    rows = []
    for row in table.to_dict("records"):
        view = found[row["view"]]
        used = view.layers[(view.layers["row"] == row["label"]) & (view.layers["n_loras"] == row["n_loras"])]
        error = pair(row["w_error"], row["w_error_std"]) or ("failed" if row["failed_layers"] else "missing")
        if row["only_partial"]:
            error += " (partial)"
        elif row["failed_layers"]:
            error += f" ({count(row['failed_layers'], 'layer')} failed)"
        score = pair(row["score"], row["score_std"])
        certified, wrong = row.get("certified_share", math.nan), row.get("wrong_certificates", math.nan)
        cells = [
            (row["label"], row["label"]),
            (row["track"], row["track"]),
            (row["subset"], row["subset"]),
            (row["source"], row["source"]),
            (row["n_loras"], str(row["n_loras"])),
            (row["draws"], str(row["draws"]) + (" of " + str(row["known_draws"]) if _fewer(row) else "")),
            (_sort(row["w_error"]), error),
            (_sort(row["floor_w_error"]), number(row["floor_w_error"])),
            (_sort(row["exact_fraction"]), share(row["exact_fraction"])),
            (_sort(row["score"]), f"{row['score_name']} {score}" if score else ""),
            (_sort(certified), share(certified)),
            (_sort(wrong), "" if math.isnan(wrong) else str(int(wrong))),
            (_sort(row["seconds_per_layer"]), duration(row["seconds_per_layer"])),
        ]
        rows.append({"cells": cells, "sources": _sources(used, anchors)})
    there = set(table["track"]) if len(table) else set()
    return {
        "heads": heads,
        "rows": rows,
        "tracks": [(name, words) for name, words in TRACKS.items() if name in there],
        "legend": "W-Error: mean and deviation over draws. Certified: share of layers the method itself vouches for; a "
        "certificate is wrong where the error is more than a decade above what the method predicts.",
    }


def _fewer(row: Mapping[str, Any]) -> bool:
    return bool(row["draws"] < row["known_draws"])


def _sort(value: float) -> str:
    return "" if math.isnan(value) else repr(float(value))


# ---- One source -------------------------------------------------------------------------------------------------


def _source(
    name: str, found: Sequence[View], records: Records, anchors: Mapping[str, tuple[str, int]]
) -> dict[str, Any]:
    mine = [view for view in found if view.source == name]
    exhibits = []
    for key, exhibit in EXHIBITS.items():
        shown = exhibit.show(mine)
        if shown is not None:
            made = _exhibit(key, exhibit, shown, name, records, anchors)
            if made:
                exhibits.append(made)
    compared = []
    for view in mine:
        numbers = paper_numbers(view.subset)
        n = numbers["n_loras"] if numbers and numbers["n_loras"] in set(view.trials["n_loras"]) else None
        n = int(view.trials["n_loras"].max()) if n is None else n
        chosen = plain(view)
        pairs = comparisons(chosen, n) if chosen.rows else []
        if pairs:
            compared.append((f"{view.heading}, n = {n}", comparison_table(pairs)))
    others = [
        (view.heading, Markup(html_caption(view.caption)), tables.main_table(view))
        for view in mine
        if not view.is_papers_setting or view.subset not in paper()["tables"]
    ]
    captions = [Markup(html_caption(view.caption)) for view in mine if view.is_papers_setting]
    return {"name": name, "captions": captions, "exhibits": exhibits, "comparisons": compared, "others": others}


def _exhibit(
    key: str,
    exhibit: Exhibit,
    shown: Shown,
    source: str,
    records: Records,
    anchors: Mapping[str, tuple[str, int]],
) -> dict[str, Any] | None:
    images = []
    if shown.figure:
        drawn = figures.drawn(getattr(figures, shown.figure), shown.views, ["svg"])
        if not drawn and not shown.tables:
            return None
        if drawn:
            images = [(_data("image/svg+xml", drawn["svg"]), f"{exhibit.place}: {exhibit.title}, source={source}")]
    texts = _texts(shown.views[0], records) if shown.gallery == "texts" else []
    pictures = _pictures(shown.views[0], records) if shown.gallery == "pictures" else None
    if shown.gallery and not texts and not pictures:
        return None
    layers = pd.concat([view.layers for view in shown.views])
    draws = layers.groupby("subset")["draw"].nunique()
    counts = ", ".join(f"{subset}: {count(int(n), 'draw')}" for subset, n in draws.items())
    days = layers["finished"].str[:10]
    when = days.min() if days.min() == days.max() else f"{days.min()} to {days.max()}"
    provenance = f"source={source}; {counts}; records of {when}."
    return {
        "anchor": f"{source}-{key}",
        "heading": f"{exhibit.place.split(',')[0]}: {exhibit.title}",
        "says": exhibit.says,
        "tables": shown.tables,
        "images": images,
        "texts": texts,
        "pictures": pictures,
        "provenance": provenance,
        "sources": _sources(layers, anchors),
        "command": f"python -m lowra.run experiment={key}" + ("" if source == "mini" else f" source={source}"),
    }


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# ---- Texts and pictures -----------------------------------------------------------------------------------------


def _columns(view: View, records: Records) -> tuple[list[Path], dict[str, str]]:
    """The folders that may hold outputs, and the outputs' labels with their headings: the truth, then the rows."""
    folders = [Path(folder) for folder in view.layers["folder"].unique()]
    names = {"reference": "Pre-FT (truth)"}
    scores = records.scores
    for column, value in view.setting.items():
        scores = scores[scores[column] == value]
    n = int(view.trials["n_loras"].max())
    numbers = paper_numbers(view.subset)
    if numbers and numbers["n_loras"] in set(view.trials["n_loras"]):
        n = int(numbers["n_loras"])
    for row in reversed(view.rows):
        variant = view.layers.loc[view.layers["row"] == row, "variant"].iloc[0]
        mine = scores[(scores["variant"] == variant) & (scores["n_loras"] == n) & (scores["trial"] == 0)]
        for weights in mine["weights"].head(1):
            label = str(weights[0])
            names[label] = f"{names[label]}, {row}" if label in names else row
    return folders, names


def _outputs(folders: Iterable[Path], names: Mapping[str, str], there: Callable[[Path, str], bool]) -> Path | None:
    """The folder of one metric that holds the outputs of the truth and of at least one model."""
    for folder in folders:
        for place in sorted((folder / "outputs").glob("*")):
            if there(place, "reference") and any(there(place, name) for name in names if name != "reference"):
                return place
    return None


def _texts(view: View, records: Records) -> list[tuple[str, list[tuple[str, Markup]]]]:
    folders, names = _columns(view, records)

    def there(place: Path, label: str) -> bool:
        return (place / f"{label}.json").is_file()

    place = _outputs(folders, names, there)
    if place is None:
        return []
    columns = {names[label]: read_texts(place, label) for label in names if there(place, label)}
    reference = columns["Pre-FT (truth)"]
    chosen = sorted(random.Random(42).sample(range(len(reference)), min(PROMPTS, len(reference))))
    return [
        (
            clean(reference[i][0]),
            [(name, Markup(marked_html(reference[i][1], texts[i][1]))) for name, texts in columns.items()],
        )
        for i in chosen
    ]


def _pictures(view: View, records: Records) -> dict[str, Any] | None:
    folders, names = _columns(view, records)

    def files(place: Path, label: str) -> list[Path]:
        return sorted((place / label).glob("*.png"))

    place = _outputs(folders, names, lambda place, label: bool(files(place, label)))
    if place is None:
        return None
    columns = {name: files(place, label) for label, name in names.items() if files(place, label)}
    rows = min(PICTURES, *(len(each) for each in columns.values()))
    listed = place / "prompts.json"
    prompts = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else []
    prompts = [clean(prompt) for prompt in prompts] + [""] * rows
    return {
        "names": list(columns),
        "rows": [
            (prompts[i], [_data("image/png", _thumbnail(each[i])) for each in columns.values()]) for i in range(rows)
        ],
    }


def _thumbnail(path: Path) -> bytes:
    from PIL import Image

    with Image.open(path) as picture:
        shown = picture.convert("RGB")
    shown.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    shown.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


# ---- What contradictions of the paper come to -------------------------------------------------------------------


def _measured(kind: str | None, found: Sequence[View]) -> str:
    """The measured effect of a choice, from the records that tell; "" where there is nothing to measure."""
    if kind == "steps":
        return _steps(found) or "Not measured here: experiment=steps_200."
    if kind == "dpo":
        return _readings(found) or "Not measured here: experiment=dpo_sft_adapter and experiment=dpo_base."
    return ""


def _steps(found: Sequence[View]) -> str:
    parts = []
    for view in found:
        if not view.is_papers_setting or view.subset not in ("vit", "stable_diffusion"):
            continue
        steps = {}
        for row in view.rows:
            options = view.options(row)
            if view.layers.loc[view.layers["row"] == row, "pretty"].iloc[0] != "Spectral DeTuning":
                continue
            if options.get("steps") in (200, 300) and _as_shipped(options):
                table = view.numbers[view.numbers["label"] == row]
                numbers = paper_numbers(view.subset)
                at = table[table["n_loras"] == (numbers or {}).get("n_loras")]
                if len(at):
                    steps[options["steps"]] = pair(at["w_error"].iloc[0], at["w_error_std"].iloc[0])
        if len(steps) == 2:
            parts.append(f"{view.title} ({view.source}): W-Error {steps[200]} with 200 steps, {steps[300]} with 300.")
    return " ".join(parts)


def _as_shipped(options: Mapping[str, Any]) -> bool:
    return bool(options.get("scheduler", True)) and not options.get("compress") and options.get("stop_after") is None


def _readings(found: Sequence[View]) -> str:
    parts = []
    for view in found:
        if view.subset != "mistral_dpo" or view.deviations():
            continue
        reading = ((view.context.get("config") or {}).get("builder") or {}).get("continues")
        rows = [row for row in view.rows if view.method(row) == "lora_ft" and view.is_plain(row)]
        table = view.numbers[view.numbers["label"].isin(rows)]
        if reading and len(table):
            parts.append((str(reading), pair(table["w_error"].iloc[0], table["w_error_std"].iloc[0]), view.source))
    if len({reading for reading, _, _ in parts}) < 2:
        return ""
    return "LoRA FT in miniature: " + "; ".join(f"{error} with {reading}" for reading, error, _ in parts) + "."
