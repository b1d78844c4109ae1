"""What a recovery says of itself: `recovery.json` for programs, a model card for people, one picture of the model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowra import __version__
from lowra.bench.names import depths, layer_type

if TYPE_CHECKING:
    from lowra.recovery.session import Plan

CARD, RECORDS, PICTURE, MASKS = "README.md", "recovery.json", "recovery.png", "sure.safetensors"

# What each certainty means, in a reader's words, and its colour; best first.
MEANING = {
    "copied": ("identical in all models, copied", "#c9ced6"),
    "agreed": ("bit for bit the same in several models", "#8fb8de"),
    "certified": ("recovered, certified", "#1a7f4b"),
    "shared": ("recovered, not certified: updates share directions", "#8cc76b"),
    "weak": ("recovered, less precise: weakly conditioned", "#c6d94e"),
    "up_to_scale": ("recovered up to a scale per row or column", "#d9c95a"),
    "up_to_rotation": ("recovered up to a rotation per head", "#d9b05a"),
    "inconsistent": ("recovered, but something contradicts it", "#f2c14e"),
    "low_signal": ("updates near the rounding: an estimate", "#f09d51"),
    "uncertified": ("estimated by a method that does not certify", "#d9a5c7"),
    "too_few_models": ("too few models: in part open", "#e0704f"),
    "not_identifiable": ("not identifiable: the mean, in part or whole", "#c0392b"),
    "kept": ("not of low rank, kept as configured", "#7d6b91"),
}
SURE = ("copied", "agreed", "certified")

# So many layers are listed one by one; the rest is in recovery.json.
LISTED = 400


def counts(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Tensors per certainty, best first."""
    found = Counter(record["certainty"] for record in records)
    return {certainty: found[certainty] for certainty in MEANING if found[certainty]}


def records_text(plan: Plan, records: Sequence[Mapping[str, Any]], key: str) -> str:
    """The recovery as JSON: the command, the models, and a record per tensor."""
    labels = [model.label for model in plan.models]
    content = {
        "format": 1,
        "key": key,
        "lowra": __version__,
        "command": plan.request.command,
        "method": repr(plan.request.method),
        "rank": plan.request.rank,
        "keep": plan.request.keep,
        "seed": plan.request.seed,
        "models": labels,
        "bases": [[labels[i] for i in base] for base in plan.bases],
        "left_out": {labels[i]: kin.looks_like for i, kin in plan.strangers.items()},
        "not_in_the_first": {
            label: list(names) for label, names in zip(labels, plan.matching.extra, strict=True) if names
        },
        "counts": counts(records),
        "tensors": list(records),
    }
    return json.dumps(content, indent=1) + "\n"


# ---- The card ---------------------------------------------------------------------------------------------------


def text(plan: Plan, records: Sequence[Mapping[str, Any]], lacking: Mapping[str, Sequence[str]]) -> str:
    """The model card, Markdown. lacking: per model, tensors its extracted adapter does not carry."""
    labels = [model.label for model in plan.models]
    used = [labels[i] for i in plan.used]
    audit = plan.request.output is None
    lines = ["---", "tags: [lowra, recovered-weights]", "---", ""]
    lines += [f"# {'What these releases give away' if audit else 'Recovered base model'}", ""]
    lines += [headline(plan, records), ""]
    lines += (
        [f"![The model layer by layer, coloured by certainty]({PICTURE})", ""]
        if not audit or plan.request.report
        else []
    )
    lines += ["```", plan.request.command or "lowra.recover_checkpoints(...)", "```", ""]
    lines += [f"lowra {__version__}, {plan.request.method.pretty}; ranks "]
    lines[-1] += "found, not told." if plan.request.rank is None else f"granted: {plan.request.rank}."
    lines += ["", "## Models", ""]
    lines += [f"- {code(label)}" for label in used]
    lines += [f"- {code(labels[i])} **left out**: {kin.looks_like}" for i, kin in plan.strangers.items()]
    needed = int(getattr(plan.request.method, "needs_models", 2))
    for base in plan.bases[1:]:
        if len(base) >= needed:
            names = ",".join(labels[i] for i in base)
            lines += ["", f"{len(base)} of those left out share a base of their own; `models='[{names}]'` recovers it."]
    lines += ["", "## By kind of layer", ""]
    lines += by_kind(records, used)
    if audit:
        lines += fewer(records)
    lines += ["", "## What is not recovered", ""]
    lines += not_recovered(records)
    for label, extra in zip(labels, plan.matching.extra, strict=True):
        if extra:
            lines += [f"- {len(extra)} tensors of {code(label)} have no place in this layout: {first_few(extra)}"]
    for label, lacks in lacking.items():
        if lacks:
            lines += [
                f"- The adapter of {code(label)} lacks {len(lacks)} tensors in which it differs: {first_few(lacks)}"
            ]
    if plan.request.sure:
        shares = [record["sure"] for record in records if record.get("sure") is not None]
        lines += ["", "## Which weights are sure", ""]
        lines += [
            f"`{MASKS}` has a mask for each of {len(shares)} tensors: true where a weight is exact beyond reasonable "
            f"doubt ({percent(sum(shares) / len(shares))} of them on average)."
            if shares
            else f"The masks of `{MASKS}` are empty: they are known for half-precision merges of a base that is, too."
        ]
    lines += ["", "## Layer by layer", "", *listing(records)]
    lines += ["", *reading(audit)]
    return "\n".join(lines) + "\n"


def first_few(names: Sequence[str], count: int = 5) -> str:
    """The first names as code, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(code(name) for name in names[:count]) + more


def headline(plan: Plan, records: Sequence[Mapping[str, Any]]) -> str:
    """What came of it in one or two sentences."""
    asked = [record for record in records if record["decision"] == "recovered"]
    sure = [record for record in asked if record["certainty"] == "certified"]
    kept = sum(record["certainty"] == "kept" for record in records)
    copied = sum(record["decision"] in ("copied", "agreed") for record in records)
    start = f"From {len(plan.used)} fine-tuned models: of {len(asked)} matrices changed by updates of low rank, "
    start += f"{len(sure)} are certified"
    exact = [r for r in asked if to_the_last_bit(r)]
    if exact:
        start += f", {len(exact)} of them expected to the last bit"
    return (
        f"{start}. {copied} tensors are the same in the models and were copied; {kept} were changed in full and are "
        "not recovered."
    )


def to_the_last_bit(record: Mapping[str, Any]) -> bool:
    """Whether less than one wrong weight is expected in a tensor."""
    size = 1
    for extent in record["shape"]:
        size *= extent
    share = record.get("predicted_exact")
    return record["certainty"] == "certified" and share is not None and (1 - share) * size < 1


def by_kind(records: Sequence[Mapping[str, Any]], used: Sequence[str]) -> list[str]:
    """A table row per kind of layer that differs between models."""
    kinds: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        if record["decision"] != "copied":
            kinds.setdefault((record["component"], layer_type(record["name"])), []).append(record)
    if not kinds:
        return ["No tensor differs between the models."]
    short = short_names(used)
    rows = [
        "| layers | certified | to the last bit | ranks found | grid | predicted W-Error | predicted exact |",
        "|---|---|---|---|---|---|---|",
    ]
    for (component, kind), group in kinds.items():
        name = f"{component}: {kind}" if component else kind
        asked = [record for record in group if record["decision"] == "recovered"]
        if not asked:
            words = ", ".join(sorted({MEANING[record["certainty"]][0] for record in group}))
            rows.append(f"| {cell(name)} ({len(group)}) | - | - | - | - | {words} | - |")
            continue
        sure = sum(record["certainty"] == "certified" for record in asked)
        bits = sum(to_the_last_bit(record) for record in asked)
        ranks = "; ".join(f"{short[label]}: {span(asked, label)}" for label in used if span(asked, label))
        grids = ", ".join(sorted({record["grid"] for record in asked if "grid" in record})) or "-"
        errors = [record["predicted_w_error"] for record in asked if "predicted_w_error" in record]
        error = f"{sum(errors) / len(errors):.2f}" if errors else "-"
        shares = [record["predicted_exact"] for record in asked if record.get("predicted_exact") is not None]
        share = percent(sum(shares) / len(shares)) if shares else "-"
        rows.append(
            f"| {cell(name)} ({len(group)}) | {sure} of {len(group)} | {bits} | {cell(ranks) or '-'} | {grids} "
            f"| {error} | {share} |"
        )
    return rows


def span(records: Sequence[Mapping[str, Any]], label: str) -> str:
    """The ranks of one model over several layers: one number, or the least and the greatest."""
    ranks = [record["ranks"][label] for record in records if label in record.get("ranks", {})]
    if not ranks:
        return ""
    return str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"


def fewer(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """For an audit: what the releases without the last one would give away."""
    asked = [record for record in records if "with_one_fewer" in record]
    if not asked:
        return []
    now = sum(record["certainty"] == "certified" for record in asked)
    then = sum(record["with_one_fewer"] == "certified" for record in asked)
    few = sum(record["with_one_fewer"] == "too_few_models" for record in asked)
    say = f"With one release fewer (the last one withheld), {then} of these {len(asked)} matrices would be certified"
    say += f" instead of {now}."
    if few == len(asked):
        say += " So few models leave a block of every matrix open."
    return ["", "## With one release fewer", "", say]


def not_recovered(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line per reason, with how many tensors and the first few names."""
    reasons: dict[str, list[str]] = {}
    for record in records:
        if record["certainty"] not in SURE:
            reasons.setdefault(record["status"], []).append(label_of(record))
        if record.get("rows_not_recovered"):
            say = "Rows that not all models have are the first model's"
            reasons.setdefault(say, []).append(f"{label_of(record)}, the last {record['rows_not_recovered']}")
    if not reasons:
        return ["Everything that differs between the models is certified."]
    lines = []
    for status, names in reasons.items():
        lines.append(f"- {first_few(names, 3)}: {cell(status)}")
    return lines


def listing(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table row per tensor that differs between models."""
    differ = [record for record in records if record["decision"] != "copied"]
    if not differ:
        return []
    rows = ["<details><summary>All tensors that differ</summary>", ""]
    rows += ["| tensor | certainty | ranks | grid | predicted W-Error | predicted exact |", "|---|---|---|---|---|---|"]
    for record in differ[:LISTED]:
        ranks = ", ".join(map(str, record.get("ranks", {}).values())) or "-"
        error = f"{record['predicted_w_error']:.2f}" if "predicted_w_error" in record else "-"
        share = percent(record["predicted_exact"]) if record.get("predicted_exact") is not None else "-"
        what = record["certainty"].replace("_", " ")
        rows.append(f"| {code(label_of(record))} | {what} | {ranks} | {record.get('grid', '-')} | {error} | {share} |")
    if len(differ) > LISTED:
        rows += ["", f"... and {len(differ) - LISTED} more, in `{RECORDS}`."]
    return [*rows, "", "</details>"]


def reading(audit: bool) -> list[str]:
    """How to read the card."""
    return [
        "## How to read this",
        "",
        "*Certified*: the merges determine the matrix, up to a component that all updates (or most) share, which no "
        "merge can show. *Predicted W-Error* is the log10 of the mean squared error expected before rounding to the "
        "grid; *predicted exact* the share of weights expected to equal the base's bit for bit. Both are predictions "
        "made without knowing the base. *Grid* is the number format the base was stored in, as its weights show it.",
        *([] if audit else ["", f"`{RECORDS}` holds a record per tensor."]),
    ]


def percent(share: float) -> str:
    """A share as a percentage that never rounds up to all."""
    if share >= 1:
        return "100%"
    return f"{min(share, 0.999999999) * 100:.4f}%" if share < 0.999999 else "> 99.9999%"


def label_of(record: Mapping[str, Any]) -> str:
    """Component and name in one string."""
    return f"{record['component']}/{record['name']}" if record["component"] else str(record["name"])


def short_names(labels: Sequence[str]) -> dict[str, str]:
    """The last part of every path, where these differ; else the labels."""
    last = {label: Path(label).name or label for label in labels}
    return last if len(set(last.values())) == len(last) else {label: label for label in labels}


def cell(value: str) -> str:
    """Foreign text inside a Markdown table or line: neither columns nor tags nor links of its own."""
    for mark in "\\`*_[]|<>":
        value = value.replace(mark, "\\" + mark) if mark != "<" else value.replace("<", "&lt;")
    return " ".join(value.split())


def code(value: str) -> str:
    """Foreign text as code."""
    return "`" + " ".join(value.replace("`", "'").replace("|", "/").split()) + "`"


# ---- The picture ------------------------------------------------------------------------------------------------


def draw(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The model layer by layer: a square per tensor, kinds of layers over depth, coloured by certainty."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    shown = [r for r in records if len(r["shape"]) >= 2] or list(records)
    at_depth = depths([(r["component"], r["name"]) for r in shown])
    kinds: dict[str, list[tuple[int, str]]] = {}
    for record, depth in zip(shown, at_depth, strict=True):
        kind = layer_type(record["name"])
        kind = f"{record['component']}: {kind}" if record["component"] else kind
        kinds.setdefault(kind, []).append((depth, record["certainty"]))
    if len(kinds) > 60:  # of a model without a plain repeating structure: only what differs
        kinds = {k: v for k, v in kinds.items() if any(c != "copied" for _, c in v)} or dict(list(kinds.items())[:60])
        kinds = dict(list(kinds.items())[:60])
    width = max(max(depth for depth, _ in squares) for squares in kinds.values()) + 1
    figure = Figure(figsize=(min(14.0, 4.5 + 0.28 * max(width, 6)), 1.5 + 0.25 * len(kinds)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    order = list(MEANING)
    for row, squares in enumerate(kinds.values()):
        worst: dict[int, str] = {}
        for depth, certainty in squares:
            worst[depth] = max(worst.get(depth, certainty), certainty, key=order.index)
        for depth, certainty in worst.items():
            axes.add_patch(Rectangle((depth + 0.06, row + 0.06), 0.88, 0.88, color=MEANING[certainty][1], lw=0))
    axes.set_xlim(0, max(width, 6))
    axes.set_ylim(len(kinds), 0)
    axes.set_yticks([row + 0.5 for row in range(len(kinds))], [plain(kind) for kind in kinds], fontsize=8)
    ticks = range(0, width, max(1, width // 12))
    axes.set_xticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks], fontsize=8)
    axes.set_xlabel("block", fontsize=9)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    present = [c for c in order if any(certainty == c for squares in kinds.values() for _, certainty in squares)]
    handles = [Patch(color=MEANING[c][1], label=MEANING[c][0]) for c in present]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, format="png", dpi=130, metadata={"Software": None})


def plain(label: str) -> str:
    """Foreign text for a figure: never mathematics, not too long."""
    label = label.replace("$", r"\$")
    return label if len(label) <= 48 else "..." + label[-45:]
