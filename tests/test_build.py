"""The command that only builds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from lowra import build as command
from lowra.bench.sources import make_source
from lowra.errors import LowraError
from lowra.paths import conf_dir


def test_help_lists_every_recipe_and_full_command_lines() -> None:
    text = command.help_text()
    for path in (conf_dir() / "builder").glob("*.yaml"):
        assert f"conf/builder/{path.name}" in text
    # One task of the full-size build needs its data like all of them.
    assert "subset=vit source=build builder.data=FOLDER builder.tasks=[dtd,kitti]" in text


def test_what_a_full_size_build_lacks_is_named(configure: Callable[..., DictConfig]) -> None:
    cfg = configure("subset=vit", "source=build", "builder.tasks=[dtd]")
    with pytest.raises(LowraError, match=r"needs builder.base .* and builder.data=FOLDER"):
        command.build(cfg)


def test_sources_that_build_nothing(configure: Callable[..., DictConfig]) -> None:
    with pytest.raises(LowraError, match="source=synthetic builds nothing; give source=mini or source=build"):
        command.build(configure("subset=vit", "source=synthetic"))


def test_a_cache_that_cannot_be_written(configure: Callable[..., DictConfig], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "inside", Path("/" + "x" * 300)):
        cfg = configure("subset=vit", f"cache_dir={place}")
        with pytest.raises(LowraError, match=r"The cache folder .* cannot be used \(.*\); give cache_dir=FOLDER"):
            make_source(cfg).open()
