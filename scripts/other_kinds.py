"""Kinds of fine-tuning beyond LoRA, and defences, planted: what is recovered, and what certified wrongly.

    python scripts/other_kinds.py fuzz                    # 2,000 layers of every kind and defence, a quarter of an hour
    python scripts/other_kinds.py dora lokr --draws 20    # tables at larger shapes, to results/kinds/planted.csv

`fuzz`: an answer claims its predicted error when it is `certified` or `weak`. It is wrong when the actual error is ten
times that (1 in W-Error) against W, unless it is right against W with what the publisher put into all models alike,
which the certificate's sentence leaves open (`covered`). The weights that are said to be sure of a layer that is
certified, or up to scales, are wrong where more than one in a thousand is not the base's, bit for bit. Exit status 1 if
there is either.

`dora`: merges of row-scaled updates, n = 3, ranks untold: the share of exact weights, by shape, size of the updates
over the weights (in the root mean square) and movement of the magnitudes. `lokr`: W-Error against the floor by block
shape and rank of the inner factor. Both are drawn W ~ N(0, 0.03^2), spectra falling to a hundredth.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from lowra.bench.defences import Defence, Noise, RankPadding, Rotation, Rounding, Scaling, SharedComponent, applied
from lowra.methods.base import Observation
from lowra.methods.subspace_intersection import SubspaceIntersection
from lowra.metrics.weight_error import weight_error

STD = 0.03
MISS = 1.0

# Of the weights called sure, this share may be wrong: half-precision merges are a matter of chances.
UNSURE = 1e-3

FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYER = "blocks.0.query.weight"


class Draw:
    """Random matrices of one seed, float64."""

    def __init__(self, seed: int) -> None:
        """Its own generators."""
        self.generator = torch.Generator().manual_seed(seed)
        self.choose = random.Random(seed)

    def __call__(self, *size: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(*size, generator=self.generator, dtype=torch.float64)

    def base(self, shape: tuple[int, int], grid: str) -> Tensor:
        """A base weight (d, k) on a grid."""
        return (STD * self(*shape)).to(FORMATS[grid]).double()

    def factors(self, shape: tuple[int, int], rank: int, size: float) -> tuple[Tensor, Tensor]:
        """B (d, r) and A (r, k) of an update whose rms is `size` times the base's."""
        left = self(shape[0], rank) * torch.logspace(0, self.choose.choice((0, -1, -2)), rank, dtype=torch.float64)
        right = self(rank, shape[1])
        return left * (size * STD / float((left @ right).square().mean().sqrt())), right


@dataclass(frozen=True)
class Planted:
    """A base (d, k), merges (n, d, k) as published, and the base with what was put into all of them alike."""

    base: Tensor
    merged: Tensor
    shared: Tensor
    words: str


def dora(base: Tensor, update: Tensor, moved: float, draw: Draw) -> Tensor:
    """diag(m / |W + M|) (W + M) with magnitudes that moved from |W| by a share (Liu et al. 2024)."""
    whole = base + update
    return (
        base.norm(dim=1, keepdim=True) * (1 + moved * draw(base.shape[0], 1)) / whole.norm(dim=1, keepdim=True) * whole
    )


def plant(seed: int) -> Planted:
    """One layer of some kind of fine-tuning, behind some defence or none."""
    draw = Draw(seed)
    pick = draw.choose
    n = pick.choice((3, 3, 3, 4, 5, 6))
    heads = pick.choice((2, 4))
    d, k = (pick.choice((32, 48, 64, 96, 128, 160)) for _ in range(2))
    rank = pick.choice((1, 2, 3, 4, 6))
    size = 10 ** pick.uniform(-2, 0)
    grid = pick.choice(("bf16", "bf16", "fp16", "fp32"))
    kind = pick.choice(KINDS)
    base = draw.base((d, k), grid)
    updates = [draw.factors((d, k), rank, size) for _ in range(n)]
    shared = base
    if kind in ("plain", "dora", "dora and lora", "columns"):
        moved = 10 ** pick.uniform(-3, -1.3)
        plain = {"plain": range(n), "dora and lora": pick.sample(range(n), pick.randint(1, 2))}.get(kind, ())
        merged = []
        for i, (left, right) in enumerate(updates):
            if kind == "columns":
                merged.append(dora(base.mT, (left @ right).mT, moved, draw).mT)
            else:
                merged.append(base + left @ right if i in plain else dora(base, left @ right, moved, draw))
    elif kind == "ia3":
        merged = [base * (1 + 0.1 * draw(d, 1)) for _ in range(n)]
    elif kind == "lokr":
        p, q = (pick.choice([m for m in (2, 4, 8, 16) if side % m == 0 and m < side]) for side in (d, k))
        inner = [draw(d // p, 8) @ draw(8, k // q) for _ in range(n)]
        products = [torch.kron(draw(p, q), one) for one in inner]
        merged = [base + one * (size * STD / float(one.square().mean().sqrt())) for one in products]
    elif kind in ("frozen A", "frozen A by twos"):
        among = n if kind == "frozen A" else 2
        merged = [base + left @ updates[i // among * among][1] for i, (left, _) in enumerate(updates)]
    elif kind == "mica":
        last = torch.linalg.svd(base, full_matrices=False)[0][:, -rank:]
        merged = [base + (size * STD * math.sqrt(d / rank)) * last @ right for _, right in updates]
    elif kind == "vera":
        wide = min(d, k, 4 * rank)
        b, a = draw(d, wide), draw(wide, k)
        merged = []
        for _ in range(n):
            one = draw(d, 1) * b @ (draw(wide, 1) * a)
            merged.append(base + one * (size * STD / float(one.square().mean().sqrt())))
    else:
        left, right = start(kind, base, rank, draw)
        shared = (base - left @ right).to(FORMATS[grid]).double()
        drift = 10 ** pick.uniform(-1.5, 0)
        merged = []
        for _ in range(n):
            b = left + drift * left.square().mean().sqrt() * draw(*left.shape)
            a = right + drift * right.square().mean().sqrt() * draw(*right.shape)
            merged.append(shared + b @ a)
    stack = torch.stack(merged).float()
    defence = DEFENCES[pick.choice(sorted(DEFENCES))](pick, heads) if pick.random() < 0.5 else None
    if defence is not None:
        stack = applied(defence, stack, LAYER, tuple(range(n)), seed)
        if isinstance(defence, SharedComponent):
            zero = torch.zeros(1, d, k)
            shared = shared + applied(defence, zero, LAYER, (0,), seed)[0].double()
    if kind in ("pissa", "olora") and defence is None:
        shared = base  # there it leaves a mark, which is to be noticed
    words = f"{kind}, {defence or 'no defence'}, n={n}, {d} x {k}, rank {rank}, size {size:.2g}, {grid}"
    return Planted(base, stack, shared, words)


def start(kind: str, base: Tensor, rank: int, draw: Draw) -> tuple[Tensor, Tensor]:
    """What is taken out of the base before training: B_0 (d, r), A_0 (r, k)."""
    if kind == "pissa":
        u, s, vt = torch.linalg.svd(base, full_matrices=False)
        return u[:, :rank] * s[:rank].sqrt(), s[:rank, None].sqrt() * vt[:rank]
    if kind == "olora":
        q, r = torch.linalg.qr(base)
        return q[:, :rank], r[:rank]
    return draw.factors(tuple(base.shape), rank, 0.5)  # type: ignore[arg-type]


KINDS = (
    "plain",
    "dora",
    "dora and lora",
    "columns",
    "ia3",
    "lokr",
    "frozen A",
    "frozen A by twos",
    "mica",
    "vera",
    "pissa",
    "olora",
    "another start",
)
DEFENCES: dict[str, Callable[[random.Random, int], Defence]] = {
    "noise": lambda pick, heads: Noise(10 ** pick.uniform(-5, -1)),
    "shared component": lambda pick, heads: SharedComponent(10 ** pick.uniform(-3, -1), pick.choice((None, 2))),
    "rank padding": lambda pick, heads: RankPadding(1, 6, 10 ** pick.uniform(-3, -1)),
    "rounding": lambda pick, heads: Rounding(pick.choice(("bfloat16", "float8", "int8")), pick.random() < 0.5),
    "rotation": lambda pick, heads: Rotation(heads),
    "scaling": lambda pick, heads: Scaling(10 ** pick.uniform(-2, 0)),
}


def judged(planted: Planted, method: SubspaceIntersection) -> dict[str, Any]:
    """What became of a layer."""
    recovery = method.recover(Observation(planted.merged))
    answer, stats = recovery.candidates[0], recovery.stats
    error, predicted = weight_error(answer, planted.base), stats["predicted_w_error"]
    verdict = "right"
    if stats["certificate"] in ("certified", "weak"):
        assert isinstance(predicted, float)
        if error > predicted + MISS:
            verdict = "covered" if weight_error(answer, planted.shared) <= predicted + MISS else "false"
    sure_wrong = 0
    if recovery.sure is not None and stats["certificate"] in ("certified", "weak", "up_to_scale"):
        sure_wrong = min(int((recovery.sure & (answer != truth)).sum()) for truth in (planted.base, planted.shared))
        if sure_wrong <= UNSURE * int(recovery.sure.sum()):
            sure_wrong = 0
    mean = weight_error(planted.merged.double().mean(0), planted.base)
    return {
        "certificate": stats["certificate"],
        "verdict": verdict,
        "sure_wrong": sure_wrong,
        "worse": error > mean + 0.1,
        "error": error,
        "mean": mean,
        "predicted": predicted,
        "status": recovery.status,
    }


def fuzz(layers: int, first: int) -> int:
    """Judge random layers; print what is false and a count of it all. Returns the exit status."""
    counts: Counter[tuple[str, str]] = Counter()
    wrong = unsure = worse = 0
    for seed in tqdm(range(first, first + layers), desc="layers", unit="layer"):
        planted = plant(seed)
        heads = int(planted.words.partition("heads=")[2][:1]) if "Rotation" in planted.words else None
        found = judged(planted, SubspaceIntersection(heads=heads if seed % 2 else None))
        counts[(str(found["certificate"]), str(found["verdict"]))] += 1
        wrong += found["verdict"] == "false"
        unsure += found["sure_wrong"] > 0
        worse += found["worse"]
        if found["verdict"] == "false" or found["sure_wrong"]:
            tqdm.write(
                f"seed {seed}: {found['certificate']}, {found['verdict']}, sure but wrong {found['sure_wrong']}, error "
                f"{found['error']:.2f}, mean {found['mean']:.2f}, predicted {found['predicted']}: {planted.words}"
            )
    for (certificate, verdict), count in sorted(counts.items()):
        print(f"{certificate:18} {verdict:8} {count}")
    print(f"{layers} layers: {wrong} false certificates, {unsure} with a sure weight that is wrong.")
    print(f"{worse} are farther from W than the mean, by 0.1 and more: of a common start that they leave out, mostly.")
    return int(bool(wrong or unsure))


def dora_rows(draws: int) -> list[dict[str, Any]]:
    """DoRA, n = 3, ranks untold, bfloat16 base: a row per shape, size and movement."""
    rows = []
    settings = [
        (s, size, moved)
        for s in ((512, 768), (1024, 4096))
        for size in (0.05, 0.3, 1.0)
        for moved in (1e-3, 0.01, 0.05)
    ]
    for shape, size, moved in tqdm(settings, desc="dora", unit="setting"):
        found = []
        for seed in range(draws if shape[0] < 1000 else max(1, draws // 5)):
            draw = Draw(seed)
            base = draw.base(shape, "bf16")
            stack = torch.stack([dora(base, _falling(draw, shape, 16, size), moved, draw).float() for _ in range(3)])
            began = time.perf_counter()
            recovery = SubspaceIntersection().recover(Observation(stack))
            seconds = time.perf_counter() - began
            same = recovery.candidates[0] == base
            sure = recovery.sure if recovery.sure is not None else torch.zeros_like(same)
            found.append(
                (float(same.double().mean()), int((sure & ~same).sum()), recovery.stats["certificate"], seconds)
            )
        exact = [one[0] for one in found]
        rows.append(
            {
                "kind": "dora",
                "shape": f"{shape[0]} x {shape[1]}",
                "rank": 16,
                "update": size,
                "moved": moved,
                "draws": len(found),
                "exact 99.99%": sum(share >= 0.9999 for share in exact) / len(exact),
                "lowest exact": min(exact),
                "sure but wrong": sum(one[1] for one in found),
                "certified": sum(one[2] == "certified" for one in found) / len(found),
                "seconds": sum(one[3] for one in found) / len(found),
            }
        )
    return rows


def lokr_rows(draws: int) -> list[dict[str, Any]]:
    """LoKr, n = 3, ranks untold, float32 base: a row per shape of blocks and rank of the inner factor."""
    rows = []
    for shape, factor, rank in tqdm(
        [(s, f, r) for s in ((256, 256), (768, 768)) for f in (4, 8, 16) for r in (4, 16)], desc="lokr", unit="setting"
    ):
        found = []
        d, k = shape
        for seed in range(draws):
            draw = Draw(seed)
            base = draw.base(shape, "fp32")
            merged, updates = [], []
            for _ in range(3):
                inner = draw(d // factor, rank) @ draw(rank, k // factor)
                update = torch.kron(draw(factor, factor), inner)
                updates.append(update * (0.05 * STD / float(update.square().mean().sqrt())))
                merged.append((base + updates[-1]).float())
            floor = weight_error(
                torch.stack([m.double() - u for m, u in zip(merged, updates, strict=True)]).mean(0), base
            )
            began = time.perf_counter()
            recovery = SubspaceIntersection(snap="none", refine="none").recover(Observation(torch.stack(merged)))
            seconds = time.perf_counter() - began
            above = weight_error(recovery.candidates[0], base) - floor
            found.append((above, recovery.stats["certificate"] == "certified", seconds))
        rows.append(
            {
                "kind": "lokr",
                "shape": f"{d} x {k}",
                "rank": rank,
                "blocks": factor,
                "draws": draws,
                "above floor, worst": max(one[0] for one in found),
                "certified": sum(one[1] for one in found) / draws,
                "seconds": sum(one[2] for one in found) / draws,
            }
        )
    return rows


def _falling(draw: Draw, shape: tuple[int, int], rank: int, size: float) -> Tensor:
    left = draw(shape[0], rank) * torch.logspace(0, -2, rank, dtype=torch.float64)
    update = left @ draw(rank, shape[1])
    return update * (size * STD / float(update.square().mean().sqrt()))


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=("fuzz", "dora", "lokr"))
    parser.add_argument("--layers", type=int, default=2000, help="of the fuzz")
    parser.add_argument("--start", type=int, default=0, help="first seed of the fuzz")
    parser.add_argument("--draws", type=int, default=20, help="of each row of a table")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "kinds" / "planted.csv")
    given = parser.parse_args()
    if given.out.is_dir():
        parser.error(f"--out is the table's file, such as {given.out / 'planted.csv'}; {given.out} is a folder.")
    status = fuzz(given.layers, given.start) if "fuzz" in given.what else 0
    rows = [
        row
        for name, make in (("dora", dora_rows), ("lokr", lokr_rows))
        if name in given.what
        for row in make(given.draws)
    ]
    if rows:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        frame = pd.DataFrame(rows)
        frame.to_csv(given.out, index=False, float_format="%.6g")
        print(frame.to_string(index=False))
    return status


if __name__ == "__main__":
    sys.exit(main())
