from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from planted_checkpoints import base_state, save, three, tuned
from safetensors.torch import load_file, save_file

from lowra import recover_checkpoints, recover_stack
from lowra.errors import LowraError
from lowra.methods.mean_lora import MeanLora
from lowra.recover import recover


def test_too_few_models(tmp_path: Path) -> None:
    models = three(tmp_path)
    with pytest.raises(LowraError, match=r"compares at least 3 fine-tunes of one base; got 2 models"):
        recover_checkpoints(models[:2], tmp_path / "out")
    with pytest.raises(LowraError, match=r"compares at least 2 fine-tunes of one base; got 1 model\."):
        recover_checkpoints(models[:1], tmp_path / "out", method=MeanLora())


def test_the_same_model_twice(tmp_path: Path) -> None:
    models = three(tmp_path)
    with pytest.raises(LowraError, match="are the same model; every model counts once"):
        recover_checkpoints([*models, tmp_path / "m1" / ".." / "m0"], tmp_path / "out")
    shutil.copytree(models[0], tmp_path / "copy")
    with pytest.raises(LowraError, match=r"m0 and .*copy hold the same weights in every tensor"):
        recover_checkpoints([*models, tmp_path / "copy"], tmp_path / "out")


def test_another_architecture_names_the_first_tensor_that_differs(tmp_path: Path) -> None:
    models = three(tmp_path)
    other = {name: tensor[..., :40].contiguous() for name, tensor in base_state(9).items()}
    save(tmp_path / "other", other)
    with pytest.raises(
        LowraError,
        match=r"other is of another architecture.*'lm_head\.weight' of shape \(60, 48\), has shape \(60, 40\)",
    ):
        recover_checkpoints([*models, tmp_path / "other"], tmp_path / "out")
    save(tmp_path / "foreign", {f"block.{i}.w": torch.randn(5, 5) for i in range(9)})
    with pytest.raises(LowraError, match=r"0 of 12 matrices agree.*is not there"):
        recover_checkpoints([*models, tmp_path / "foreign"], tmp_path / "out")


def test_files_that_are_cut_short_or_no_files(tmp_path: Path) -> None:
    models = three(tmp_path)
    weights = models[1] / "model.safetensors"
    whole = weights.read_bytes()
    for broken, message in (
        (whole[:-100], "cut short"),
        (whole + b"x", "bytes added"),
        (b"", "no header"),
        (b"\xff" * 100, "no header"),
        (b"\x05" + b"\0" * 7 + b"hello", "is not a readable safetensors file"),
    ):
        weights.write_bytes(broken)
        with pytest.raises(LowraError, match=message):
            recover_checkpoints(models, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    base = base_state()
    models = [save(tmp_path / f"m{i}", tuned(base, i), shards=2) for i in range(3)]
    index = models[2] / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]

    def told(changed: dict[str, str]) -> None:
        index.write_text(json.dumps({"weight_map": changed}))

    told(dict.fromkeys(places, "model-00001-of-00002.safetensors"))
    with pytest.raises(LowraError, match=r"does not list the shard model-00002-of-00002\.safetensors"):
        recover_checkpoints(models, tmp_path / "out")
    told({**places, "model.more.weight": "model-00001-of-00002.safetensors"})
    with pytest.raises(LowraError, match=r"says that tensor 'model\.more\.weight' is in model-00001"):
        recover_checkpoints(models, tmp_path / "out")
    told({**places, "lm_head.weight": "../m0/model-00001-of-00002.safetensors"})
    with pytest.raises(LowraError, match="which is not a file beside it; do not trust"):
        recover_checkpoints(models, tmp_path / "out")
    told(places)
    (models[2] / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(LowraError, match=r"names model-00002-of-00002\.safetensors, which is not in"):
        recover_checkpoints(models, tmp_path / "out")
    index.write_text("{}")
    with pytest.raises(LowraError, match="is not a readable index"):
        recover_checkpoints(models, tmp_path / "out")


class _Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('unpickled foreign code')",))


def test_pickles_that_hold_more_than_tensors(tmp_path: Path) -> None:
    models = three(tmp_path)
    (models[0] / "model.safetensors").unlink()
    torch.save({"a": _Payload()}, models[0] / "pytorch_model.bin")
    with pytest.raises(LowraError, match="could run foreign code"):
        recover_checkpoints(models, tmp_path / "out")
    torch.save([1, 2], models[0] / "pytorch_model.bin")
    with pytest.raises(LowraError, match="holds no state dict"):
        recover_checkpoints(models, tmp_path / "out")


def test_output_that_is_not_empty_or_inside_an_input(tmp_path: Path) -> None:
    models = three(tmp_path)
    with pytest.raises(LowraError, match="lies inside the model"):
        recover_checkpoints(models, models[1] / "base")
    with pytest.raises(LowraError, match="lies inside the model"):
        recover_checkpoints(models, models[1])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    with pytest.raises(LowraError, match="is not empty; name a new folder"):
        recover_checkpoints(models, tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep me"
    (tmp_path / "empty").mkdir()
    assert recover_checkpoints(models, tmp_path / "empty").folder == tmp_path / "empty"


def test_another_commands_unfinished_work_is_left_alone(tmp_path: Path) -> None:
    models = three(tmp_path)
    (tmp_path / "out.partial").mkdir()
    lines = [{"key": "another", "command": "lowra recover of old"}, {"item": "lm_head.weight"}]
    (tmp_path / "out.partial" / ".journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(LowraError, match=r"unfinished work of another command \(lowra recover of old\)"):
        recover_checkpoints(models, tmp_path / "out")


def test_places_without_weights(tmp_path: Path) -> None:
    models = three(tmp_path)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(LowraError, match="nothing holds no safetensors weights; expected model"):
        recover_checkpoints([*models, tmp_path / "nothing"], tmp_path / "out")
    (tmp_path / "nothing" / "model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(LowraError, match="is a GGUF file: convert it back"):
        recover_checkpoints([*models, tmp_path / "nothing"], tmp_path / "out")
    (tmp_path / "nothing" / "adapter_config.json").write_text("{}")
    save_file({"x.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "nothing" / "adapter_model.safetensors")
    with pytest.raises(LowraError, match="it is a PEFT adapter: merge it"):
        recover_checkpoints([*models, tmp_path / "nothing"], tmp_path / "out")
    with pytest.raises(LowraError, match=r"There is no model at \./not/there"):
        recover_checkpoints([*models, "./not/there"], tmp_path / "out")
    with pytest.raises(
        LowraError, match="'nobody/nothing' is no local folder or file, and as a Hub id it cannot be had"
    ):
        recover_checkpoints([*models, "nobody/nothing"], tmp_path / "out")


def test_components_must_not_leave_the_folder(tmp_path: Path) -> None:
    models = three(tmp_path)
    (models[0] / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "../m1"}]))
    with pytest.raises(LowraError, match=r"names the component '\.\./m1', which lies outside"):
        recover_checkpoints(models, tmp_path / "out")


def test_tensor_names_are_never_paths(tmp_path: Path) -> None:
    base = {**base_state(), "../../escape.weight": torch.randn(8, 8)}
    models = [save(tmp_path / "in" / f"m{i}", tuned(base, i)) for i in range(3)]
    recover_checkpoints(models, tmp_path / "in" / "out", adapters=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    assert "../../escape.weight" in load_file(tmp_path / "in" / "out" / "model.safetensors")


@pytest.mark.parametrize(
    ("tensors", "settings", "route"),
    [
        ({"model.layers.0.mlp.qweight": torch.zeros(4, 4, dtype=torch.int32)}, {}, "GPTQModel, dequantise"),
        ({"model.layers.0.mlp.weight.absmax": torch.zeros(4)}, {}, r"model\.dequantize\(\)"),
        ({"model.layers.0.mlp.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, {}, "FineGrainedFP8Config"),
        ({}, {"quantization_config": {"quant_method": "awq"}}, r"quantised \(awq, by its configuration\)"),
    ],
)
def test_quantised_checkpoints_are_refused_by_their_header(
    tmp_path: Path, tensors: dict[str, torch.Tensor], settings: dict[str, object], route: str
) -> None:
    models = three(tmp_path)
    save(tmp_path / "q", {**base_state(), **tensors}, config=settings or None)
    with pytest.raises(LowraError, match=route):
        recover_checkpoints([*models, tmp_path / "q"], tmp_path / "out")


def test_nan_is_named(tmp_path: Path) -> None:
    base = base_state()
    states = [tuned(base, i) for i in range(3)]
    states[1]["model.layers.1.self_attn.v_proj.weight"][7, 7] = float("nan")
    models = [save(tmp_path / f"m{i}", state) for i, state in enumerate(states)]
    with pytest.raises(LowraError, match=r"'model\.layers\.1\.self_attn\.v_proj\.weight' of .*m1 contains NaN"):
        recover_checkpoints(models, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nan_in_what_is_only_kept_is_named_too(tmp_path: Path) -> None:
    base = base_state()
    states = [tuned(base, i) | {"model.norm.weight": torch.full((16,), float(i))} for i in range(3)]
    states[1]["model.norm.weight"][3] = float("nan")
    models = [save(tmp_path / f"m{i}", state) for i, state in enumerate(states)]
    with pytest.raises(LowraError, match=r"'model\.norm\.weight' of .*m1 contains NaN"):
        recover_checkpoints(models, tmp_path / "out")


@pytest.mark.parametrize("shape", [(3, 64), (5, 64), (7, 64), (64, 3), (4, 32, 3, 3)])
def test_small_matrices_that_were_trained_in_full_are_kept(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Heads of three classes: too small for any of the ranks that a difference is first tried with."""
    base, generator = base_state(), torch.Generator().manual_seed(7)
    head = torch.randn(*shape, generator=generator) * 0.05
    heads = [head + 0.002 * torch.randn(*shape, generator=generator) for _ in range(3)]
    states = [tuned(base, i) | {"score.weight": own} for i, own in enumerate(heads)]
    models = [save(tmp_path / f"m{i}", state) for i, state in enumerate(states)]
    records = {record["name"]: record for record in recover_checkpoints(models, tmp_path / "out").records}
    assert records["score.weight"]["certainty"] in ("kept", "not_identifiable")
    assert records["model.layers.0.self_attn.q_proj.weight"]["certainty"] == "certified"


def test_one_model_in_half_precision_is_of_the_same_base(tmp_path: Path) -> None:
    base = {name: value.bfloat16().float() for name, value in base_state().items()}
    states = [tuned(base, i) for i in range(4)]
    states[1] = {name: value.bfloat16() for name, value in states[1].items()}
    models = [save(tmp_path / f"m{i}", state) for i, state in enumerate(states)]
    report = recover_checkpoints(models, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for record in report.records:
        if record["decision"] == "recovered":
            assert "left_out" not in record, record["status"]
            # Three models in float32 differ from the base by 1e-2; an open weight is one step of bfloat16 off.
            assert float((found[record["name"]] - base[record["name"]]).abs().max()) < 2e-3


def test_an_output_that_lost_its_weights_is_not_believed(tmp_path: Path) -> None:
    models = three(tmp_path)
    recover_checkpoints(models, tmp_path / "out")
    recover_checkpoints(models, tmp_path / "out")
    for name in ("recovery.png", "model.safetensors"):
        (tmp_path / "out" / name).unlink()
        with pytest.raises(LowraError, match=rf"made by this very command, but {name} is gone; delete"):
            recover_checkpoints(models, tmp_path / "out")
        (tmp_path / "out" / name).touch()  # only that one lacks at a time


def test_an_output_whose_weights_were_changed_is_not_believed(tmp_path: Path) -> None:
    models = three(tmp_path)
    recover_checkpoints(models, tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    whole = weights.read_bytes()
    tensors = load_file(weights)
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, tmp_path / "changed.safetensors", metadata={"format": "pt"})
    for broken, what in (
        ((tmp_path / "changed.safetensors").read_bytes(), r"\(lm_head\.weight\)"),
        (whole[:-4], "its header or size"),
        (whole + b"1234", "its header or size"),
    ):
        weights.write_bytes(broken)
        with pytest.raises(LowraError, match=rf"model\.safetensors was changed since.*{what}.*; delete"):
            recover_checkpoints(models, tmp_path / "out")
    weights.write_bytes(whole)
    said: list[str] = []
    (models[0] / "config.json").write_text('{"changed": true}')
    recover_checkpoints(models, tmp_path / "out", say=said.append)
    assert "out/config.json is not what" in said[-1]
    records = json.loads((tmp_path / "out" / "recovery.json").read_text())
    (tmp_path / "out" / "recovery.json").write_text(json.dumps({**records, "tensors": records["tensors"][:3]}))
    with pytest.raises(LowraError, match=r"recovery\.json was changed since"):
        recover_checkpoints(models, tmp_path / "out")


def test_names_of_the_first_models_files_that_the_output_has_for_its_own(tmp_path: Path) -> None:
    models = three(tmp_path)
    for name in ("README.md", "recovery.json", "recovery.png", "adapters", "sure.safetensors"):
        (models[0] / name).mkdir()
        (models[0] / name / "note.txt").write_text("of the model")
    recover_checkpoints(models, tmp_path / "out", adapters=True, sure=True)
    assert (tmp_path / "out" / "README.md").read_text().startswith("---")
    assert not list((tmp_path / "out").rglob("note.txt"))


def test_weights_named_as_the_masks_are(tmp_path: Path) -> None:
    models = [shutil.copy(m / "model.safetensors", tmp_path / f"{m.name}.safetensors") for m in three(tmp_path)]
    first = Path(models[0]).rename(tmp_path / "sure.safetensors")
    with pytest.raises(LowraError, match=r"sure\.safetensors is where sure=true writes, and the name of"):
        recover_checkpoints([first, *models[1:]], tmp_path / "out", sure=True)


def test_somebody_elses_folder_where_the_output_is_made_is_left_alone(tmp_path: Path) -> None:
    models = three(tmp_path)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(LowraError, match=r"out\.partial, where the output is made, holds files of somebody else's"):
        recover_checkpoints(models, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == ["model.safetensors"]


def test_an_adapters_configuration_is_not_taken_along(tmp_path: Path) -> None:
    models = three(tmp_path)
    (models[0] / "adapter_config.json").write_text("{}")
    recover_checkpoints(models, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_the_output_may_be_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [path.resolve() for path in three(tmp_path)]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert recover_checkpoints(models, ".").folder == tmp_path / "here"
    assert (tmp_path / "here" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        ([], r"have the shapes \(none is given\)"),
        ([torch.zeros(3, 4), torch.zeros(4, 3)], r"have the shapes \[\(3, 4\), \(4, 3\)\]"),
        (torch.zeros(3, 0, 5), "with numbers in it"),
        (torch.zeros(4, 5), r"has shape \(n, d, k\)"),
    ],
)
def test_stacks_that_no_method_can_work_on(stack: list[torch.Tensor] | torch.Tensor, message: str) -> None:
    with pytest.raises(LowraError, match=message):
        recover_stack(stack)


def test_integers_scalars_and_vectors_are_kept_and_said_so(tmp_path: Path) -> None:
    base = base_state()
    states = []
    for i in range(3):
        extra = {"steps": torch.tensor(i), "scale": torch.tensor(float(i)), "ids": torch.arange(4) + i}
        norm = {"model.norm.weight": torch.full((WIDE,), float(i)), "empty": torch.zeros(0, 4)}
        states.append({**tuned(base, i), **extra, **norm})
    models = [save(tmp_path / f"m{i}", state) for i, state in enumerate(states)]
    report = recover_checkpoints(models, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["steps"] == 0
    assert found["ids"].tolist() == [0, 1, 2, 3]
    assert found["scale"] == 1.0
    assert torch.equal(found["model.norm.weight"], torch.ones(WIDE))
    said = {record["name"]: record["decision"] for record in report.records}
    assert {name: said[name] for name in ("steps", "scale", "ids", "model.norm.weight", "empty")} == {
        "steps": "first",
        "scale": "mean",
        "ids": "first",
        "model.norm.weight": "mean",
        "empty": "copied",
    }
    first = recover_checkpoints(models, tmp_path / "first", keep="first")
    assert {record["name"]: record["decision"] for record in first.records}["model.norm.weight"] == "first"
    assert torch.equal(load_file(tmp_path / "first" / "model.safetensors")["model.norm.weight"], torch.zeros(WIDE))


WIDE = 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": "median"}, "Unknown keep 'median'; known: first, mean"),
        ({"jobs": 0}, "jobs=0: expected at least 1"),
        ({"rank": 0}, "rank=0: expected at least 1"),
        ({"adapters": True}, "adapters=true writes files"),
        ({"jobs": None}, "jobs=None: expected at least 1"),
        ({"rank": "4"}, "rank=4: expected at least 1"),
    ],
)
def test_settings(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(LowraError, match=message):
        recover_checkpoints(three(tmp_path), None, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("models=abc", r"models=abc: expected a list"),
        ("output=''", "output=: expected a folder's name"),
        ("output=2024", r"output=2024: expected a folder's name, or null; in quotes where it is a number"),
        ("report=there", "report=there is where an audit"),
        ("rank=x", "rank=x: expected a whole number, or null"),
        ("jobs=1.5", r"jobs=1\.5: expected a whole number"),
        ("dry_run=perhaps", "dry_run=perhaps: expected true or false"),
        ("method=guess", "Unknown method 'guess'; known: lora_ft"),
        ("method=spectral_detuning", "needs the rank of the updates; give rank=16"),
    ],
)
def test_command_line(tmp_path: Path, override: str, message: str) -> None:
    from hydra import compose, initialize_config_dir

    from lowra.paths import conf_dir, register_resolvers

    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("recover", overrides=[f"models=[a{tmp_path.name},b,c]", f"output={tmp_path / 'o'}", override])
        bare = compose("recover")
    with pytest.raises(LowraError, match=message):
        recover(cfg)
    with pytest.raises(LowraError, match=r"models has no value; give models='\[A,B,C\]'"):
        recover(bare)
