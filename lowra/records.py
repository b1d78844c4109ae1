"""Records: one JSON file per finished cell (draw x method), and the two tidy tables made from them.

A cell is named by a digest of everything that decides its numbers, so a changed configuration is never mistaken for
the same cell. While a cell is under way its layers are journalled one line each; a killed run continues there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowra.bench.draws import Draw
from lowra.errors import LowraError

COORDINATES = ("n_loras", "trial", "method", "merge_dtype", "knows_rank")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def _json_safe(value: Any) -> Any:
    """JSON has no NaN or infinity; strings stand in for them, which `_json_back` undoes."""
    if isinstance(value, dict):
        return {k: _json_safe(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def _json_back(pairs: dict[str, Any]) -> Any:
    return float(pairs["float"]) if pairs.keys() == {"float"} else pairs


@dataclass(frozen=True)
class Cell:
    """One draw recovered by one method. `settings` holds everything that decides the numbers."""

    draw: Draw
    method: str
    settings: dict[str, Any]

    @property
    def digest(self) -> str:
        """Sixteen hex digits that name the cell."""
        everything = {
            "n_loras": self.draw.n_loras,
            "trial": self.draw.trial,
            "models": self.draw.models,
            "method": self.method,
            **self.settings,
        }
        return hashlib.sha256(json.dumps(everything, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Store:
    """The records of one (subset, source) folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check_writable(self) -> None:
        """Raise LowraError if nothing can be written here, before any work is done."""
        made = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise LowraError(
                f"Cannot write results to {self.folder} ({error.strerror}); give another with results_dir=FOLDER."
            ) from None
        for path in made:  # nothing half-written stays behind a later error
            path.rmdir()

    def _stem(self, cell: Cell) -> Path:
        _, n_loras, trial = str(cell.draw).split("/")
        return self.folder / "cells" / n_loras / trial / f"{cell.method}-{cell.digest}"

    def load(self, cell: Cell) -> dict[str, Any] | None:
        """The finished record of a cell, or None. Cells with a failed layer count as unfinished."""
        path = self._stem(cell).with_suffix(".json")
        if not path.exists():
            return None
        record = json.loads(path.read_text(), object_hook=_json_back)
        return None if record["trial"]["failed_layers"] else record

    def finish(self, cell: Cell, record: dict[str, Any]) -> None:
        """Keep a cell's record and drop its journal and scratch files."""
        stem = self._stem(cell)
        write_text(stem.with_suffix(".json"), json.dumps(_json_safe(record), default=str) + "\n")
        stem.with_suffix(".jsonl").unlink(missing_ok=True)
        shutil.rmtree(self.scratch(cell), ignore_errors=True)

    def journal(self, cell: Cell) -> list[dict[str, Any]]:
        """The layers a killed run had finished, in order; a line cut short by the kill is ignored."""
        path = self._stem(cell).with_suffix(".jsonl")
        rows = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    rows.append(json.loads(line, object_hook=_json_back))
                except json.JSONDecodeError:
                    break
        # The rest is appended after the whole lines only.
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(_json_safe(row), default=str) + "\n" for row in rows))
        return rows

    def append(self, cell: Cell, row: dict[str, Any]) -> None:
        """Journal one finished layer."""
        with self._stem(cell).with_suffix(".jsonl").open("a") as file:
            file.write(json.dumps(_json_safe(row), default=str) + "\n")

    def scratch(self, cell: Cell) -> Path:
        """Where a cell's recovered weights wait for the semantic metrics."""
        return self.folder / "scratch" / cell.digest

    def keep_weights(self, cell: Cell, index: int, candidates: Tensor) -> None:
        """Keep one layer's candidates (c, d, k) until the cell is scored."""
        folder = self.scratch(cell)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{index}.safetensors"
        save_file({str(c): candidate.contiguous() for c, candidate in enumerate(candidates)}, temporary)
        os.replace(temporary, folder / f"{index}.safetensors")

    def has_weights(self, cell: Cell, index: int) -> bool:
        """Whether a layer's candidates are still there."""
        return (self.scratch(cell) / f"{index}.safetensors").exists()

    def weights(self, cell: Cell, index: int) -> dict[str, Tensor]:
        """One layer's candidates, memory-mapped: {"0": (d, k), ...}."""
        return load_file(self.scratch(cell) / f"{index}.safetensors")

    def records(self) -> Iterator[dict[str, Any]]:
        """All finished records of the folder, oldest first."""
        paths = sorted(self.folder.glob("cells/*/*/*.json"), key=lambda p: (p.stat().st_mtime_ns, p.name))
        for path in paths:
            yield json.loads(path.read_text(), object_hook=_json_back)

    def tables(self, fingerprint: str, current: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Write `layers.parquet` and `trials.parquet` and return both.

        They hold the current run's cells and, for coordinates it did not touch, the newest earlier ones of the same
        data; records of other data stay in `cells/` only. current: digests of the current run's cells.
        """
        newest: dict[tuple[Any, ...], dict[str, Any]] = {}
        mine = set(current)
        for record in self.records():
            if record["fingerprint"] != fingerprint:
                continue
            key = tuple(record["trial"][c] for c in COORDINATES)
            if key not in newest or record["cell"] in mine or newest[key]["cell"] not in mine:
                newest[key] = record
        kept = sorted(newest.values(), key=lambda r: tuple(str(r["trial"][c]).zfill(4) for c in COORDINATES))
        trials = pd.DataFrame([record["trial"] for record in kept])
        layers = pd.DataFrame([row for record in kept for row in record["layers"]])
        self._write_table(trials, "trials")
        self._write_table(layers, "layers")
        history = [row for record in kept for row in record.get("history", [])]
        if history:
            self._write_table(pd.DataFrame(history), "history")
        return layers, trials

    def _write_table(self, table: pd.DataFrame, name: str) -> None:
        temporary = self.folder / f".{name}.{os.getpid()}.parquet"
        table.to_parquet(temporary, index=False)
        os.replace(temporary, self.folder / f"{name}.parquet")


def weights_digest(weights: dict[tuple[str, str], Tensor]) -> str:
    """A digest of recovered weights: equal weights are scored once."""
    digest = hashlib.sha256()
    for (component, name), tensor in sorted(weights.items()):
        digest.update(f"{component}|{name}|{tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Records:
    """Placeholder until the store lands: the union of the records of some folders."""

    layers: pd.DataFrame
    scores: pd.DataFrame
    history: pd.DataFrame
    contexts: dict[str, dict[str, Any]]


TRIAL = [
    "subset", "source", "data", "n_loras", "trial", "seed", "variant", "method", "label", "merge_dtype", "merge_order",
    "knows_rank", "device",
]  # fmt: skip


def trials(layers: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Placeholder until the store lands."""
    rows = []
    for key, group in layers.groupby(TRIAL, sort=False):
        row = dict(zip(TRIAL, key, strict=True))
        row["models"] = group["models"].iloc[0]
        row["w_error"] = group["w_error"].mean(skipna=False)
        row["w_error_layer_std"] = group["w_error"].std() if len(group) > 1 else 0.0
        row["exact_fraction"] = group["exact_fraction"].mean(skipna=False)
        row["exact_layers"] = int(group["exact_layer"].sum())
        row["layers"] = len(group)
        row["failed_layers"] = int(group["failed"].sum())
        row["seconds"] = group["seconds"].sum()
        rows.append(row)
    table = pd.DataFrame(rows)
    if len(scores):
        wide = scores.pivot_table(index=TRIAL, columns="column", values="value").reset_index()
        table = table.merge(wide, on=TRIAL, how="left")
    return table
