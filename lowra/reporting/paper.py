"""What the paper reports, read from `paper.json`: no run of this project produced any of it."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any


@functools.cache
def paper() -> dict[str, Any]:
    """The whole file: tables, the data set's summary, numbers the figures and the text state, contradictions."""
    text = resources.files("lowra.reporting").joinpath("paper.json").read_text(encoding="utf-8")
    return json.loads(text)  # type: ignore[no-any-return]


def paper_numbers(subset: str) -> dict[str, Any] | None:
    """The rows of a subset's table, with the names of its columns, or None for data the paper has none for."""
    table = paper()["tables"].get(subset)
    return table and table | {"columns": paper()["columns"]}
