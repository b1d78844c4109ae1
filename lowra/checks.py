"""Settings to objects: a config's node becomes the dataclass it names, every value checked against its annotation.

A dataclass says in its annotations what its fields may be: `rank: Count`, `dropout: Share`, `targets: Names`. Whatever
is made from a config goes through `make`, so a wrong type, a number out of range, an unknown or a missing setting is
one sentence before anything is built, fetched or trained.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin

from hydra.utils import get_object
from omegaconf import OmegaConf

from lowra.errors import LowraError, unknown

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Numbers from low to high; `above` leaves low itself out, `below` leaves out high."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number is in the range."""
        return (self.low < value if self.above else self.low <= value) and (
            value < self.high if self.below else value <= self.high
        )

    def __str__(self) -> str:
        low = f"{'above' if self.above else 'at least'} {self.low:g}" if self.low > -math.inf else ""
        high = f"{'below' if self.below else 'at most'} {self.high:g}" if self.high < math.inf else ""
        return " and ".join(filter(None, (low, high)))


@dataclass(frozen=True)
class MultipleOf:
    """Whole multiples of a number, from the number itself."""

    unit: int

    def holds(self, value: int) -> bool:
        """Whether it is one."""
        return value >= self.unit and value % self.unit == 0

    def __str__(self) -> str:
        return f"a multiple of {self.unit}"


@dataclass(frozen=True)
class OneOf:
    """Some known names."""

    names: tuple[str, ...]

    def holds(self, value: str) -> bool:
        """Whether a name is known."""
        return value in self.names

    def __str__(self) -> str:
        return f"one of {', '.join(self.names)}"


@dataclass(frozen=True)
class Filled:
    """A list that is not empty, or a text."""

    def holds(self, value: Sequence[Any]) -> bool:
        """Whether there is something in it."""
        return len(value) > 0

    def __str__(self) -> str:
        return "not empty"


Count = Annotated[int, Range(1)]
Number = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**32, below=True)]  # what every library's generators take
Positive = Annotated[float, Range(0, above=True)]
Weight = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Rate = Annotated[float, Range(0, 1, below=True)]  # a share of what is left out: never all
Name = Annotated[str, Filled()]
Names = Annotated[Sequence[str], Filled()]


# ---- Making -----------------------------------------------------------------------------------------------------


def make(config: Any, where: str) -> Any:
    """The dataclass that a config's `_target_` names, made from its other entries.

    where: the config's place ("builder"), for messages. Only dataclasses are made: a config cannot call functions.
    Raises LowraError, in one sentence, for a target that is none, settings it does not have, missing ones and values
    that do not fit.
    """
    values = plain(config)
    target = values.get("_target_") if isinstance(values, dict) else None
    if target is None:
        raise LowraError(f"The config of {where} has no _target_; name the dataclass to make of it.")
    try:
        kind = get_object(str(target))
    except Exception as error:  # hydra wraps whatever the import raised
        raise LowraError(f"{where}._target_ names {target!r}, which cannot be imported: {_line(error)}") from None
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise LowraError(f"{where}._target_ names {target!r}, which is no dataclass; only those are made from configs.")
    return make_as(kind, values, where)


def make_as(kind: type[T], config: Any, where: str) -> T:
    """A dataclass of a known kind from a config without `_target_`; see `make`.

    Entries whose annotation is a dataclass are made likewise, of the kind their own `_target_` names if they have one.
    """
    values = plain(config)
    if not isinstance(values, dict):
        raise LowraError(f"{where} is {_shown(values)}; expected settings, KEY: VALUE.")
    specs = {spec.name: spec for spec in dataclasses.fields(kind) if spec.init}  # type: ignore[arg-type]
    values = {str(k): v for k, v in values.items() if k not in ("_target_", "_convert_", "_recursive_")}
    hints = typing.get_type_hints(kind, include_extras=True)
    for key, value in values.items():
        if key not in specs:
            raise unknown("setting", f"{where}.{key}", [f"{where}.{name}" for name in specs])
        if value == "???":
            raise LowraError(f"{where}.{key} has no value; give {where}.{key}=...")
        if isinstance(value, dict) and not _fits(value, hints[key]):
            inner = _dataclass_in(hints[key])
            if "_target_" in value:
                values[key] = make(value, f"{where}.{key}")
            elif inner is not None:
                values[key] = make_as(inner, value, f"{where}.{key}")
    for name, spec in specs.items():
        needed = spec.default is spec.default_factory is dataclasses.MISSING
        if needed and name not in values:
            raise LowraError(f"{where} lacks the setting {where}.{name}, which {kind.__name__} needs.")
    for key, value in values.items():
        _check(value, hints[key], f"{where}.{key}")
    return kind(**values)


def check_fields(made: Any, where: str) -> None:
    """Check the fields of a dataclass that was made by hand, and those of the dataclasses in them; see `make`."""
    hints = typing.get_type_hints(type(made), include_extras=True)
    for spec in dataclasses.fields(made):
        if spec.init:
            value = getattr(made, spec.name)
            _check(value, hints[spec.name], f"{where}.{spec.name}")
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                check_fields(value, f"{where}.{spec.name}")


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass that an annotation asks for, alone or in a union: settings without `_target_` are its."""
    kinds = get_args(hint) if get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None)


def plain(config: Any) -> Any:
    """A config node as dicts, lists and values, references resolved; missing values stay "???".

    Raises LowraError for a reference that leads nowhere.
    """
    if not OmegaConf.is_config(config):
        return config
    try:
        return OmegaConf.to_container(config, resolve=True)
    except Exception as error:
        raise LowraError(f"The configuration cannot be resolved: {_line(error)}") from None


# ---- Checking ---------------------------------------------------------------------------------------------------


def _check(value: Any, hint: Any, where: str) -> None:
    if not _fits(value, hint):
        raise LowraError(f"{where} is {_shown(value)}; expected {describe(hint)}.")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation asks for."""
    if hint is Any:
        return True
    if getattr(hint, "_is_protocol", False):
        return all(hasattr(value, name) for name in vars(hint) if not name.startswith("_"))
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fits(value, arguments[0]) and all(limit.holds(value) for limit in arguments[1:])
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if hint in (int, bool, str):
        return type(value) is hint
    if origin is tuple and arguments[-1] is not Ellipsis:
        return isinstance(value, list | tuple) and len(value) == len(arguments) and all(map(_fits, value, arguments))
    if origin in (list, tuple, Sequence):
        return isinstance(value, list | tuple) and all(_fits(item, arguments[0]) for item in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(_fits(item, arguments[1]) for item in value.values())
    if hint in (None, types.NoneType):
        return value is None
    return isinstance(value, origin or hint)


_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    None: "null",
    types.NoneType: "null",
}


def describe(hint: Any) -> str:
    """An annotation in words: "a whole number at least 1", "a list of texts"."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        if any(isinstance(limit, OneOf) for limit in arguments[1:]):
            return ", ".join(map(str, arguments[1:]))
        return ", ".join([describe(arguments[0]), *map(str, arguments[1:])])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(one) for one in arguments)
    if origin in (list, tuple, Sequence):
        if origin is tuple and arguments[-1] is not Ellipsis:
            return f"a list of {len(arguments)}: {', '.join(describe(one) for one in arguments)}"
        return f"a list (each {describe(arguments[0])})"
    if origin in (dict, Mapping):
        return "settings, KEY: VALUE"
    return _WORDS.get(hint, f"a config of {getattr(hint, '__name__', hint)}")


def _shown(value: Any) -> str:
    """A value in a message, not all of a long one."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _line(error: Exception) -> str:
    return " ".join(str(error.__cause__ or error).split())
