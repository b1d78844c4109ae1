"""The same tensor in several models: matched by name, whatever releases do to names, and known from headers alone.

Names are compared without what wrappers add (`_orig_mod.`, `base_model.model.`), under the model family's own renamings
between versions of transformers, and with a prefix added or dropped where that makes more of them agree. What is left
is matched by its tie (an embedding saved once in one model, twice in another), or listed.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lowra.checkpoints.reading import Checkpoint, StoredState, TensorInfo
from lowra.errors import LowraError

# What wrappers leave in names: torch.compile, DistributedDataParallel, PEFT.
_WRAPPERS = (
    (re.compile(r"(^|\.)_orig_mod\."), r"\1"),
    (re.compile(r"^module\."), ""),
    (re.compile(r"^base_model\.model\."), ""),
    (re.compile(r"\.base_layer\."), "."),
    (re.compile(r"\.modules_to_save\.default\."), "."),
    (re.compile(r"\.original_module\."), "."),
    # Old and new spellings every family shares.
    (re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"),
    (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"),
    (re.compile(r"\.parametrizations\.weight\.original0$"), ".weight_g"),
    (re.compile(r"\.parametrizations\.weight\.original1$"), ".weight_v"),
)

# Tensors with a row per token: they grow when tokens are added, and input and output may be one tensor.
EMBEDDING = re.compile(r"(embed|embd|wte|lm_head|\bshared\b|output_projection|predictions\.decoder)")

# Fewer than this share of a model's matrices in common: another architecture.
_COMMON = 0.5


@dataclass(frozen=True)
class Match:
    """One tensor of the first model and what it is called in the others.

    names: per model, None where it lacks the tensor. rows: of the first dimension, what all that have it share.
    note: what is unusual about it, "" where nothing is.
    """

    component: str
    name: str
    names: tuple[str | None, ...]
    info: TensorInfo
    rows: int
    note: str = ""

    @property
    def label(self) -> str:
        """Component and name in one string."""
        return f"{self.component}/{self.name}" if self.component else self.name


@dataclass(frozen=True)
class Matching:
    """All tensors of the first model, in its order, and per model what the first one does not have."""

    tensors: tuple[Match, ...]
    extra: tuple[tuple[str, ...], ...] = field(default=())


def match(models: Sequence[Checkpoint]) -> Matching:
    """Match every tensor of the first model with the others', from headers.

    Raises LowraError for models of different architectures, naming the first tensor that differs.
    """
    first = models[0]
    found: list[Match] = []
    extra: list[list[str]] = [[] for _ in models]
    partners = [_components(first, other) for other in models[1:]]
    for component, state in first.components.items():
        others = [(other, partner.get(component)) for other, partner in zip(models[1:], partners, strict=True)]
        maps = []
        for at, (other, partner) in enumerate(others, 1):
            theirs = other.components[partner] if partner is not None else None
            names = same_tensors(state, theirs, _family(first, other)) if theirs is not None else {}
            maps.append((theirs, names))
            if theirs is not None:
                taken = set(names.values())
                extra[at] += [f"{component}/{name}" if component else name for name in theirs if name not in taken]
        found += [_matched(component, info, maps) for info in state.infos.values()]
    for at, other in enumerate(models[1:], 1):
        _check_architecture(first, other, found, at)
    return Matching(tuple(found), tuple(tuple(names) for names in extra))


def _components(first: Checkpoint, other: Checkpoint) -> dict[str, str]:
    """Component of the first model to the other's: by name, or the only one of each."""
    if len(first.components) == len(other.components) == 1:
        return {next(iter(first.components)): next(iter(other.components))}
    return {name: name for name in first.components if name in other.components}


def _family(first: Checkpoint, other: Checkpoint) -> tuple[str, ...]:
    """The model types whose renamings may stand between two models."""
    types: list[str] = []
    for config in (first.config, other.config):
        for part in (config, *(v for v in config.values() if isinstance(v, dict))):
            if isinstance(part.get("model_type"), str) and part["model_type"] not in types:
                types.append(part["model_type"])
    return tuple(types)


@functools.lru_cache
def _renamings(family: tuple[str, ...]) -> tuple[tuple[re.Pattern[str], str], ...]:
    """Transformers' own plain renamings of these model types, old spelling to new."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    rules = []
    for model_type in family:
        for rule in get_checkpoint_conversion_mapping(model_type) or []:
            if type(rule) is WeightRenaming:
                for source, target in zip(rule.source_patterns, rule.target_patterns, strict=False):
                    try:
                        rules.append((re.compile(source), target))
                    except re.error:
                        continue
    return tuple(rules)


def _plain(name: str, rules: Sequence[tuple[re.Pattern[str], str]]) -> str:
    """A name without what wrappers and versions do to it."""
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name)
    return name


def same_tensors(first: StoredState, other: StoredState, family: tuple[str, ...] = ()) -> dict[str, str]:
    """Names of the first state to names of the other, as far as they can be told. family: types of model."""
    found = {name: name for name in first if name in other}
    taken = set(found.values())
    if len(found) == len(first):
        return found
    # transformers' tables are imported only for models whose names do not agree without them.
    for rules in (_WRAPPERS, (*_WRAPPERS, *_renamings(family))) if family else (_WRAPPERS,):
        mine = {name: _plain(name, rules) for name in first}
        theirs = {_plain(name, rules): name for name in other}
        add, drop = _prefix(first, other, mine, theirs)
        for name, plain in mine.items():
            target = theirs.get(add + plain.removeprefix(drop) if plain.startswith(drop) else plain, theirs.get(plain))
            if name not in found and target is not None and target not in taken:
                found[name] = target
                taken.add(target)
        if len(found) == len(first):
            break
    return found


def _prefix(
    first: StoredState, other: StoredState, mine: Mapping[str, str], theirs: Mapping[str, str]
) -> tuple[str, str]:
    """(added, dropped): the change of prefix under which most names and shapes agree, ("", "") before any other."""

    def ends(names: Sequence[str]) -> list[str]:
        counts: Counter[str] = Counter()
        for name in names:
            parts = name.split(".")
            counts.update(".".join(parts[:depth]) + "." for depth in (1, 2) if len(parts) > depth)
        return ["", *(prefix for prefix, _ in counts.most_common(8))]

    def agreeing(add: str, drop: str) -> int:
        total = 0
        for name, plain in mine.items():
            if plain.startswith(drop):
                target = theirs.get(add + plain.removeprefix(drop))
                total += target is not None and first.shape(name) == other.shape(target)
        return total

    pairs = [("", "")]
    pairs += [(add, "") for add in ends(list(theirs))[1:]]
    pairs += [("", drop) for drop in ends(list(mine.values()))[1:]]
    pairs += [(add, drop) for add in ends(list(theirs))[1:] for drop in ends(list(mine.values()))[1:]]
    return max(pairs, key=lambda pair: agreeing(*pair))


def _matched(component: str, info: TensorInfo, maps: Sequence[tuple[StoredState | None, Mapping[str, str]]]) -> Match:
    """One tensor's match: who has it, in what shape, and how much of it is common."""
    names: list[str | None] = [info.name]
    rows = info.shape[0] if info.shape else 1
    notes = []
    for state, known in maps:
        name = known.get(info.name)
        if state is not None and name is None and EMBEDDING.search(info.name):
            # Saved once there and twice here: the other end of the tie has the same shape.
            name = next((n for n in state if EMBEDDING.search(n) and state.shape(n) == info.shape), None)
            if name is not None:
                notes.append("tied in a model that saves it once")
        if state is not None and name is not None:
            theirs = state.infos[name]
            if theirs.shape != info.shape:
                resized = (
                    len(info.shape) == 2
                    and len(theirs.shape) == 2
                    and theirs.shape[1:] == info.shape[1:]
                    and EMBEDDING.search(info.name) is not None
                )
                if resized:
                    rows = min(rows, theirs.shape[0])
                    notes.append(f"{theirs.shape[0]} rows in one model, {info.shape[0]} in the first")
                else:
                    notes.append(f"of shape {theirs.shape} in one model")
                    name = None
        names.append(name)
    return Match(component, info.name, tuple(names), info, rows, "; ".join(dict.fromkeys(notes)))


def _check_architecture(first: Checkpoint, other: Checkpoint, found: Sequence[Match], at: int) -> None:
    matrices = [match for match in found if len(match.info.shape) >= 2]
    common = sum(match.names[at] is not None for match in matrices)
    if matrices and common >= _COMMON * len(matrices):
        return
    odd = next((match for match in (matrices or found) if match.names[at] is None), None)
    if odd is None:
        raise LowraError(f"{first.label} holds no matrices to compare.")
    theirs = next((s.shape(odd.name) for s in other.components.values() if odd.name in s), None)
    has = f"has shape {theirs} there" if theirs is not None else "is not there"
    raise LowraError(
        f"{other.label} is of another architecture than {first.label}: {common} of {len(matrices)} matrices agree in "
        f"name and shape; the first that does not, {odd.label!r} of shape {odd.info.shape}, {has}."
    )
