"""How much of a base weight do half-precision merges give back, bit for bit? Planted layers, many seeds.

    python scripts/half_precision.py                    # all groups; hours on 2 cores, resumed where it was left
    python scripts/half_precision.py phase --seeds 3    # one group, fewer seeds
    python scripts/half_precision.py --loras FOLDER     # real LoRAs: the files of a folder, their base drawn
    python scripts/half_precision.py --fuzz 1000        # random layers, most of which no certificate may be given to
    python scripts/half_precision.py --report           # table and figure from the rows there are

Layers d x k of W ~ N(0, 0.02^2) on the grid, updates of rank r with singular values from 1 down to `decay`, scaled to a
signal mu = rms(M) / rms(ulp(W)). rho = r (d + k) / (d k) is the number of unknowns of an update over its equations.
Ranks are not told, unless to Spectral DeTuning, which needs them. Beside the methods stand two bounds that know what
nobody does: `from the truth` is where ours comes to rest from the true updates (the first seeds); `updates known` is
the share that anybody could have who knows them exactly. Groups:

    phase        exact share over mu and rho, n = 3, beside the vote, the mean, Spectral DeTuning and the weighted fit
    sizes        512 x 512 to 4096 x 4096; of layers above a million weights fewer seeds
    models       n = 5 and 8
    formats      float16; bfloat16 bases in float16 merges; both among the models; updates rounded before they are added
    norms        updates of very different size
    overlap      updates whose column and row spaces overlap, as those of fine-tunes for one task do
    certificate  layers that no certificate may be given to, and sound ones among them
    loras        real updates: NAME.lora_up.weight (d, r) and NAME.lora_down.weight (r, k) of three files and more, all
                 of a layer scaled alike to the signal

Writes a row per layer and method to results/half_precision/cases.csv, and half_precision.md and .png from it.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import matplotlib
import pandas as pd
import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from lowra.methods.base import Observation
from lowra.methods.spectral_detuning import SpectralDeTuning
from lowra.methods.subspace_intersection import SubspaceIntersection
from lowra.methods.subspace_intersection.half.cells import grid_of
from lowra.methods.subspace_intersection.half.fit import FAINTEST
from lowra.methods.subspace_intersection.half.recovery import AT_ONCE, FINISH, sizes_in_cells
from lowra.methods.subspace_intersection.half.rounds import converge
from lowra.methods.subspace_intersection.half.sites import Cells, hold_out, unit
from lowra.methods.subspace_intersection.half.start import factored, vote

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CELLS = "cell by cell"
TODAY = "weighted fit"
SPECTRAL = "Spectral DeTuning"
TRUTH = "from the truth"
KNOWN = "updates known"
METHODS = (CELLS, TODAY, SPECTRAL, "vote", "mean", TRUTH, KNOWN)
BOUNDS = (TRUTH, KNOWN)

# Methods that take long: of large layers, or of many seeds, they are not tried.
SLOW = (TODAY, SPECTRAL)

SIGNALS = (0.05, 0.1, 0.3, 1.0, 4.0, 8.0, 30.0)

# Seeds of the slow methods beside ours, and the largest layers that they are tried on.
SEEDS_BESIDE = 3
BESIDE = 2**18

# Seeds of layers up to so many weights; one of larger ones.
SEEDS = {2**20: 100, 2**22: 3}

# Signals of real updates.
REAL = (0.15, 1.0, 3.0)


@dataclass(frozen=True)
class Case:
    """A recipe for planted layers. norms: sizes of the updates relative to mu. plant: what is wrong with the layer.

    overlap: of the columns and of the rows, how much all updates have in common: about the cosine between their spaces.
    files, layer: of real updates, in place of random ones.
    """

    group: str
    shape: tuple[int, int]
    ranks: tuple[int, ...]
    mu: float
    decay: float = 0.1
    base: str = "bf16"
    merges: tuple[str, ...] = ("bf16",)
    norms: tuple[float, ...] = (1.0,)
    plant: str = "independent"
    overlap: tuple[float, float] = (0.0, 0.0)
    files: tuple[Path, ...] = ()
    layer: str = ""

    @property
    def name(self) -> str:
        """All that tells it from others."""
        d, k = self.shape
        parts = [
            f"{d}x{k}",
            "r=" + "/".join(map(str, sorted(set(self.ranks)))),
            f"n={len(self.ranks)}",
            f"mu={self.mu:g}",
        ]
        if self.files:
            return ", ".join([self.layer, *parts])
        parts.append(f"decay={self.decay:g}")
        if self.base != "bf16" or self.merges != ("bf16",):
            parts.append(f"{self.base} base, {'/'.join(self.merges)} merges")
        if self.norms != (1.0,):
            parts.append("norms " + "/".join(f"{x:g}" for x in self.norms))
        if any(self.overlap):
            parts.append("overlap " + "/".join(f"{x:g}" for x in self.overlap))
        if self.plant != "independent":
            parts.append(self.plant)
        return ", ".join(parts)

    @property
    def rho(self) -> float:
        """Unknowns over equations."""
        d, k = self.shape
        return max(self.ranks) * (d + k) / (d * k)

    @property
    def seeds(self) -> int:
        """How many are worth their time, at most."""
        d, k = self.shape
        return next((seeds for size, seeds in SEEDS.items() if d * k <= size), 1)


@dataclass(frozen=True)
class Row:
    """One method on one layer. exact: share of weights on the bit. sure_exact: of those called sure."""

    group: str
    case: str
    plant: str
    rho: float
    mu: float
    seed: int
    method: str
    exact: float
    w_error: float
    seconds: float
    certificate: str = ""
    predicted: float = math.nan
    sure: float = math.nan
    sure_exact: float = math.nan
    chi: float = math.nan
    deviation: float = math.nan
    start: str = ""


# Overlaps of columns and rows that are plants of their own.
OVERLAPS = {"shared A": (0.0, 1.0), "nearly shared A": (0.0, 0.99), "shared B": (1.0, 0.0)}

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Planted:
    """W (d, k), the merged stack (n, d, k), and the updates as they were added; float32."""

    weight: Tensor
    stack: Tensor
    updates: tuple[Tensor, ...]


def planted(case: Case, seed: int) -> Planted:
    """The layer of a case."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    d, k = case.shape
    weight = (0.02 * draw(d, k)).to(DTYPES[case.base]).float()
    grid = torch.finfo(DTYPES[case.merges[0]])
    ulp = torch.exp2(torch.floor(torch.log2(weight.abs().clamp(min=grid.tiny)))) * grid.eps
    size = case.mu * float(ulp.square().mean().sqrt())
    shared_left, shared_right = draw(d, max(case.ranks)), draw(k, max(case.ranks))
    overlap = OVERLAPS.get(case.plant, case.overlap)
    updates = []
    if case.files:
        read = [real_update(file, case.layer) for file in case.files]
        mean = sum(float(update.square().mean()) for update in read) / len(read)
        updates = [update * (size / math.sqrt(mean)) for update in read]
    for i, rank in enumerate(() if case.files else case.ranks):
        left, right = draw(d, rank), draw(k, rank)
        left, right = (
            math.sqrt(share) * common[:, :rank] + math.sqrt(1 - share) * own
            for share, common, own in zip(overlap, (shared_left, shared_right), (left, right), strict=True)
        )
        values = torch.logspace(0, math.log10(case.decay), rank) if rank > 1 else torch.ones(1)
        update = (torch.linalg.qr(left).Q * values) @ torch.linalg.qr(right).Q.mT
        update *= size * case.norms[i % len(case.norms)] / update.square().mean().sqrt()
        if (case.plant == "component of two" and i < 2) or case.plant == "component of all":
            part = torch.outer(shared_left[:, 0], shared_right[:, 0])
            update += part * (update.norm() / part.norm() / math.sqrt(rank))
        updates.append(update)
    stack = []
    for i, update in enumerate(updates):
        dtype = dtype_of(case, i)
        base = weight
        if case.plant == "another base" and i == 0:
            base = (0.02 * draw(d, k)).to(DTYPES[case.base]).float()
        if case.plant == "touched" and i == 0:
            base = weight + ulp * torch.randint(-1, 2, (d, k), generator=generator)
        if case.plant == "rounded twice":
            updates[i] = update.to(dtype).float()
        stack.append((base + updates[i]).to(dtype).float())
    return Planted(weight, torch.stack(stack), tuple(updates))


def dtype_of(case: Case, model: int) -> torch.dtype:
    """The format of a model's merge."""
    return DTYPES[case.merges[model % len(case.merges)]]


def share_of_known(case: Case, layer: Planted) -> float:
    """The expected share of W that is right on the bit, at most, for who knows the updates exactly.

    W lies in the part that all cells have in common once each is moved back by its update. Where that holds several
    numbers of the grid, the likeliest is the one that is rounded to from most of it: none is denser than another there.
    """
    low, high = (torch.full_like(layer.weight, end, dtype=torch.float64) for end in (-math.inf, math.inf))
    for i, (stored, update) in enumerate(zip(layer.stack, layer.updates, strict=True)):
        centre, half = (part.double() for part in grid_of(dtype_of(case, i)).cell(stored))
        low, high = torch.maximum(low, centre - half - update), torch.minimum(high, centre + half - update)
    dtype = DTYPES[case.base]
    grid = grid_of(dtype)
    first, last = low.to(dtype).float(), high.to(dtype).float()
    first = torch.where(first < low, grid.neighbour(first, 1), first)
    last = torch.where(last > high, grid.neighbour(last, -1), last)
    (centre, half), (last_centre, last_half) = grid.cell(first), grid.cell(last)
    together = (last_centre.double() + last_half) - (centre.double() - half)
    share = 2 * torch.maximum(half, last_half) / together
    # Sums in float32 now and then leave a number that lies just outside, and nothing inside.
    return float(torch.where(first >= last, 1.0, share).mean())


def from_truth(case: Case, layer: Planted) -> Tensor:
    """W (d, k) where ours comes to rest from the true updates, of the true ranks."""
    dtypes = tuple(dtype_of(case, i) for i in range(len(layer.updates)))
    generator = torch.Generator().manual_seed(0)
    scale = unit(layer.stack, dtypes)
    base = None if case.base == "fp32" else grid_of(DTYPES[case.base], scale)
    twice = case.plant == "rounded twice"
    cells = Cells(layer.stack, dtypes, scale, base, hold_out(layer.stack, generator), twice)
    nothing = torch.zeros_like(layer.weight)
    factors = factored(torch.stack(layer.updates) * scale, nothing, list(case.ranks), generator)
    # Rest is long in coming where updates are faint: what the truth alone knows is lost a little in every round.
    clips, calm_rounds, most = (AT_ONCE, 40, 80) if sizes_in_cells(cells)[1] < FAINTEST else (FINISH, 12, 40)
    run = converge(cells, factors, clips, good=True, most=most, calm_rounds=calm_rounds, slack=math.inf)
    weight = run.decoded.weight
    assert weight is not None
    return weight.float()


def real_update(path: Path, layer: str) -> Tensor:
    """The update (d, k) of a layer in a LoRA file."""
    with safe_open(path, "pt") as file:
        up, down = (file.get_tensor(f"{layer}.lora_{side}.weight").float() for side in ("up", "down"))
    return up @ down


def real_cases(folder: Path) -> Iterator[Case]:
    """The layers that three and more of the LoRA files in a folder have trained."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) < 3:
        raise SystemExit(f"error: {folder} has {len(files)} .safetensors files; three LoRAs of one base are needed.")
    trained: dict[str, list[Path]] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            for key in sorted(file.keys()):
                layer, up, rest = key.partition(".lora_up.weight")
                if up and not rest and bool(file.get_tensor(key).any()):
                    trained.setdefault(layer, []).append(path)
    for layer, found in sorted(trained.items()):
        if len(found) >= 3:
            d, k = real_update(found[0], layer).shape
            with safe_open(found[0], "pt") as file:
                rank = file.get_slice(f"{layer}.lora_down.weight").get_shape()[0]
            for mu in REAL:
                yield Case("loras", (d, k), (rank,) * len(found), mu, files=tuple(found), layer=layer)


def cases(group: str, loras: Path | None = None) -> Iterator[Case]:
    """The cases of a group."""
    if group == "loras" and loras is not None:
        yield from real_cases(loras)
    if group == "phase":
        for rank in (4, 8, 16):
            for mu in SIGNALS:
                yield Case(group, (256, 256), (rank,) * 3, mu)
        for mu in (0.1, 0.3, 1.0, 4.0):
            yield Case(group, (256, 256), (16,) * 3, mu, decay=1.0)
    if group == "sizes":
        for mu in (0.1, 0.3, 1.0, 4.0, 8.0):
            yield Case(group, (512, 512), (8,) * 3, mu)
            yield Case(group, (256, 1024), (16,) * 3, mu)
            yield Case(group, (1024, 1024), (16,) * 3, mu)
        for mu in (0.1, 1.0, 8.0):
            yield Case(group, (1024, 4096), (64,) * 3, mu)
            yield Case(group, (4096, 4096), (64,) * 3, mu)
    if group == "models":
        for n in (5, 8):
            for mu in (0.1, 1.0, 4.0):
                yield Case(group, (256, 256), (16,) * n, mu)
        for mu in (0.1, 1.0, 8.0):
            yield Case(group, (512, 512), (8,) * 8, mu)
        for mu in (0.1, 0.3, 1.0, 4.0):
            yield Case(group, (256, 256), (2, 4, 8, 16), mu, decay=0.1)
    if group == "formats":
        for mu in (0.3, 1.0, 4.0):
            yield Case(group, (256, 256), (16,) * 3, mu, base="fp16", merges=("fp16",))
            yield Case(group, (256, 256), (8,) * 3, mu, base="bf16", merges=("fp16",))
            yield Case(group, (256, 256), (8,) * 3, mu, merges=("bf16", "fp16"))
            yield Case(group, (128, 128), (4,) * 3, mu, base="fp32")
        for mu in (1.0, 10.0, 30.0):
            yield Case(group, (256, 256), (8,) * 3, mu, plant="rounded twice")
    if group == "norms":
        for norms in ((10.0, 1.0, 1.0), (30.0, 1.0, 0.1), (1.0, 0.1, 0.1)):
            for mu in (0.1, 0.3, 1.0):
                yield Case(group, (256, 256), (4,) * 3, mu, norms=norms)
    if group == "overlap":
        for overlap in ((0.5, 0.2), (0.8, 0.2), (0.5, 0.5), (0.8, 0.5)):
            for mu in (0.3, 1.0, 2.0, 8.0):
                yield Case(group, (256, 320), (8,) * 3, mu, overlap=overlap)
        for mu in (0.3, 1.0, 2.0, 8.0):
            yield Case(group, (512, 512), (16,) * 3, mu, overlap=(0.8, 0.2))
            yield Case(group, (256, 320), (8,) * 5, mu, overlap=(0.8, 0.2))
    if group == "certificate":
        for mu in (0.1, 0.3, 1.0, 4.0):
            for plant in (
                "independent",
                "shared A",
                "shared B",
                "nearly shared A",
                "component of two",
                "component of all",
                "another base",
                "touched",
            ):
                yield Case(group, (96, 96), (3,) * 3, mu, plant=plant)
            yield Case(group, (96, 96), (3,) * 2, mu)
            yield Case(group, (96, 96), (3,) * 3, mu, base="fp32")
            yield Case(group, (96, 96), (3,) * 3, mu, norms=(1.0, 0.1, 0.1))
            yield Case(group, (96, 96), (3,) * 5, mu, plant="another base")


GROUPS = ("phase", "sizes", "models", "formats", "norms", "overlap", "certificate", "loras")


def random_case(seed: int) -> Case:
    """A layer of any shape, ranks, sizes, formats and plant."""
    pick = random.Random(seed)
    plant = pick.choice(
        ["independent"] * 4
        + ["shared A", "shared B", "nearly shared A", "component of two", "component of all", "another base", "touched"]
        + ["rounded twice", "two models", "float32 base"]
    )
    shape = (pick.randint(48, 320), pick.randint(48, 320))
    n = 2 if plant == "two models" else pick.choice((3, 3, 3, 4, 5, 8))
    ranks = [pick.randint(1, max(1, min(shape) // 12)) for _ in range(n)]
    if pick.random() < 0.5 or plant.startswith(("shared", "nearly")):
        ranks = ranks[:1] * n
    half = ("bf16", "bf16", "bf16", "fp16")
    return Case(
        "fuzz",
        shape,
        tuple(ranks),
        10 ** pick.uniform(-1.3, 1.5),
        decay=10 ** pick.uniform(-1.3, 0),
        base="fp32" if plant == "float32 base" else pick.choice(half),
        merges=tuple(pick.choice(half) for _ in range(n)) if pick.random() < 0.2 else (pick.choice(half),),
        norms=tuple(10 ** pick.uniform(-1, 1) for _ in range(n)) if pick.random() < 0.3 else (1.0,),
        plant="independent" if plant in ("two models", "float32 base") else plant,
    )


def fuzz(layers: int, first: int, table: Path) -> None:
    """Measure random layers that are not in the table yet."""
    with appended(table) as (add, done):
        for seed in tqdm(range(first, first + layers), unit="layer"):
            case = random_case(seed)
            if (case.name, seed, CELLS) not in done:
                add(measured(case, seed, CELLS))


def measured(case: Case, seed: int, method: str) -> Row:
    """Recover one layer with one method."""
    layer = planted(case, seed)
    weight, stack = layer.weight, layer.stack
    begun = time.perf_counter()
    extra: dict[str, float | str] = {}
    share: float | None = None
    if method in (CELLS, TODAY):
        solver = SubspaceIntersection(refine="auto" if method == CELLS else "weighted")
        recovery = solver.recover(Observation(stack, None, seed, DTYPES[case.merges[0]]))
        estimate, stats = recovery.candidates[0], recovery.stats
        extra["certificate"] = str(stats["certificate"])
        found = {"predicted": "predicted_exact", "sure": "sure_share", "chi": "chi", "deviation": "held_out_deviation"}
        extra |= {column: value for column, key in found.items() if isinstance(value := stats[key], float)}
        extra["start"] = str(stats["start"])
        if recovery.sure is not None and bool(recovery.sure.any()):
            extra["sure_exact"] = float((estimate == weight)[recovery.sure].float().mean())
    elif method == SPECTRAL:
        estimate = SpectralDeTuning(compress=True).recover(Observation(stack, max(case.ranks), seed)).candidates[0]
    elif method == TRUTH:
        estimate = from_truth(case, layer)
    elif method == KNOWN:
        estimate, share = torch.full_like(weight, math.nan), share_of_known(case, layer)
    else:
        estimate = vote(stack) if method == "vote" else stack.mean(0)
    seconds = time.perf_counter() - begun
    if method not in (CELLS, TODAY):  # these choose a grid themselves
        estimate = estimate.to(DTYPES[case.base]).float()
    error = float((estimate.double() - weight).square().mean())
    return Row(
        group=case.group,
        case=case.name,
        plant=case.plant,
        rho=case.rho,
        mu=case.mu,
        seed=seed,
        method=method,
        exact=float((estimate == weight).double().mean()) if share is None else share,
        w_error=math.log10(error) if error else -31.3,
        seconds=seconds,
        **extra,  # type: ignore[arg-type]
    )


@contextmanager
def appended(table: Path) -> Iterator[tuple[Callable[[Row], None], set[tuple[str, int, str]]]]:
    """What adds a row to the table, and what is there: case, seed and method."""
    done: set[tuple[str, int, str]] = set()
    if table.exists():
        known = pd.read_csv(table)
        done = set(zip(known.case, known.seed, known.method, strict=True))
    else:
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text(",".join(field.name for field in fields(Row)) + "\n")
    with table.open("a", newline="") as file:
        writer = csv.writer(file)

        def add(row: Row) -> None:
            writer.writerow([getattr(row, field.name) for field in fields(Row)])
            file.flush()

        yield add, done


def run(groups: list[str], seeds: int, beside: int, table: Path, loras: Path | None) -> None:
    """Measure what is not in the table yet, seed by seed, so that a part of the run is a smaller run."""
    with appended(table) as (add, done):
        for seed in range(seeds):
            for group in groups:
                for case in cases(group, loras):
                    if seed >= case.seeds:
                        continue
                    for method in METHODS:
                        if (case.name, seed, method) in done or not worth(case, seed, method, beside):
                            continue
                        row = measured(case, seed, method)
                        add(row)
                        print(
                            f"{row.case}, seed {seed}, {method}: exact {row.exact:.4f}, {row.seconds:.1f} s", flush=True
                        )


def worth(case: Case, seed: int, method: str, beside: int) -> bool:
    """Whether a method that is not ours is measured on a layer."""
    if method in BOUNDS and (case.group == "certificate" or case.base == "fp32"):
        return False  # there, no number is to be had
    if method in SLOW and (case.group in ("certificate", "loras") or math.prod(case.shape) > BESIDE):
        return False
    return seed < beside or method not in (*SLOW, TRUTH)


def report(table: Path) -> None:
    """The table's summary (Markdown) and the phase diagram."""
    rows = pd.read_csv(table, keep_default_na=True)
    ours = rows[rows.method == CELLS]
    lines = ["# Half-precision merges, cell by cell", "", __doc__.split("\n\n")[2].replace("\n", " "), ""]
    lines += [
        "Exact share, median / worst over the seeds (Spectral DeTuning, the weighted fit, from the truth: the first).",
        "",
    ]
    for group in [group for group in GROUPS if group != "certificate"]:
        part = rows[rows.group == group]
        if part.empty:
            continue
        lines += [
            f"## {group.capitalize()}",
            "",
            "| case | seeds | " + " | ".join(METHODS) + " | predicted | certified | seconds |",
        ]
        lines += ["|" + "---|" * (len(METHODS) + 5)]
        if group == "loras":  # a row for all layers of a shape
            part = part.assign(case=part.case.str.partition(", ")[2])
            part = part.sort_values("case", key=lambda names: names.map(in_order), kind="stable")
        for name, some in part.groupby("case", sort=False):
            mine = some[some.method == CELLS]
            if mine.empty:
                continue
            shares = []
            for method in METHODS:
                exact = some[some.method == method].exact
                shares.append(f"{exact.median():.4f} / {exact.min():.4f}" if len(exact) else "")
            certified = int((mine.certificate == "certified").sum())
            lines.append(
                f"| {name} | {len(mine)} | " + " | ".join(shares) + f" | {mine.predicted.median():.4f} "
                f"| {certified} | {mine.seconds.median():.1f} |"
            )
        lines.append("")
    lines += [*calibration(ours), ""]
    table.with_name("half_precision.md").write_text("\n".join(lines))
    figure(rows, table.with_name("half_precision.png"))


def in_order(name: str) -> tuple[float, ...]:
    """A key that sorts names of cases by the numbers in them."""
    return tuple(float(number) for number in re.findall(r"[\d.]+", name))


def calibration(ours: pd.DataFrame) -> list[str]:
    """What the certificate and the predictions are worth."""
    certified = ours[ours.certificate == "certified"]
    gap = certified.predicted - certified.exact
    wrong = certified[~(gap <= 0.02)]  # a certificate without a prediction is wrong too
    right = (certified.sure_exact * certified.sure).sum() / certified.sure.sum()
    lines = ["## Calibration", ""]
    lines.append(
        f"{len(certified)} of {len(ours)} layers certified. Predicted less actual exact share there: "
        f"median {gap.median():+.4f}, 5% to 95% {gap.quantile(0.05):+.4f} to {gap.quantile(0.95):+.4f}, "
        f"extremes {gap.min():+.4f} to {gap.max():+.4f}; "
        f"within .01 in {(gap.abs() <= 0.01).mean():.1%}, within .02 in {(gap.abs() <= 0.02).mean():.1%}. "
        f"Of the weights called sure in certified layers {right:.5%} are right, in the worst layer "
        f"{certified.sure_exact.min():.4%}."
    )
    lines += ["", "| planted | layers | certified | overstated by more than .02 |", "|---|---|---|---|"]
    for plant, some in ours.assign(
        kind=ours.plant
        + ours.case.str.contains("n=2,").map({True: ", n = 2", False: ""})
        + ours.case.str.contains("fp32 base").map({True: ", float32 base", False: ""})
    ).groupby("kind"):
        marked = some[some.certificate == "certified"]
        lines.append(f"| {plant} | {len(some)} | {len(marked)} | {len(wrong.index.intersection(marked.index))} |")
    return lines


def figure(rows: pd.DataFrame, path: Path) -> None:
    """Exact share over the signal, a panel for each rho."""
    part = rows[(rows.group == "phase") & rows.case.str.contains("256x256") & rows.case.str.contains("decay=0.1")]
    ratios = sorted(part.rho.unique())
    if not ratios:
        return
    size = (4 * len(ratios), 3.7)
    drawing, axes = plt.subplots(1, len(ratios), figsize=size, sharey=True, squeeze=False, layout="constrained")
    styles = {CELLS: "-", TODAY: "--", SPECTRAL: "-.", "vote": ":", "mean": (0, (1, 3)), KNOWN: (0, (5, 2, 1, 2, 1, 2))}
    for axis, rho in zip(axes[0], ratios, strict=True):
        for method in styles:
            some = part[(part.rho == rho) & (part.method == method)].groupby("mu").exact
            middle = 1 - some.median()
            axis.plot(middle.index, middle, marker="o", markersize=3, linestyle=styles[method], label=method)
            if method == CELLS:
                axis.fill_between(middle.index, 1 - some.max(), 1 - some.min(), alpha=0.2)
        axis.set(xscale="log", yscale="log", xlabel="rms(M) / rms(ulp(W))", title=f"r (d + k) / (d k) = {rho:.3f}")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("share of weights that are wrong")
    drawing.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(styles), fontsize=8)
    drawing.savefig(path, dpi=150)
    plt.close(drawing)


def picture(path: Path) -> None:
    """One weight between two powers of two: three cells, moved back by the updates, leave one number of the grid."""
    truth, step = 4, 1.0
    updates, known = (0.9, -1.7, 0.35), (0.07, 0.05, 0.09)
    drawing, axis = plt.subplots(figsize=(7.2, 2.7))
    for i in range(9):
        axis.axvline(i * step, color="0.85" if i != truth else "tab:green", linewidth=1 if i != truth else 2, zorder=0)
    low, high = -math.inf, math.inf
    for level, (update, spread) in enumerate(zip(updates, known, strict=True)):
        stored = round(truth + update)
        left, right = stored - 0.5 - update, stored + 0.5 - update
        y = 2 - level
        axis.barh(y, right - left, left=left, height=0.38, color="tab:blue", alpha=0.55)
        for edge in (left, right):
            axis.barh(y, 4 * spread, left=edge - 2 * spread, height=0.38, color="tab:blue", alpha=0.2)
        axis.text(-0.15, y, f"cell of $W'_{level + 1}$, moved by $-M_{level + 1}$", ha="right", va="center", fontsize=9)
        low, high = max(low, left - 2 * spread), min(high, right + 2 * spread)
    axis.barh(-1, high - low, left=low, height=0.38, color="tab:orange", alpha=0.8)
    axis.text(-0.15, -1, "what fits all three", ha="right", va="center", fontsize=9)
    axis.text(truth, 2.55, "W", ha="center", fontsize=11, color="tab:green")
    axis.set(xlim=(0, 8), ylim=(-1.5, 2.9), yticks=[], xticks=range(9), xticklabels=[])
    axis.set_xlabel("numbers of the grid")
    for side in ("left", "right", "top"):
        axis.spines[side].set_visible(False)
    drawing.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(drawing)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], help="groups to measure; all by default")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--beside", type=int, default=SEEDS_BESIDE, help="seeds of the slow methods beside ours")
    parser.add_argument("--loras", type=Path, help="a folder of LoRA files of one base; measures the group `loras`")
    parser.add_argument("--fuzz", type=int, metavar="LAYERS", help="measure so many random layers, and nothing else")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="of the random layers")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--picture", type=Path, help="draw the cells of one weight into this file, and nothing else")
    parser.add_argument("--out", type=Path, default=Path("results/half_precision"))
    arguments = parser.parse_args()
    if arguments.picture:
        picture(arguments.picture)
        return
    table = arguments.out / "cases.csv"
    if arguments.fuzz:
        fuzz(arguments.fuzz, arguments.first, table)
    elif not arguments.report:
        groups = arguments.groups or (["loras"] if arguments.loras else [group for group in GROUPS if group != "loras"])
        if "loras" in groups and arguments.loras is None:
            parser.error("the group loras needs --loras FOLDER")
        run(groups, arguments.seeds, arguments.beside, table, arguments.loras)
    report(table)


if __name__ == "__main__":
    main()
