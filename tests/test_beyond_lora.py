"""The script that prices defences and writes the pages of kinds and defences, on a miniature of the miniature."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scripts_as_modules import load_script

from lowra.bench.defences import applied
from lowra.paths import conf_dir

TASKS = ["cifar", "dtd", "kitti"]
SMALL = {"image_size": 16, "width": 24, "depth": 2, "heads": 3, "train": 40, "val": 20, "pretraining_images": 120}
SMALL |= {"held_out": 30, "epochs": 1, "batch_size": 40, "evaluation_per_class": 1}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("beyond_lora")


@dataclass(frozen=True)
class Made:
    """settings: of the tiny ViT in its cache. results: with records and prices. prices: those. report: of its build."""

    settings: list[str]
    results: Path
    prices: dict[str, dict[str, Any]]
    report: dict[str, Any]


@pytest.fixture(scope="module")
def made(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Prices of every defence, and records of plain LoRA, two defences and one kind."""
    pytest.importorskip("peft")
    from lowra.pipeline import run

    folder = tmp_path_factory.mktemp("beyond")
    results = folder / "results"
    settings = [f"cache_dir={folder / 'cache'}", f"builder.tasks=[{','.join(TASKS)}]", "builder.epochs=2"]
    settings += [f"builder.miniature.{key}={value}" for key, value in SMALL.items()]
    prices = script.price(settings, results / "defences" / "price.json")
    own = ["n_loras=3", "trials=1", "jobs=1", "methods=[lora_ft,mean_lora,subspace_intersection]", "metrics=[]"]
    kinds = ["experiment=kinds", *settings, *own, f"results_dir={results}/kinds/lora"]
    run(script.composed(*kinds))
    for defence in ([], ["defence=rotation"], ["defence=noise", "defence.size=1e-3"]):
        run(script.composed("experiment=defences", *settings, *own, *defence, f"results_dir={results}/defences"))
    report = script.make_source(script.composed(*settings)).build().report
    return Made(settings, results, {each.label: vars(each) for each in prices}, report)


def test_every_kind_and_defence_has_its_sentence(script: ModuleType) -> None:
    from lowra.builders.kinds import KINDS

    assert tuple(sorted(script.KINDS)) == tuple(sorted(KINDS))
    files = {path.stem.replace("_", " ") for path in (conf_dir() / "defence").glob("*.yaml")}
    assert set(script.VERDICTS) == files | set(script.TRAINED)
    assert all(script.KINDS.values())
    assert all(text for name, text in script.VERDICTS.items() if name != "none")
    tried = {variant[0].removeprefix("defence=").replace("_", " ") for variant in script.VARIANTS}
    assert tried == files - {"none"}


def test_prices_are_named_as_records_name_defences(script: ModuleType, made: Made) -> None:
    orders = {view.setting["merge_order"] for view in script.view_of(made.results / "defences" / "vit" / "mini")}
    assert orders == {"once", "once, noise (size 0.001)", "once, rotation (heads 3)"}
    assert {order.partition("once, ")[2] for order in orders} - {""} <= made.prices.keys()
    assert len(made.prices) == len(script.VARIANTS)


def test_prices_are_of_the_models_that_were_built(made: Made) -> None:
    built = [task["val_accuracy"] for task in made.report["tasks"].values()]
    for price in made.prices.values():
        assert price["accuracy_before"] == pytest.approx(sum(built) / len(TASKS))
    written = json.loads((made.results / "defences" / "price.json").read_text())
    assert {each["label"]: each for each in written["prices"]} == made.prices
    assert (written["tasks"], written["images"]) == (3, 3 * SMALL["val"])


def test_what_leaves_the_function_costs_nothing_and_the_rest_shows(made: Made) -> None:
    for label in ("rotation (heads 3)", "scaling (size 0.3)"):
        assert made.prices[label]["equal_predictions"] == 1
        assert made.prices[label]["accuracy_after"] == made.prices[label]["accuracy_before"]
        assert 0 < made.prices[label]["largest_logit_difference"] < 1e-4
    noises = [made.prices[f"noise (size {size})"]["largest_logit_difference"] for size in (1e-4, 1e-3, 1e-2)]
    assert 1e-6 < noises[0] < noises[1] < noises[2]
    assert made.prices["noise (size 0.01)"]["bytes_per_weight"] == 4
    assert made.prices["rounding (format bfloat16)"]["bytes_per_weight"] == 2
    assert made.prices["rounding (format int8)"]["bytes_per_weight"] == pytest.approx(1 + 4 / 24)


def test_the_layers_priced_are_those_a_run_attacks(script: ModuleType, made: Made) -> None:
    tunes = list(script.fine_tunes(script.composed(*made.settings, "subset=vit", "source=mini")))
    table = script.make_source(script.composed(*made.settings)).open().table
    assert tunes[0].fine_tuned == tuple(info.label for info in table.infos)
    for settings in script.VARIANTS:
        defence, _ = script.make_defence(script.composed(*made.settings, *settings))
        out = [script.published(tune.state, tune.fine_tuned, defence, i, 0) for i, tune in enumerate(tunes)]
        for name in tunes[0].fine_tuned:
            stack = torch.stack([tune.state[name] for tune in tunes])
            assert torch.equal(torch.stack([state[name] for state in out]), applied(defence, stack, name, (0, 1, 2), 0))
        changed = {name for name, tensor in out[0].items() if not torch.equal(tensor, tunes[0].state[name])}
        assert set(tunes[0].fine_tuned) <= changed
        if "rotation" in settings[0] or "scaling" in settings[0]:  # keys, outputs and biases are changed along
            parts = {name.split("layer.")[1].split(".", 1)[1] for name in changed}
            inner = {f"attention.attention.{p}.{q}" for p in ("query", "key", "value") for q in ("weight", "bias")}
            assert parts == inner | {"attention.output.dense.weight"}
        else:
            assert changed == set(tunes[0].fine_tuned)


def rows_of(page: str) -> list[dict[str, str]]:
    """The first table of a page."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def test_pages(script: ModuleType, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["beyond_lora.py", "page", "--results", str(made.results)])
    script.main()
    kinds = (made.results / "kinds" / "README.md").read_text()
    (row,) = rows_of(kinds)
    assert (row["kind"], row["n"], row["draws"]) == ("lora", "3", "1")
    after = sum(task["val_accuracy"] for task in made.report["tasks"].values()) / len(TASKS)
    assert row["accuracy"].endswith(f"to {after:.3f}")
    (view,) = script.view_of(made.results / "kinds" / "lora" / "vit" / "mini")
    found = view.layers.groupby("method")["w_error"].mean()
    assert [row["one model"], row["mean"], row["subspace intersection"]] == [
        f"{found[method]:.3f}" for method in ("lora_ft", "mean_lora", "subspace_intersection")
    ]
    assert sum(int(part.split()[0]) for part in row["certificates"].split(", ")) == 4  # every layer has one
    assert "Not run yet: rslora" in kinds
    assert "Not run yet: lora" in kinds  # of Mistral
    defences = (made.results / "defences" / "README.md").read_text()
    table = rows_of(defences)
    assert [each["defence"] for each in table] == ["none", "noise (size 0.001)", "rotation (heads 3)"]
    accuracy = made.prices["rotation (heads 3)"]["accuracy_after"]
    assert table[0]["accuracy"] == f"{after:.4f}"
    assert (table[2]["accuracy"], table[2]["equal predictions"]) == (f"{accuracy:.4f} (+0.0000)", "100%")
    assert "Not run yet: shared component" in defences
    assert str(made.results) not in kinds + defences
