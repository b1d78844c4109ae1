"""From model names to a finished folder: opened, matched, sorted, worked through, resumed, and told in words."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lowra import __version__, pool
from lowra.checkpoints.hub import cached, fetch, headers
from lowra.checkpoints.matching import Match, Matching, match
from lowra.checkpoints.reading import Checkpoint, open_checkpoint, other_files
from lowra.checkpoints.single_file import aligned
from lowra.checkpoints.writing import (
    Entry,
    Shard,
    Slot,
    Workshop,
    check_space,
    index_name,
    index_text,
    output_name,
    plan_shards,
)
from lowra.code import code_digest, digest, module_of
from lowra.errors import LowraError, unknown
from lowra.methods.base import Method
from lowra.recovery import card
from lowra.recovery.adapters import SCRATCH, scratch_file, write_adapters
from lowra.recovery.sorting import Kinship, differing, sort_models
from lowra.recovery.tensors import agreeing, sources, view_of
from lowra.recovery.work import Task, settle, solve_one

# Tensors solved by a dry run for the ranks it shows and the time it foresees.
TRIED = 3

# Folder of the adapters in the output.
ADAPTERS = "adapters"

# What the process needs beside the tensors, bytes: PyTorch itself and the names.
CONSTANT = 600 * 2**20


@dataclass(frozen=True)
class Request:
    """What a user asks for.

    models: folders, files or Hub ids. output: the folder to be made, None for an audit. report: where an audit's card
    goes, None for none. method: with its settings. rank: granted to the method, or None. keep: what stands for tensors
    that are no low-rank change, "mean" or "first". jobs: processes. adapters: write each model's update as well.
    sure: write which weights are sure. command: as it stands in the card.
    """

    models: tuple[str, ...]
    output: Path | None
    method: Method
    report: Path | None = None
    rank: int | None = None
    keep: str = "mean"
    seed: int = 0
    jobs: int = 1
    adapters: bool = False
    sure: bool = False
    command: str = ""

    def check(self) -> None:
        """Raise LowraError for settings that cannot be, before any file is opened."""
        needed = int(getattr(self.method, "needs_models", 2))
        if len(self.models) < needed:
            raise LowraError(
                f"{self.method.pretty} compares at least {needed} fine-tunes of one base; got {len(self.models)} "
                f"model{'s' * (len(self.models) != 1)}. Give models='[A,B,C]'."
            )
        if self.keep not in ("mean", "first"):
            raise unknown("keep", self.keep, ("mean", "first"))
        if type(self.jobs) is not int or self.jobs < 1:
            raise LowraError(f"jobs={self.jobs}: expected at least 1.")
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise LowraError(f"rank={self.rank}: expected at least 1, or null to let it be found.")
        if self.method.needs_rank and self.rank is None:
            raise LowraError(f"{self.method.pretty} needs the rank of the updates; give rank=16, say.")
        if self.adapters and self.output is None:
            raise LowraError("adapters=true writes files; name an output folder (output=null is the audit).")
        if self.report is not None and self.output is not None:
            raise LowraError(
                f"report={self.report} is where an audit (output=null) writes; the card of output={self.output} is in "
                "that folder. Give one of them."
            )
        if self.sure and self.output is None:
            raise LowraError("sure=true writes a file; name an output folder (output=null is the audit).")
        places: dict[Path | str, str] = {}
        for name in self.models:
            place = Path(name).resolve() if Path(name).exists() else name
            if place in places:
                raise LowraError(f"{name} and {places[place]} are the same model; every model counts once.")
            places[place] = name
        for folder in (self.output, self.report):
            inside = [m for m in self.models if folder and Path(m).exists() and _within(folder, Path(m))]
            if inside:
                raise LowraError(f"{folder} lies inside the model {inside[0]}; name a folder outside of all inputs.")


def placed(folder: Path) -> Path:
    """A folder under a name that others can be made of, also where it is given as `.` or `..`."""
    return folder if folder.name not in ("", "..") else Path(os.path.abspath(folder))


def _within(inner: Path, outer: Path) -> bool:
    folder = inner.resolve()
    return folder == outer.resolve() or outer.resolve() in folder.parents


@dataclass(frozen=True)
class Plan:
    """What is known before the work.

    parts: per tensor, the models in groups that agree on samples of it. bases: the models by shared base, the largest
    group first, as positions. strangers: how each model outside of it stands to it.
    """

    request: Request
    models: tuple[Checkpoint, ...]
    matching: Matching
    parts: tuple[list[list[int]], ...]
    bases: tuple[tuple[int, ...], ...]
    strangers: dict[int, Kinship]

    @property
    def used(self) -> tuple[int, ...]:
        """Positions of the models recovered from."""
        return self.bases[0]

    def task(self, **settings: Any) -> Task:
        """What is asked of every tensor."""
        request = self.request
        return Task(self.models, self.used, request.method, request.rank, request.seed, request.keep, **settings)

    def to_solve(self) -> list[Match]:
        """The tensors a method will be asked about, as far as samples tell."""
        used, found = set(self.used), []
        for tensor, parts in zip(self.matching.tensors, self.parts, strict=True):
            here = [part for part in parts if used & set(part)]
            floating = tensor.info.dtype.is_floating_point
            if len(here) > 1 and floating and view_of(tensor.info.shape, tensor.rows).matrix:
                found.append(tensor)
        return found

    def output_bytes(self) -> int:
        """Size of the weights to be written."""
        return sum(tensor.info.nbytes for tensor in self.matching.tensors)

    def memory(self) -> int:
        """Bytes the work takes at most: n + 3 times the largest matrix in float32, and a constant, for every job."""
        sizes = [view_of(t.info.shape, t.rows) for t in self.to_solve()]
        largest = max((view.d * view.k for view in sizes), default=0) * 4
        return self.request.jobs * ((len(self.used) + 3) * largest + CONSTANT)


def make_plan(request: Request, say: Callable[[str], None] = lambda line: None) -> Plan:
    """Open, match and sort the models, reading headers and samples. Raises LowraError for what cannot be recovered."""
    request.check()
    models = aligned(open_models(request.models, say))
    matching = match(models)
    parts = differing(matching.tensors, models, range(len(models)))
    _refuse_twins(models, matching, parts)
    bases, strangers = sort_models(matching.tensors, models, parts)
    needed = int(getattr(request.method, "needs_models", 2))
    if len(bases[0]) < needed:
        listed = "; ".join(", ".join(models[i].label for i in base) for base in bases)
        raise LowraError(
            f"No {needed} of the models share a base ({request.method.pretty} needs as many). By shared base they are: "
            f"{listed}. {next(iter(strangers.values())).looks_like.capitalize()} would look like this."
        )
    # The layout is the first used model's: matching is done anew from there when the first one is left out.
    if bases[0][0] != 0:
        order = [bases[0][0], *(i for i in range(len(models)) if i != bases[0][0])]
        say(f"{models[0].label} is left out, so that the layout is {models[order[0]].label}'s.")
        reordered = make_plan(replace(request, models=tuple(request.models[i] for i in order)))
        return replace(reordered, request=replace(request, models=reordered.request.models))
    return Plan(request, tuple(models), matching, tuple(parts), tuple(tuple(base) for base in bases), strangers)


def open_models(names: Sequence[str], say: Callable[[str], None]) -> list[Checkpoint]:
    """Open local models; Hub ids by their headers first, so that what does not fit is not downloaded."""
    local = {name: open_checkpoint(name) for name in names if Path(name).exists()}
    for name in names:
        if name not in local and (folder := cached(name)) is not None:
            local[name] = open_checkpoint(folder, label=name)
    remote = [name for name in names if name not in local]
    if remote:
        known = {**local, **{name: headers(name) for name in remote}}
        match(aligned([known[name] for name in names]))
        for name in remote:
            say(f"Fetching {name}: {sum(i.nbytes for i in known[name].components[''].infos.values()) / 2**30:.2f} GiB.")
            local[name] = open_checkpoint(fetch(name), label=name)
    return [local[name] for name in names]


def _refuse_twins(models: Sequence[Checkpoint], matching: Matching, parts: Sequence[Sequence[Sequence[int]]]) -> None:
    """Raise LowraError when two models hold the same weights."""
    for i in range(len(models)):
        for j in range(i + 1, len(models)):
            shared = [
                (tensor, groups)
                for tensor, groups in zip(matching.tensors, parts, strict=True)
                if tensor.names[i] is not None and tensor.names[j] is not None
            ]
            if not all(any(i in group and j in group for group in groups) for _, groups in shared):
                continue
            if all(len(agreeing(sources(tensor, models, [i, j]))) == 1 for tensor, _ in shared):
                raise LowraError(
                    f"{models[i].label} and {models[j].label} hold the same weights in every tensor; every model "
                    "counts once, so leave one of them out."
                )


# ---- The work ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What came of it. records: per tensor of the first model, in its order. card: the Markdown a person reads.

    folder: the finished output (or the audit's report), None where nothing was written.
    """

    plan: Plan
    records: tuple[dict[str, Any], ...]
    card: str
    folder: Path | None

    @property
    def counts(self) -> dict[str, int]:
        """Tensors per certainty, best first."""
        return card.counts(self.records)


def carry_out(plan: Plan, say: Callable[[str], None] = lambda line: None, progress: bool = False) -> Report:
    """Do the work of a plan, from where an earlier run of the same command stopped.

    Raises LowraError for an output that is not empty, a full disk, or NaN in a tensor.
    """
    request = plan.request
    place = request.output or request.report
    key = identity(plan)
    if request.output is not None:
        check_space(request.output, plan.output_bytes() - _already(request.output))
    workshop = Workshop(place, key, scratch=[SCRATCH]) if place is not None else None
    if workshop is not None and workshop.finished:
        return _finished(plan, workshop.folder, say)
    slots: dict[str, Slot] = {}
    if workshop is not None:
        workshop.begin(request.command)
    if request.output is not None and workshop is not None:
        slots = _slots(plan, workshop.partial)
        _verify(workshop, slots)
    factors = str(workshop.partial / SCRATCH) if workshop is not None and request.adapters else None
    sure = _masks(plan, workshop.partial) if workshop is not None and request.sure else {}
    task = plan.task(slots=slots, fewer=request.output is None, factors=factors, sure=sure)
    done = dict(workshop.records) if workshop is not None else {}
    pending = [at for at, tensor in enumerate(plan.matching.tensors) if tensor.label not in done]
    if pending and len(pending) < len(plan.matching.tensors):
        say(f"Going on: {len(plan.matching.tensors) - len(pending)} of {len(plan.matching.tensors)} tensors are done.")
    for at, record in _worked(plan, task, pending, progress):
        label = plan.matching.tensors[at].label
        done[label] = record
        if workshop is not None:
            workshop.done(label, record)
    records = tuple(_public(done[tensor.label]) for tensor in plan.matching.tensors)
    if workshop is None:
        return Report(plan, records, card.text(plan, records, {}), None)
    return _finish(plan, workshop, records, key)


def _already(output: Path) -> int:
    """Bytes an unfinished run of the output has taken."""
    partial = output.with_name(output.name + ".partial")
    return sum(path.stat().st_size for path in partial.rglob("*.safetensors")) if partial.is_dir() else 0


def _shards(plan: Plan, folder: Path) -> Iterator[tuple[Shard, dict[str, Slot]]]:
    """The files that hold the output's weights, each with its slots by the tensors' labels."""
    first = plan.models[plan.used[0]]
    for component, state in first.components.items():
        for name, entries in plan_shards(state).items():
            source = next(path for path in state.files if output_name(path) == name)
            shard = Shard.planned(folder / component / name, entries, state.metadata[source])
            yield shard, {f"{component}/{n}" if component else n: slot for n, slot in shard.slots.items()}


def _slots(plan: Plan, folder: Path) -> dict[str, Slot]:
    """Every tensor's place in the shards of the output, which have their full size from here on."""
    slots: dict[str, Slot] = {}
    for shard, labelled in _shards(plan, folder):
        shard.create()
        slots |= labelled
    return slots


def _copied(plan: Plan) -> list[Path]:
    """The files of the first model that are taken along, relative; none whose place is taken by the output's own."""
    own = (card.CARD, card.RECORDS, card.PICTURE, card.MASKS, ADAPTERS)
    if plan.request.output is None:
        return []
    return [inside for inside in other_files(plan.models[plan.used[0]]) if inside.parts[0] not in own]


def _masks(plan: Plan, folder: Path) -> dict[str, Slot]:
    """A mask for every tensor that is to be recovered: all zeros (nothing is sure) until a method says otherwise."""
    entries = [Entry(tensor.label, torch.bool, tensor.info.shape) for tensor in plan.to_solve()]
    masks = Shard.planned(folder / card.MASKS, entries, {})
    if any(shard.path == masks.path for shard, _ in _shards(plan, folder)):
        raise LowraError(
            f"{card.MASKS} is where sure=true writes, and the name of the first model's weights; rename that file."
        )
    return masks.create() if entries else {}


def _verify(workshop: Workshop, slots: dict[str, Slot]) -> None:
    """Forget finished tensors whose bytes are not what the journal says (a power cut; a file changed since).

    Or whose factors are not there: adapters are put together from them.
    """
    for label, record in list(workshop.records.items()):
        changed = label in slots and slots[label].checksum() != record.get("checksum")
        factors = any(record.get("adapters", {}).values())
        if changed or (factors and not scratch_file(workshop.partial / SCRATCH, label).is_file()):
            workshop.forget(label)


def _finished(plan: Plan, folder: Path, say: Callable[[str], None]) -> Report:
    """What an earlier run of the very command left; raises LowraError where its files are not as it left them."""

    def refused(what: str) -> LowraError:
        return LowraError(
            f"{folder} was made by this very command, but {what}; delete the folder and give the command again."
        )

    for name in (card.CARD, card.PICTURE):
        if not (folder / name).is_file():
            raise refused(f"{name} is gone")
    records = json.loads((folder / card.RECORDS).read_text()).get("tensors")
    if not isinstance(records, list) or len(records) != len(plan.matching.tensors):
        raise refused(f"{card.RECORDS} was changed since")
    if plan.request.output is not None:
        labels = [tensor.label for tensor in plan.matching.tensors]
        checksums = {label: record.get("checksum") for label, record in zip(labels, records, strict=True)}
        for shard, slots in _shards(plan, folder):
            file = shard.path.relative_to(folder)
            if not shard.path.is_file():
                raise refused(f"{file} is gone")
            if not shard.stands:
                raise refused(f"{file} was changed since (its header or size)")
            for label, slot in slots.items():
                if slot.checksum() != checksums[label]:
                    raise refused(f"{file} was changed since ({label})")
    say(f"{folder} is there already, made by this very command.")
    first = plan.models[plan.used[0]]
    for inside in _copied(plan):
        copied = folder / inside
        if not copied.is_file() or not filecmp.cmp(first.place / inside, copied, shallow=False):
            say(f"{copied} is not what {first.place / inside} is now.")
    return Report(plan, tuple(records), (folder / card.CARD).read_text(), folder)


def _worked(plan: Plan, task: Task, pending: Sequence[int], progress: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """Records of the pending tensors as they are finished, each with its tensor's position."""
    from tqdm import tqdm

    total, jobs = len(plan.matching.tensors), min(plan.request.jobs, max(1, len(pending)))
    threads = max(1, torch.get_num_threads() // jobs)
    work = Step(task, plan.matching.tensors, dict(zip(pending, pending[jobs:], strict=False)))
    bar = tqdm(total=total, initial=total - len(pending), unit="tensor", disable=not progress)
    with pool.started(jobs, __name__, threads=threads), bar:
        for at, record in pool.run(work, pending, jobs, threads):
            yield at, record
            bar.update()


@dataclass(frozen=True)
class Step:
    """The work on one tensor, told by its position. following: the tensor that is probably asked for after it."""

    task: Task
    tensors: tuple[Match, ...]
    following: dict[int, int]

    def __call__(self, at: int) -> dict[str, Any]:
        """Settle it while the operating system fetches the next; the record has a checksum of what was written."""
        if at in self.following:
            self.task.sources(self.tensors[self.following[at]]).expect()
        record = settle(self.task, self.tensors[at])
        slot = self.task.slots.get(self.tensors[at].label)
        return record if slot is None else {**record, "checksum": slot.checksum()}


def _public(record: dict[str, Any]) -> dict[str, Any]:
    """A journal's record as recovery.json holds it."""
    return {key: value for key, value in record.items() if key != "item"}


def _finish(plan: Plan, workshop: Workshop, records: tuple[dict[str, Any], ...], key: str) -> Report:
    request = plan.request
    first = plan.models[plan.used[0]]
    lacking: dict[str, list[str]] = {}
    if request.output is not None:
        for component, state in first.components.items():
            shards = plan_shards(state)
            if len(shards) > 1:
                workshop.write_text(str(Path(component) / index_name(state.files[0])), index_text(shards))
        for inside in _copied(plan):
            workshop.write(str(inside), partial(shutil.copyfile, first.place / inside))
    if request.adapters:
        labelled = {tensor.label: record for tensor, record in zip(plan.matching.tensors, records, strict=True)}
        scratch = workshop.partial / SCRATCH
        lacking = write_adapters(workshop.partial / ADAPTERS, scratch, plan.models, plan.used, labelled)
    text = card.text(plan, records, lacking)
    workshop.write_text(card.RECORDS, card.records_text(plan, records, key))
    workshop.write(card.PICTURE, lambda path: card.draw(records, path))
    workshop.write_text(card.CARD, text)
    workshop.finish()
    return Report(plan, records, text, workshop.folder)


def identity(plan: Plan) -> str:
    """16 hex digits that name a command's result: models' files, method, settings; not where or how fast it is made."""
    request = plan.request
    files = []
    for model in plan.models:
        for component, state in model.components.items():
            for path in state.files:
                stat = path.stat()
                files.append([model.label, component, path.name, stat.st_size, stat.st_mtime_ns])
    settings = [
        repr(request.method),
        request.rank,
        request.keep,
        request.seed,
        request.adapters,
        request.sure,
        request.output is None,
    ]
    code = [code_digest(__name__), code_digest(module_of(request.method))]
    return digest(json.dumps([__version__, code, files, settings]))


# ---- Dry run ----------------------------------------------------------------------------------------------------


def foresee(plan: Plan) -> str:
    """The plan in words, with ranks and seconds from a few tensors tried."""
    labels = [model.label for model in plan.models]
    tensors, solve = plan.matching.tensors, plan.to_solve()
    lines = [f"{len(tensors)} tensors of {labels[plan.used[0]]}, {plan.output_bytes() / 2**30:.3f} GiB:"]
    differ = sum(len([p for p in parts if set(p) & set(plan.used)]) > 1 for parts in plan.parts)
    lines.append(f"  {len(tensors) - differ} look identical, {len(solve)} to recover, {differ - len(solve)} to keep.")
    for at, base in enumerate(plan.bases):
        names = ", ".join(labels[i] for i in base)
        lines.append(f"Base {at + 1}: {names}" + ("" if at == 0 else f" ({plan.strangers[base[0]].looks_like})"))
    task = plan.task()
    tried, seconds, entries = [], 0.0, 0
    by_size = sorted(solve, key=lambda tensor: tensor.info.numel)
    for at in sorted({round(i) for i in torch.linspace(0, len(by_size) - 1, min(TRIED, len(by_size))).tolist()}):
        view = view_of(by_size[at].info.shape, by_size[at].rows)
        tensor = task.sources(by_size[at])
        distinct = tensor.only([group[0] for group in agreeing(tensor)])
        if len(distinct.models) < task.needed:
            continue
        begin = time.perf_counter()
        found, _ = solve_one(task, distinct.stack(view), distinct)
        seconds += time.perf_counter() - begin
        entries += view.d * view.k
        ranks = ", ".join(map(str, found.get("ranks", {}).values())) or "not found"
        tried.append(f"  {by_size[at].label} ({view.d} x {view.k}): {found['certainty']}, ranks {ranks}")
    lines += ["Tried:", *tried] if tried else []
    if entries:
        total = sum(tensor.info.numel for tensor in solve) * seconds / entries / plan.request.jobs
        lines.append(
            f"Time: about {total:.0f} s for the recovery, at {plan.request.jobs} jobs, and the reading of all."
        )
    lines.append(f"Memory: at most {plan.memory() / 2**30:.2f} GiB.")
    return "\n".join(lines)
