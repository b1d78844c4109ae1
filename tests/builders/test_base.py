from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from lowra.builders.base import recipe_key, stage


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


def test_a_stage_is_done_once(tmp_path: Path) -> None:
    calls = []

    def work(partial: Path) -> dict[str, float]:
        calls.append(partial)
        (partial / "weights").write_text("w")
        return {"loss": 0.5}

    assert stage(tmp_path / "s", work) == {"loss": 0.5}
    assert stage(tmp_path / "s", work) == {"loss": 0.5}
    assert len(calls) == 1
    assert (tmp_path / "s" / "weights").read_text() == "w"
    assert not (tmp_path / "s.partial").exists()


def test_a_killed_stage_finds_what_it_left(tmp_path: Path) -> None:
    def killed(partial: Path) -> None:
        (partial / "checkpoint").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "s", killed)
    assert not (tmp_path / "s").exists()
    assert stage(tmp_path / "s", lambda partial: {"found": (partial / "checkpoint").read_text()}) == {"found": "half"}
