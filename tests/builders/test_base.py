from __future__ import annotations

import subprocess
import sys
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


def test_a_builder_whose_models_are_there_loads_no_model_library() -> None:
    # A run on built models makes the builder to know its cache folder: seconds of imports would come before each.
    code = (
        "import sys, lowra.builders.vit, lowra.builders.stable_diffusion, lowra.builders.causal_lm\n"
        "import lowra.builders.custom\n"
        "print([m for m in ('transformers', 'diffusers', 'peft', 'datasets', 'trl') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
