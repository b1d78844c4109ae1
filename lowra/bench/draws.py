"""The experiments: which models each draw holds (Section 6.4), the same for every method and on every machine."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from dataclasses import dataclass

from lowra.errors import LowraError


@dataclass(frozen=True, order=True)
class Draw:
    """One experiment: trial `trial` of `len(models)` models out of a subset. Prints and parses as `vit/L05/t03`."""

    subset: str
    trial: int
    models: tuple[int, ...]

    @property
    def n_loras(self) -> int:
        """How many models the attacker holds."""
        return len(self.models)

    def __str__(self) -> str:
        return f"{self.subset}/L{self.n_loras:02d}/t{self.trial:02d}"


def parse(text: str) -> tuple[str, int, int]:
    """The subset, number of models and trial of a printed draw."""
    match = re.fullmatch(r"(\w+)/L(\d+)/t(\d+)", text)
    if not match:
        raise LowraError(f"{text!r} names no draw; expected SUBSET/L<models>/t<trial>, such as vit/L05/t03.")
    return match[1], int(match[2]), int(match[3])


def draws(subset: str, available: int, n_loras: int, trials: int, seed: int) -> tuple[Draw, ...]:
    """`trials` different seeded draws of `n_loras` out of `available` models, or all there are where they are fewer.

    Each trial orders all models by a SHA-256 of (seed, trial, model) and takes the first n_loras: no library's
    generator is involved, so a draw is the same on every machine and version. Draws of one trial are nested: a
    sweep over n_loras adds models to those the smaller draw had, which takes the luck of the draw out of the
    comparison. A trial that repeats an earlier draw is passed over (15 of 15 models can be drawn once only).
    Raises LowraError for n_loras below 2 or above `available`.
    """
    if n_loras < 2:
        raise LowraError(f"n_loras is {n_loras}; recovery compares models and needs at least 2.")
    if n_loras > available:
        raise LowraError(
            f"n_loras is {n_loras}, but subset {subset!r} has {available} models; ask for 2 to {available}."
        )

    def key(trial: int, model: int) -> bytes:
        return hashlib.sha256(f"lowra draw|{seed}|{trial}|{model}".encode()).digest()

    found: dict[tuple[int, ...], Draw] = {}
    wanted = min(trials, math.comb(available, n_loras))
    for trial in itertools.count():
        models = tuple(sorted(sorted(range(available), key=lambda m: key(trial, m))[:n_loras]))
        found.setdefault(models, Draw(subset, trial, models))
        if len(found) == wanted:
            return tuple(found.values())
    raise AssertionError  # count() has no end
