"""Settings from configs: what fits is made, what does not is one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from omegaconf import OmegaConf

from lowra.checks import Count, Filled, MultipleOf, Names, OneOf, Positive, Rate, Share, check_fields, make, make_as
from lowra.errors import LowraError


@dataclass(frozen=True)
class Inner:
    width: Annotated[int, MultipleOf(4)]


@dataclass(frozen=True)
class Other:
    depth: Count


@dataclass(frozen=True)
class Recipe:
    rank: Count
    rate: Positive
    dropout: Rate
    kind: Annotated[str, OneOf(("a", "b"))]
    targets: Names
    pair: tuple[Count, Count]
    inner: Inner | None
    seeds: Annotated[Sequence[int], Filled()] | None = None
    flag: bool = False
    rest: Mapping[str, Any] | None = None
    share: Share = 0.5


GOOD = {"rank": 4, "rate": 1, "dropout": 0.0, "kind": "a", "targets": ["q"], "pair": [1, 2], "inner": {"width": 8}}


def test_settings_become_the_dataclass() -> None:
    config = OmegaConf.create({"_target_": f"{__name__}.Recipe", **GOOD, "rest": {"_target_": "x", "y": 1}})
    made = make(config, "builder")
    assert made == Recipe(**GOOD | {"inner": Inner(8)}, rest={"_target_": "x", "y": 1})  # type: ignore[arg-type]
    # A nested config may name its own kind.
    nested = {**GOOD, "inner": {"_target_": f"{__name__}.Other", "depth": 1}}
    with pytest.raises(LowraError, match=r"builder.inner is Other\(depth=1\); expected a config of Inner or null"):
        make_as(Recipe, nested, "builder")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "builder.rank is 0; expected a whole number, at least 1"),
        ({"rank": True}, "builder.rank is True; expected a whole number"),
        ({"rank": 1.0}, "builder.rank is 1.0; expected a whole number"),
        ({"rank": None}, "builder.rank is null"),
        ({"rank": "???"}, "builder.rank has no value; give builder.rank=..."),
        ({"rate": "abc"}, "builder.rate is 'abc'; expected a number, above 0"),
        ({"rate": float("nan")}, "builder.rate is nan"),
        ({"rate": float("inf")}, "builder.rate is inf"),
        ({"dropout": 1}, "builder.dropout is 1; expected a number, at least 0 and below 1"),
        ({"kind": "c"}, "builder.kind is 'c'; expected one of a, b"),
        ({"targets": []}, r"builder.targets is \[\]; expected a list \(each text\), not empty"),
        ({"targets": "q"}, "builder.targets is 'q'"),
        ({"targets": [1]}, r"builder.targets is \[1\]"),
        ({"pair": [1]}, r"builder.pair is \[1\]; expected a list of 2: "),
        ({"pair": [1, 0]}, r"builder.pair is \[1, 0\]"),
        ({"inner": {"width": 6}}, "builder.inner.width is 6; expected a whole number, a multiple of 4"),
        ({"inner": {"width": 8, "hight": 1}}, "Unknown setting 'builder.inner.hight'; known: builder.inner.width"),
        ({"inner": {}}, "builder.inner lacks the setting builder.inner.width, which Inner needs"),
        ({"inner": 3}, "builder.inner is 3; expected a config of Inner or null"),
        ({"seeds": []}, r"builder.seeds is \[\]; expected a list \(each a whole number\), not empty or null"),
        ({"flag": 1}, "builder.flag is 1; expected true or false"),
        ({"ranks": 3}, "Unknown setting 'builder.ranks'; known: "),
    ],
)
def test_what_does_not_fit_is_a_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LowraError, match=message):
        make_as(Recipe, {**GOOD, **changes}, "builder")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("torch.load", "names 'torch.load', which is no dataclass; only those are made from configs"),
        ("os.system", "no dataclass"),
        ("no.such.module", "cannot be imported"),
        (None, "has no _target_"),
    ],
)
def test_a_config_calls_no_functions(target: str | None, message: str) -> None:
    with pytest.raises(LowraError, match=message):
        make({"_target_": target, "f": "x"}, "builder")


def test_dataclasses_made_by_hand_are_checked_to_the_bottom() -> None:
    made = Recipe(**GOOD | {"inner": Inner(6)})  # type: ignore[arg-type]
    with pytest.raises(LowraError, match=r"builder.inner.width is 6"):
        check_fields(made, "builder")
