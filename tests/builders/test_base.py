from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from lowra.builders import base
from lowra.builders.base import recipe_key


@dataclass(frozen=True)
class Inner:
    width: int


@dataclass(frozen=True)
class Recipe:
    rank: int
    inner: Inner
    wanted: tuple[int, ...] = field(default=(), metadata={"recipe": False})


def test_a_recipes_key_is_all_that_decides_the_subset() -> None:
    recipe = Recipe(4, Inner(8))
    assert recipe_key(recipe) == recipe_key(Recipe(4, Inner(8)))
    assert recipe_key(recipe) != recipe_key(replace(recipe, rank=5))
    assert recipe_key(recipe) != recipe_key(replace(recipe, inner=Inner(9)))
    assert recipe_key(recipe) == recipe_key(replace(recipe, wanted=(1, 2)))


def test_a_recipes_key_follows_the_builders_code(monkeypatch: pytest.MonkeyPatch) -> None:
    before = recipe_key(Recipe(4, Inner(8)))
    asked = []
    monkeypatch.setattr(base, "code_digest", lambda module, within: asked.append(module) or "edited")
    assert recipe_key(Recipe(4, Inner(8))) != before
    assert asked == [Recipe.__module__]
