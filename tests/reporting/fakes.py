"""Records with known numbers, as `lowra.records.read` gives them."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lowra.records import LAYER_FIELDS, Records, key_of, write_records

METHODS = {"mean_lora": ("Mean LoRA", -5.0), "spectral_detuning": ("Spectral DeTuning", -16.0)}


def layer(method: str, label: str, error: float, **changes: Any) -> dict[str, Any]:
    """One record of a layer; `changes` to any column."""
    row = {
        "key": "k",
        "variant": f"{abs(hash(label)):016x}"[:16],
        "context": "c0",
        "folder": "runs/vit/mini",
        "subset": "vit",
        "source": "mini",
        "data": "d" * 16,
        "n_loras": 5,
        "trial": 0,
        "models": [0, 1, 2, 3, 4],
        "seed": 0,
        "method": method,
        "pretty": label.split(" (")[0],
        "label": label,
        "reference": "",
        "options": "{}",
        "merge_dtype": "float32",
        "merge_order": "once",
        "knows_rank": True,
        "device": "cpu",
        "layer_model": "",
        "layer_name": "query",
        "layer_type": "query",
        "depth": 0,
        "d": 96,
        "k": 96,
        "rank": 2,
        "w_error": error,
        "exact_fraction": 0.25,
        "exact_layer": False,
        "floor_w_error": -19.0,
        "candidates": 1,
        "seconds": 0.5,
        "status": "ok",
        "failed": False,
        "finished": "2026-11-24T12:00:00.000000Z",
    } | changes
    if row["failed"]:
        row |= {"w_error": np.nan, "exact_fraction": np.nan, "exact_layer": False, "status": "failed: ValueError: no"}
    return row


def context(**changes: Any) -> dict[str, Any]:
    """What is known of one command."""
    return {
        "command": "python -m lowra.run subset=vit",
        "config": {},
        "versions": {"lowra": "0.1.0", "torch": "2.14.1"},
        "machine": {"processor": "a laptop's", "cores": 2, "system": "Linux", "gpus": []},
        "threads": 1,
        "jobs": 2,
        "note": None,
        "title": "ViT",
        "caption": "**a miniature built and attacked on one machine, NOT the paper's experiment**",
        "models": [f"task{i}" for i in range(15)],
        "build": {},
        "kind": "image_classifier",
    } | changes


def draws(n: int, trials: int, models: int = 15) -> list[list[int]]:
    """Some distinct draws of n models."""
    return [list(chosen) for chosen, _ in zip(combinations(range(models), n), range(trials), strict=False)]


def rows(method: str, label: str, base: float, n: int = 5, trials: int = 2, **changes: Any) -> list[dict[str, Any]]:
    """Two layers in each draw: errors base - trial and base - trial - 1."""
    return [
        layer(
            method,
            label,
            base - trial - i,
            n_loras=n,
            trial=trial,
            models=models,
            layer_name=kind,
            layer_type=kind,
            depth=i,
            **changes,
        )
        for trial, models in enumerate(draws(n, trials))
        for i, kind in enumerate(("query", "value"))
    ]


SCORE_COLUMNS = [
    "subset", "source", "data", "n_loras", "trial", "models", "seed", "variant", "method", "label", "merge_dtype",
    "merge_order", "knows_rank", "device",
]  # fmt: skip


def scores(layers: pd.DataFrame, value: float = 2e-5, column: str = "act_dist", heading: str = "Act.-Dist.") -> Any:
    """A semantic score of every draw of some layers."""
    first = layers.drop_duplicates(["n_loras", "trial", "variant", "merge_dtype", "knows_rank", "data", "subset"])
    return first[SCORE_COLUMNS].assign(
        metric="activation_distance", column=column, heading=heading, settings="{}", value=value
    )


def records(layers: list[dict[str, Any]] | None = None, score: float | None = 2e-5, **contexts: Any) -> Records:
    """Records of two methods, two draws, two layers, unless others are given."""
    if layers is None:
        layers = [row for method, (label, base) in METHODS.items() for row in rows(method, label, base)]
    table = pd.DataFrame(layers)
    scored = scores(table, score) if score is not None and len(table) else pd.DataFrame()
    return Records(table, scored, pd.DataFrame(), contexts or {"c0": context()})


def folder(place: Path, layers: list[dict[str, Any]], **contexts: Any) -> Path:
    """A run folder that holds these records, as a finished process leaves it."""
    whole = []
    for row in layers:
        stats = {name.removeprefix("stat_"): value for name, value in row.items() if name.startswith("stat_")}
        record = {name: row.get(name) for name in LAYER_FIELDS} | {"kind": "layer", "stats": json.dumps(stats)}
        record |= {"context": row["context"], "finished": row["finished"], "weights": []}
        known = {name: row[name] for name in ("data", "models", "layer_name", "merge_dtype", "knows_rank", "variant")}
        whole.append(record | {"key": key_of(known)})
    write_records(whole, contexts or {"c0": context()}, place / "records" / "p1.parquet")
    return place
