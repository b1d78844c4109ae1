"""Whole runs on a small data set: what they leave, what they share, how they stop and go on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import planted_layers
from omegaconf import DictConfig, open_dict
from tqdm import tqdm

from lowra import pipeline, plan
from lowra.bench.schema import write_dataset
from lowra.judge import LayerJudge
from lowra.records import SCORE, Store, read, trials, write_records
from lowra.reporting import figures

Configure = Callable[..., DictConfig]

TIMES = ["seconds", "finished", "context", "folder"]


def numbers(folder: Path) -> pd.DataFrame:
    """Everything of a run's layers but its times."""
    layers = read([folder]).layers.drop(columns=TIMES)
    return layers.sort_values("key", ignore_index=True)


def journalled(records: Path) -> bool:
    """Whether a process at work has written a record."""
    return any(b'"kind":"layer"' in path.read_bytes() for path in records.glob("*.jsonl"))


def counted(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[tuple[int, int, tuple[str, ...]]]:
    """The (trial, layer, variants) that are recovered from now on; interrupted after so many."""
    real, done = LayerJudge.judge_alike, []

    def judge(self: LayerJudge, tasks: Sequence[plan.Task]) -> Any:
        if len(done) == stop_after:
            raise KeyboardInterrupt
        done.extend((task.draw.trial, task.index, task.variants) for task in tasks)
        return real(self, tasks)

    monkeypatch.setattr(LayerJudge, "judge_alike", judge)
    return done


def test_every_row_and_column_is_there(custom: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pipeline.run(custom("methods=[lora_ft,mean_lora]", "n_loras=[2,3]")).folder
    layers, draws = pd.read_parquet(folder / "layers.parquet"), pd.read_parquet(folder / "trials.parquet")
    assert len(layers) == 2 * 2 * 2 * 3  # methods, numbers of models, draws, layers
    assert len(draws) == 2 * 2 * 2
    assert (layers["models"].map(len) == layers["n_loras"]).all()
    assert set(layers["status"]) == {"ok"}
    mean = layers.groupby(["n_loras", "trial", "method"])["w_error"].mean()
    found = draws.set_index(["n_loras", "trial", "method"])["w_error"]
    assert (mean - found).abs().max() < 1e-12
    # Three independent updates: their mean's square is a third of one's, log10(3) = 0.477 below it.
    three = draws[draws["n_loras"] == 3].groupby("method")["w_error"].mean()
    assert three["lora_ft"] - three["mean_lora"] == pytest.approx(0.477, abs=0.05)
    assert (layers.groupby(["n_loras", "trial", "layer_name"])["floor_w_error"].nunique() == 1).all()
    printed = capsys.readouterr().out
    assert "Mean LoRA" in printed
    assert (folder / "table.md").read_text().count("Mean LoRA") >= 2
    assert (folder / "by_models.png").stat().st_size > 1000


def test_a_record_says_what_one_needs_to_trust_it(custom: Configure, dataset: Path) -> None:
    found = read([pipeline.run(custom()).folder])
    (context,) = found.contexts.values()
    assert {"torch", "lowra", "python"} <= set(context["versions"])
    assert {"command", "config", "machine", "threads", "device", "models", "caption", "title"} <= set(context)
    assert context["config"]["seed"] == 0
    assert context["config"]["source"]["path"] == dataset.name  # no folder of this machine
    assert str(dataset) not in json.dumps(context)
    assert found.layers["seconds"].ge(0).all()


def test_methods_see_the_same_draws(custom: Configure) -> None:
    layers = read([pipeline.run(custom("methods=[lora_ft,mean_lora]")).folder]).layers
    drawn = layers.groupby(["trial", "method"])["models"].first().map(tuple).unstack()
    assert (drawn["lora_ft"] == drawn["mean_lora"]).all()


def test_draws_are_different_ones(custom: Configure) -> None:
    layers = read([pipeline.run(custom("n_loras=6", "trials=10")).folder]).layers
    assert set(layers["trial"]) == {0}  # there is one draw of 6 of 6


def test_exact_recovery_is_counted(tmp_path: Path, custom: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    # A method that was told the answer, to check the judge: it knows the planted layers.
    (tmp_path / "oracle_method.py").write_text(
        "import torch\nfrom conftest import planted_layers\nTRUE = [layer.weight for layer in planted_layers()]\n"
        "def f(stack):\n    return min(TRUE, key=lambda w: float((w - stack.mean(0)).square().sum()))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    cfg = custom("methods=[]", "+methods.told={_target_: oracle_method.f, _partial_: true}")
    layers = read([pipeline.run(cfg).folder]).layers
    assert layers["w_error"].tolist() == pytest.approx([-31.3072] * 6, abs=1e-4)
    assert layers["exact_layer"].all()
    assert (layers["exact_fraction"] == 1).all()


# ---- Again, and further -----------------------------------------------------------------------------------------


def test_a_second_run_computes_nothing(custom: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    first = numbers(pipeline.run(custom()).folder)
    done = counted(monkeypatch)
    pd.testing.assert_frame_equal(first, numbers(pipeline.run(custom()).folder))
    assert not done


def test_a_killed_run_continues_at_the_layer(custom: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = numbers(pipeline.run(custom()).folder)
    shutil.rmtree(custom().results_dir)
    with monkeypatch.context() as patch:
        counted(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(custom())
    done = counted(monkeypatch)
    folder = pipeline.run(custom()).folder
    assert done == [(1, 1, ("mean_lora",)), (1, 2, ("mean_lora",))]
    pd.testing.assert_frame_equal(whole, numbers(folder))


def test_what_was_asked_for_is_no_part_of_a_key(custom: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline.run(custom("trials=1", "layers='layers.0'"))
    pipeline.run(custom("trials=1", "methods=[lora_ft]"))
    done = counted(monkeypatch)
    pipeline.run(custom("methods=[lora_ft,mean_lora]", "n_loras=[3]"))
    assert done[:2] == [(0, 1, ("mean_lora",)), (0, 2, ("mean_lora",))]
    assert done[2:] == [(1, i, ("lora_ft", "mean_lora")) for i in range(3)]  # one reading for both


@pytest.mark.parametrize("jobs", [1, 2])
def test_shards_add_up_to_an_undisturbed_run(
    custom: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, jobs: int
) -> None:
    settings = ["methods=[lora_ft,mean_lora]", f"jobs={jobs}"]
    whole = numbers(pipeline.run(custom(*settings)).folder)
    shutil.rmtree(custom().results_dir)
    for i in (3, 1, 2):
        outcome = pipeline.run(custom(*settings, f"shard='{i}/3'"))
        assert not (outcome.folder / "table.md").exists()
        assert len(read([outcome.folder]).layers) <= len(whole)
    done = counted(monkeypatch)
    folder = pipeline.run(custom(*settings)).folder
    assert not done
    pd.testing.assert_frame_equal(whole, numbers(folder))


def test_two_processes_on_one_folder_share_the_work(tmp_path: Path, custom: Configure) -> None:
    # Two whole runs walk in the same order; each leaves to the other what it is about to do.
    write_dataset(planted_layers(layers=40), tmp_path / "many")
    made = plan.prepare(custom("trials=1", "methods=[mean_lora]", f"source.path={tmp_path}/many"))
    stores = [Store(made.folder), Store(made.folder)]
    todo = list(made.tasks(stores[0], made.draws[0], ["mean_lora"]))
    walks = []
    for store in stores:
        store.open(made.context(1, 1))
        walks.append(pipeline.still_open(made, store, todo, ["mean_lora"], tqdm(disable=True)))
    judge = pipeline.layer_judge(made, 1)
    worked = 0
    for pair in itertools.zip_longest(*walks):
        for tasks, store in zip(pair, stores, strict=True):
            for task in tasks or ():
                if task.variants:
                    worked += 1
                    (found,) = judge.judge(task)
                    store.append(made.coordinates(task.draw, task.index, made.variants["mean_lora"]) | found)
    assert len({record["key"] for record in stores[0].all("layer")}) == len(todo) == 40
    assert worked <= 41  # side by side it would be 80; the last one both may try
    assert not any(tasks[0].variants for walk in walks for tasks in walk)


def test_shards_share_the_work_evenly_and_do_not_depend_on_what_is_done() -> None:
    sizes = [float(4096 * (4096 if i % 4 in (0, 3) else 1024)) for i in range(128)]
    pairs = [(None, i) for i in range(128)]
    parts = [plan.in_shard(pairs, sizes, (i, 16)) for i in range(1, 17)]  # type: ignore[arg-type]
    assert sorted(t for part in parts for t in part) == list(range(128))
    loads = [sum(sizes[t] for t in part) for part in parts]
    assert max(loads) == min(loads)


def test_two_jobs_give_the_same_numbers(custom: Configure) -> None:
    one = numbers(pipeline.run(custom("methods=[mean_lora,spectral_detuning]", "jobs=1")).folder)
    shutil.rmtree(custom().results_dir)
    two = numbers(pipeline.run(custom("methods=[mean_lora,spectral_detuning]", "jobs=2")).folder)
    pd.testing.assert_frame_equal(one, two)  # small layers have one thread in either


# ---- Variants and keys ------------------------------------------------------------------------------------------


def test_variants_stand_side_by_side(custom: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    flat = "+methods.flat={like: spectral_detuning, scheduler: false, steps: 20}"
    folder = pipeline.run(custom("methods=[spectral_detuning]", flat)).folder
    layers = read([folder]).layers
    assert set(layers["label"]) == {"Spectral DeTuning", "Spectral DeTuning (scheduler=false, steps=20)"}
    assert len(layers) == 12
    assert "Spectral DeTuning (scheduler=false, steps=20)" in capsys.readouterr().out


def test_a_variant_adds_to_the_default(custom: Configure) -> None:
    pipeline.run(custom("methods=[spectral_detuning]", "methods.spectral_detuning.steps=20"))
    folder = pipeline.run(custom("methods=[spectral_detuning]")).folder
    assert len(read([folder]).layers) == 12
    table = pd.read_parquet(folder / "layers.parquet")  # the run's own report is of what it was asked for
    assert set(table["label"]) == {"Spectral DeTuning"}


def test_a_config_of_ones_own_inherits_another(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "conf" / "methods").mkdir(parents=True)
    (tmp_path / "conf" / "methods" / "patient.yaml").write_text(
        "# @package methods.patient\ndefaults:\n  - spectral_detuning@_here_\n  - _self_\npatience: 30\nsteps: 20\n"
    )
    done = command(
        dataset, tmp_path, "methods=[spectral_detuning,patient]", f"hydra.searchpath=[file://{tmp_path}/conf]"
    )
    assert done.returncode == 0, done.stderr
    labels = set(read([tmp_path / "out/custom/published"]).layers["label"])
    assert labels == {"Spectral DeTuning", "Spectral DeTuning (patience=30, steps=20)"}


def test_any_name_keeps_its_own_records(custom: Configure) -> None:
    def named(seed: int) -> DictConfig:
        cfg = custom(f"seed={seed}", "methods=[mean_lora]")
        mean = cfg.methods.mean_lora
        with open_dict(cfg):
            cfg.methods = {"my.v1": mean, "../../escape": {"like": "spectral_detuning", "steps": 10}}
        return cfg

    folder = pipeline.run(named(0)).folder
    first, second = (set(plan.prepare(named(seed)).keys()) for seed in (0, 1))
    assert not first & second
    assert set(read([folder]).layers["method"]) == {"my.v1", "../../escape"}
    assert not list(folder.parents[2].rglob("*escape*"))


@pytest.mark.parametrize(
    "change", ["seed=1", "merge.dtype=bfloat16", "knows_rank=false", "+methods.mean_lora.like=mean_lora"]
)
def test_a_setting_that_decides_numbers_is_in_the_key(custom: Configure, change: str) -> None:
    before, after = set(plan.prepare(custom()).keys()), set(plan.prepare(custom(change)).keys())
    if "like" in change:
        assert before == after
    else:
        assert not before & after


def test_an_edited_method_is_recovered_again(
    tmp_path: Path, custom: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowra.code import code_digest

    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for body in ("stack.mean(0)", "stack.median(0).values"):
        (tmp_path / "edited_method.py").write_text(f"def f(stack):\n    return {body}\n")
        sys.modules.pop("edited_method", None)
        code_digest.cache_clear()
        cfg = (
            custom("methods=[]", "+methods.my={v1: 0}", "~methods.my.v1", "methods.my={}")
            if False
            else custom("methods=[]", "+methods.mine={_target_: edited_method.f, _partial_: true}")
        )
        outcome = pipeline.run(cfg)
        found.append(pd.read_parquet(outcome.folder / "layers.parquet")["w_error"].tolist())
    assert found[0] != found[1]
    assert len(found[1]) == 6


def test_other_settings_add_to_the_folder(custom: Configure) -> None:
    pipeline.run(custom())
    folder = pipeline.run(custom("methods=[lora_ft]", "n_loras=2")).folder
    layers = read([folder]).layers
    assert set(zip(layers["method"], layers["n_loras"], strict=True)) == {("mean_lora", 3), ("lora_ft", 2)}
    assert "Mean LoRA" not in (folder / "table.md").read_text()  # the report is of the last run


def test_coarser_merges_are_labelled(custom: Configure) -> None:
    folder = pipeline.run(custom("merge.dtype=bfloat16")).folder
    assert "bfloat16" in (folder / "table.md").read_text()
    twice = pipeline.run(custom("merge.dtype=bfloat16", "merge.order=twice")).folder
    layers = read([twice]).layers
    assert set(zip(layers["merge_dtype"], layers["merge_order"], strict=True)) == {
        ("bfloat16", "once"),
        ("bfloat16", "twice"),
    }


def test_models_of_another_base_are_a_setting_of_their_own(custom: Configure) -> None:
    folder = pipeline.run(custom()).folder
    pipeline.run(custom("merge.foreign=1"))
    layers = read([folder]).layers.set_index(["merge_order", "trial", "layer_name"])["w_error"]
    plain, foreign = layers["once"], layers["once, 1 foreign"]
    # One of three is of a base as far away as W is large: (0.05^2 * 2) / 9 in the mean square.
    assert (foreign > plain + 1).all()
    assert foreign.mean() == pytest.approx(math.log10(0.05**2 * 2 / 9), abs=0.1)


def test_ranks_may_differ_between_loras(tmp_path: Path, custom: Configure) -> None:
    path = write_dataset(planted_layers(ranks=(2, 4)), tmp_path / "mixed")
    layers = read([pipeline.run(custom(f"source.path={path}")).folder]).layers
    for row in layers.itertuples():
        assert row.rank == max((2, 4)[m % 2] for m in row.models)


# ---- Methods that fail ------------------------------------------------------------------------------------------


@pytest.fixture
def bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """A method with a body of one's own, as an override."""
    monkeypatch.syspath_prepend(tmp_path)

    def made(body: str) -> str:
        name = f"bad_{abs(hash(body))}"
        (tmp_path / f"{name}.py").write_text(
            "import sys\nimport torch\nfrom lowra.methods import Recovery\n\n"
            f"class Bad:\n    def recover(self, observation):\n        stack = observation.merged\n        {body}\n"
        )
        return f"+methods.bad={{_target_: {name}.Bad}}"

    return made


BAD = {
    "raise ValueError('no luck')": "ValueError: no luck",
    "sys.exit(0)": "SystemExit: 0",
    "return stack.mean(0)": "TypeError: recover returned a Tensor; expected a Recovery",
    "return Recovery(stack.mean(0))": "ValueError: returned shape",
    "return Recovery(stack[:0])": "at least one candidate",
    "return Recovery(stack.mean(0, keepdim=True).to(torch.complex64))": "expected a dense one of real",
    "return Recovery(stack.mean(0, keepdim=True).to_sparse())": "expected a dense one of real",
    "return Recovery(stack.mean(0, keepdim=True).int())": "expected a dense one of real",
    "return Recovery(stack.mean(0, keepdim=True), stats=None)": "stats is a NoneType",
    "return Recovery(stack.mean(0, keepdim=True), stats={'x': stack})": "stats holds 'x': Tensor",
    "return Recovery(stack.mean(0, keepdim=True), history=5)": "history is a int",
    "return Recovery(stack.mean(0, keepdim=True), history=[5])": "a step of history is a int",
    "stack.mul_(0); return Recovery(stack.mean(0, keepdim=True))": "it wrote into observation.merged",
    "stack.numpy()[:] = 0; return Recovery(stack.mean(0, keepdim=True))": "it wrote into observation.merged",
    "stack.resize_(1); return Recovery(stack)": "ValueError",
    # Permutations change neither the sum of the bits nor torch's count of writes.
    "stack.numpy().sort(axis=0); return Recovery(stack[:1].clone())": "it wrote into observation.merged",
    "a = stack.numpy(); a[[0, 1]] = a[[1, 0]]; return Recovery(stack[:1].clone())": "it wrote into observation.merged",
    "torch.set_default_dtype(torch.float64); return Recovery(stack[:1])": "it set torch's default dtype",
    "torch.set_default_dtype(torch.float64); raise ValueError('so')": "ValueError: so",
    "return Recovery(stack[:1], stats={'x': 10**30})": "00000, beyond 64 bits; give a float",
    "return Recovery(stack[:1], history=[{'models': 3}])": "holds 'models', a column of the benchmark's own",
    "raise ValueError('a half \\udcff')": "ValueError: a half ?",
}


@pytest.mark.parametrize("body", BAD)
def test_a_method_that_fails_spoils_nobody_elses_numbers(
    body: str, bad: Callable[[str], str], custom: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = numbers(pipeline.run(custom()).folder)
    shutil.rmtree(custom().results_dir)
    outcome = pipeline.run(custom("methods=[]", bad(body), "+methods.mean_lora={like: mean_lora}"))
    layers = read([outcome.folder]).layers
    failed = layers[layers["method"] == "bad"]
    assert len(failed) == 3  # it failed on every layer of the first draw and is not tried on the second
    assert failed["failed"].all()
    assert failed["status"].str.startswith("failed: ").all()
    assert BAD[body] in failed["status"].iloc[0]
    good = layers[layers["method"] == "mean_lora"].drop(columns=TIMES).sort_values("key", ignore_index=True)
    assert good["w_error"].tolist() == alone["w_error"].tolist()
    assert good["floor_w_error"].tolist() == alone["floor_w_error"].tolist()
    assert len(outcome.failures) == 1
    assert BAD[body] in capsys.readouterr().err


BATCHES = {
    "good": "return [self.recover(each) for each in observations]",
    "fails": "raise ValueError('too many')",
    "fewer": "return [self.recover(each) for each in observations][1:]",
    "wrong": "return [self.recover(observations[0])] + [None] * (len(observations) - 1)",
    "writes": "return [self.recover(each) for each in observations if each.merged.mul_(2) is not None]",
}


@pytest.mark.parametrize("kind", BATCHES)
def test_small_layers_alike_are_given_to_a_method_together(
    kind: str, tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong with several at once, each is recovered as it is alone, and the next method gets the same."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"batch_{kind}.py").write_text(
        "from lowra.methods import Recovery\n\nASKED = []\n\nclass Mean:\n"
        "    pretty, reference, needs_rank = 'Mean', '', False\n\n"
        "    def recover(self, observation):\n        return Recovery(observation.merged.mean(0, keepdim=True))\n\n"
        "    def recover_batch(self, observations):\n        ASKED.append(len(observations))\n"
        f"        {BATCHES[kind]}\n"
    )
    shapes = [(24, 16)] * 5 + [(16, 24)] * 2
    layers = [
        dataclasses.replace(layer, name=f"model.layers.{i}.self_attn.q_proj.weight")
        for i, (d, k) in enumerate(shapes)
        for layer in planted_layers(layers=1, d=d, k=k, seed=i)
    ]
    write_dataset(layers, tmp_path / "alike")
    data = ["subset=custom", "source=published", f"source.path={tmp_path}/alike", "n_loras=3", "trials=2", "jobs=1"]
    methods = ["methods=[]", f"+methods.mine={{_target_: batch_{kind}.Mean}}", "+methods.mean_lora={like: mean_lora}"]
    outcome = pipeline.run(configure(*data, *methods))
    assert not outcome.failures
    found = read([outcome.folder]).layers
    assert len(found) == 2 * 2 * 7
    ours, theirs = (
        found[found["method"] == name].sort_values(["trial", "layer_name"]) for name in ("mine", "mean_lora")
    )
    assert ours["w_error"].tolist() == theirs["w_error"].tolist()
    alone = read([pipeline.run(configure(*data, "methods=[mean_lora]", f"results_dir={tmp_path}/alone")).folder]).layers
    assert theirs["w_error"].tolist() == alone.sort_values(["trial", "layer_name"])["w_error"].tolist()
    asked = sys.modules[f"batch_{kind}"].ASKED
    assert asked == [4, 2] * 2  # of seven layers four alike, one more alone, and two of another shape


def test_a_method_that_fails_everywhere_ends_with_its_error(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "raises.py").write_text("def f(stack):\n    raise ValueError('no luck at all')\n")
    done = command(dataset, tmp_path, "methods=[]", "+methods.raises={_target_: raises.f, _partial_: true}")
    assert done.returncode == 1
    assert done.stderr.count("no luck at all") == 1
    assert "Traceback" not in done.stderr


def test_mixed_statistics_do_not_poison_the_folder(bad: Callable[[str], str], custom: Configure) -> None:
    body = "return Recovery(stack.mean(0, keepdim=True), stats={'x': 1.5 if stack[0, 0, 0] > 0 else 'no'})"
    folder = pipeline.run(custom("methods=[]", bad(body))).folder
    assert set(pd.read_parquet(folder / "layers.parquet")["stat_x"]) <= {"1.5", "no"}
    pipeline.run(custom())


def test_a_configured_rank_of_a_function_is_its_own(tmp_path: Path, custom: Configure, monkeypatch: Any) -> None:
    (tmp_path / "ranked.py").write_text("def f(stack, rank):\n    return stack.mean(0) * rank\n")
    monkeypatch.syspath_prepend(tmp_path)
    cfg = custom("methods=[]", "+methods.mine={_target_: ranked.f, _partial_: true, rank: 1}", "knows_rank=false")
    mean = numbers(pipeline.run(custom("knows_rank=false")).folder)["w_error"]
    layers = read([pipeline.run(cfg).folder]).layers
    assert layers[layers["method"] == "mine"]["w_error"].mean() == pytest.approx(mean.mean(), abs=1e-9)


# ---- As a user types it -----------------------------------------------------------------------------------------


def command(dataset: Path, folder: Path, *overrides: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`python -m lowra.run` on a data set, from a folder of one's own."""
    arguments = [sys.executable, "-m", "lowra.run", "subset=custom", "source=published", f"source.path={dataset}"]
    arguments += ["n_loras=3", "trials=1", f"results_dir={folder}/out", *overrides]
    return subprocess.run(arguments, cwd=folder, capture_output=True, text=True, **options)


def test_workers_of_the_command_are_of_its_own_code(dataset: Path, tmp_path: Path) -> None:
    """Where the working directory has another package of the name: workers are forked from a server started there."""
    (tmp_path / "here" / "lowra").mkdir(parents=True)
    (tmp_path / "here" / "lowra" / "__init__.py").write_text("raise SystemExit('the wrong lowra')\n")
    arguments = ["subset=custom", "source=published", f"source.path={dataset}", "n_loras=3", "trials=2"]
    arguments += ["methods=[mean_lora]", "jobs=2", f"results_dir={tmp_path / 'out'}"]
    script = Path(sys.executable).with_name("lowra")
    options = {"cwd": tmp_path / "here", "capture_output": True, "text": True}
    done = subprocess.run([script, "run", *arguments], **options)
    assert done.returncode == 0, done.stderr
    alone = command(dataset, tmp_path, "methods=[mean_lora]", "trials=2", "jobs=1", f"results_dir={tmp_path / 'alone'}")
    assert alone.returncode == 0, alone.stderr
    found, expected = (numbers(tmp_path / name / "custom" / "published") for name in ("out", "alone"))
    assert found["w_error"].tolist() == expected["w_error"].tolist()


def test_a_method_of_ones_own_as_the_readme_shows(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "my_method.py").write_text(
        "def median(stack):  # (n, d, k) merged weights, nothing else\n    return stack.median(0).values\n"
    )
    (tmp_path / "conf" / "methods").mkdir(parents=True)
    (tmp_path / "conf" / "methods" / "median.yaml").write_text(
        "# @package methods.median\n_target_: my_method.median\n_partial_: true\n"
    )
    done = command(dataset, tmp_path, "methods=[mean_lora,median]", f"hydra.searchpath=[file://{tmp_path}/conf]")
    assert done.returncode == 0, done.stderr
    draws = pd.read_parquet(tmp_path / "out/custom/published/trials.parquet").set_index("method")
    assert draws.loc["median", "w_error"] < -4
    assert draws.loc["median", "w_error"] != draws.loc["mean_lora", "w_error"]
    assert not (tmp_path / "outputs").exists()


SLOW = "import time\ndef f(stack):\n    time.sleep(0.3)\n    return stack.mean(0)\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize(("jobs", "sweep"), [(1, False), (2, False), (1, True)])
def test_signals_stop_a_run_with_a_sentence(
    dataset: Path, tmp_path: Path, number: signal.Signals, status: int, jobs: int, sweep: bool
) -> None:
    (tmp_path / "slow_method.py").write_text(SLOW)
    slow = ["methods=[]", "+methods.slow={_target_: slow_method.f, _partial_: true}", "trials=20", f"jobs={jobs}"]
    arguments = [sys.executable, "-m", "lowra.run", "subset=custom", "source=published", f"source.path={dataset}"]
    process = subprocess.Popen(
        [*arguments, f"results_dir={tmp_path}/out", *slow, *(["n_loras=3,4", "-m"] if sweep else ["n_loras=3"])],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    records = tmp_path / "out/custom/published/records"
    deadline = time.monotonic() + 120
    while not journalled(records) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status
    assert said.count("the same command continues where this one stopped") == 1  # a sweep stops as a whole
    assert "Traceback" not in said
    assert len(read([tmp_path / "out/custom/published"]).layers) >= 1


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("subset=nope", "Unknown subset 'nope'; known: custom, "),
        ("source=nope", "Unknown source 'nope'; known: build, mini, published, synthetic."),
        ("methods=[nope]", "Unknown method 'nope'; known: lora_ft, mean_lora, "),
        ("metrics=[nope]", "Unknown metric 'nope'; known: activation_distance, lpips, sbert."),
        ("experiment=exact_recovry", "Unknown experiment 'exact_recovry'; known: "),
        ("methods=null", "Expected names of config files, such as methods=[mean_lora]."),
        ("builder=nope", "Unknown builder 'nope'; known: "),
        ("trails=1", "Unknown setting 'trails'; known: "),
        ("trails=1", "Did you mean trials?"),
        ("merge.dtyp=bfloat16", "Unknown setting 'merge.dtyp'; known: dtype, "),
        ("defence=noise defence.siz=1", "Unknown setting 'defence.siz'; known: _target_, size. Did you mean size?"),
    ],
)
def test_unknown_names_list_the_known(argument: str, message: str, tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "lowra.run", *argument.split(), f"results_dir={tmp_path}/out"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_run_of_the_checkout_changes_no_tracked_file() -> None:
    from lowra.paths import runs_dir

    root = Path(__file__).parents[1]
    assert runs_dir() == root / "runs"
    if (root / ".git").exists():
        ignored = subprocess.run(["git", "check-ignore", "runs/x", "cache/x"], cwd=root, capture_output=True, text=True)
        assert ignored.stdout.split() == ["runs/x", "cache/x"]


def test_killed_and_concurrent_processes_leave_the_tables_of_an_undisturbed_run(dataset: Path, tmp_path: Path) -> None:
    # A small one of the kills that scripts/kill_runs.py does by the dozen.
    (tmp_path / "slow_method.py").write_text(SLOW.replace("0.3", "0.02"))
    slow = ["methods=[mean_lora]", "+methods.slow={_target_: slow_method.f, _partial_: true}", "n_loras=3", "trials=6"]
    arguments = [
        sys.executable,
        "-m",
        "lowra.run",
        "subset=custom",
        "source=published",
        f"source.path={dataset}",
        *slow,
    ]
    quiet = {"cwd": tmp_path, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for _ in range(2):
        pair = [subprocess.Popen([*arguments, f"results_dir={tmp_path}/out"], **quiet) for _ in range(2)]  # type: ignore[call-overload]
        records = tmp_path / "out/custom/published/records"
        deadline = time.monotonic() + 120
        while not journalled(records) and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in pair:
            process.kill()
            process.wait()
    before = set(numbers(tmp_path / "out/custom/published")["key"])
    for folder in ("out", "undisturbed"):
        subprocess.run([*arguments, f"results_dir={tmp_path / folder}"], check=True, **quiet)  # type: ignore[call-overload]
    after = numbers(tmp_path / "out/custom/published")
    assert before <= set(after["key"])
    pd.testing.assert_frame_equal(after, numbers(tmp_path / "undisturbed/custom/published"))


# ---- Reports that were made before ------------------------------------------------------------------------------


@pytest.fixture
def drawings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The figures that are drawn from now on; nothing was drawn before."""
    monkeypatch.setenv("LOWRA_CACHE", str(tmp_path / "reports made before"))
    names: list[str] = []
    real = figures.drawn

    def drawn(draw: Any, *arguments: Any) -> Any:
        names.append(draw.__name__)
        return real(draw, *arguments)

    monkeypatch.setattr(figures, "drawn", drawn)
    return names


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_run_without_work_draws_nothing_and_leaves_everything_as_it_was(
    custom: Configure, drawings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pipeline.run(custom()).folder
    said, there = capsys.readouterr().out, files(folder)
    drawings.clear()
    (folder / "cumulative.svg").unlink()
    (folder / "table.md").write_text("edited")
    (folder / "layers.parquet").write_bytes(b"")
    (folder / "by_models.png").write_bytes(b"of an earlier state")
    (folder / "history.parquet").write_bytes(b"of an earlier state")
    pipeline.run(custom())
    assert not drawings
    assert files(folder) == there
    assert capsys.readouterr().out in said


def test_settings_that_take_turns_in_a_folder_each_find_their_own(custom: Configure, drawings: list[str]) -> None:
    turns = [custom(), custom("n_loras=[3,4]"), custom("methods=[lora_ft,mean_lora]")]
    for cfg in turns:
        folder = pipeline.run(cfg).folder
    drawings.clear()
    left = []
    for cfg in turns * 2:
        pipeline.run(cfg)
        left.append(files(folder))
    assert not drawings
    assert left[:3] == left[3:]
    assert "by_models.png" in left[1]
    assert "by_models.png" not in left[2]
    assert "LoRA FT" in left[2]["table.md"].decode()
    assert "LoRA FT" not in left[0]["table.md"].decode()


def test_an_edited_record_changes_the_tables(custom: Configure, drawings: list[str]) -> None:
    folder = pipeline.run(custom()).folder
    before = files(folder)
    (place,) = (folder / "records").glob("*.parquet")
    store = Store(folder)
    store.refresh()
    first, *others = store.all("layer")
    write_records([first | {"w_error": first["w_error"] - 1}, *others], store.contexts, place)
    drawings.clear()
    pipeline.run(custom())
    assert drawings
    after = files(folder)
    for name in ("table.md", "table.csv", "layers.parquet", "cumulative.png"):
        assert after[name] != before[name]


def test_a_lost_record_is_made_again_and_shown(custom: Configure, drawings: list[str]) -> None:
    folder = pipeline.run(custom()).folder
    for path in (folder / "records").iterdir():
        path.unlink()
    before = pd.read_parquet(folder / "layers.parquet")
    pipeline.run(custom())
    after = pd.read_parquet(folder / "layers.parquet")
    assert (before["finished"] < after["finished"]).all()


def test_a_run_killed_while_it_reports_is_put_right_by_the_next(dataset: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "lowra.run", "subset=custom", "source=published", f"source.path={dataset}"]
    arguments += ["n_loras=3", "trials=2", "methods=[mean_lora]", "jobs=1", f"results_dir={tmp_path / 'out'}"]
    environment = os.environ | {"LOWRA_CACHE": str(tmp_path / "cache")}
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    folder = tmp_path / "out/custom/published"
    subprocess.run(arguments, check=True, **quiet)
    subprocess.run(arguments, check=True, **quiet)
    right = files(folder)
    for i in range(4):
        shutil.rmtree(tmp_path / "cache")
        (folder / "table.md").write_text("not yet written")
        pair = [subprocess.Popen(arguments, **quiet) for _ in range(2)]
        deadline = time.monotonic() + 60
        while (folder / "table.md").stat().st_size < 20 and time.monotonic() < deadline and i:
            time.sleep(0.02 * i)
        for process in pair:
            process.kill()
            process.wait()
        subprocess.run(arguments, check=True, **quiet)
        assert {name: there for name, there in files(folder).items() if not name.startswith(".")} == right


# ---- Metrics ----------------------------------------------------------------------------------------------------


class Norm:
    """A metric that scores the mean of all recovered weights, and keeps a file a model."""

    column, pretty, kinds, places = "norm", "Norm", ("custom",), ("folder",)
    keeps_outputs = True

    def __init__(self, answer: Any = None, bias: float = 0.0) -> None:
        self.labels: list[str | None] = []
        self.shown: list[dict[str, str]] = []
        self.answer, self.bias = answer, bias

    def ready(self) -> None:
        pass

    def check(self, base: str, evaluation: Path | None, device: torch.device) -> None:
        pass

    def inputs(self, evaluation: Path | None) -> str:
        return f"bias {self.bias}"

    def gallery(self, artifacts: Path, columns: dict[str, str], folder: Path, title: str) -> list[Path]:
        self.shown.append(columns)
        for label in columns if self.keeps_outputs else ():
            assert label == "reference" or (artifacts / f"{label}.json").exists()
        return []

    def scorer(self, base: str, evaluation: Path | None, device: torch.device, artifacts: Path) -> Norm:
        self.artifacts = artifacts
        return self

    def score(self, weights: dict[tuple[str, str], torch.Tensor], label: str | None) -> Any:
        self.labels.append(label)
        if label is not None:
            path = self.artifacts / f"{label}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(label)
        assert sorted(weights) == [("", f"model.layers.{i}.self_attn.q_proj.weight") for i in range(3)]
        if self.answer is not None:
            return self.answer() if callable(self.answer) else self.answer
        return {"norm": self.bias + float(torch.cat([w.flatten() for w in weights.values()]).double().mean())}


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Norm]:
    """Make the runs of this test score with a metric of the test's, against a base of its name."""

    def used(metric: Norm, base: str = "base") -> Norm:
        import dataclasses

        monkeypatch.setattr(plan, "make_metrics", lambda cfg, weights_only: {"norm": metric})
        real = plan.make_source

        def source(cfg: DictConfig) -> Any:
            made = real(cfg)
            opened = type(made).open
            monkeypatch.setattr(type(made), "open", lambda self: dataclasses.replace(opened(self), base=base))
            return made

        monkeypatch.setattr(plan, "make_source", source)
        return metric

    return used


def test_a_metric_scores_recovered_models_averaged_over_candidates(custom: Configure, use: Any) -> None:
    norm = use(Norm())
    cfg = custom("methods=[lora_ft,mean_lora]", "+metrics.norm={_target_: x}", "n_loras=3", "trials=3")
    outcome = pipeline.run(cfg)
    assert not outcome.failures
    found = read([outcome.folder])
    table = trials(found.layers, found.scores).set_index(["method", "trial"])
    # The mean of three models' means is the mean of their mean, up to float32 rounding of the merged weights.
    assert table.loc["lora_ft", "norm"].tolist() == pytest.approx(table.loc["mean_lora", "norm"].tolist(), abs=1e-8)
    drawn = {m for models in found.layers["models"] for m in models}
    assert len(norm.labels) == len(drawn) + 3  # each fine-tuned model once, and three means
    assert sum(label is not None for label in norm.labels) == 2  # outputs of the first draw alone are kept
    assert [list(columns.values()) for columns in norm.shown] == [["Pre-FT (truth)", "Mean LoRA", "LoRA FT"]]
    assert not (outcome.folder / "weights").exists()


def test_a_model_that_another_process_is_scoring_is_left_to_the_last(
    custom: Configure, use: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = use(Norm())
    cfg = custom("methods=[mean_lora]", "+metrics.norm={_target_: x}", "n_loras=3", "trials=3")
    other = Store(pipeline.run(cfg).folder)
    other.refresh()
    first = min((record for record in other.all(SCORE)), key=lambda record: record["finished"])["key"]
    for name in ("records", "outputs"):
        shutil.rmtree(other.folder / name)
    other.open({})
    other.claim([first])
    scored: list[str] = []
    real = Store.append

    def append(self: Store, record: Any) -> Any:
        scored.extend([record["key"]] if record["kind"] == SCORE else [])
        other.claim(["something"])  # it is seen at work
        return real(self, record)

    monkeypatch.setattr(Store, "append", append)
    pipeline.run(cfg)
    assert len(norm.labels) == 6
    assert len(scored) == 3
    assert scored[-1] == first


def test_scores_are_keyed_by_base_inputs_and_settings(custom: Configure, use: Any) -> None:
    cfg = ("+metrics.norm={_target_: x}", "trials=1")
    first = use(Norm())
    one = pd.read_parquet(pipeline.run(custom(*cfg)).folder / "trials.parquet")["norm"].iloc[0]
    again = use(Norm())
    pipeline.run(custom(*cfg))
    assert (len(first.labels), len(again.labels)) == (1, 0)
    other = use(Norm(bias=5.0))  # other inputs
    five = pd.read_parquet(pipeline.run(custom(*cfg)).folder / "trials.parquet")["norm"].iloc[0]
    assert five == pytest.approx(one + 5)
    assert len(other.labels) == 1
    placed = use(Norm())
    moved = ("+metrics.norm={_target_: x, folder: %s}", "trials=1")
    pipeline.run(custom(*(part % "there" if "%s" in part else part for part in moved)))
    assert not placed.labels  # where something lies is no setting
    mute = use(Norm())
    mute.keeps_outputs = False  # nothing that could be missing
    shutil.rmtree(next(Path(custom().results_dir).rglob("outputs")))
    pipeline.run(custom(*cfg))
    assert not mute.labels
    based = use(Norm(), base="another base")
    pipeline.run(custom(*cfg))
    assert len(based.labels) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"w_error": 1.0}, "is a column of the benchmark's own"),
        ({"trial": 1.0}, "is a column of the benchmark's own"),
        ({"norm": "high"}, "'norm': str; expected a number"),
        ({}, "expected a dict of numbers"),
        (5, "score returned a int"),
        (lambda: sys.exit(0), "SystemExit"),
    ],
)
def test_a_metric_that_fails_is_told_and_ends_in_failure(
    custom: Configure, use: Any, answer: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    use(Norm(answer))
    outcome = pipeline.run(custom("+metrics.norm={_target_: x}"))
    assert len(outcome.failures) == 1
    assert message in outcome.failures[0]
    assert (outcome.folder / "table.md").exists()
    assert read([outcome.folder]).layers["w_error"].notna().all()


def test_candidates_that_differ_in_number_are_no_model(custom: Configure, use: Any, bad: Callable[[str], str]) -> None:
    norm = use(Norm())
    body = "return Recovery(stack[:1 + (stack[0, 0, 0] > 0)])"
    outcome = pipeline.run(custom("methods=[]", bad(body), "+metrics.norm={_target_: x}"))
    assert "candidates a layer" in outcome.failures[0] or norm.labels


def test_a_killed_run_scores_what_it_had_recovered(
    custom: Configure, use: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(Norm())
    settings = ("+metrics.norm={_target_: x}",)
    whole = pd.read_parquet(pipeline.run(custom(*settings)).folder / "trials.parquet")
    shutil.rmtree(Path(custom().results_dir))
    with monkeypatch.context() as patch:
        done = counted(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(custom(*settings))
    later = counted(monkeypatch)
    again = pd.read_parquet(pipeline.run(custom(*settings)).folder / "trials.parquet")
    assert [index for _, index, _ in done + later] == [0, 1, 2, 0, 1, 2]
    assert again["norm"].tolist() == whole["norm"].tolist()
    assert not math.isnan(again["norm"].iloc[0])
    assert os.path.isdir(Path(custom().results_dir))


def test_outputs_side_by_side_are_made_again_only_when_they_are_others(
    custom: Configure, use: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LOWRA_CACHE", str(tmp_path / "galleries made before"))

    class Shows(Norm):
        def gallery(self, artifacts: Path, columns: dict[str, str], folder: Path, title: str) -> list[Path]:
            self.shown.append(columns)
            texts = [(artifacts / f"{label}.json").read_text() for label in columns if label != "reference"]
            (folder / "shown.md").write_text("\n".join([title, *texts]))
            return [folder / "shown.md"]

    metric = use(Shows())
    cfg = custom("+metrics.norm={_target_: x}")
    folder = pipeline.run(cfg).folder
    there = (folder / "shown.md").read_text()
    (folder / "shown.md").unlink()
    pipeline.run(cfg)
    assert (folder / "shown.md").read_text() == there
    assert len(metric.shown) == 1
    (kept,) = folder.glob("outputs/*/*.json")
    kept.write_text("edited")
    pipeline.run(cfg)
    assert "edited" in (folder / "shown.md").read_text()
    pipeline.run(custom("+metrics.norm={_target_: x}", "methods=[lora_ft,mean_lora]"))
    assert [list(columns.values()) for columns in metric.shown][2:] == [["Pre-FT (truth)", "Mean LoRA", "LoRA FT"]]


def test_scores_of_other_runs_in_the_folder_draw_nothing_anew(custom: Configure, use: Any, drawings: list[str]) -> None:
    use(Norm())
    first, second = (custom("+metrics.norm={_target_: x}", f"n_loras={n}") for n in (3, 4))
    folder = pipeline.run(first).folder
    there = files(folder)
    pipeline.run(second)
    drawings.clear()
    pipeline.run(first)
    assert not drawings
    assert files(folder) == there
    assert "Norm" in there["table.md"].decode()
