"""A mistake is one sentence before any work, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from lowra import pipeline, plan, settings
from lowra.errors import LowraError

Configure = Callable[..., DictConfig]


MISTAKES = [
    ("n_loras=1", "n_loras is 1; recovery compares models and needs at least 2"),
    ("n_loras=7", "n_loras is 7, but subset 'custom' has 6 models; ask for 2 to 6"),
    ("n_loras=[2,x]", "expected a whole number, or a list"),
    ("n_loras=[]", "n_loras is empty"),
    ("n_loras=true", "expected a whole number, or a list"),
    ("trials=0", "trials is 0; at least 1 draw is needed"),
    ("trials=1000000000", "at most 10000 are listed"),
    ("trials=many", "trials is 'many'; expected a whole number"),
    ("trials=null", "trials is None; expected a whole number"),
    ("seed=1.5", r"seed is 1\.5; expected a whole number"),
    ("seed=99999999999999999999", "expected a whole number of at most 64 bits"),
    ("subset.name=5", r"subset\.name is 5; expected a name"),
    ("source.name=../x", r"source\.name is '\.\./x'; expected a name, without slashes"),
    ("device=???", r"device has no value \(\?\?\?\)"),
    ("~merge.dtype", r"merge\.dtype was taken out"),
    ("merge.order=twice", "float32 merges round nothing"),
    ("+methods.a={like:b} +methods.b={like:a}", "are like each other in a circle"),
    ("+methods.a={like:null}", r"methods\.a\.like is None"),
    ("+methods.a={_target_:torch.median,_partial_:true}", "no signature found for builtin"),
    ("knows_rank=5", "knows_rank is 5; expected true or false"),
    ("methods=[]", "methods is empty"),
    ("+methods.my=5", r"methods\.my is 5; expected a config with _target_"),
    ("merge.dtype=int8", "int8"),
    ("merge.dtype=null", "expected|known"),
    ("merge.order=thrice", r"Unknown merge\.order 'thrice'; known: once, twice"),
    ("merge.foreign=2", r"merge\.foreign is 2, of n_loras=3 models; two at least"),
    ("merge.foreign=one", r"merge\.foreign is 'one'; expected a number of models"),
    ("merge=null", r"merge is None; expected merge\.dtype=\.\.\."),
    ("metrics=[sbert]", r"Metric sbert runs models, but subset=custom source=published holds weights only"),
    ("source.path=/nowhere", "/nowhere does not exist"),
    ("source.path=5", r"source\.path is 5; expected"),
    ("source.path=null", r"give source\.path=FOLDER"),
    ("layers=nothing", "matches none of 3 layers"),
    ("layers='('", "is no regular expression"),
    ("layers=5", "layers is 5; expected text in quotes, or null"),
    ("layers=[a]", r"layers is \['a'\]; expected text"),
    ("layers=true", "layers is True; expected text"),
    ("device=foo", "device is 'foo'; expected cpu, cuda"),
    ("device=''", "device is ''; expected cpu, cuda"),
    ("device=null", "device is None; expected cpu, cuda"),
    ("device=0", "device is 0; expected cpu, cuda"),
    ("device=mps", "device is 'mps'; expected cpu, cuda"),
    ("device=meta", "device is 'meta'; expected cpu, cuda"),
    ("jobs=0", "jobs is 0; expected a number of processes"),
    ("jobs=many", "jobs is 'many'; expected a number of processes"),
    ("shard=0/2", r"shard is '0/2'; expected i/k"),
    ("shard=3/2", r"shard is '3/2'; expected i/k"),
    ("shard=one", r"shard is 'one'; expected i/k"),
    ("cache_dir=null", "cache_dir is None; expected a folder"),
    ("+methods.mine._target_=nowhere.f", r"Cannot make method 'mine' from nowhere\.f"),
    ("+methods.mine.x=1", "has no _target_"),
    ("+methods.mine={like:nobody}", "Unknown method 'nobody'; known: lora_ft, mean_lora"),
    ("+methods.mine={like:mean_lora,x:1}", "Unknown option of method 'mean_lora' 'x'"),
    ("+methods.again={like:mean_lora}", "are the same code with the same options; drop one"),
    ("knows_rank=false methods=[spectral_detuning]", "needs the LoRA rank, which knows_rank=false withholds"),
    ("methods=[spectral_detuning] methods.spectral_detuning.compress=abc", "compress is 'abc'; expected true or false"),
    ("methods=[spectral_detuning] methods.spectral_detuning.steps=1.5", r"steps is 1\.5; expected a whole number"),
    ("methods=[spectral_detuning] methods.spectral_detuning.stop_after=9999", "stop_after is 1 to steps=300"),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES, ids=[o for o, _ in MISTAKES])
def test_mistakes_are_one_sentence_and_leave_nothing(
    overrides: str, message: str, custom: Configure, tmp_path: Path
) -> None:
    with pytest.raises(LowraError, match=message) as caught:
        pipeline.run(custom(*overrides.split()))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("value", ["null", "''", "5", f"/{'x' * 300}"])
def test_results_folders_that_cannot_be(value: str, custom: Configure) -> None:
    with pytest.raises(LowraError, match=r"results_dir is .*expected a folder|Cannot write results to"):
        pipeline.run(custom(f"results_dir={value}"))


def test_results_folder_that_cannot_be_written(custom: Configure, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LowraError, match=r"Cannot write results to .*give another with results_dir=FOLDER"):
        pipeline.run(custom(f"results_dir={tmp_path}/file"))


def test_custom_data_are_only_read(configure: Configure) -> None:
    with pytest.raises(LowraError, match=r"source=published source\.path=FOLDER"):
        pipeline.run(configure("subset=custom", "source=mini", "methods=[mean_lora]"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda(custom: Configure) -> None:
    with pytest.raises(LowraError, match="device=cuda was asked for, but torch finds no CUDA device"):
        pipeline.run(custom("device=cuda"))


def test_metric_of_another_kind_of_model(configure: Configure) -> None:
    with pytest.raises(LowraError, match=r"Metric 'sbert' scores .*causal_lm.*'vit'.*image_classifier"):
        pipeline.run(configure("subset=vit", "metrics=[sbert]", "methods=[mean_lora]"))


def test_the_hub_out_of_reach(configure: Configure) -> None:
    with pytest.raises(LowraError, match=r"Cannot get Eliahu/LoWRA-Bench \(vit\) .*source=mini .*source\.path=FOLDER"):
        pipeline.run(configure("subset=vit", "source=published", "metrics=[]", "methods=[mean_lora]"))


@pytest.mark.parametrize("seed", [0, 7, -3, 2**40, -(2**63), 2**63 - 1])
def test_any_seed_serves(custom: Configure, seed: int) -> None:
    made = plan.prepare(custom(f"seed={seed}"))
    seeds = {made.seed(draw, index) for draw in made.draws for index in made.layers}
    assert len(seeds) == 6
    for one in seeds:
        torch.Generator().manual_seed(one)


def test_configs_may_name_defaults_of_lowra_alone(custom: Configure) -> None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    cfg = OmegaConf.create({"x": "${default:os.getcwd}", "y": "${default:lowra.settings.MAX_TRIALS}"})
    custom()  # registers the resolvers
    assert cfg.y == settings.MAX_TRIALS
    with pytest.raises(OmegaConfBaseException, match=r"os\.getcwd.* names no default of lowra's"):
        cfg.x  # noqa: B018


def test_no_folder_of_this_machine_is_kept() -> None:
    cfg = {"results_dir": "/a/b", "source": {"path": "/home/me/data", "name": "x/y"}, "list": ["/tmp/z", 5]}
    assert plan._portable(cfg) == {"source": {"path": "data", "name": "x/y"}, "list": ["z", 5]}
    assert plan._without_folders("source.path=/home/me/data") == "source.path=data"


def test_options_of_ones_own_method_that_differ_from_its_defaults_are_in_its_label(
    custom: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "labelled_method.py").write_text("def mine(stack, alpha=1.0):\n    return alpha * stack.mean(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    labels = []
    for alpha in ("1.0", "2.0"):
        target = f"{{_target_: labelled_method.mine, _partial_: true, alpha: {alpha}}}"
        labels += [each.label for each in plan.make_variants(custom("methods=[]", f"+methods.mine={target}")).values()]
    assert labels == ["mine", "mine (alpha=2.0)"]
