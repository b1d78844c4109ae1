"""Time and memory of recovery, reading and merging, side by side in one run on this machine.

    python scripts/benchmark.py            all of it, about a quarter of an hour on 2 cores
    python scripts/benchmark.py --quick    small shapes, under a minute: does it run, and roughly how fast
    python scripts/benchmark.py --only read merge

Every number is the median of warm runs, with the fastest and the slowest beside it. Operations and bytes are counted
while a warm-up run executes: the products' floating-point operations, and the bytes of every tensor an operation reads
or writes, both beside this machine's measured ceilings. Writes a table (Markdown and CSV) and a plot.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lowra.allocator import trim
from lowra.bench.merging import merge
from lowra.bench.schema import open_dataset, write_dataset
from lowra.bench.sources import synthetic_table
from lowra.methods.base import Method, Observation
from lowra.methods.spectral_detuning import RankScheduler, SpectralDeTuning
from lowra.methods.subspace_intersection import SubspaceIntersection
from lowra.methods.subspace_intersection.method import REFINE_ENTRIES
from lowra.metrics.weight_error import exact_fraction, weight_error

PLAIN = "Algorithm 2, plain"

READ_ARROW = "lowra, Arrow file"
READ_ARROW_DATASETS = "datasets with torch format, Arrow file"
READ_PARQUET = "lowra, parquet file"
READ_PARQUET_DATASETS = "datasets with torch format, parquet file"

# Root mean square of the planted updates: a twentieth of the weights' 0.04, as LoRAs trained hard have it; and small
# enough for subspace intersection to take its passes in float32, as those of published 7B fine-tunes are.
UPDATE_RMS = 2e-3
SMALL_UPDATE_RMS = 2e-4

# Share of exact weights from which it is told: of weights on no coarse grid it is chance.
ON_THE_BIT = 0.3

# Entries of the stacks of the steps in one timing of the full-space iterations, about a tenth of a second.
TIMED_ENTRIES = 20_000_000


# ---- What is measured ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A layer (d, k) with n models of rank r."""

    n: int
    d: int
    k: int
    r: int


@dataclass(frozen=True)
class Row:
    """One line of the table. seconds: the median; fastest, slowest: of `runs` warm runs."""

    section: str
    what: str
    n: int
    d: int
    k: int
    r: int
    steps: int | None
    seconds: float
    fastest: float
    slowest: float
    runs: int
    w_error: float | None = None
    gflop: float | None = None
    gbyte: float | None = None
    peak_layers: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of matrix products, and bytes read and written by all operations."""

    flop: float = 0.0
    byte: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flop + other.flop, self.byte + other.byte)


class Traffic(TorchDispatchMode):
    """Adds up the bytes of the tensors that operations read and write; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


def counted(work: Callable[[], Any]) -> tuple[Any, Cost]:
    """Run once under the counters; returns the result and the cost."""
    with FlopCounterMode(display=False) as flops, Traffic() as traffic:
        result = work()
    return result, Cost(flops.get_total_flops(), traffic.bytes)


def timed(work: Callable[[], Any], runs: int) -> list[float]:
    """Seconds of each of `runs` runs."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return seconds


def with_peak(work: Callable[[], Any]) -> tuple[Any, int | None]:
    """Run once; returns the result and the most resident memory beyond what was resident before.

    The memory is None where the system cannot tell (neither Linux nor glibc).
    """

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    if not trim():  # freed memory that the allocator keeps would hide what the run takes
        return work(), None
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, man 5 proc
        before = status("VmRSS")
    except OSError:
        return work(), None
    result = work()
    return result, max(status("VmHWM") - before, 0)


# ---- The plain restatement ----------------------------------------------------------------------------------------


def algorithm_2(stack: Tensor, rank: int, steps: int, *, scheduler: bool = True, seed: int = 0) -> Tensor:
    """The paper's Algorithm 2 line by line: lists of matrices, one `svd_lowrank` a model and step. (d, k)."""
    torch.manual_seed(seed)
    merged = list(stack)
    ranks = RankScheduler(SpectralDeTuning(steps=steps, start_rank=1 if scheduler else rank), rank)
    weight = torch.mean(torch.stack(merged), dim=0)
    for _ in range(steps):
        updates = [w - weight for w in merged]
        for i in range(len(updates)):
            u, s, v = torch.svd_lowrank(updates[i], q=ranks.current_rank)
            updates[i] = (u @ torch.diag_embed(s)) @ v.T
        weight = torch.mean(torch.stack([w - m for w, m in zip(merged, updates, strict=True)]), dim=0)
        losses = [torch.mean((w - (weight + m)) ** 2) for w, m in zip(merged, updates, strict=True)]
        ranks.step(torch.mean(torch.stack(losses), dim=0).item())
    return weight


def planted(shape: Shape, rms: float = UPDATE_RMS, grid: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A weight (d, k) of rms 0.04 and a merged stack (n, d, k): random rank-r updates, singular values down to 0.1.

    grid: the format whose numbers the weight is of.
    Equal sizes and a mild spectrum, so that Spectral DeTuning converges and errors can be compared beside times.
    """
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(shape.d, shape.k, generator=generator) * 0.04).to(grid).float()
    values = torch.logspace(0, -1, shape.r)
    values *= rms / values.norm()
    stack = torch.empty(shape.n, shape.d, shape.k)
    for merged in stack:
        columns = torch.randn(shape.d, shape.r, generator=generator) * values
        torch.mm(columns, torch.randn(shape.r, shape.k, generator=generator), out=merged)
        merged += weight
    return weight, stack


# ---- Rows ---------------------------------------------------------------------------------------------------------


def say(what: str, shape: Shape) -> None:
    """One line of progress."""
    print(f"  {what}: n={shape.n}, {shape.d} x {shape.k}, r={shape.r}", flush=True)


def summary(seconds: list[float], cost: Cost) -> dict[str, Any]:
    """The columns that come from timing and counting."""
    return {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "runs": len(seconds),
        "gflop": cost.flop / 1e9,
        "gbyte": cost.byte / 1e9,
    }


def measured(
    section: str, what: str, shape: Shape, work: Callable[[], Any], runs: int, memory: bool
) -> tuple[Row, Any]:
    """Warm up under the counters, time, and look at memory. Returns the row and one result.

    A single run is for what takes long: it is timed and watched at once, after no warm-up and without counts.
    """
    say(what, shape)
    if runs == 1:
        results: list[Any] = []
        seconds, peak = with_peak(lambda: timed(lambda: results.append(work()), 1))
        row = Row(section, what, **asdict(shape), steps=None, **summary(seconds, Cost()))
        result = results[0]
    else:
        result, cost = counted(work)
        row = Row(section, what, **asdict(shape), steps=None, **summary(timed(work, runs), cost))
        peak = with_peak(work)[1] if memory else None
    return replace(row, peak_layers=None if peak is None else peak / (4 * shape.d * shape.k)), result


def recovered(
    section: str,
    shape: Shape,
    method: Method,
    runs: int,
    data: tuple[Tensor, Tensor],
    memory: bool = False,
    storage: torch.dtype = torch.float32,
) -> tuple[Row, list[int]]:
    """A whole run of one of our methods on a planted layer, and the ranks of its steps where it keeps them."""
    weight, stack = data
    what = method.pretty + (", compress" if getattr(method, "compress", False) else "")
    observation = Observation(stack, rank=shape.r if method.needs_rank else None, storage=storage)
    row, recovery = measured(section, what, shape, partial(method.recover, observation), runs, memory)
    estimate = recovery.candidates[0]
    exact = exact_fraction(estimate, weight)
    row = replace(row, steps=getattr(method, "steps", None), w_error=weight_error(estimate, weight))
    row = replace(row, note=f"{exact:.2%} exact" if exact > ON_THE_BIT else "")
    return row, [int(step["rank"]) for step in recovery.history or []]


def compressed(steps: int = 300) -> SpectralDeTuning:
    """Spectral DeTuning in the joint subspace; its history says which ranks the full space would go through."""
    return SpectralDeTuning(steps=steps, compress=True, keep_history=True)


def full_steps(stack: Tensor, rank: int, steps: int) -> None:
    """Steps of our Spectral DeTuning in the full space at a fixed rank."""
    SpectralDeTuning(steps=steps, scheduler=False).recover(Observation(stack, rank))


def plain_steps(stack: Tensor, rank: int, steps: int) -> None:
    """Steps of the plain restatement at a fixed rank."""
    algorithm_2(stack, rank, steps, scheduler=False)


ITERATIONS: dict[str, Callable[[Tensor, int, int], None]] = {
    PLAIN: plain_steps,
    SpectralDeTuning.pretty: full_steps,
}


def extrapolated(
    section: str, what: str, shape: Shape, stack: Tensor, schedules: list[list[int]], memory: bool = False
) -> list[Row]:
    """The rows of runs whose steps have the given ranks, from a few warm steps at each of those ranks, timed twice."""
    say(f"{what}, single steps", shape)
    iterate = ITERATIONS[what]
    together = max(1, min(20, TIMED_ENTRIES // stack.numel()))  # steps in one timing: small layers need several
    seconds: dict[int, list[float]] = {}
    costs: dict[int, Cost] = {}
    for rank in sorted({rank for ranks in schedules for rank in ranks}):
        _, costs[rank] = counted(partial(iterate, stack, rank, 1))
        seconds[rank] = [total / together for total in timed(partial(iterate, stack, rank, together), 2)]
    peak = with_peak(partial(iterate, stack, shape.r, 1))[1] if memory else None
    rows = []
    for ranks in schedules:
        totals = [sum(seconds[rank][i] for rank in ranks) for i in range(2)]
        cost = Cost(sum(costs[rank].flop for rank in ranks), sum(costs[rank].byte for rank in ranks))
        row = Row(section, what, **asdict(shape), steps=len(ranks), **summary(totals, cost))
        peak_layers = None if peak is None else peak / (4 * shape.d * shape.k)
        note = f"extrapolated from {2 * together} steps at each of {len(seconds)} ranks"
        rows.append(replace(row, peak_layers=peak_layers, note=note))
    return rows


# ---- Sections -----------------------------------------------------------------------------------------------------


def recovery(quick: bool, runs: int) -> list[Row]:
    """Whole runs on a ViT layer; on a Mistral layer the full-space runs are extrapolated from single steps."""
    small = Shape(5, 256, 256, 16) if quick else Shape(5, 768, 768, 16)
    large = Shape(8, 512, 512, 16) if quick else Shape(8, 4096, 4096, 64)
    exact = SubspaceIntersection()

    data = planted(small)
    row, estimate = measured("recovery", PLAIN, small, partial(algorithm_2, data[1], small.r, 300), runs, True)
    rows = [replace(row, steps=300, w_error=weight_error(estimate, data[0]))]
    for method in (SpectralDeTuning(), compressed(), exact):
        rows.append(recovered("recovery", small, method, runs, data, memory=True)[0])
    rows.append(on_small_updates(small, runs))

    data = planted(large)
    short, short_ranks = recovered("recovery", large, compressed(300), 1, data)
    long, long_ranks = recovered("recovery", large, compressed(1000), 1, data)
    for what in ITERATIONS:
        rows += extrapolated("recovery", what, large, data[1], [short_ranks, long_ranks], memory=True)
    rows += [short, long]
    rows.append(recovered("recovery", large, exact, runs, data, memory=True)[0])
    three = (data[0], data[1][:3])
    rows.append(recovered("recovery", replace(large, n=3), exact, runs, three, memory=True)[0])
    del data, three
    rows += [on_small_updates(shape, runs) for shape in (large, replace(large, n=3))]
    return rows


def on_small_updates(shape: Shape, runs: int) -> Row:
    """Subspace intersection where it takes its passes in float32."""
    row, _ = recovered("recovery", shape, SubspaceIntersection(), runs, planted(shape, SMALL_UPDATE_RMS), memory=True)
    return replace(row, note=f"updates of rms {SMALL_UPDATE_RMS}: passes in float32")


def growth(quick: bool, runs: int) -> list[Row]:
    """How the cost of 300 steps, and of the closed form, grows with d, n and r from one middle shape."""
    middle = Shape(5, 256, 256, 8) if quick else Shape(5, 768, 768, 16)
    sizes = (128, 256, 512) if quick else (256, 512, 768, 1024, 2048)
    shapes = [replace(middle, d=d, k=d) for d in sizes]
    shapes += [replace(middle, n=n) for n in ((3, 8) if quick else (3, 8, 15))]
    shapes += [replace(middle, r=r) for r in ((4, 16) if quick else (4, 8, 32, 64))]
    rows = []
    for shape in shapes:
        data = planted(shape)
        row, ranks = recovered("growth", shape, compressed(), runs, data)
        for what in ITERATIONS:
            rows += extrapolated("growth", what, shape, data[1], [ranks])
        rows += [row, recovered("growth", shape, SubspaceIntersection(), runs, data)[0]]
    return rows


def reading(quick: bool, runs: int) -> list[Row]:
    """One layer with 15 LoRAs, from disk to tensors, against `datasets` with torch format.

    Like for like on the memory-mapped Arrow file that `datasets` keeps; and from the parquet file it was published as,
    which lowra reads directly and `datasets` converts first, in whole.
    """
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    table = synthetic_table("vit" if quick else "mistral_sft")
    info = table.infos[0]
    shape = Shape(len(table.model_names), info.d, info.k, info.ranks[0])
    rows = []

    def time_it(what: str, read: Callable[[], Any], times: int) -> None:
        say(what, shape)
        rows.append(Row("read", what, **asdict(shape), steps=None, **summary(timed(read, times), Cost())))

    with tempfile.TemporaryDirectory() as scratch:
        folder = write_dataset([table.read(0)], Path(scratch) / "one-layer")
        fresh = (f"{scratch}/cache-{i}" for i in range(runs + 1))

        def convert_and_read() -> Any:
            dataset = load_dataset(str(folder), split="train", cache_dir=next(fresh))
            return dataset.with_format("torch")[0]

        time_it(READ_PARQUET, lambda: open_dataset(folder).read(0), runs)
        time_it(READ_PARQUET_DATASETS, convert_and_read, min(runs, 3))
        dataset = load_dataset(str(folder), split="train", cache_dir=next(fresh))
        dataset.save_to_disk(f"{scratch}/arrow")
        stored, torch_format = open_dataset(Path(scratch) / "arrow"), dataset.with_format("torch")
        assert torch.equal(torch.as_tensor(torch_format[0]["pre_ft_weight"]), stored.read(0).weight)  # and both warm
        time_it(READ_ARROW, lambda: stored.read(0), runs)
        time_it(READ_ARROW_DATASETS, lambda: torch_format[0], min(runs, 3))
    return rows


def merging(quick: bool, runs: int) -> list[Row]:
    """W' = W + (alpha / r) B A for the models of a draw."""
    rows = []
    for family, n in (("vit", 5), ("mistral_sft", 8))[: 1 if quick else 2]:
        layer = synthetic_table(family).read(0, range(n))
        d, k = layer.weight.shape
        shape = Shape(n, d, k, layer.loras[0].rank)
        rows.append(measured("merge", "lowra.bench.merging", shape, partial(merge, layer), runs, True)[0])
    return rows


def half_precision(quick: bool, runs: int) -> list[Row]:
    """Merges stored in bfloat16, of a base on its grid: cell by cell, and as if the rounding were noise."""
    rows = []
    for shape in (Shape(3, 256, 256, 8), Shape(3, 768, 768, 16), Shape(3, 4096, 4096, 64))[: 1 if quick else 3]:
        weight, stack = planted(shape, 2.0**-8 * 0.04, torch.bfloat16)  # about the spacing of the grid
        data = weight, stack.bfloat16().float()
        del stack
        once = 1 if shape.d > 1000 else runs
        for what, method in (
            ("cell by cell", SubspaceIntersection()),
            ("weighted", SubspaceIntersection("bf16", "weighted")),
        ):
            row, _ = recovered("half precision", shape, method, once, data, memory=True, storage=torch.bfloat16)
            rows.append(replace(row, what=f"{row.what}, {what}"))
    return rows


def scaled(quick: bool, runs: int) -> list[Row]:
    """Merges whose rows were scaled, as DoRA's, beside the plain ones of the same updates."""
    rows = []
    for shape in (Shape(3, 256, 256, 8), Shape(3, 768, 768, 16), Shape(3, 1024, 4096, 64))[: 1 if quick else 3]:
        weight, plain = planted(shape, 10 * UPDATE_RMS, torch.bfloat16)
        moved = torch.rand(shape.n, shape.d, 1, generator=torch.Generator().manual_seed(1))
        own = weight.norm(dim=1, keepdim=True) / plain.norm(dim=2, keepdim=True)
        for what, merged in (("plain", plain), ("rows scaled", plain * own * (0.98 + 0.04 * moved))):
            row, _ = recovered("scaled", shape, SubspaceIntersection(), runs, (weight, merged), memory=True)
            rows.append(replace(row, what=f"{row.what}, {what}"))
    return rows


SECTIONS = {
    "recovery": recovery,
    "growth": growth,
    "half precision": half_precision,
    "scaled": scaled,
    "read": reading,
    "merge": merging,
}


# ---- Ceilings -----------------------------------------------------------------------------------------------------


def ceilings() -> dict[str, float]:
    """The best this machine does: GB/s of copying (read and written), GFLOP/s of matrix products by dtype."""
    big = torch.ones(2**26)  # 256 MB, beyond the caches
    target = torch.empty_like(big)
    best = {"copy GB/s": 2 * big.nbytes / min(timed(lambda: target.copy_(big), 5)) / 1e9}
    for name, dtype in (("sgemm GFLOP/s", torch.float32), ("dgemm GFLOP/s", torch.float64)):
        a = torch.randn(2048, 2048, dtype=dtype)
        out = torch.empty_like(a)
        best[name] = 2 * 2048**3 / min(timed(partial(torch.mm, a, a, out=out), 5)) / 1e9
    return best


# ---- Results ------------------------------------------------------------------------------------------------------


def ratios(rows: list[Row]) -> list[tuple[str, float]]:
    """The speed-ups that the project promises, from the rows of this run."""
    found = []

    def find(what: str, shape: tuple[int, ...], steps: int | None) -> Row | None:
        for row in rows:
            if (row.section, row.what, (row.n, row.d, row.k, row.r), row.steps) == ("recovery", what, shape, steps):
                return row
        return None

    for shape in sorted({(row.n, row.d, row.k, row.r) for row in rows if row.section == "recovery"}):
        size = f"{shape[1]} x {shape[2]}, n={shape[0]}, r={shape[3]}"
        exact = find(SubspaceIntersection.pretty, shape, None)
        for steps in (300, 1000):
            plain = find(PLAIN, shape, steps)
            short = find(f"{SpectralDeTuning.pretty}, compress", shape, steps)
            if plain is None:
                continue
            against = f"against {PLAIN}, {steps} steps{' (extrapolated)' if plain.note else ''}, {size}"
            if short:
                found.append((f"Spectral DeTuning with compress {against}", plain.seconds / short.seconds))
            if exact:
                found.append((f"Subspace intersection {against}", plain.seconds / exact.seconds))
    reads = {row.what: row for row in rows if row.section == "read"}
    for ours, theirs in ((READ_ARROW, READ_ARROW_DATASETS), (READ_PARQUET, READ_PARQUET_DATASETS)):
        if ours in reads:
            row = reads[ours]
            what = f"Reading a layer, {ours}, against {theirs}, {row.d} x {row.k}, {row.n} LoRAs of rank {row.r}"
            found.append((what, reads[theirs].seconds / row.seconds))
    return found


def markdown(rows: list[Row], best: dict[str, float], machine: str, command: str) -> str:
    """The report."""
    lines = ["# Benchmark", "", f"`{command}` on {machine}.", ""]
    lines += [
        "Ceilings: " + ", ".join(f"{name.split()[0]} {value:.0f} {name.split()[1]}" for name, value in best.items())
    ]
    lines[-1] += (
        ". Seconds are medians of warm runs, with the fastest and the slowest in brackets. GFLOP counts matrix "
    )
    lines[-1] += (
        "products only (no QR, no SVD), GB every byte that an operation reads or writes, caches or not, so that "
    )
    lines[-1] += "its rate may exceed that of copying. Peak memory is what a run needs beyond its input, in layers of "
    lines[-1] += "d x k float32. Layers are planted: float32 weights of rms 0.04, random updates of rms 0.002 "
    lines[-1] += f"unless noted. Up to {REFINE_ENTRIES} entries subspace intersection makes its weighted fit as well, "
    lines[-1] += "most of its time there."
    if found := ratios(rows):
        lines += ["", "| In this run | times faster |", "|---|---|"]
        lines += [f"| {what} | {ratio:.3g} |" for what, ratio in found]
    for section in SECTIONS:
        chosen = [row for row in rows if row.section == section]
        if not chosen:
            continue
        lines += ["", f"## {section.capitalize()}", ""]
        lines += ["| what | n | d x k | r | steps | seconds | runs | W-Error | GFLOP/s (of sgemm) | GB/s (of copy) "]
        lines[-1] += "| peak memory | note |"
        lines += ["|" + "---|" * 12]
        for row in chosen:
            rate, traffic = (row.gflop or 0) / row.seconds, (row.gbyte or 0) / row.seconds
            cells = [
                row.what,
                row.n,
                f"{row.d} x {row.k}",
                row.r,
                row.steps or "",
                f"{row.seconds:.3g} ({row.fastest:.3g} to {row.slowest:.3g})",
                row.runs,
                "" if row.w_error is None else f"{row.w_error:.2f}",
                f"{rate:.0f} ({rate / best['sgemm GFLOP/s']:.0%})" if row.gflop else "",
                f"{traffic:.1f} ({traffic / best['copy GB/s']:.0%})" if row.gbyte else "",
                "" if row.peak_layers is None else f"{row.peak_layers:.1f} layers",
                row.note,
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], path: Path) -> None:
    """Seconds against d, n and r: one panel each, the other two at their middle."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    grown = [row for row in rows if row.section == "growth"]
    middle = {key: statistics.mode(getattr(row, key) for row in grown) for key in ("n", "d", "r")}
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), sharey=True, layout="constrained")
    for axis, key in zip(axes, ("d", "n", "r"), strict=True):
        others = [other for other in middle if other != key]
        for what in dict.fromkeys(row.what for row in grown):
            line = [row for row in grown if row.what == what and all(getattr(row, o) == middle[o] for o in others)]
            line.sort(key=lambda row: getattr(row, key))
            times = [row.seconds for row in line]
            spread = [[row.seconds - row.fastest for row in line], [row.slowest - row.seconds for row in line]]
            axis.errorbar(
                [getattr(row, key) for row in line], times, yerr=spread, marker="o", ms=4, capsize=2, label=what
            )
        axis.set(xscale="log", yscale="log", xlabel={"d": "width d = k", "n": "models n", "r": "rank r"}[key])
        ticks = sorted({getattr(row, key) for row in grown})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.set_title(", ".join(f"{o} = {middle[o]}" for o in others), fontsize=10)
    axes[0].set_ylabel("seconds a layer")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle(
        "Cost of one layer (iterative methods: 300 steps; full space extrapolated from single steps;\n"
        f"subspace intersection with its weighted fit up to {REFINE_ENTRIES} entries)",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def processor() -> str:
    """The processor's name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Run the chosen sections and write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, under a minute")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run (all)")
    parser.add_argument("--runs", type=int, default=5, help="warm runs a number is the median of, 2 or more (5)")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch (as many as it takes by itself)")
    parser.add_argument("--out", type=Path, default=Path("results") / "benchmark", help="folder for the results")
    options = parser.parse_args()
    if options.runs < 2:
        parser.error(f"--runs must be at least 2; got {options.runs}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)

    print("ceilings", flush=True)
    best = ceilings()
    rows: list[Row] = []
    for section in options.only:
        print(section, flush=True)
        rows += SECTIONS[section](options.quick, options.runs)
    machine = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.system()}"
    command = " ".join(["python scripts/benchmark.py", *sys.argv[1:]])

    report = markdown(rows, best, machine, command)
    (options.out / "benchmark.md").write_text(report)
    with (options.out / "benchmark.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    if "growth" in options.only:
        draw(rows, options.out / "benchmark.png")
    print(f"\n{report}\nwritten to {options.out}")


if __name__ == "__main__":
    main()
