"""Grids of generated pictures side by side (Figures 3 and 14 to 16)."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

from lowra.errors import LowraError
from lowra.files import replacing
from lowra.reporting.escape import clean, plot_text
from lowra.reporting.figures import style

CELL_INCHES = 1.5


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
    with style():
        figure, axes = plt.subplots(
            rows,
            len(labels),
            figsize=(CELL_INCHES * (len(labels) + 1), CELL_INCHES * rows + 0.8),
            squeeze=False,
            layout="constrained",
        )
        for j, pictures in enumerate(columns):
            for i in range(rows):
                shown = _picture(pictures[i])
                # Small pictures of a miniature keep their pixels; large ones are scaled smoothly.
                scaling = "nearest" if shown.width < 128 else "antialiased"
                axes[i, j].imshow(shown, interpolation=scaling)
                axes[i, j].set(xticks=[], yticks=[])
                axes[i, j].spines[:].set_visible(False)
            axes[0, j].set_title(textwrap.fill(plot_text((headings or labels)[j]), 20), fontsize=9)
        for i in range(rows):
            axes[i, 0].set_ylabel(
                textwrap.fill(plot_text(prompts[i], 120), 18),
                fontsize=7,
                rotation=0,
                ha="right",
                va="center",
                multialignment="right",
            )
        figure.suptitle(plot_text(title, 120), fontsize=10)
        # No creation date or version in the file: equal pictures give equal bytes.
        with replacing(out) as temporary:
            figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})
        plt.close(figure)
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
