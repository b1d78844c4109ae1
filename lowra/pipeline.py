"""What a run does, step by step, with the parts the other modules make; `lowra.run` is its command."""

from __future__ import annotations

import functools
import itertools
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from lowra import plan as planning
from lowra import pool, reporting, signals
from lowra.bench.draws import Draw
from lowra.judge import LayerJudge, ModelJudge
from lowra.plan import Plan, Task, in_shard
from lowra.records import LAYER, SCORE, KeptWeights, Store, scores_of, tables
from lowra.reporting import kept
from lowra.reporting.kept import Made
from lowra.settings import shard_of

TABLES_SECONDS = 2.0  # at least so long between two writings of the tables while a run is under way, ...
TABLES_SHARE = 20  # ... and so many times as long as writing them takes


@dataclass
class Outcome:
    """How a run ended. failures: sentences; a run with any of them ends with exit status 1."""

    folder: Path
    failures: list[str] = field(default_factory=list)


def run(cfg: DictConfig) -> Outcome:
    """Run a configuration to its end (see `lowra.run.run`)."""
    plan = planning.prepare(cfg)
    store = Store(plan.folder)
    store.refresh()
    keys = set(plan.keys())
    done = sum(store.done(LAYER, key) for key in keys)
    if done:
        print(f"{done} of {len(keys)} recovered layers are there from an earlier run.", file=sys.stderr)
    jobs, threads = workers(plan, len(keys) - done)
    store.open(plan.context(jobs, threads))
    judge = layer_judge(plan, threads, store.weights if plan.metrics else None)
    outcome = Outcome(plan.folder)
    models = ModelJudge(plan, store, judge)
    shard = shard_of(cfg.shard)
    try:
        recover(plan, store, judge, models, jobs, threads, outcome)
    finally:
        store.close()
    outcome.failures += models.problems
    if shard:
        print(f"Shard {cfg.shard} is done; the command without shard= makes the tables. Records: {store.place}")
    else:
        models.galleries()
        outcome.failures += [p for p in models.problems if p not in outcome.failures]
        print(report(plan, store, figures=True))
    for sentence in outcome.failures:
        print(sentence, file=sys.stderr)
    return outcome


def layer_judge(plan: Plan, threads: int, keep: KeptWeights | None = None) -> LayerJudge:
    """The judge of a plan's layers. keep: where recovered weights wait for metrics, None keeps none."""
    return LayerJudge(
        table=plan.data.table,
        methods={name: variant.method for name, variant in plan.variants.items()},
        merge_dtype=plan.cfg.merge.dtype,
        merge_order=plan.cfg.merge.order,
        foreign=plan.cfg.merge.foreign,
        defence=plan.defence,
        seed=plan.cfg.seed,
        threads=threads,
        device=str(plan.device),
        digests=plan.data.base is not None,
        keep=keep,
    )


def workers(plan: Plan, records: int) -> tuple[int, int]:
    """Processes, and threads of each."""
    if plan.cfg.jobs is not None:
        jobs = int(plan.cfg.jobs)
    else:
        largest = max(plan.info(index).d * plan.info(index).k for index in plan.layers)
        models = max(draw.n_loras for draw in plan.draws)
        tasks = records // len(plan.variants)
        # The stack, float64 copies of a layer in the judge, and the workspaces of a method: measured at 8 layers.
        jobs = pool.choose_jobs(tasks, pool.cores(), 4 * largest * (2 * models + 8), plan.device.type)
    return jobs, pool.threads_of(jobs)


def recover(
    plan: Plan, store: Store, judge: LayerJudge, models: ModelJudge, jobs: int, threads: int, outcome: Outcome
) -> None:
    """Recover all layers that are not there, and score each draw's models when its layers are all there."""
    torch.set_num_threads(threads)  # this process scores while the others recover
    active = list(plan.variants)
    mine = shares(plan)
    remaining = dict.fromkeys(plan.draws, 0)
    todo: list[Task] = []
    for draw in plan.draws:
        tasks = [task for task in plan.tasks(store, draw, active) if mine is None or (draw, task.index) in mine]
        remaining[draw] = len(tasks)
        todo += tasks
    due = time.monotonic() + TABLES_SECONDS
    interval = 0.1 if sys.stderr.isatty() else 30  # a log file wants a line now and then, not ten a second
    total = sum(len(task.variants) for task in todo)
    finished = [draw for draw in plan.draws if not remaining[draw]]
    with tqdm(total=total, unit="layer", disable=not todo, dynamic_ncols=True, mininterval=interval) as bar:
        for draw in finished:
            score(plan, models, draw, mine is not None, leave=True)
        waiting = still_open(plan, store, todo, active, bar)
        for group, found in pool.run(judge.judge_alike, waiting, jobs, threads, lambda: not store.others):
            signals.check()
            draw = group[0].draw
            bar.set_description(str(draw), refresh=False)
            for task, judged in zip(group, found, strict=True):
                for name, measured in zip(task.variants, judged, strict=True):
                    record = store.append(plan.coordinates(draw, task.index, plan.variants[name]) | measured)
                    if record["failed"]:
                        told(record, outcome)
                bar.update(len(task.variants))
            remaining[draw] -= len(group)
            if not remaining[draw]:
                drop_hopeless(plan, store, draw, active)
                score(plan, models, draw, mine is not None, leave=True)
                if mine is None and time.monotonic() > due:
                    started = time.monotonic()
                    report(plan, store, figures=False)
                    due = time.monotonic() + max(TABLES_SECONDS, TABLES_SHARE * (time.monotonic() - started))
    store.refresh()
    # What other processes finished of draws that were not ours to score, what one of them is at last.
    for leave in (True, False) if store.others else (False,):
        for draw in plan.draws:
            score(plan, models, draw, mine is not None, leave=leave)


def shares(plan: Plan) -> set[tuple[Draw, int]] | None:
    """The (draw, layer) pairs of the shard asked for; None where the run is whole."""
    shard = shard_of(plan.cfg.shard)
    if shard is None:
        return None
    pairs = [(draw, index) for draw in plan.draws for index in plan.layers]
    sizes = [float(plan.info(index).d * plan.info(index).k * draw.n_loras) for draw, index in pairs]
    chosen = in_shard(pairs, sizes, shard)
    return {pair for position, pair in enumerate(pairs) if position in chosen}


def still_open(
    plan: Plan, store: Store, todo: Sequence[Task], active: Sequence[str], bar: Any
) -> Iterator[tuple[Task, ...]]:
    """The tasks that nobody has finished meanwhile, of variants that are still tried; small layers alike as one.

    Draws come in order, and so do the layers of a draw until another process is seen at work on them: from there on
    they come at random, lest the two walk side by side where each sees late what the other does. What another process
    has claimed comes when it is done, or last.
    """
    claimed_by_others: list[Task] = []
    of_its_own = random.Random()  # what is worked at when is nobody's result

    @functools.cache
    def key(draw: Draw, index: int, name: str) -> str:
        return plan.key(draw, index, plan.variants[name])

    def lacking(task: Task) -> dict[str, str]:
        keys = {name: key(task.draw, task.index, name) for name in task.variants if name in active}
        return {name: named for name, named in keys.items() if not store.done(LAYER, named)}

    def look() -> Iterator[tuple[Task, ...]]:
        store.refresh()
        for task in [task for task in claimed_by_others if not lacking(task)]:
            claimed_by_others.remove(task)
            yield begun([task])

    def elsewhere(task: Task) -> bool:
        return any(map(store.claimed, lacking(task).values()))

    def taken(waiting: list[Task]) -> Task:
        if store.others:
            chosen = of_its_own.randrange(len(waiting))
            waiting[-1], waiting[chosen] = waiting[chosen], waiting[-1]
        return waiting.pop()

    def begun(tasks: Sequence[Task]) -> tuple[Task, ...]:
        open_ = [lacking(task) for task in tasks]
        bar.update(sum(len(task.variants) - len(keys) for task, keys in zip(tasks, open_, strict=True)))
        if any(open_):
            store.claim(itertools.chain.from_iterable(keys.values() for keys in open_))
        return tuple(replace(task, variants=tuple(keys)) for task, keys in zip(tasks, open_, strict=True))

    for _, group in itertools.groupby(todo, key=lambda task: task.draw):
        waiting = list(group)[::-1]
        while waiting:
            yield from look()
            first = taken(waiting)
            if elsewhere(first):
                claimed_by_others.append(first)
                continue
            tasks, most, places = [first], plan.together(first), reversed(range(len(waiting)))
            while len(tasks) < most and (place := next(places, None)) is not None:
                if plan.alike(waiting[place]) == plan.alike(first) and not elsewhere(waiting[place]):
                    tasks.append(waiting.pop(place))
            yield begun(tasks)
    while claimed_by_others:
        yield from look()
        if claimed_by_others:
            yield begun([taken(claimed_by_others)])


def score(plan: Plan, models: ModelJudge, draw: Draw, sharded: bool, *, leave: bool) -> None:
    """Score a draw's recovered models, where the run has metrics and is whole. leave: what another process is at."""
    if plan.metrics and not sharded:
        for variant in plan.variants.values():
            signals.check()
            models.score(draw, variant, leave=leave)


def told(record: dict[str, Any], outcome: Outcome) -> None:
    """Keep the first error of each variant, to be printed at the end."""
    sentence = f"{record['label']} failed, first on {record['layer_name']}: {record['status'].removeprefix('failed: ')}"
    if not any(known.startswith(f"{record['label']} failed, first on") for known in outcome.failures):
        outcome.failures.append(sentence)


def drop_hopeless(plan: Plan, store: Store, draw: Draw, active: list[str]) -> None:
    """Try a method no further that failed on every layer of a draw."""
    for name in list(active):
        records = [store.get(LAYER, plan.key(draw, index, plan.variants[name])) for index in plan.layers]
        if all(record is not None and record["failed"] for record in records):
            active.remove(name)


def report(plan: Plan, store: Store, *, figures: bool) -> str:
    """Write the tables (and figures) of the run's folder; returns the text for the terminal."""
    wanted = set(plan.keys())
    rows = [record | {"folder": str(plan.folder)} for record in store.all(LAYER) if record["key"] in wanted]
    if not rows:
        return ""
    rows.sort(key=lambda row: row["key"])  # whoever wrote them when, and whatever others wrote beside them
    scores, order = scores_of(rows, store.all(SCORE)), list(plan.variants)
    contexts = {name: store.contexts.get(name, {}) for name in dict.fromkeys(record["context"] for record in rows)}
    notes = [f"{len(store.damaged)} damaged records or files were left out."] if store.damaged else []

    def make() -> Made:
        records = tables(rows, scores, contexts, wanted, notes)
        return reporting.made(records, plan.folder, methods_order=order, figures=figures)

    if not figures:  # while the run is under way: seldom the same twice
        return reporting.put(make(), plan.folder)
    given = ["run", rows, scores, contexts, notes, order, str(Path.cwd())]  # folders are shown as seen from here
    return reporting.put(kept.made(given, make), plan.folder)
