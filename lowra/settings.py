"""A run's settings, checked before anything heavy is imported: a slip of the finger is told at once.

What needs torch to be judged is checked when the run is planned.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lowra.errors import LowraError

MAX_TRIALS = 10_000  # more draws than any table needs; a slip of the finger would list for hours

# What every run reads, and a command line can take out.
NEEDED = ("n_loras", "jobs", "shard", "layers", "note", "device", "subset.name", "source.name")
NEEDED_OF_MERGE = ("dtype", "order", "foreign")


def check_settings(cfg: DictConfig) -> None:
    """Raise LowraError for settings that cannot work, before anything is built, fetched or written."""
    if missing := next(_missing(OmegaConf.to_container(cfg, resolve=False)), None):
        raise LowraError(f"{missing} has no value ({MISSING}); give it one.")
    for key in (*NEEDED, *(f"merge.{key}" for key in NEEDED_OF_MERGE if isinstance(cfg.get("merge"), DictConfig))):
        if OmegaConf.select(cfg, key, default=MISSING) == MISSING:
            raise LowraError(f"{key} was taken out of the configuration (~{key}); it is needed.")
    for key, kind, name in (
        ("trials", int, "a whole number"),
        ("seed", int, "a whole number"),
        ("knows_rank", bool, "true or false"),
        ("keep_outputs", bool, "true or false"),
        ("results_dir", str, "a folder"),
        ("cache_dir", str, "a folder"),
    ):
        value = _value(cfg, key)
        if type(value) is not kind or value == "":
            raise LowraError(f"{key} is {value!r}; expected {name}.")
    if not -(2**63) <= cfg.seed < 2**63:
        raise LowraError(f"seed is {cfg.seed}; expected a whole number of at most 64 bits.")
    for key in ("subset.name", "source.name"):  # folders are named by them
        value = OmegaConf.select(cfg, key)
        if not isinstance(value, str) or not re.fullmatch(r"[^/\\\0]+", value) or value.startswith("."):
            raise LowraError(f"{key} is {value!r}; expected a name, without slashes, that does not begin with a dot.")
    for key in ("layers", "note", "shard"):
        if cfg[key] is not None and not isinstance(cfg[key], str):
            raise LowraError(f"{key} is {cfg[key]!r}; expected text in quotes, or null.")
    if cfg.jobs is not None and (type(cfg.jobs) is not int or cfg.jobs < 1):
        raise LowraError(f"jobs is {cfg.jobs!r}; expected a number of processes, or null to choose by the machine.")
    if not 1 <= cfg.trials <= MAX_TRIALS:
        raise LowraError(f"trials is {cfg.trials}; at least 1 draw is needed, and at most {MAX_TRIALS} are listed.")
    if not isinstance(cfg.get("merge"), DictConfig):
        raise LowraError(f"merge is {cfg.get('merge')!r}; expected merge.dtype=... and merge.order=....")
    foreign = cfg.merge.foreign
    if type(foreign) is not int or not foreign >= 0:
        raise LowraError(f"merge.foreign is {foreign!r}; expected a number of models of another base, 0 for none.")
    if foreign and cfg.get("defence"):
        raise LowraError("merge.foreign and defence cannot be had together; set merge.foreign=0 or defence=none.")
    for group in ("methods", "metrics"):
        if cfg.get(group) is not None and not isinstance(cfg[group], DictConfig):
            raise LowraError(f"{group} is {cfg[group]!r}; expected names of files in conf/{group}, such as {group}=[].")
        for name, node in (cfg.get(group) or {}).items():
            if not isinstance(node, DictConfig):
                raise LowraError(f"{group}.{name} is {node!r}; expected a config with _target_ and its options.")
    if not cfg.get("methods"):
        raise LowraError("methods is empty; choose some of the files in conf/methods, such as methods=[mean_lora].")
    if not n_loras(cfg):
        raise LowraError("n_loras is empty; expected a whole number, or a list such as [2,3,5].")
    for n in n_loras(cfg):
        if type(n) is not int:
            raise LowraError(f"n_loras is {cfg.n_loras!r}; expected a whole number, or a list such as [2,3,5].")
        if n < 2:
            raise LowraError(f"n_loras is {n}; recovery compares models and needs at least 2.")
        if foreign and foreign > n - 2:
            raise LowraError(
                f"merge.foreign is {foreign}, of n_loras={n} models; two at least must share the true base."
            )
    shard_of(cfg.shard)
    if cfg.layers is not None:
        try:
            re.compile(cfg.layers)
        except re.error as error:
            raise LowraError(f"layers={cfg.layers!r} is no regular expression: {error}.") from None


def _missing(node: Any, place: str = "") -> Iterator[str]:
    """Where a configuration says ???; nothing in it is worked out."""
    if node == MISSING:
        yield place
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inside:
        yield from _missing(value, f"{place}.{key}" if place else str(key))


def _value(cfg: DictConfig, key: str) -> Any:
    try:
        return cfg[key]
    except OmegaConfBaseException as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise LowraError(f"{key} cannot be worked out: {first}.") from None


def shard_of(text: str | None) -> tuple[int, int] | None:
    """`i/k` as numbers, None where the run is whole; raises LowraError for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise LowraError(f"shard is {text!r}; expected i/k with i from 1 to k, such as shard=1/16.")
    return int(match[1]), int(match[2])


def n_loras(cfg: DictConfig) -> tuple[int, ...]:
    """The numbers of models to draw: one, or a sweep; each once, in the order given."""
    value = cfg.n_loras
    return tuple(dict.fromkeys(value)) if isinstance(value, ListConfig | list) else (value,)
