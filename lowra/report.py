"""Tables and figures from the records of a run: `python -m lowra.report results/vit/mini`.

`lowra.run` calls this at its end; by itself it makes them again without running anything.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from lowra.cli import tell_mistakes
from lowra.records import write_text
from lowra.reporting.figures import write_figures
from lowra.reporting.results import load
from lowra.reporting.tables import breakdown, main_table, markdown, plain, summary

LEGEND = (
    "W-Error is the mean over layers of log10 MSE (Eq. 8); an exactly recovered layer counts as -31.3. "
    "± is the deviation over draws, '± layers' that over layers; 'floor' is what the rounding of the merges leaves "
    "when every update is known. 'paper' columns are the paper's own full-size results."
)


def write(folder: Path) -> str:
    """Write `table.md` and the figures of a results folder; returns the table for the terminal."""
    results = load(folder)
    table = main_table(results)
    figures = write_figures(results)
    parts = [f"# {results.title} (source={results.run['source']})", results.caption, markdown(table), LEGEND]
    parts += [f"![{path.stem}]({path.name})" for path in figures]
    for by, heading in (("layer_type", "By layer type"), ("depth", "By depth")):
        parts += [f"## {heading}", "Mean W-Error.", markdown(breakdown(results, by))]
    write_text(folder / "table.md", "\n\n".join(parts) + "\n")
    caption = results.caption.replace("**", "")
    return f"\n{caption}\n\n{plain(table)}\n\n{LEGEND}\nWritten to {folder}: table.md, layers.parquet, trials.parquet."


def show(folder: Path) -> None:
    """Write and print."""
    print(write(folder))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m lowra.report", description="Make a run's tables and figures again."
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="results/SUBSET/SOURCE")
    parser.add_argument("--summary", action="store_true", help="only print one Markdown table of all the folders")
    arguments = parser.parse_args()
    if arguments.summary:
        tell_mistakes(lambda: print(markdown(summary([load(folder) for folder in arguments.folders]))))
    else:
        for folder in arguments.folders:
            tell_mistakes(functools.partial(show, folder))


if __name__ == "__main__":
    main()
