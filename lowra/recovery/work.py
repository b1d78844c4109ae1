"""One tensor: what it is across the models, what becomes of it, and its bytes into their place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowra.checkpoints.matching import Match
from lowra.checkpoints.reading import Checkpoint
from lowra.checkpoints.writing import Slot, pieces
from lowra.errors import LowraError
from lowra.methods.base import Method, Observation, Recovery
from lowra.recovery.adapters import factored, keep_factors
from lowra.recovery.looks import looks_like
from lowra.recovery.sorting import full_rank
from lowra.recovery.tensors import Sources, View, agreeing, check_finite, sources, view_of

# What became of a tensor.
COPIED, AGREED, RECOVERED, MEAN, FIRST = "copied", "agreed", "recovered", "mean", "first"

# Certainty of an answer, best first; pictures and tables go by it. The benchmark's certificates are among them.
CERTAINTY = (
    "copied",
    "agreed",
    "certified",
    "shared",
    "weak",
    "up_to_scale",
    "up_to_rotation",
    "inconsistent",
    "low_signal",
    "uncertified",
    "too_few_models",
    "not_identifiable",
    "kept",
)


@dataclass(frozen=True)
class Task:
    """What is asked of every tensor. used: positions of the models that share the base, the first one first.

    slots: where results go, by the tensor's label; {} in an audit. keep: what stands for a tensor that is no low-rank
    change, "mean" or "first". fewer: solve without the last model as well (audit). factors: folder for the adapters'
    factors, None where no adapters are asked for. sure: where masks of sure weights go, {} where none are asked for.
    """

    models: tuple[Checkpoint, ...]
    used: tuple[int, ...]
    method: Method
    rank: int | None
    seed: int
    keep: str
    slots: dict[str, Slot] = field(default_factory=dict)
    fewer: bool = False
    factors: str | None = None
    sure: dict[str, Slot] = field(default_factory=dict)

    @property
    def labels(self) -> list[str]:
        """The models' names, in the order of the command."""
        return [model.label for model in self.models]

    @property
    def needed(self) -> int:
        """Distinct models the method needs."""
        return int(getattr(self.method, "needs_models", 2))

    def sources(self, match: Match) -> Sources:
        """Where a tensor stands in the models used."""
        return sources(match, self.models, self.used)


def settle(task: Task, match: Match) -> dict[str, Any]:
    """Decide what becomes of one tensor, write it, and return its record (JSON scalars, lists and dicts).

    Raises LowraError for NaN or infinity in a tensor that is to be recovered.
    """
    tensor = task.sources(match)
    record: dict[str, Any] = {
        "component": match.component,
        "name": match.name,
        "shape": list(match.info.shape),
        "dtype": str(match.info.dtype).removeprefix("torch."),
        "models": [task.labels[i] for i in tensor.models],
    }
    groups = agreeing(tensor)
    view = view_of(match.info.shape, match.rows)
    if match.note:
        record["note"] = match.note
    if len(groups) == 1:
        several = len(tensor.models) > 1
        say = "Identical in all models." if several else "Only the first model has it (in this shape)."
        record |= {
            "decision": COPIED if several else FIRST,
            "certainty": "copied" if several else "kept",
            "status": say,
        }
        copy(task, match, tensor, 0)
    elif not all(dtype.is_floating_point for dtype in tensor.dtypes()):
        record |= {"decision": FIRST, "certainty": "kept", "status": "Not floating point, and different: the first's."}
        copy(task, match, tensor, 0)
    elif (agreed := agreement(groups)) is not None:
        names = ", ".join(task.labels[tensor.models[i]] for i in agreed)
        say = f"The same to the last bit in {names}, which would be no accident: the base's, unless these share more."
        record |= {"decision": AGREED, "certainty": "agreed", "status": say}
        copy(task, match, tensor, agreed[0])
    elif not view.matrix:
        keep(task, match, tensor, record, "A vector, trained in full: an update of it has no low rank.")
    else:
        recover(task, match, tensor, view, groups, record)
    if 0 < match.rows < (match.info.shape[0] if match.info.shape else 0):
        rest = match.info.shape[0] - match.rows
        record["rows_not_recovered"] = rest
        record["status"] += f" The last {rest} rows are in the first model only, and its."
        copy(task, match, tensor, 0, after=tensor.entries)
    return record


def agreement(groups: Sequence[Sequence[int]]) -> list[int] | None:
    """The one group of models that agree bit for bit where all others differ, None where there is none or several."""
    several = [list(group) for group in groups if len(group) > 1]
    return several[0] if len(several) == 1 else None


# ---- Recovery ---------------------------------------------------------------------------------------------------


def recover(
    task: Task, match: Match, tensor: Sources, view: View, groups: Sequence[Sequence[int]], record: dict[str, Any]
) -> None:
    """A matrix, or a batch of them, that differs in all (distinct) models."""
    distinct = tensor.only([group[0] for group in groups])
    record["models"] = [task.labels[i] for i in distinct.models]
    if len(distinct.models) < task.needed:
        say = f"Only {len(distinct.models)} distinct models have it, and {task.method.pretty} needs {task.needed}."
        keep(task, match, tensor, record, say, "too_few_models")
        return
    slices = []
    factors: dict[str, Tensor] = {}
    for index in range(view.count):
        stack = distinct.stack(view, index)
        check_finite(stack, distinct, task.labels)
        found, recovery = solve_one(task, stack, distinct)
        if recovery is not None:
            answer = recovery.candidates[0]
            write_answer(task, match, answer, index * view.d * view.k)
            if recovery.sure is not None and match.label in task.sure:
                task.sure[match.label].write(recovery.sure, index * view.d * view.k)
            if task.factors is not None:
                parts, found["adapters"] = factored(match, distinct, stack, answer, task.labels, index)
                factors |= parts
            del answer
        elif view.count == 1:
            keep(task, match, distinct, record, found["status"])
            return
        else:
            keep_entries(task, match, distinct, index * view.d * view.k, (index + 1) * view.d * view.k)
        del stack, recovery
        slices.append(found)
    if task.factors is not None:
        keep_factors(Path(task.factors), match, factors)
    record |= {"decision": RECOVERED} | (slices[0] if view.count == 1 else together(slices))


def solve_one(task: Task, stack: Tensor, tensor: Sources) -> tuple[dict[str, Any], Recovery | None]:
    """What is known of one stack (n, d, k), and its recovery, None where the models differ by a full rank."""
    labels = [task.labels[i] for i in tensor.models]
    storage = tensor.storage()
    recovery = task.method.recover(Observation(stack, task.rank, task.seed, storage))
    certificate = recovery.stats.get("certificate")
    found = read_stats(recovery, labels)
    if certificate in (None, "not_identifiable") and all_full(stack, storage):
        kind = looks_like(stack[0], stack[1])
        named = f"; it looks {kind}" if kind else ""
        return {"certainty": "kept", "status": f"The models differ by a full rank{named}: no low-rank update."}, None
    if found["certainty"] not in ("not_identifiable", "too_few_models"):
        found["predicted_exact"] = recovery.stats.get("predicted_exact")
    if task.fewer and len(labels) > 1:
        found["with_one_fewer"] = with_one_fewer(task, stack[:-1], storage)
    if recovery.sure is not None:
        found["sure"] = float(recovery.sure.double().mean())
    return found, recovery


def read_stats(recovery: Recovery, labels: Sequence[str]) -> dict[str, Any]:
    """A recovery's statistics in the record's terms; methods without certificates are taken at their word."""
    stats = recovery.stats
    certificate = stats.get("certificate")
    out = [int(i) for i in str(stats.get("outlier") or "").split(",") if i.strip()]
    kept = [label for i, label in enumerate(labels) if i not in out]
    ranks = [int(r) for r in str(stats.get("ranks") or "").split(",") if r.strip()]
    found: dict[str, Any] = {
        "certainty": str(certificate) if certificate in CERTAINTY else "uncertified",
        "status": recovery.status,
    }
    if len(ranks) == len(kept):
        found["ranks"] = dict(zip(kept, ranks, strict=True))
    if out:
        found["left_out"] = [labels[i] for i in out]
    if stats.get("grid"):
        found["grid"] = str(stats["grid"])
    if stats.get("predicted_w_error") is not None:
        found["predicted_w_error"] = round(float(stats["predicted_w_error"] or 0), 4)
    return found


def all_full(stack: Tensor, storage: torch.dtype) -> bool:
    """Whether no two of the models differ by a low rank, on a block of each."""
    few = stack[:, :1024, :1024]
    return all(full_rank(few[i], few[j], storage) for i in range(few.shape[0]) for j in range(i + 1, few.shape[0]))


def with_one_fewer(task: Task, stack: Tensor, storage: torch.dtype) -> str:
    """The certificate that the models without the last one would give."""
    if stack.shape[0] < max(2, task.needed):
        return "too_few_models"
    try:
        recovery = task.method.recover(Observation(stack, task.rank, task.seed, storage))
    except LowraError:
        return "not_identifiable"
    certificate = recovery.stats.get("certificate")
    return str(certificate) if certificate in CERTAINTY else "uncertified"


def together(slices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One record for a batch of matrices: the least certain speaks, errors and shares are averaged."""
    worst = max(slices, key=lambda found: CERTAINTY.index(found["certainty"]))
    sure = sum(found["certainty"] == "certified" for found in slices)
    merged = dict(worst)
    merged["status"] = f"{sure} of {len(slices)} matrices certified. The least certain: {worst['status']}"
    for key, average in (("predicted_w_error", _log_mean), ("predicted_exact", _mean), ("sure", _mean)):
        values = [found[key] for found in slices if found.get(key) is not None]
        merged.pop(key, None)
        if len(values) == len(slices):
            merged[key] = average(values)
    if ranks := _largest([found.get("ranks", {}) for found in slices]):
        merged["ranks"] = ranks
    merged.pop("adapters", None)
    if all("adapters" in found for found in slices):  # else not every matrix was recovered: none carries the whole
        merged["adapters"] = _largest([found["adapters"] for found in slices])
    merged["matrices"] = [found["certainty"] for found in slices]
    return merged


def _largest(ranks: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The largest rank of each model."""
    labels = dict.fromkeys(label for found in ranks for label in found)
    return {label: max(found.get(label, 0) for found in ranks) for label in labels}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _log_mean(values: Sequence[float]) -> float:
    return round(math.log10(_mean([10**value for value in values])), 4)


# ---- Bytes ------------------------------------------------------------------------------------------------------


def copy(task: Task, match: Match, tensor: Sources, at: int, after: int = 0) -> None:
    """One model's numbers into the slot, from entry `after` on; of any but the first the common entries only."""
    slot = task.slots.get(match.label)
    if slot is None:
        return
    stop = match.info.numel if at == 0 else tensor.entries
    for start, end in pieces(stop - after, slot.dtype):
        slot.write(tensor.read(at, after + start, after + end).to(slot.dtype), after + start)


def keep(task: Task, match: Match, tensor: Sources, record: dict[str, Any], why: str, certainty: str = "kept") -> None:
    """A tensor that is not recovered: the mean of the models, or the first's, as configured."""
    if task.keep == "first":
        record |= {"decision": FIRST, "certainty": certainty, "status": f"{why} The first model's is kept."}
    else:
        count = len(tensor.models)
        record |= {"decision": MEAN, "certainty": certainty, "status": f"{why} The mean of {count} models is kept."}
    keep_entries(task, match, tensor, 0, tensor.entries)


def keep_entries(task: Task, match: Match, tensor: Sources, start: int, stop: int) -> None:
    """What stands for entries that are not recovered: their mean over the models in float64, or the first model's."""
    slot = task.slots.get(match.label)
    if slot is None:
        return
    for begin, end in pieces(stop - start, torch.float64):
        piece = tensor.read(0, start + begin, start + end)
        if task.keep == "mean":
            total = piece.double()
            for at in range(1, len(tensor.models)):
                total += tensor.read(at, start + begin, start + end)
            piece = total / len(tensor.models)
        if not bool(torch.isfinite(piece).all()):
            refuse_infinite(task, tensor, start + begin, start + end)
        slot.write(piece.to(slot.dtype), start + begin)


def refuse_infinite(task: Task, tensor: Sources, start: int, stop: int) -> None:
    """Raise LowraError naming the model whose entries hold NaN or infinity, where one does."""
    for at in range(len(tensor.models)):
        check_finite(tensor.read(at, start, stop).float()[None], tensor.only([at]), task.labels)


def write_answer(task: Task, match: Match, answer: Tensor, offset: int) -> None:
    """A recovered matrix into the slot, rounded to the slot's format a piece at a time."""
    slot = task.slots.get(match.label)
    if slot is None:
        return
    flat = answer.reshape(-1)
    for start, stop in pieces(flat.numel(), slot.dtype):
        slot.write(flat[start:stop].to(slot.dtype), offset + start)
