from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import planted_layers
from omegaconf import DictConfig

from lowra import run as pipeline
from lowra.bench.schema import write_dataset
from lowra.errors import LowraError
from lowra.methods import Observation, Recovery
from lowra.metrics.weight_error import EXACT

Configure = Callable[..., DictConfig]


@pytest.fixture
def custom(dataset: Path, configure: Configure) -> Configure:
    """A run of the small data set with the cheap methods."""

    def composed(*overrides: str) -> DictConfig:
        data = ["subset=custom", "source=published", f"source.path={dataset}", "n_loras=3", "trials=2"]
        return configure(
            *data, *([] if any("methods=" in o for o in overrides) else ["methods=[mean_lora]"]), *overrides
        )

    return composed


class Oracle:
    """A method that was told the answer, to check the judge."""

    def __init__(self, answers: dict[float, torch.Tensor]) -> None:
        self.answers = answers

    def recover(self, observation: Observation) -> Recovery:
        return Recovery(self.answers[round(float(observation.merged.mean()), 5)].unsqueeze(0))


def test_every_row_and_column_is_there(custom: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pipeline.run(custom("methods=[lora_ft,mean_lora]", "n_loras=[2,3]"))
    layers, trials = pd.read_parquet(folder / "layers.parquet"), pd.read_parquet(folder / "trials.parquet")
    assert len(layers) == 2 * 2 * 2 * 3  # methods, numbers of models, draws, layers
    assert len(trials) == 2 * 2 * 2
    asked = "subset source n_loras trial models method layer_model layer_name d k rank w_error exact_fraction"
    assert {*asked.split(), "seconds", "status"} <= set(layers)
    assert (layers["models"].map(len) == layers["n_loras"]).all()
    assert set(layers["status"]) == {"ok"}
    mean = layers.groupby(["n_loras", "trial", "method"])["w_error"].mean()
    found = trials.set_index(["n_loras", "trial", "method"])["w_error"]
    assert (mean - found).abs().max() < 1e-12
    # Three independent updates: their mean's square is a third of one's, log10(3) = 0.477 below it.
    three = trials[trials["n_loras"] == 3].groupby("method")["w_error"].mean()
    assert three["lora_ft"] - three["mean_lora"] == pytest.approx(0.477, abs=0.05)
    printed = capsys.readouterr().out
    assert "Mean LoRA" in printed
    assert "source=published" in printed
    described = json.loads((folder / "run.json").read_text())
    assert described["draws"]["custom/L02/t01"] == list(layers[layers["n_loras"] == 2].iloc[-1]["models"])
    assert described["config"]["seed"] == 0
    assert "results_dir" not in described["config"]
    assert (folder / "table.md").read_text().count("Mean LoRA") >= 2
    assert (folder / "by_models.png").stat().st_size > 1000


def test_methods_see_the_same_draws(custom: Configure) -> None:
    folder = pipeline.run(custom("methods=[lora_ft,mean_lora]"))
    layers = pd.read_parquet(folder / "layers.parquet")
    drawn = layers.groupby(["trial", "method"])["models"].first().map(tuple).unstack()
    assert (drawn["lora_ft"] == drawn["mean_lora"]).all()


def test_exact_recovery_is_counted(custom: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = custom()
    prepared = pipeline.prepare(cfg)
    answers = {}
    for cell in prepared.cells():
        for index in prepared.layers:
            layer = prepared.data.table.read(index, cell.draw.models)
            answers[round(float(pipeline.merge(layer).mean()), 5)] = layer.weight
    monkeypatch.setattr(
        pipeline, "make_methods", lambda cfg: {"mean_lora": pipeline.as_method(Oracle(answers), "told")}
    )
    trials = pd.read_parquet(pipeline.run(cfg) / "trials.parquet")
    assert trials["w_error"].tolist() == pytest.approx([EXACT] * 2, abs=1e-12)  # a mean of equal numbers may round
    assert (trials["exact_layers"] == 3).all()
    assert (trials["exact_fraction"] == 1).all()


def test_a_second_run_computes_nothing(custom: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pd.read_parquet(pipeline.run(custom()) / "layers.parquet")
    monkeypatch.setattr(pipeline, "recover_layer", lambda *_: pytest.fail("computed again"))
    pd.testing.assert_frame_equal(first, pd.read_parquet(pipeline.run(custom()) / "layers.parquet"))


def kill_after(layers: int, cfg: DictConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """Interrupt a run after so many layers: the indices recovered until then, and a list for those recovered later."""
    real, done, again = pipeline.recover_layer, [], []

    def killed(*arguments: Any) -> Any:
        if len(done) == layers:
            raise KeyboardInterrupt
        done.append(arguments[2])
        return real(*arguments)

    monkeypatch.setattr(pipeline, "recover_layer", killed)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(cfg)
    monkeypatch.setattr(pipeline, "recover_layer", lambda *a: (again.append(a[2]), real(*a))[1])
    return done, again


def test_a_killed_run_continues_at_the_layer(custom: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    _, again = kill_after(4, custom(), monkeypatch)
    folder = pipeline.run(custom())
    assert again == [1, 2]  # trial 1, its first layer was finished
    assert len(pd.read_parquet(folder / "layers.parquet")) == 6
    assert not list(folder.rglob("*.jsonl"))


@pytest.mark.parametrize(
    "change", ["seed=1", "merge.dtype=bfloat16", "knows_rank=false", "layers=layers.0", "+methods.mean_lora.x=1"]
)
def test_a_changed_setting_is_another_cell(custom: Configure, change: str) -> None:
    def digests(*overrides: str) -> list[str]:
        cfg = custom(*overrides)
        prepared = pipeline.prepare(custom(*[o for o in overrides if "methods." not in o]))
        prepared.cfg = cfg
        return [cell.digest for cell in prepared.cells()]

    assert not set(digests()) & set(digests(change))


def test_an_edited_method_is_another_cell(tmp_path: Path, custom: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for body in ("stack.mean(0)", "stack.median(0).values"):
        (tmp_path / "edited_method.py").write_text(f"def f(stack):\n    return {body}\n")
        sys.modules.pop("edited_method", None)
        cfg = custom("methods=[]", "+methods.mine={_target_: edited_method.f, _partial_: true}")
        found.append([cell.digest for cell in pipeline.prepare(cfg).cells()])
    assert not set(found[0]) & set(found[1])


def test_other_settings_add_to_the_tables(custom: Configure) -> None:
    pipeline.run(custom())
    folder = pipeline.run(custom("methods=[lora_ft]", "n_loras=2"))
    trials = pd.read_parquet(folder / "trials.parquet")
    assert set(zip(trials["method"], trials["n_loras"], strict=True)) == {("mean_lora", 3), ("lora_ft", 2)}
    assert "Mean LoRA" not in (folder / "table.md").read_text()  # the report is of the last run


def test_one_coordinate_has_one_row(custom: Configure) -> None:
    pipeline.run(custom())
    folder = pipeline.run(custom("seed=1"))
    assert len(pd.read_parquet(folder / "trials.parquet")) == 2


def test_a_failing_method_is_marked_not_dropped(
    tmp_path: Path, custom: Configure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "failing_method.py").write_text("def f(stack):\n    raise ValueError('no luck')\n")
    monkeypatch.syspath_prepend(tmp_path)
    cfg = custom("methods=[mean_lora]", "+methods.mine={_target_: failing_method.f, _partial_: true}")
    folder = pipeline.run(cfg)
    layers = pd.read_parquet(folder / "layers.parquet")
    assert set(layers[layers["method"] == "mine"]["status"]) == {"failed: ValueError: no luck"}
    assert layers[layers["method"] == "mean_lora"]["w_error"].notna().all()
    assert "6 layers failed" in capsys.readouterr().err


def test_a_method_of_ones_own_as_the_readme_shows(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "my_method.py").write_text(
        "def median(stack):  # (n, d, k) merged weights, nothing else\n    return stack.median(0).values\n"
    )
    (tmp_path / "conf" / "methods").mkdir(parents=True)
    (tmp_path / "conf" / "methods" / "median.yaml").write_text(
        "# @package methods.median\n_target_: my_method.median\n_partial_: true\n"
    )
    command = [sys.executable, "-m", "lowra.run", "subset=custom", "source=published", f"source.path={dataset}"]
    command += ["methods=[mean_lora,median]", f"hydra.searchpath=[file://{tmp_path}/conf]", "n_loras=3", "trials=1"]
    done = subprocess.run([*command, f"results_dir={tmp_path}/out"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    trials = pd.read_parquet(tmp_path / "out/custom/published/trials.parquet").set_index("method")
    assert trials.loc["median", "w_error"] < -4
    assert trials.loc["median", "w_error"] != trials.loc["mean_lora", "w_error"]
    assert not (tmp_path / "outputs").exists()


MISTAKES = [
    ("n_loras=1", "n_loras is 1; recovery compares models and needs at least 2"),
    ("n_loras=7", "n_loras is 7, but subset 'custom' has 6 models; ask for 2 to 6"),
    ("n_loras=[2,x]", "expected a whole number, or a list"),
    ("trials=0", "trials is 0; at least 1 draw is needed"),
    ("trials=many", "trials is 'many'; expected a whole number"),
    ("methods=[]", "methods is empty"),
    ("merge.dtype=int8", r"Unknown merge\.dtype 'int8'"),
    (
        "metrics=[sbert]",
        r"Metric sbert runs models, but subset=custom source=published holds weights only; use metrics=\[\]",
    ),
    ("source.path=/nowhere", "/nowhere does not exist"),
    ("layers=nothing", "matches none of 3 layers"),
    ("layers='('", "is no regular expression"),
    ("source.path=null", r"give source=published source\.path=FOLDER"),
    ("+methods.mine._target_=nowhere.f", "Cannot make method 'mine' from nowhere.f"),
    ("+methods.mine.x=1", "has no _target_"),
    ("knows_rank=false methods=[spectral_detuning]", "needs the LoRA rank, which knows_rank=false withholds"),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES, ids=[o for o, _ in MISTAKES])
def test_mistakes_are_one_sentence_and_leave_nothing(
    overrides: str, message: str, custom: Configure, tmp_path: Path
) -> None:
    with pytest.raises(LowraError, match=message):
        pipeline.run(custom(*overrides.split()))
    assert not (tmp_path / "results").exists()


def test_custom_data_are_only_read(configure: Configure) -> None:
    with pytest.raises(LowraError, match=r"subset=custom is read from disk: give source=published source\.path=FOLDER"):
        pipeline.run(configure("subset=custom", "source=mini", "methods=[mean_lora]"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda(custom: Configure) -> None:
    with pytest.raises(LowraError, match="device=cuda was asked for, but torch finds no CUDA device"):
        pipeline.run(custom("device=cuda"))


def test_results_folder_that_cannot_be_written(custom: Configure, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LowraError, match=r"Cannot write results to .*give another with results_dir=FOLDER"):
        pipeline.run(custom(f"results_dir={tmp_path}/file"))


def test_metric_of_another_family(configure: Configure) -> None:
    with pytest.raises(LowraError, match=r"Metric 'sbert' scores .*not subset 'vit'"):
        pipeline.run(configure("subset=vit", "metrics=[sbert]", "methods=[mean_lora]"))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("subset=nope", "Unknown subset 'nope'; known: custom, mistral_dpo, mistral_sft, stable_diffusion, vit."),
        ("source=nope", "Unknown source 'nope'; known: build, mini, published, synthetic."),
        ("methods=[nope]", "Unknown method 'nope'; known: lora_ft, mean_lora, "),
        ("metrics=[nope]", "Unknown metric 'nope'; known: activation_distance, lpips, sbert."),
    ],
)
def test_unknown_names_list_the_known(argument: str, message: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lowra.run", argument, f"results_dir={tmp_path}/out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_hub_out_of_reach(configure: Configure) -> None:
    with pytest.raises(LowraError, match=r"Cannot get Eliahu/LoWRA-Bench \(vit\) .*source=mini .*source\.path=FOLDER"):
        pipeline.run(configure("subset=vit", "source=published", "metrics=[]", "methods=[mean_lora]"))


def test_coarser_merges_are_labelled(custom: Configure) -> None:
    folder = pipeline.run(custom("merge.dtype=bfloat16"))
    assert "stored in bfloat16" in (folder / "table.md").read_text()
    assert set(pd.read_parquet(folder / "layers.parquet")["merge_dtype"]) == {"bfloat16"}


def test_ranks_may_differ_between_loras(tmp_path: Path, custom: Configure) -> None:
    path = write_dataset(planted_layers(ranks=(2, 4)), tmp_path / "mixed")
    layers = pd.read_parquet(pipeline.run(custom(f"source.path={path}")) / "layers.parquet")
    for row in layers.itertuples():
        assert row.rank == max((2, 4)[m % 2] for m in row.models)


class Norm:
    """A metric that scores the mean of all recovered weights, and keeps a file a model."""

    column, pretty, kinds = "norm", "Norm", ("custom",)

    def __init__(self) -> None:
        self.labels: list[str] = []

    def ready(self) -> None:
        pass

    def check(self, base: str, evaluation: Path | None, device: torch.device) -> None:
        pass

    def gallery(self, artifacts: Path, columns: dict[str, str], folder: Path, title: str) -> list[Path]:
        return []

    def scorer(self, base: str, evaluation: Path | None, device: torch.device, artifacts: Path) -> Norm:
        self.artifacts = artifacts
        return self

    def score(self, weights: dict[tuple[str, str], torch.Tensor], label: str) -> dict[str, float]:
        self.labels.append(label)
        path = self.artifacts / f"{label}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(label)
        assert sorted(weights) == [("", f"model.layers.{i}.self_attn.q_proj.weight") for i in range(3)]
        return {"norm": float(torch.cat([w.flatten() for w in weights.values()]).double().mean())}


@pytest.fixture
def norm(monkeypatch: pytest.MonkeyPatch) -> Norm:
    metric, real = Norm(), pipeline.open_data
    monkeypatch.setattr(pipeline, "make_metrics", lambda cfg: {"norm": metric})
    monkeypatch.setattr(pipeline, "open_data", lambda cfg: dataclasses.replace(real(cfg), base="base"))
    return metric


def test_a_metric_scores_recovered_models_averaged_over_candidates(custom: Configure, norm: Norm) -> None:
    cfg = custom("methods=[lora_ft,mean_lora]", "n_loras=3", "trials=3")
    folder = pipeline.run(cfg)
    trials = pd.read_parquet(folder / "trials.parquet").set_index(["method", "trial"])
    # The mean of three models' means is the mean of their mean, up to float32 rounding of the merged weights.
    assert trials.loc["lora_ft", "norm"].tolist() == pytest.approx(trials.loc["mean_lora", "norm"].tolist(), abs=1e-8)
    drawn = {m for models in pd.read_parquet(folder / "trials.parquet")["models"] for m in models}
    assert len(norm.labels) == len(drawn) + 3  # each fine-tuned model once, and three means
    kept = sorted(str(p.relative_to(folder / "outputs")) for p in (folder / "outputs").rglob("*.json"))
    assert kept == ["L03/lora_ft.json", "L03/mean_lora.json"]  # of the first draw
    assert not (folder / "scratch").exists()


def test_equal_weights_show_their_outputs_under_both_labels(custom: Configure, norm: Norm) -> None:
    cfg = custom("methods=[mean_lora]", "+methods.again={_target_: lowra.methods.mean_lora.MeanLora}", "trials=1")
    folder = pipeline.run(cfg)
    assert norm.labels == ["L03/mean_lora"]
    assert (folder / "outputs/L03/again.json").read_text() == "L03/mean_lora"


def test_a_killed_run_scores_what_it_had_recovered(
    custom: Configure, norm: Norm, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pd.read_parquet(pipeline.run(custom()) / "trials.parquet")
    shutil.rmtree(Path(custom().results_dir))
    done, later = kill_after(2, custom(), monkeypatch)
    again = pd.read_parquet(pipeline.run(custom()) / "trials.parquet")
    assert done + later == [0, 1, 2, 0, 1, 2]
    assert again["norm"].tolist() == whole["norm"].tolist()
