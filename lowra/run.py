"""The pipeline: `python -m lowra.run subset=vit`.

build or fetch a subset -> draw L models ten times -> merge -> recover -> score -> records -> report.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

import lowra
import lowra.methods
from lowra import report
from lowra.bench import draws as drawing
from lowra.bench.merging import merge, merge_dtype
from lowra.bench.names import depths, layer_type
from lowra.bench.schema import LayerInfo
from lowra.bench.sources import Data, open_data, weights_only
from lowra.cli import command
from lowra.errors import LowraError
from lowra.methods import Method, Observation, as_method, check_observation
from lowra.metrics.base import Metric, Scorer
from lowra.metrics.weight_error import EXACT, exact_fraction, floor_error, weight_error
from lowra.records import Cell, Store, weights_digest, write_text
from lowra.reporting.images import write_grid
from lowra.reporting.texts import write_texts

PACKAGES = ("torch", "transformers", "diffusers", "peft", "trl", "datasets", "sentence-transformers", "lpips", "numpy")


GRID_ROWS = 12  # prompts in a grid of images: what a page can show


@dataclass
class Run:
    """One run, checked and opened: everything the loop over cells needs."""

    cfg: DictConfig
    methods: dict[str, Method]
    metrics: dict[str, Metric]
    data: Data
    fingerprint: str
    layers: tuple[int, ...]
    depths: tuple[int, ...]
    draws: tuple[drawing.Draw, ...]
    store: Store
    device: torch.device
    floors: dict[tuple[drawing.Draw, int], float] = field(default_factory=dict)
    scorers: dict[str, Scorer] = field(default_factory=dict)
    scored: dict[tuple[str, str], tuple[str, dict[str, float]]] = field(default_factory=dict)

    def cells(self) -> list[Cell]:
        """All cells of the run, draw by draw, so that a run cut short has whole draws."""
        settings = {name: self._settings(name) for name in self.methods}  # reads the methods' files, so once
        return [Cell(draw, name, settings[name]) for draw in self.draws for name in self.methods]

    def _settings(self, name: str) -> dict[str, Any]:
        cfg = self.cfg
        return {
            "lowra": lowra.__version__,
            "fingerprint": self.fingerprint,
            "layers": [self.data.table.infos[i].label for i in self.layers],
            "seed": cfg.seed,
            "knows_rank": cfg.knows_rank,
            "merge_dtype": cfg.merge.dtype,
            "method_config": OmegaConf.to_container(cfg.methods[name], resolve=True),
            # Editing a method's file makes its cells new ones: nobody is judged by what an older version computed.
            "method_source": source_digest(self.methods[name]),
            "metrics": OmegaConf.to_container(cfg.get("metrics") or OmegaConf.create({}), resolve=True),
        }


def source_digest(method: Method) -> str:
    """A digest of the code a method is made of: its file, or all files of its package where it has one of its own."""
    target = getattr(method, "function", None)
    target = getattr(target, "func", target) or type(method)
    module = sys.modules.get(target.__module__)
    file = getattr(module, "__file__", None)
    if module is None or file is None:  # defined at a prompt: nothing to read
        return ""
    own_package = module.__package__ not in ("", None, lowra.methods.__name__)
    files = sorted(Path(file).parent.glob("*.py")) if own_package else [Path(file)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


# ---- Before any heavy work --------------------------------------------------------------------------------------


def check_settings(cfg: DictConfig) -> None:
    """Raise LowraError for settings that cannot work, before anything is built, fetched or written."""
    merge_dtype(cfg.merge.dtype)
    for key, kind, name in (
        ("trials", int, "a whole number"),
        ("seed", int, "a whole number"),
        ("knows_rank", bool, "true or false"),
        ("keep_outputs", bool, "true or false"),
    ):
        if type(cfg[key]) is not kind:
            raise LowraError(f"{key} is {cfg[key]!r}; expected {name}.")
    if cfg.trials < 1:
        raise LowraError(f"trials is {cfg.trials}; at least 1 draw is needed.")
    if not cfg.get("methods"):
        raise LowraError("methods is empty; choose some of the files in conf/methods, such as methods=[mean_lora].")
    for n in n_loras(cfg):
        if type(n) is not int:
            raise LowraError(f"n_loras is {cfg.n_loras!r}; expected a whole number, or a list such as [2,3,5].")
        if n < 2:
            raise LowraError(f"n_loras is {n}; recovery compares models and needs at least 2.")
    if str(cfg.device).startswith("cuda") and not torch.cuda.is_available():
        raise LowraError(f"device={cfg.device} was asked for, but torch finds no CUDA device; use device=cpu.")
    if weights_only(cfg) and cfg.get("metrics"):
        raise LowraError(
            f"Metric {', '.join(cfg.metrics)} runs models, but subset={cfg.subset.name} source={cfg.source.name} holds "
            "weights only; use metrics=[]."
        )
    if cfg.subset.name == "custom" and cfg.source.name != "published":
        raise LowraError("subset=custom is read from disk: give source=published source.path=FOLDER.")


def n_loras(cfg: DictConfig) -> tuple[int, ...]:
    """The numbers of models to draw: one, or a sweep."""
    value = cfg.n_loras
    return tuple(value) if isinstance(value, ListConfig | list) else (value,)


def make(node: DictConfig, kind: str, name: str) -> Any:
    """Instantiate a method's or metric's config; a wrong `_target_` or parameter is one sentence."""
    if "_target_" not in node:
        raise LowraError(f"The config of {kind} {name!r} has no _target_; name a class or function to import.")
    try:
        return instantiate(node, _convert_="object")
    except Exception as error:  # hydra wraps whatever went wrong; its cause says it best
        cause = error.__cause__ or error
        text = " ".join(str(cause).split())
        raise LowraError(f"Cannot make {kind} {name!r} from {node['_target_']}: {text}") from error


def make_methods(cfg: DictConfig) -> dict[str, Method]:
    """The methods of the run, in the order asked for."""
    methods = {}
    for name, node in cfg.methods.items():
        methods[name] = as_method(make(node, "method", str(name)), str(name))
        if methods[name].needs_rank and not cfg.knows_rank:
            raise LowraError(
                f"Method {name!r} needs the LoRA rank, which knows_rank=false withholds; drop one of them."
            )
    return methods


def make_metrics(cfg: DictConfig) -> dict[str, Metric]:
    """The semantic metrics of the run; raises LowraError for one that cannot score this subset."""
    metrics = {}
    for name, node in (cfg.get("metrics") or {}).items():
        metric = make(node, "metric", str(name))
        if cfg.subset.name not in metric.families:
            raise LowraError(
                f"Metric {name!r} scores {', '.join(metric.families)}, not subset {cfg.subset.name!r}; use metrics=[]."
            )
        metrics[name] = metric
    return metrics


def choose_layers(infos: Sequence[LayerInfo], pattern: str | None) -> tuple[int, ...]:
    """The positions of the layers whose label matches; raises LowraError when none does."""
    if pattern is None:
        return tuple(range(len(infos)))
    try:
        chosen = tuple(i for i, info in enumerate(infos) if re.search(pattern, info.label))
    except re.error as error:
        raise LowraError(f"layers={pattern!r} is no regular expression: {error}.") from None
    if not chosen:
        raise LowraError(f"layers={pattern!r} matches none of {len(infos)} layers, e.g. {infos[0].label!r}.")
    return chosen


def prepare(cfg: DictConfig) -> Run:
    """Check everything, cheapest first; then build or open the data."""
    check_settings(cfg)
    if cfg.source.name == "mini":  # dozens of tiny models are loaded; a progress bar for each would drown ours
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    methods = make_methods(cfg)
    metrics = make_metrics(cfg)
    store = Store(Path(cfg.results_dir) / cfg.subset.name / cfg.source.name)
    store.check_writable()
    # TF32 would cost seven digits of the float32 products that merges and methods rely on.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    for metric in metrics.values():
        metric.ready()
        if cfg.source.name != "mini":  # a miniature makes its base and evaluation inputs itself
            metric.check(str((cfg.get("builder") or {}).get("base") or cfg.subset.base), None)
    data = open_data(cfg)
    available = len(data.table.model_names)
    chosen = [d for n in n_loras(cfg) for d in drawing.draws(cfg.subset.name, available, n, cfg.trials, cfg.seed)]
    for metric in metrics.values():
        metric.check(data.base or "", data.evaluation)
    infos = data.table.infos
    return Run(
        cfg=cfg,
        methods=methods,
        metrics=metrics,
        data=data,
        fingerprint=data.table.fingerprint(),
        layers=choose_layers(infos, cfg.layers),
        depths=depths([(info.model, info.name) for info in infos]),
        draws=tuple(chosen),
        store=store,
        device=torch.device(cfg.device),
    )


# ---- One cell ---------------------------------------------------------------------------------------------------


def recover_layer(run: Run, cell: Cell, index: int) -> tuple[dict[str, Any], Tensor | None, list[dict[str, float]]]:
    """Merge one layer's drawn models, recover, and score the weights: (row, candidates, history)."""
    info = run.data.table.infos[index]
    layer = run.data.table.read(index, cell.draw.models)
    dtype = merge_dtype(run.cfg.merge.dtype)
    rank = max(lora.rank for lora in layer.loras)
    row = layer_row(run, cell, index) | {"rank": rank}
    observation = Observation(
        merged=merge(layer, dtype).to(run.device),
        rank=rank if run.cfg.knows_rank else None,
        seed=(run.cfg.seed * 1_000_003 + cell.draw.trial) * 1_000_003 + index,
        storage=dtype,
    )
    check_observation(observation)
    shape = observation.merged.shape
    started = time.perf_counter()
    try:
        recovery = run.methods[cell.method].recover(observation)
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        seconds = time.perf_counter() - started
        candidates = recovery.candidates.detach().cpu()
        if candidates.ndim != 3 or candidates.shape[1:] != shape[1:]:
            raise ValueError(f"returned shape {tuple(candidates.shape)}; expected (candidates, {info.d}, {info.k})")
    except Exception as error:  # a failed layer is marked, the sweep goes on
        message = " ".join(f"{type(error).__name__}: {error}".split())
        failed = {"w_error": math.nan, "exact_fraction": math.nan, "status": f"failed: {message}"}
        return row | failed | {"seconds": time.perf_counter() - started}, None, []
    if (cell.draw, index) not in run.floors:
        run.floors[cell.draw, index] = floor_error(observation.merged.cpu(), layer)
    errors = [weight_error(c, layer.weight) for c in candidates]
    exact = [exact_fraction(c, layer.weight) for c in candidates]
    row |= {
        "w_error": sum(errors) / len(errors),
        "exact_fraction": sum(exact) / len(exact),
        "exact_layer": all(e == EXACT for e in errors),
        "candidates": len(errors),
        "seconds": seconds,
        "status": recovery.status,
        "floor_w_error": run.floors[cell.draw, index],
    }
    row |= {f"stat_{key}": value for key, value in recovery.stats.items()}
    where = {key: row[key] for key in ("subset", "source", "n_loras", "trial", "method", "layer_model", "layer_name")}
    return row, candidates.float(), [where | {"step": i} | step for i, step in enumerate(recovery.history or [])]


def layer_row(run: Run, cell: Cell, index: int) -> dict[str, Any]:
    """The coordinates of one layer of a cell, in the order of `layers.parquet`."""
    info = run.data.table.infos[index]
    return trial_row(run, cell) | {
        "layer_model": info.model,
        "layer_name": info.name,
        "layer_type": layer_type(info.name),
        "depth": run.depths[index],
        "d": info.d,
        "k": info.k,
    }


def trial_row(run: Run, cell: Cell) -> dict[str, Any]:
    """The coordinates of a cell, in the order of `trials.parquet`."""
    return {
        "subset": run.cfg.subset.name,
        "source": run.cfg.source.name,
        "n_loras": cell.draw.n_loras,
        "trial": cell.draw.trial,
        "models": list(cell.draw.models),
        "method": cell.method,
        "merge_dtype": run.cfg.merge.dtype,
        "knows_rank": run.cfg.knows_rank,
    }


def run_cell(run: Run, cell: Cell, bar: Any) -> dict[str, Any]:
    """Recover and score all layers of a cell, continuing where a killed run stopped; returns its record."""
    rows = run.store.journal(cell)
    if run.metrics:  # the weights of finished layers must still be there to be put into a model
        lost = [
            position
            for position, row in enumerate(rows)
            if not row["status"].startswith("failed") and not run.store.has_weights(cell, run.layers[position])
        ]
        rows = rows[: lost[0]] if lost else rows
    history: list[dict[str, float]] = [step for row in rows for step in row.pop("history", [])]
    bar.update(len(rows))
    for index in run.layers[len(rows) :]:
        row, candidates, steps = recover_layer(run, cell, index)
        if run.metrics and candidates is not None:
            run.store.keep_weights(cell, index, candidates)
        run.store.append(cell, row | ({"history": steps} if steps else {}))
        rows.append(row)
        history += steps
        bar.update()
    trial = trial_row(run, cell) | summary(rows)
    if not trial["failed_layers"]:
        trial |= semantic_scores(run, cell, int(rows[0]["candidates"]))
    return {
        "cell": cell.digest,
        "fingerprint": run.fingerprint,
        "draw": str(cell.draw),
        "settings": {k: v for k, v in cell.settings.items() if k != "layers"},
        "trial": trial | {"cell": cell.digest},
        "layers": rows,
        **({"history": history} if history else {}),
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the layers of a cell say together: W-Error is their mean (Eq. 8); failed layers make it NaN."""
    errors = torch.tensor([row["w_error"] for row in rows], dtype=torch.float64)
    return {
        "w_error": errors.mean().item(),
        "w_error_layer_std": errors.std().item() if len(rows) > 1 else 0.0,
        "exact_layers": sum(bool(row.get("exact_layer")) for row in rows),
        "exact_fraction": sum(row["exact_fraction"] for row in rows) / len(rows),
        "layers": len(rows),
        "failed_layers": sum(str(row["status"]).startswith("failed") for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
    }


def semantic_scores(run: Run, cell: Cell, candidates: int) -> dict[str, float]:
    """The semantic metrics of a cell, averaged over a method's candidates; equal weights are scored once."""
    totals: dict[str, list[float]] = {}
    for c in range(candidates if run.metrics else 0):
        weights = {}
        for index in run.layers:
            info = run.data.table.infos[index]
            weights[info.model, info.name] = run.store.weights(cell, index)[str(c)]
        digest = weights_digest(weights)
        shown = run.cfg.keep_outputs and cell.draw.trial == 0 and c == 0
        label = output_label(cell) if shown else f"scratch/{str(cell.draw).replace('/', '-')}-{cell.method}-{c}"
        for name in run.metrics:
            known = run.scored.get((name, digest))
            if known is None:
                scores = scorer(run, name).score(weights, label)
                run.scored[name, digest] = (label, scores)
            else:
                scores = known[1]
                if shown:
                    copy_outputs(outputs(run), known[0], label)
            for column, value in scores.items():
                totals.setdefault(column, []).append(value)
    return {column: sum(values) / len(values) for column, values in totals.items()}


def scorer(run: Run, name: str) -> Scorer:
    """The metric bound to the base model; made when the first cell needs it."""
    if name not in run.scorers:
        assert run.data.base is not None  # weights-only data has no metrics (check_settings)
        made = run.metrics[name].scorer(run.data.base, run.data.evaluation, run.device, outputs(run))
        run.scorers[name] = made
    return run.scorers[name]


def outputs(run: Run) -> Path:
    """Where generated texts and images are kept."""
    return run.store.folder / "outputs"


def output_label(cell: Cell) -> str:
    """The name of a cell's kept outputs."""
    return f"L{cell.draw.n_loras:02d}/{cell.method}"


def copy_outputs(folder: Path, source: str, target: str) -> None:
    """Show outputs under a second label: equal weights gave them already."""
    for found in folder.glob(f"{source}*"):
        if found.name.split(".")[0] != Path(source).name:
            continue
        copy = (folder / target).with_suffix(found.suffix)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if found.is_dir():
            shutil.copytree(found, copy, dirs_exist_ok=True)
        else:
            shutil.copyfile(found, copy)


# ---- The whole --------------------------------------------------------------------------------------------------


def run(cfg: DictConfig) -> Path:
    """Run all cells of a configuration that are not there yet, write the tables, print the report.

    Returns the results folder. Raises LowraError for a user's mistake.
    """
    prepared = prepare(cfg)
    cells = prepared.cells()
    todo = [cell for cell in cells if prepared.store.load(cell) is None]
    if len(todo) < len(cells):
        print(f"{len(cells) - len(todo)} of {len(cells)} cells are there from an earlier run.", file=sys.stderr)
    failed = 0
    total = len(todo) * len(prepared.layers)
    interval = 0.1 if sys.stderr.isatty() else 30  # a log file wants a line now and then, not ten a second
    with tqdm(total=total, unit="layer", disable=not todo, dynamic_ncols=True, mininterval=interval) as bar:
        for cell in todo:
            bar.set_description(f"{cell.draw} {cell.method}", refresh=False)
            record = run_cell(prepared, cell, bar)
            prepared.store.finish(cell, record)
            failed += record["trial"]["failed_layers"]
    shutil.rmtree(outputs(prepared) / "scratch", ignore_errors=True)
    shutil.rmtree(prepared.store.folder / "scratch", ignore_errors=True)
    digests = [cell.digest for cell in cells]
    prepared.store.tables(prepared.fingerprint, digests)
    write_text(prepared.store.folder / "run.json", json.dumps(description(prepared, digests), indent=1) + "\n")
    write_galleries(prepared)
    print(report.write(prepared.store.folder))
    if failed:
        print(f"{failed} layers failed; layers.parquet says why, and the next run tries them again.", file=sys.stderr)
    return prepared.store.folder


def write_galleries(prepared: Run) -> None:
    """Put the kept texts or images of the first draw side by side: pre-FT, then the methods (Figs. 2, 3, 14 to 17)."""
    if not (prepared.metrics and prepared.cfg.keep_outputs):
        return
    draw = max(prepared.draws, key=lambda d: (d.n_loras, -d.trial))
    headings = {"reference": "Pre-FT (truth)"}
    for name in reversed(list(prepared.methods)):
        headings[output_label(Cell(draw, name, {}))] = prepared.methods[name].pretty
    folder, title = prepared.store.folder, f"{prepared.cfg.subset.title}, source={prepared.cfg.source.name}, {draw}"
    try:
        if "sbert" in prepared.metrics:
            write_texts(outputs(prepared), headings, folder, title)
        if "lpips" in prepared.metrics:
            labels, names = list(headings), list(headings.values())
            write_grid(outputs(prepared), labels, folder / "images.png", title, GRID_ROWS, names)
    except LowraError as error:  # finished cells of an earlier run may have kept nothing; the tables are there
        print(f"No side-by-side outputs: {error}", file=sys.stderr)


def description(prepared: Run, digests: Sequence[str]) -> dict[str, Any]:
    """What one needs to know to trust or repeat the run: configuration, versions, seeds, draws, data."""
    cfg = OmegaConf.to_container(prepared.cfg, resolve=True)
    assert isinstance(cfg, dict)
    for folder in ("results_dir", "cache_dir"):  # where it lay does not matter to anyone else
        cfg.pop(folder)
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "subset": prepared.cfg.subset.name,
        "source": prepared.cfg.source.name,
        "fingerprint": prepared.fingerprint,
        "models": list(prepared.data.table.model_names),
        "methods": {n: {"pretty": m.pretty, "reference": m.reference} for n, m in prepared.methods.items()},
        "metrics": {n: {"column": m.column, "pretty": m.pretty} for n, m in prepared.metrics.items()},
        "draws": {str(draw): list(draw.models) for draw in prepared.draws},
        "cells": list(digests),
        "versions": {"lowra": lowra.__version__, "python": sys.version.split()[0]}
        | {package: importlib.metadata.version(package) for package in PACKAGES},
        "threads": torch.get_num_threads(),
        "build": prepared.data.report,
        "config": cfg,
    }


if __name__ == "__main__":
    command(run)
