"""The judge: one layer merged, recovered and scored; one recovered model scored.

The attacker's side (`lowra.methods`) gets a stack of merged weights and gives a weight back; everything that knows the
answer stands here. A layer is read and merged once per draw, its floor computed once, and every method works on it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import numbers
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowra.allocator import keep_temporaries
from lowra.bench.defences import Defence, applied
from lowra.bench.foreign import swap
from lowra.bench.merging import merge, merge_dtype
from lowra.bench.schema import Layer, LayerTable
from lowra.code import code_digest, digest, module_of
from lowra.configured import default_dtype_kept, options
from lowra.digests import folder_digest, visible_files
from lowra.errors import LowraError
from lowra.methods import Method, Observation, Recovery, check_observation, check_recovery
from lowra.metrics.base import Metric, Scorer
from lowra.metrics.weight_error import EXACT, exact_fraction, floor_error, weight_error
from lowra.plan import Plan, Task, Variant
from lowra.records import (
    COORDINATES,
    LAYER_FIELDS,
    SCORE,
    STEP_PLACE,
    KeptWeights,
    Store,
    dumps,
    key_of,
    model_digest,
)
from lowra.reporting import kept

# A recovered weight that waits for a metric is kept on disk where recovering it again takes longer than writing it,
# at this many bytes a second. (One candidate of LoRA FT is one of the merges: nothing is gained by keeping that.)
DISK_BYTES_PER_SECOND = 2e8

# Layers of up to so many weights (1024 x 1024) are recovered on one thread.
ONE_THREAD = 2**20


class WroteIntoStack(Exception):
    """A method changed the merged weights it was given."""


@dataclass(frozen=True)
class LayerJudge:
    """What it takes to merge, recover and score layers; goes to worker processes whole.

    methods: by variant name. defence, seed: what is done to the merges before they are released. digests: whether
    weights are digested, for metrics that score whole models. keep: where weights are kept for them, None keeps none.
    """

    table: LayerTable
    methods: Mapping[str, Method]
    merge_dtype: str
    merge_order: str
    foreign: int
    defence: Defence | None
    seed: int
    threads: int
    device: str
    digests: bool
    keep: KeptWeights | None

    def judge(self, task: Task) -> list[dict[str, Any]]:
        """One layer of one draw by all the task's variants: the measured part of a record each, in their order."""
        return self.judge_alike((task,))[0]

    def judge_alike(self, tasks: Sequence[Task]) -> list[list[dict[str, Any]]]:
        """Layers of one draw, of one shape and rank, together where a method can: `judge` of each, in their order."""
        with self._threads(tasks[0]) as threads:
            return [[found | {"threads": threads} for found in judged] for judged in self._judged(tasks)]

    @contextmanager
    def _threads(self, task: Task) -> Iterator[int]:
        """The threads a layer is recovered with, however many there are: one where it is small.

        Sums divide among threads in other places, which moves last bits, and with them the path of methods that decide
        by them. Small layers are no faster with more.
        """
        info = self.table.infos[task.index]
        threads = self.threads if info.d * info.k > ONE_THREAD else 1
        torch.set_num_threads(threads)
        keep_temporaries()  # a tenth of the time of a small layer
        try:
            yield threads
        finally:
            torch.set_num_threads(self.threads)

    def _judged(self, tasks: Sequence[Task]) -> list[list[dict[str, Any]]]:
        seen = [self._see(task) for task in tasks]
        measured: list[list[dict[str, Any]]] = [[] for _ in tasks]
        for name, method in self.methods.items():
            chosen = [i for i, task in enumerate(tasks) if name in task.variants]
            recovered = self._recover(method, [seen[i] for i in chosen])
            for i, (found, candidates) in zip(chosen, recovered, strict=True):
                if candidates is not None and self.digests:
                    found["weights"] = [self._kept(candidate, found) for candidate in candidates]
                measured[i].append(found | {"floor_w_error": seen[i].floor})
        return measured

    def _see(self, task: Task) -> Seen:
        layer = self.table.read(task.index, task.draw.models)
        merged = self._released(layer, task)
        return Seen(task, layer, self._observe(layer, task, merged), floor_error(merged, layer))

    def weights(self, task: Task) -> list[Tensor]:
        """The candidates (d, k) of the task's first variant, recovered again. Raises LowraError where it fails."""
        with self._threads(task):
            layer = self.table.read(task.index, task.draw.models)
            seen = Seen(task, layer, self._observe(layer, task))
            ((found, candidates),) = self._recover(self.methods[task.variants[0]], [seen])
        if candidates is None:
            raise LowraError(f"Method {task.variants[0]!r} {found['status']} in a layer that it recovered before.")
        return [candidate.float() for candidate in candidates]

    def _released(self, layer: Layer, task: Task) -> Tensor:
        """The merges (n, d, k) as they are published."""
        dtype = merge_dtype(self.merge_dtype)
        merged = merge(layer, dtype, self.merge_order)
        if self.defence is None:
            return merged
        label = self.table.infos[task.index].label
        return applied(self.defence, merged, label, task.draw.models, self.seed).to(dtype).float()

    def _observe(self, layer: Layer, task: Task, merged: Tensor | None = None) -> Observation:
        """What the attacker sees of a layer. merged: its merges where they are made already; they are handed on."""
        dtype = merge_dtype(self.merge_dtype)
        if merged is None:
            merged = self._released(layer, task)
        merged = swap(layer, merged, dtype, self.merge_order, seed=task.draw_seed, count=self.foreign)
        observation = Observation(merged=merged.to(self.device), rank=task.rank, seed=task.seed, storage=dtype)
        check_observation(observation)
        return observation

    def _recover(self, method: Method, seen: Sequence[Seen]) -> list[tuple[dict[str, Any], Tensor | None]]:
        """Recover and score layers: of each (measured fields, candidates (c, d, k) on the CPU or None where it failed).

        All at once where the method can; what goes wrong then is tried one by one.
        """
        together = getattr(method, "recover_batch", None)
        if together is not None and len(seen) > 1:
            try:
                return self._attempted(together, seen)
            except (Exception, SystemExit):
                self._seen_anew(seen)
        results: list[tuple[dict[str, Any], Tensor | None]] = []
        for each in seen:
            started = time.perf_counter()
            try:
                results += self._attempted(lambda observations: [method.recover(observations[0])], [each])
            except (Exception, SystemExit) as error:  # a failed layer is marked, the sweep goes on
                results.append((_failed(error, time.perf_counter() - started), None))
                self._seen_anew([each])
        return results

    def _seen_anew(self, seen: Sequence[Seen]) -> None:
        """Whatever a method that failed did to the stacks, nobody else gets that."""
        for each in seen:
            each.observation = self._observe(each.layer, each.task)
            each.state = _state(each.observation.merged)

    def _attempted(
        self, recover: Callable[[list[Observation]], Sequence[Any]], seen: Sequence[Seen]
    ) -> list[tuple[dict[str, Any], Tensor | None]]:
        """Layers recovered by one call and scored; raises what it raises, and for what no method may return or do."""
        watched = [Watched(each.layer.weight) for each in seen]
        observations = [replace(each.observation, watch=watch) for each, watch in zip(seen, watched, strict=True)]
        started = time.perf_counter()
        with default_dtype_kept():
            recoveries = recover(observations)
        if observations[0].merged.is_cuda:
            torch.cuda.synchronize(observations[0].merged.device)
        seconds = time.perf_counter() - started - sum(watch.seconds for watch in watched)
        results: list[tuple[dict[str, Any], Tensor | None]] = []
        for recovery, each, watch in zip(recoveries, seen, watched, strict=True):
            candidates = check_recovery(recovery, each.layer.weight.shape)
            if _state(each.observation.merged) != each.state:
                raise WroteIntoStack("it wrote into observation.merged, which is everybody's; work on a clone")
            results.append(
                (self._scored(recovery, candidates, each.layer.weight, seconds / len(seen), watch), candidates)
            )
        return results

    def _scored(
        self, recovery: Recovery, candidates: Tensor, weight: Tensor, seconds: float, watched: Watched
    ) -> dict[str, Any]:
        """What is measured of a recovery against the true weight."""
        errors = [weight_error(candidate, weight) for candidate in candidates]
        exact = [exact_fraction(candidate, weight) for candidate in candidates]
        return {
            "w_error": sum(errors) / len(errors),
            "exact_fraction": sum(exact) / len(exact),
            "exact_layer": all(error == EXACT for error in errors),
            "candidates": len(errors),
            "seconds": seconds,
            "status": " ".join(_writable(recovery.status).split()),
            "failed": False,
            "stats": dumps(_told(recovery.stats, "stats")),
            "history": dumps(watched.beside([_step(step) for step in recovery.history])) if recovery.history else None,
        }

    def _kept(self, candidate: Tensor, found: Mapping[str, Any]) -> str:
        """The digest of a candidate; kept for the metrics where it cannot be had again for less."""
        weight = candidate.float().contiguous()
        name = weight_digest(weight)
        slow = found["seconds"] > found["candidates"] * weight.numel() * weight.element_size() / DISK_BYTES_PER_SECOND
        if self.keep is not None and slow:
            self.keep.keep(name, weight)
        return name


@dataclass
class Seen:
    """A layer as a method gets it, beside the truth. floor: the W-Error that the merges' rounding leaves.

    state: of the merges, as every method has to leave them.
    """

    task: Task
    layer: Layer
    observation: Observation
    floor: float = math.nan
    state: Any = field(init=False)

    def __post_init__(self) -> None:
        self.state = _state(self.observation.merged)


@dataclass
class Watched:
    """The W-Error of each W that a method shows, in the order shown; what it costs is not the method's time."""

    weight: Tensor
    errors: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def __call__(self, shown: Tensor) -> None:
        """Take in one W (d, k)."""
        started = time.perf_counter()
        self.errors.append(weight_error(shown.detach().cpu(), self.weight))
        self.seconds += time.perf_counter() - started

    def beside(self, history: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
        """A history with a column `w_error`, where as many W were shown as it has steps."""
        if len(self.errors) != len(history):
            return [dict(step) for step in history]
        return [dict(step) | {"w_error": error} for step, error in zip(history, self.errors, strict=True)]


def _failed(error: BaseException, seconds: float) -> dict[str, Any]:
    return {
        "w_error": math.nan,
        "exact_fraction": math.nan,
        "exact_layer": False,
        "candidates": 0,
        "seconds": seconds,
        "status": f"failed: {_said(error)[:500]}",
        "failed": True,
        "stats": "{}",
        "history": None,
        "weights": [],
    }


def _said(error: BaseException) -> str:
    """A foreign error in one line of text that can be written anywhere."""
    try:
        message = str(error)
    except Exception:
        message = "(its message cannot be had)"
    return " ".join(_writable(f"{type(error).__name__}: {message}").split())


def _told(values: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The checked numbers and texts that a method tells of itself, as they can be written.

    Raises TypeError for a number that no table holds.
    """
    for name, value in values.items():
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise TypeError(f"{what} holds {name!r}: {value}, beyond 64 bits; give a float")
    return {_writable(name): _writable(value) if isinstance(value, str) else value for name, value in values.items()}


def _step(step: Mapping[str, Any]) -> dict[str, Any]:
    """A step of a method's history; raises ValueError where it says what the table itself does."""
    if taken := sorted(set(step) & set(STEP_PLACE)):
        raise ValueError(f"a step of history holds {taken[0]!r}, a column of the benchmark's own; name it otherwise")
    return _told(step, "a step of history")


def _writable(text: str) -> str:
    """A text without the halves of characters that no file can hold."""
    return text.encode(errors="replace").decode()


@functools.cache
def _multipliers(device: torch.device) -> Tensor:
    """An odd number for each place of a piece of bits."""
    return torch.randint(2**62, (2**16,), generator=torch.Generator().manual_seed(0)).mul_(2).add_(1).to(device)


def _state(merged: Tensor) -> tuple[tuple[int, ...], int, int]:
    """What changes when somebody writes into a tensor: its shape, torch's own count of writes, a hash of its bits.

    Writes through numpy or `.data` are not counted, but change the hash, also where they only put numbers elsewhere.
    """
    version = 0 if merged.is_inference() else merged._version
    bits = torch.int64 if merged.element_size() * merged.shape[-1] % 8 == 0 else torch.int32  # fewer, wider numbers
    odd, found = _multipliers(merged.device), 0
    for part in merged.view(bits).flatten().split(len(odd)):
        product = part * odd[: len(part)]
        found = hash((found, int(product.bitwise_xor_(product >> 29).sum())))  # as the top bit alone is in no other
    return tuple(merged.shape), version, found


def weight_digest(weight: Tensor) -> str:
    """Sixteen hex digits of a weight's float32 bytes."""
    return hashlib.sha256(weight.contiguous().view(torch.uint8).numpy().data).hexdigest()[:16]


# ---- Whole models -----------------------------------------------------------------------------------------------


@dataclass
class ModelJudge:
    """Scores recovered models by the run's semantic metrics; base models and reference outputs are loaded once.

    problems: sentences on models that could not be scored.
    """

    plan: Plan
    store: Store
    layers: LayerJudge
    scorers: dict[str, Scorer] = field(default_factory=dict)
    fixed: dict[str, dict[str, str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    shown: dict[str, str] = field(default_factory=dict)

    def score(self, draw: Any, variant: Variant, *, leave: bool = False) -> None:
        """Score what a variant recovered in one draw, unless it is there already.

        leave: leave what another process is at.
        """
        records = self._records(draw, variant)
        if records is None:
            return
        counts = {record["candidates"] for record in records}
        if len(counts) > 1:
            self._problem(f"{variant.label} returned {min(counts)} to {max(counts)} candidates a layer; no one model.")
            return
        for candidate in range(counts.pop()):
            name = model_digest(records, candidate)
            assert name is not None  # as many digests as candidates (LayerJudge)
            shown = self.plan.cfg.keep_outputs and draw.trial == 0 and candidate == 0
            todo = [metric for metric in self.plan.metrics if not self._there(metric, name, shown=shown)]
            if leave and any(self.store.claimed(self._key(metric, name)) for metric in todo):
                return
            if todo:
                self.store.claim(self._key(metric, name) for metric in todo)
                weights = self._weights(draw, variant, records, candidate)
                for metric in todo:
                    self._measure(metric, name, weights, variant, shown=shown)
        self.store.weights.drop(name for record in records for name in record["weights"])

    def galleries(self) -> list[Path]:
        """Texts or images of the first draw side by side: the base's, then each variant's (Figs. 2, 3, 14 to 17)."""
        if not self.plan.cfg.keep_outputs:
            return []
        draw = max(self.plan.draws, key=lambda d: (d.n_loras, -d.trial))
        title = f"{self.plan.cfg.subset.title}, source={self.plan.source.name}, {draw}"
        if self.plan.cfg.merge.dtype != "float32":
            title += f", merges in {self.plan.cfg.merge.dtype}"
        made = []
        for name, metric in self.plan.metrics.items():
            try:
                made += self._gallery(name, metric, self._headings(draw, name), title)
            except LowraError as error:  # records of an earlier run may have kept no outputs; the tables are there
                self.problems.append(f"No outputs side by side: {error}")
        return made

    def _gallery(self, name: str, metric: Metric, headings: Mapping[str, str], title: str) -> list[Path]:
        """What a metric shows side by side, put into the run's folder; made anew only where it shows something else."""
        artifacts = self._artifacts(name)

        def make() -> kept.Made:
            with tempfile.TemporaryDirectory() as place:
                metric.gallery(artifacts, headings, Path(place), title)
                files = visible_files(Path(place))
                return kept.Made({path.relative_to(place).as_posix(): path.read_bytes() for path in files}, "")

        given = ["gallery", name, self._settings(name), list(headings.items()), title]
        gallery = kept.made([*given, folder_digest(artifacts)], make)
        gallery.put(self.plan.folder)
        return [self.plan.folder / file for file in gallery.files]

    def _headings(self, draw: Any, metric: str) -> dict[str, str]:
        """Of the base and of each model that was scored: the label of its outputs to its heading, in order."""
        headings = {"reference": "Pre-FT (truth)"}
        for variant in reversed(self.plan.variants.values()):
            records = self._records(draw, variant)
            name = model_digest(records, 0) if records else None
            if name is not None and self.store.done(SCORE, self._key(metric, name)):  # equal models are one column
                headings[name] = f"{headings[name]}, {variant.label}" if name in headings else variant.label
        return headings

    def _records(self, draw: Any, variant: Variant) -> list[dict[str, Any]] | None:
        """A draw's records by a variant, None unless all layers are there and none failed."""
        found = [self.store.get("layer", self.plan.key(draw, index, variant)) for index in self.plan.layers]
        if any(record is None or record["failed"] for record in found):
            return None
        return [record for record in found if record is not None]

    def _settings(self, metric: str) -> dict[str, str]:
        """What decides a metric's scores besides the weights: its settings, inputs, base model and code."""
        if metric not in self.fixed:
            made = self.plan.metrics[metric]
            base = str(self.plan.data.base)
            self.fixed[metric] = {
                "settings": json.dumps(self._options(metric), sort_keys=True, default=str),
                "inputs": made.inputs(self.plan.data.evaluation),
                "base": folder_digest(Path(base)) if Path(base).is_dir() else base,
                "code": code_digest(module_of(made)),
            }
        return self.fixed[metric]

    def _options(self, metric: str) -> dict[str, Any]:
        """A metric's settings but for those that only say where something lies: `inputs` says what lies there."""
        places = getattr(self.plan.metrics[metric], "places", ())
        return {name: value for name, value in options(self.plan.cfg.metrics[metric]).items() if name not in places}

    def _key(self, metric: str, model: str) -> str:
        settings = self._settings(metric)
        return key_of({"metric": metric, "model": model, "device": self.plan.device.type, **settings})

    def _artifacts(self, metric: str) -> Path:
        settings = self._settings(metric)
        return self.plan.folder / "outputs" / f"{metric}-{digest(dumps(settings))[:8]}"

    def _there(self, metric: str, model: str, *, shown: bool) -> bool:
        """Whether a model is scored, and its outputs are there where they are to be shown."""
        outputs = shown and getattr(self.plan.metrics[metric], "keeps_outputs", False)
        kept = not outputs or any(self._artifacts(metric).glob(f"{model}*"))
        if not self.store.done(SCORE, self._key(metric, model)):
            self.store.refresh()
        return kept and self.store.done(SCORE, self._key(metric, model))

    def _weights(
        self, draw: Any, variant: Variant, records: Sequence[Mapping[str, Any]], candidate: int
    ) -> dict[tuple[str, str], Tensor]:
        """A recovered model's weights: those kept, or else recovered again."""
        weights = {}
        for index, record in zip(self.plan.layers, records, strict=True):
            info = self.plan.info(index)
            weight = self.store.weights.get(record["weights"][candidate])
            if weight is None:
                plan = self.plan
                task = plan.task(draw, index, (variant.name,))
                weight = self.layers.weights(task)[candidate]
            weights[info.model, info.name] = weight
        return weights

    def _measure(
        self, metric: str, model: str, weights: Mapping[tuple[str, str], Tensor], variant: Variant, *, shown: bool
    ) -> None:
        made = self.plan.metrics[metric]
        try:
            if metric not in self.scorers:
                artifacts = self._artifacts(metric)
                data = self.plan.data
                self.scorers[metric] = made.scorer(data.base, data.evaluation, self.plan.device, artifacts)
            values = _numbers(self.scorers[metric].score(weights, model if shown else None))
        except LowraError:
            raise
        except (Exception, SystemExit) as error:
            self._problem(f"Metric {metric!r} failed on {variant.label}: {_said(error)}")
            return
        settings = self._settings(metric)
        self.store.append(
            {
                "kind": SCORE,
                "key": self._key(metric, model),
                "metric": metric,
                "heading": made.pretty,
                "column": made.column,
                "settings": settings["settings"],
                "inputs": settings["inputs"],
                "base": settings["base"],
                "values": dumps(values),
                "weights": [model],
            }
        )

    def _problem(self, sentence: str) -> None:
        if sentence not in self.problems:
            self.problems.append(sentence)


_RESERVED = {*LAYER_FIELDS, *COORDINATES, "exact_layers", "failed_layers", "layers", "w_error_layer_std"}


def _numbers(values: Any) -> dict[str, float]:
    """A scorer's answer as columns of numbers; raises TypeError or ValueError for anything else."""
    if not isinstance(values, Mapping) or not values:
        raise TypeError(f"score returned a {type(values).__name__}; expected a dict of numbers by column")
    if taken := sorted(set(values) & _RESERVED):
        raise ValueError(f"score returned {taken[0]!r}, which is a column of the benchmark's own; name it otherwise")
    for name, value in values.items():
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise TypeError(f"score returned {name!r}: {type(value).__name__}; expected a number")
    return {str(name): float(value) for name, value in values.items()}
