from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from lowra.errors import LowraError
from lowra.report import write
from lowra.reporting.results import load
from lowra.reporting.tables import breakdown, main_table, markdown, pair, paper_numbers, summary


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results with known numbers: two draws, two methods, two layers of two types."""
    trials, layers = [], []
    for method, base in (("mean_lora", -5.0), ("spectral_detuning", -16.0)):
        for trial in (0, 1):
            where = {"subset": "vit", "source": "mini", "n_loras": 5, "trial": trial, "method": method}
            where |= {"merge_dtype": "float32", "knows_rank": True}
            errors = [base - trial, base - trial - 1]
            for i, error in enumerate(errors):
                kind = ("query", "value")[i]
                layers.append(
                    where
                    | {
                        "layer_model": "",
                        "layer_name": kind,
                        "layer_type": kind,
                        "depth": i,
                        "w_error": error,
                        "floor_w_error": -19.0,
                    }
                )
            scores = {"w_error": sum(errors) / 2, "w_error_layer_std": 0.5**0.5, "exact_layers": 0, "layers": 2}
            scores |= {
                "exact_fraction": 0.25,
                "failed_layers": 0,
                "seconds": 1.0,
                "act_dist": 2e-5,
                "cell": f"{method}{trial}",
            }
            trials.append(where | scores)
    stale = trials[0] | {"cell": "of another run", "w_error": 99.0, "n_loras": 3}
    pd.DataFrame([*trials, stale]).to_parquet(tmp_path / "trials.parquet")
    pd.DataFrame(layers).to_parquet(tmp_path / "layers.parquet")
    methods = {"mean_lora": {"pretty": "Mean LoRA"}, "spectral_detuning": {"pretty": "Spectral DeTuning"}}
    run = {
        "subset": "vit",
        "source": "mini",
        "models": ["m"] * 15,
        "methods": methods,
        "metrics": {"activation_distance": {"column": "act_dist", "pretty": "Act.-Dist."}},
        "cells": [t["cell"] for t in trials],
        "config": {"subset": {"title": "ViT"}, "merge": {"dtype": "float32"}, "knows_rank": True},
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    return tmp_path


def test_mean_and_deviation_over_draws(folder: Path) -> None:
    table = main_table(load(folder)).set_index("Method")
    # draws -5.5 and -6.5: mean -6, sample deviation sqrt(0.5)
    assert table.loc["Mean LoRA", "W-Error ↓"] == "-6.000 ± 0.707"
    assert table.loc["Mean LoRA", "Act.-Dist. ↓"] == "2e-05 ± 0"
    assert table.loc["Mean LoRA", "exact weights"] == "25%"
    assert len(table) == 2  # nothing of the other run


def test_the_papers_numbers_stand_in_their_own_columns(folder: Path) -> None:
    table = main_table(load(folder)).set_index("Method")
    assert table.loc["Spectral DeTuning", "paper W-Error"] == "-15.942 ± 1.889"
    assert table.loc["Mean LoRA", "paper Act.-Dist."] == "0.050 ± 0.010"


def test_a_miniature_says_it_is_one(folder: Path) -> None:
    printed = write(folder)
    for text in (printed, (folder / "table.md").read_text()):
        assert "source=mini" in text
        assert "NOT the paper's experiment" in text
    assert "By layer type" in (folder / "table.md").read_text()


def test_a_summary_puts_folders_below_each_other(folder: Path) -> None:
    table = summary([load(folder), load(folder)])
    assert len(table) == 4
    assert set(table["Subset"]) == {"ViT, mini"}
    assert table.iloc[1]["semantic metric ↓"] == "Act.-Dist. 2e-05 ± 0"
    assert not any("paper" in column for column in table)


def test_breakdown_by_type(folder: Path) -> None:
    table = breakdown(load(folder), "layer_type").set_index("layer_type")
    assert table.loc["query", "Mean LoRA"] == "-5.500"
    assert table.loc["value", "Spectral DeTuning"] == "-17.500"


@pytest.mark.parametrize("subset", ["vit", "stable_diffusion", "mistral_sft", "mistral_dpo"])
def test_the_papers_numbers_are_all_there(subset: str) -> None:
    paper = paper_numbers(subset)
    assert paper is not None
    assert list(paper["rows"]) == ["lora_ft", "mean_lora", "spectral_detuning"]
    assert all(len(row) == 2 for row in paper["rows"].values())
    # Each of its tables has Spectral DeTuning far below the mean, and LoRA FT worst.
    errors = [row["w_error"][0] for row in paper["rows"].values()]
    assert errors[0] > errors[1] > errors[2] + 7


def test_own_data_has_no_paper_numbers() -> None:
    assert paper_numbers("custom") is None


@pytest.mark.parametrize(
    ("mean", "deviation", "text"),
    [(-15.9424, 1.889, "-15.942 ± 1.889"), (1e-6, 3e-6, "1e-06 ± 3e-06"), (-31.3, float("nan"), "-31.300")],
)
def test_numbers_are_readable(mean: float, deviation: float, text: str) -> None:
    assert pair(mean, deviation) == text


def test_markdown() -> None:
    assert markdown(pd.DataFrame({"a": [1], "b": ["x"]})) == "| a | b |\n|---|---|\n| 1 | x |"


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(
        LowraError, match=r"holds no finished run \(run\.json, layers\.parquet, trials\.parquet missing\)"
    ):
        write(tmp_path)
