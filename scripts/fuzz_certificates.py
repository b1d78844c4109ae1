"""Is a certificate ever wrong? Random layers that plant what could fool it, each recovered and compared with the truth.

    python scripts/fuzz_certificates.py                  # 2,000 layers, about fifteen minutes on one core
    python scripts/fuzz_certificates.py --layers 200 --start 5000

Planted, singly and together: components that some or all updates share, shared columns and rows, one update the sum of
two others, mixed ranks, spectra that decay into the rounding, norms from 1e-4 to 1e2, 3 to 12 models, models of another
base, bases on coarse and few-valued grids, layers of tiny and huge scale, merges in bfloat16. The rank is told
(truthfully) in half of the layers whose updates have one.

An answer claims its predicted error when it is `certified` or `weak`. It is wrong when the actual error is ten times
that (1 in W-Error). Then either the answer is a simpler explanation than the truth, its updates being of smaller total
rank, and none of larger rank than a rank that was told (a lower one the rounding may hide), which nobody can tell from
the merges, and which the certificate's sentence allows for (`covered`); or the certificate is false. The script ends
with exit status 1 if there is a false one.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import traceback
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowra.errors import LowraError
from lowra.methods.base import Observation
from lowra.methods.subspace_intersection import SubspaceIntersection

BASES = ("gaussian", "gaussian", "bfloat16", "float16", "ternary", "int4")

# An answer is wrong when it misses its prediction, and worse than the mean when it misses that, by so much in W-Error.
MISS, ALLOWANCE = 1.0, 0.1


@dataclass(frozen=True)
class Layer:
    """A planted layer.

    base (d, k) and updates (n, d, k) float64; merged (n, d, k) float32 as an attacker sees it. own: models of this
    base, fewer than all where strangers are among them. rank: told to the method or not. planted: words for it all.
    """

    base: Tensor
    updates: Tensor
    merged: Tensor
    own: list[int]
    rank: int | None
    storage: torch.dtype
    planted: tuple[str, ...]


def planted_base(kind: str, shape: tuple[int, int], draw: Any) -> Tensor:
    """A base weight (d, k) of rms about 0.04 on a grid of some kind."""
    weight = 0.04 * draw(*shape)
    if kind == "bfloat16":
        return weight.bfloat16().double()
    if kind == "float16":
        return weight.half().double()
    if kind in ("ternary", "int4"):
        most = 1 if kind == "ternary" else 7
        scale = float(torch.tensor(float(weight.abs().mean()) * (1.0 if most == 1 else 0.4)).float())
        return ((weight / scale).round().clamp(-most, most) * scale).float().double()
    return weight.float().double()


def plant(seed: int) -> Layer:
    """Draw a layer."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    words = []
    n = rng.choice((3, 3, 3, 4, 4, 5, 5, 6, 8, 12))
    d, k = rng.choice((24, 40, 64, 96, 128)), rng.choice((24, 40, 64, 96, 128))
    most = rng.choice((1, 2, 3, 4, 6, 8))
    mixed = rng.random() < 0.3
    ranks = [rng.randint(1, most) if mixed else most for _ in range(n)]
    kind = rng.choice(BASES)
    base = planted_base(kind, (d, k), draw)
    words.append(kind)
    decay = rng.choice((0.0, 0.0, 0.0, -1.0, -2.0, -4.0, -7.0))
    norms = [1.0] * n
    if rng.random() < 0.3:
        norms = [10 ** rng.uniform(-4, 2) for _ in range(n)]
        words.append("norms")
    rms = 0.04 * 10 ** rng.uniform(-2.5, 0)

    def subset(least: int = 2) -> list[int]:
        return sorted(rng.sample(range(n), rng.randint(least, n)))

    shared: dict[str, tuple[list[int], int]] = {}
    for side in ("columns", "rows"):
        if rng.random() < 0.25:
            members, count = subset(), rng.randint(1, most)
            shared[side] = members, count
            words.append(f"{side} {count} of {len(members)}/{n}")
    common = {"columns": draw(d, most), "rows": draw(k, most)}
    updates = []
    for i, rank in enumerate(ranks):
        left, right = draw(d, rank), draw(k, rank)
        for side, factor in (("columns", left), ("rows", right)):
            members, count = shared.get(side, ([], 0))
            if i in members:
                factor[:, : min(rank, count)] = common[side][:, : min(rank, count)]
        left, right = torch.linalg.qr(left).Q, torch.linalg.qr(right).Q
        scales = torch.logspace(0, decay, rank, dtype=torch.float64)
        turn = torch.linalg.qr(draw(rank, rank)).Q if rng.random() < 0.5 else torch.eye(rank, dtype=torch.float64)
        update = (left @ turn * scales) @ right.T
        updates.append(update * (rms * norms[i] * math.sqrt(d * k) / torch.linalg.norm(update)))
    if rng.random() < 0.3:
        members, count = subset(), rng.randint(1, 2)
        component = draw(d, count) @ draw(count, k)
        component *= rms * 10 ** rng.uniform(-1, 1) * math.sqrt(d * k) / torch.linalg.norm(component)
        updates = [update + component if i in members else update for i, update in enumerate(updates)]
        words.append(f"component {count} of {len(members)}/{n}")
    if rng.random() < 0.08:
        updates[2] = updates[0] + updates[1]
        words.append("sum of two")
    stacked = torch.stack(updates)
    bases = [base] * n
    own = list(range(n))
    if n > 3 and rng.random() < 0.15:
        other = planted_base(kind, (d, k), draw)
        strangers = rng.sample(range(n), rng.randint(1, (n - 1) // 2))
        bases = [other if i in strangers else base for i in range(n)]
        own = [i for i in range(n) if i not in strangers]
        words.append(f"strangers {len(strangers)}/{n}")
    storage = torch.bfloat16 if rng.random() < 0.12 else torch.float32
    scale = 1.0
    if rng.random() < 0.15:
        scale = 2.0 ** rng.choice((-110, -90, -60, -40, -25, 25, 40, 60, 80, 100))
        words.append(f"scale {scale:.0e}")
    merged = ((torch.stack(bases) + stacked) * scale).to(storage).float()
    if storage != torch.float32:
        words.append("bfloat16 merges")
    stacked, base = stacked * scale, base * scale
    true = {rank_above(update, level(merged[i], storage)) for i, update in enumerate(stacked) if i in own}
    told = true.pop() if len(true) == 1 and rng.random() < 0.5 else None
    words.append("told" if told else "not told")
    return Layer(base, stacked, merged, own, told or None, storage, tuple(words))


def level(merged: Tensor, storage: torch.dtype) -> float:
    """Norm below which a singular value is the rounding of a merge (d, k)."""
    d, k = merged.shape
    return (
        0.5 * float(merged.double().square().mean().sqrt()) * torch.finfo(storage).eps * (math.sqrt(d) + math.sqrt(k))
    )


def rank_above(matrix: Tensor, cutoff: float) -> int:
    """Number of singular values above a cutoff."""
    return int((torch.linalg.svdvals(matrix) > cutoff).sum())


def log_error(weight: Tensor, truth: Tensor) -> float:
    """W-Error: log10 of the mean squared error, in float64."""
    return math.log10(max(float((weight.double() - truth).square().mean()), 1e-300))


def judge(layer: Layer) -> dict[str, Any]:
    """Recover one layer and say what became of it."""
    observation = Observation(layer.merged, layer.rank, 0, layer.storage)
    recovery = SubspaceIntersection(snap="none", refine="none").recover(observation)
    error, mean_error = log_error(recovery.candidates[0], layer.base), log_error(layer.merged.mean(0), layer.base)
    stats = recovery.stats
    predicted, certificate = stats["predicted_w_error"], str(stats["certificate"])
    verdict = "right"
    if certificate in ("certified", "weak"):
        assert isinstance(predicted, float)
        if error > predicted + MISS:
            left_out = [int(i) for i in str(stats["outlier"]).split(",") if i]
            used = [i for i in range(len(layer.updates)) if i not in left_out]
            answer = recovery.candidates[0].double() - layer.base
            found, truth = (
                [rank_above(layer.updates[i] - shift, level(layer.merged[i], layer.storage)) for i in used]
                for shift in (answer, torch.zeros_like(answer))
            )
            simpler = (
                set(used) <= set(layer.own)
                and sum(found) < sum(truth)
                and (layer.rank is None or max(found) <= layer.rank)
            )
            verdict = "covered" if simpler else "false"
    snapped = SubspaceIntersection().recover(observation)
    return {
        "certificate": certificate,
        "verdict": verdict,
        "error": error,
        "mean_error": mean_error,
        "predicted": predicted,
        "ranks": stats["ranks"],
        "outlier": stats["outlier"],
        "lambda_min": stats["lambda_min"],
        "discrepancy": stats["discrepancy"],
        "snapped_error": log_error(snapped.candidates[0], layer.base),
        "grid": snapped.stats["grid"],
        "status": recovery.status,
    }


def main() -> None:
    """Run the layers and print what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2000)
    parser.add_argument("--start", type=int, default=0, help="first seed")
    parser.add_argument("--verbose", action="store_true", help="name each layer that is wrong or worse than the mean")
    arguments = parser.parse_args()
    counts: Counter[str] = Counter()
    certificates: Counter[tuple[str, str]] = Counter()
    for seed in range(arguments.start, arguments.start + arguments.layers):
        layer = plant(seed)
        try:
            found = judge(layer)
        except LowraError:  # updates that share all they have are identical, and so are the merges
            counts["refused"] += 1
            continue
        except Exception:
            counts["raised"] += 1
            print(seed, *layer.planted, sep="; ")
            print(traceback.format_exc(limit=-3))
            continue
        certificate = found["certificate"]
        certificates[certificate, found["verdict"]] += 1
        notes = [] if found["verdict"] == "right" else [found["verdict"]]
        if found["error"] > found["mean_error"] + ALLOWANCE:
            notes.append("worse than the mean")
        if found["snapped_error"] > found["error"] + ALLOWANCE:
            notes.append("spoilt by the grid")
        counts.update(f"{note}, {certificate}" for note in notes)
        if notes and arguments.verbose:
            shown = " ".join(
                f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}"
                for key, value in found.items()
                if key != "status"
            )
            print(seed, list(layer.merged.shape), "; ".join(layer.planted), "|", ", ".join(notes), "|", shown)
    print(f"{arguments.layers} layers")
    for (certificate, verdict), count in sorted(certificates.items()):
        print(f"{count:6} {certificate}: {verdict}")
    for note, count in sorted(counts.items()):
        print(f"{count:6} {note}")
    sys.exit(any(note.startswith(("false", "raised")) for note in counts))


if __name__ == "__main__":
    main()
