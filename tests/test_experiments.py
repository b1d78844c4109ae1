"""Every experiment file, found by glob, run on the smallest setting: tiny layers of fifteen models, few draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lowra.bench.schema import write_dataset
from lowra.paths import conf_dir
from lowra.pipeline import run
from lowra.records import read
from lowra.reporting.exhibits import EXHIBITS
from lowra.reporting.views import View, views
from tests.conftest import planted_layers

NAMES = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))
MEASURED_WITH_MODELS = {"fig2", "fig3", "fig8", "fig9", "fig10", "fig11", "fig13"}
"""Their exhibits need a semantic score, which weights alone do not have: here their rows are checked."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(planted_layers(layers=2, models=15), tmp_path_factory.mktemp("tiny") / "dataset")


@pytest.fixture(params=NAMES)
def ran(
    request: pytest.FixtureRequest, tiny: Path, configure: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, list[View], Any]:
    monkeypatch.setattr("lowra.plan.cores", lambda: 1)  # layers this small only wait for a second thread
    name = request.param
    small = [f"experiment={name}", "source=published", f"source.path={tiny}", "metrics=[]", "jobs=1", "subset.steps=10"]
    cfg = configure(*small)
    if cfg.trials > 2:
        cfg.trials = 2
    if OmegaConf.is_list(cfg.n_loras):
        cfg.n_loras = [cfg.n_loras[0], cfg.n_loras[-1]]
    for node in cfg.methods.values():  # a tenth or less of the steps: curves keep their points
        if "stop_after" in node and node.stop_after is not None:
            node.steps, node.stop_after = 200, max(1, node.stop_after // 2)
        elif "like" in node and "steps" in node:
            node.steps = 12 if node.steps == 200 else 15
    outcome = run(cfg)
    assert outcome.failures == []
    return name, views(read([outcome.folder])), cfg


def test_it_runs_and_has_what_it_names(ran: tuple[str, list[View], Any]) -> None:
    name, found, cfg = ran
    (view,) = found
    assert len(view.rows) == len(cfg.methods)
    asked = set(cfg.n_loras) if OmegaConf.is_list(cfg.n_loras) else {cfg.n_loras}
    assert set(view.trials["n_loras"]) == asked
    assert (view.trials["layers"] == 2).all()
    exhibit = EXHIBITS.get(name)
    if exhibit and name not in MEASURED_WITH_MODELS:
        shown = exhibit.show(found)
        assert shown is not None
        assert shown.tables or shown.figure is not None


def test_every_table_and_figure_has_a_file_and_every_file_a_place() -> None:
    others = {"paper", "three", "released", "one_short", "defended", "steps_200", "dpo_base", "dpo_sft_adapter"}
    others |= {"kinds", "kinds_sft", "defences"}  # pages of their own, by scripts/beyond_lora.py
    assert set(EXHIBITS) | others >= set(NAMES)
    assert set(EXHIBITS) <= set(NAMES)
