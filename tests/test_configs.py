"""Every config file of every group composes, and what it names can be made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from lowra import plan
from lowra.bench.sources import make_source
from lowra.paths import conf_dir


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


@pytest.mark.parametrize("subset", names("subset"))
@pytest.mark.parametrize("source", names("source"))
def test_every_subset_at_every_source_composes(subset: str, source: str, configure: Callable[..., DictConfig]) -> None:
    cfg = configure(f"subset={subset}", f"source={source}")
    OmegaConf.to_container(cfg, resolve=True)
    assert cfg.subset.name == subset
    assert cfg.source.name == source
    assert plan.make_variants(cfg).keys() == cfg.methods.keys()
    assert len(cfg.methods) == 4
    expected = 0 if source == "synthetic" or subset == "custom" else 1
    assert len(plan.make_metrics(cfg, weights_only=False)) == expected
    if source in ("mini", "build") and subset != "custom":
        assert not OmegaConf.missing_keys(cfg.builder)
        assert make_source(cfg).make_builder() is not None  # type: ignore[attr-defined]


@pytest.mark.parametrize("experiment", names("experiment"))
def test_every_experiment_composes_and_says_its_command(experiment: str, configure: Callable[..., DictConfig]) -> None:
    cfg = configure(f"experiment={experiment}")
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    first = (conf_dir() / "experiment" / f"{experiment}.yaml").read_text().splitlines()[:3]
    assert any(f"python -m lowra.run experiment={experiment}" in line for line in first)


@pytest.mark.parametrize("method", names("methods"))
def test_a_methods_file_is_named_as_its_config(method: str, configure: Callable[..., DictConfig]) -> None:
    cfg = configure(f"methods=[{method}]", "metrics=[]")
    (made,) = (variant.method for variant in plan.make_variants(cfg).values())
    assert type(made).__module__.startswith(f"lowra.methods.{method}")
    assert made.pretty
    assert made.reference


def test_builders_belong_to_a_subset_and_a_source() -> None:
    pairs = {f"{subset}_{source}" for subset in names("subset") for source in names("source")}
    assert set(names("builder")) <= pairs


def test_no_config_names_a_machine() -> None:
    for path in Path(conf_dir()).rglob("*.yaml"):
        assert "/work/" not in path.read_text()
