"""Settings held against the annotations of the dataclass that owns them: a wrong type is one sentence, at once."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any

from lowra.errors import LowraError

_SAID = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of an annotated type; a whole number passes for a float, True for no number."""
    origin = typing.get_origin(annotation)
    if annotation is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, part) for part in typing.get_args(annotation))
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Sequence):
        inner = [part for part in typing.get_args(annotation) if part is not Ellipsis]
        listed = isinstance(value, list | tuple)
        return listed and all(fits(item, inner[0]) for item in value) if inner else listed
    if isinstance(annotation, type):
        return isinstance(value, annotation)
    return True


def said(annotation: Any) -> str:
    """An annotation in words."""
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(said(part) for part in typing.get_args(annotation))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Sequence):
        inner = [part for part in typing.get_args(annotation) if part is not Ellipsis]
        return f"a list of {said(inner[0])}" if inner else "a list"
    return _SAID.get(annotation, getattr(annotation, "__name__", str(annotation)))


def check_fields(settings: Any, where: str) -> None:
    """Raise LowraError, naming `where` and the field, for the first field of a dataclass that is of another type."""
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.init and not fits(value, hints[field.name]):
            raise LowraError(f"{where}.{field.name} is {value!r}; expected {said(hints[field.name])}.")
