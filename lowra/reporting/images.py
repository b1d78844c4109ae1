"""Grids of generated pictures side by side (Figures 3 and 14 to 16)."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from lowra.errors import LowraError
from lowra.files import replacing
from lowra.reporting.escape import clean, plot_text
from lowra.reporting.figures import style

CELL_INCHES = 1.5  # of a picture with its gap, of which there are so many cells
GAP = 0.05
HEAD_INCHES = 0.5  # for the title, and for each line of a heading
LINE_INCHES = 0.17


def write_grid(
    artifacts: Path,
    labels: Sequence[str],
    out: Path,
    title: str,
    rows: int,
    headings: Sequence[str] | None = None,
) -> Path:
    """Write one PNG with a row per prompt and a column per model.

    artifacts: the folder a scorer kept its pictures in (`<label>/000.png`, ...; `prompts.json` labels the rows).
    labels: the columns, in order; headings: what to call them (the labels by default). rows: prompts shown, from the
    first on; fewer when there are fewer pictures.
    Raises LowraError when a label has no pictures.
    """
    columns = [sorted((artifacts / label).glob("*.png")) for label in labels]
    for label, pictures in zip(labels, columns, strict=True):
        if not pictures:
            raise LowraError(f"There are no pictures of {label!r} in {artifacts}; run with keep_outputs=true.")
    rows = min(rows, *(len(pictures) for pictures in columns))
    prompts = _prompts(artifacts / "prompts.json", rows)
    shown_as = [textwrap.fill(plot_text(heading), 20) for heading in headings or labels]
    top = HEAD_INCHES + LINE_INCHES * max(heading.count("\n") + 1 for heading in shown_as)
    # One pair of axes for all: with one for each picture matplotlib spends seconds on their frames.
    with style():
        figure = Figure(figsize=(CELL_INCHES * (len(labels) + 1), CELL_INCHES * rows + top))
        left, height = 1 / (len(labels) + 1), CELL_INCHES * rows / (CELL_INCHES * rows + top)
        axes = figure.add_axes((left, 0, 1 - left, height))
        for j, pictures in enumerate(columns):
            for i in range(rows):
                shown = _picture(pictures[i])
                # Small pictures of a miniature keep their pixels; large ones are scaled smoothly.
                scaling = "nearest" if shown.width < 128 else "antialiased"
                scale = (1 - GAP) / max(shown.size)
                right, below = j + shown.width * scale, i + shown.height * scale
                axes.imshow(shown, interpolation=scaling, extent=(j, right, below, i))
            axes.text(j + 0.5, -GAP, shown_as[j], fontsize=9, ha="center", va="bottom")
        for i in range(rows):
            prompt = textwrap.fill(plot_text(prompts[i], 120), 18)
            axes.text(-GAP, i + 0.5, prompt, fontsize=7, ha="right", va="center", multialignment="right")
        axes.set(xlim=(0, len(labels)), ylim=(rows, 0))
        axes.set_axis_off()
        figure.suptitle(plot_text(title, 120), fontsize=10, y=1 - 0.1 / figure.get_figheight(), va="top")
        # No creation date or version in the file: equal pictures give equal bytes.
        with replacing(out) as temporary:
            figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})
    return out


def _picture(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except OSError as error:
        raise LowraError(f"{path} is no picture ({error}); delete it and run again.") from None


def _prompts(path: Path, rows: int) -> list[str]:
    """The labels of the rows; blank where the file has none for a row."""
    try:
        prompts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except (OSError, ValueError) as error:
        raise LowraError(f"{path} holds no list of prompts ({error}); delete it and run again.") from None
    listed = [clean(prompt) for prompt in prompts] if isinstance(prompts, list) else []
    return (listed + [""] * rows)[:rows]
