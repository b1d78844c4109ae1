"""Tables, figures and the page from records, and the paper's own numbers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowra.imports import uncollected
from lowra.reporting.kept import Made

if TYPE_CHECKING:
    import pandas as pd

    from lowra.records import Records
    from lowra.reporting.views import View


NAMES = (
    *("cumulative", "by_models", "semantic_by_models", "predicted"),
    *("iterations", "error_against_loss", "error_against_score"),
)
"""The figures of a folder by the stem of their files: `figures.FIGURES`, which takes matplotlib to look at."""

HISTORY = "history.parquet"


def write(records: Records, folder: Path, *, methods_order: Sequence[str] | None = None, figures: bool = True) -> str:
    """Write the views of some records into a folder; returns the text for the terminal.

    `table.md`, `table.tex`, `table.csv`, `layers.parquet`, `trials.parquet` (and `history.parquet` where methods kept
    one), and the figures as PNG and SVG. Without `figures` those of an earlier state are removed: nothing stale stays
    beside a new table. methods_order: config keys of methods in the order of rows and legends.
    Raises LowraError when there are no records or the folder cannot be written to.
    """
    return put(made(records, folder, methods_order=methods_order, figures=figures), folder)


def put(report: Made, folder: Path) -> str:
    """Write a report into its folder and remove what an earlier state left there and this one does not have."""
    for name in NAMES:
        for kind in ("png", "svg"):
            for path in [folder / f"{name}.{kind}", *folder.glob(f"{name}_*.{kind}")]:
                if path.name not in report.files:
                    path.unlink(missing_ok=True)
    report.put(folder)
    if HISTORY not in report.files:
        (folder / HISTORY).unlink(missing_ok=True)
    return report.text


def made(records: Records, folder: Path, *, methods_order: Sequence[str] | None = None, figures: bool = True) -> Made:
    """What `write` writes, not written yet. Raises LowraError when there are no records."""
    from lowra.errors import LowraError
    from lowra.reporting import tables
    from lowra.reporting.escape import markdown_caption, markdown_text, slug
    from lowra.reporting.views import views

    found = views(records, methods_order)
    if not found:
        raise LowraError(f"There are no records to show in {folder}; run something first: python -m lowra.run --help.")
    files, drawn = _figures(found) if figures else ({}, {view.slug: [] for view in found})
    count = sum(map(len, drawn.values()))
    files |= _parquet(found)
    title = " and ".join(dict.fromkeys(f"{view.title} (source={view.source})" for view in found))
    parts = [f"# {markdown_text(title)}"]
    for view in found:
        table = tables.main_table(view)
        if len(found) > 1:
            parts.append(f"## {markdown_text(view.heading)}")
        parts += [markdown_caption(view.caption), tables.markdown(table)]
    explained = tables.legend(found)
    parts += [markdown_text(sentence) for sentence in (explained, *records.notes)]
    for view in found:
        if len(found) > 1:
            parts.append(f"## {markdown_text(view.heading)}: figures, types, depths")
        parts += [f"![{name}]({name}.png)" for name in drawn[view.slug]]
        for by, heading in (("layer_type", "By layer type"), ("depth", "By depth")):
            level = "###" if len(found) > 1 else "##"
            parts += [f"{level} {heading}", "Mean W-Error.", tables.markdown(tables.breakdown(view, by))]
    parts += ["## Where the records came from", tables.markdown(tables.provenance(found))]
    latex = (tables.latex(tables.main_table(v), v.caption, slug(v.heading).lower()) for v in found)
    texts = {
        "table.md": "\n\n".join(parts) + "\n",
        "table.csv": tables.csv(found),
        "table.tex": "% needs \\usepackage{booktabs}\n" + "\n".join(latex),
    }
    files |= {name: text.encode() for name, text in texts.items()}
    names = "table.md (.tex, .csv), layers.parquet, trials.parquet"
    if count:
        names += f", {count} figure{'s' * (count > 1)} (.png, .svg)"
    return Made(files, f"{_terminal(records, found)}\nWritten to {folder}: {names}.")


def text(records: Records, *, methods_order: Sequence[str] | None = None) -> str:
    """The same for the terminal alone: tables, what they mean, and which records came from where."""
    from lowra.reporting import tables
    from lowra.reporting.views import views

    found = views(records, methods_order)
    return f"{_terminal(records, found)}\n\nWhere the records came from:\n\n{tables.plain(tables.provenance(found))}"


def _terminal(records: Records, found: Sequence[View]) -> str:
    from lowra.reporting import tables

    parts = [part for view in found for part in (view.caption.replace("**", ""), tables.plain(tables.main_table(view)))]
    return "\n\n".join(["", *parts, tables.legend(found), *records.notes])


def _figures(found: Sequence[View]) -> tuple[dict[str, bytes], dict[str, list[str]]]:
    """The figures of each view as files, and the stems of these files by the view's slug."""
    with uncollected():
        from lowra.reporting.figures import FIGURES, FORMATS, drawn

    files: dict[str, bytes] = {}
    stems: dict[str, list[str]] = {view.slug: [] for view in found}
    for view in found:
        for name, draw in FIGURES.items():
            stem = f"{name}_{view.slug}" if view.slug else name
            figure = drawn(draw, [view], FORMATS)
            files |= {f"{stem}.{kind}": content for kind, content in figure.items()}
            if figure:
                stems[view.slug].append(stem)
    return files, stems


def _parquet(found: Sequence[View]) -> dict[str, bytes]:
    """The three tidy tables: layers, trials, history."""
    import pandas as pd

    from lowra.reporting import tables

    extra = ["row", "draw"]
    files = {}
    for name in ("layers", "trials", "history"):
        frames = [getattr(view, name) for view in found]
        frames = [frame for frame in frames if len(frame)]
        if frames:
            table = pd.concat(frames, ignore_index=True)
            if "folder" in table:
                table["folder"] = table["folder"].map(tables.short_folder)
            files[f"{name}.parquet"] = _of_frame(table.drop(columns=[c for c in extra if c in table]))
    return files


def _of_frame(table: pd.DataFrame) -> bytes:
    """A frame as parquet; a column of several types (a method's own statistics) becomes text."""
    for column in table.columns:
        if table[column].dtype == object and not column.startswith(("models", "weights")):
            kinds = {type(value) for value in table[column] if value is not None and value == value}
            if len(kinds) > 1:
                table = table.assign(**{column: table[column].map(lambda v: v if v is None or v != v else str(v))})
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()
