"""Grids of generated pictures side by side (Figures 3 and 14 to 16)."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

from lowra.errors import LowraError

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
    prompts_file = artifacts / "prompts.json"
    prompts = json.loads(prompts_file.read_text()) if prompts_file.exists() else [""] * rows

    figure, axes = plt.subplots(
        rows,
        len(labels),
        figsize=(CELL_INCHES * (len(labels) + 1), CELL_INCHES * rows + 0.8),
        squeeze=False,
        layout="constrained",
    )
    for j, pictures in enumerate(columns):
        for i in range(rows):
            with Image.open(pictures[i]) as picture:
                # Small pictures of a miniature keep their pixels; large ones are scaled smoothly.
                scaling = "nearest" if picture.width < 128 else "antialiased"
                axes[i, j].imshow(picture.convert("RGB"), interpolation=scaling)
            axes[i, j].set(xticks=[], yticks=[])
            axes[i, j].spines[:].set_visible(False)
        axes[0, j].set_title((headings or labels)[j], fontsize=9)
    for i in range(rows):
        axes[i, 0].set_ylabel(
            textwrap.fill(prompts[i], 18), fontsize=7, rotation=0, ha="right", va="center", multialignment="right"
        )
    figure.suptitle(title, fontsize=10)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    # No creation date or version in the file: equal pictures give equal bytes.
    figure.savefig(partial, dpi=110, format="png", metadata={"Software": None})
    plt.close(figure)
    os.replace(partial, out)
    return out
