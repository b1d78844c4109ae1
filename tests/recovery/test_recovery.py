from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from planted_checkpoints import LAYERS, base_state, renamed, save, three, tuned
from safetensors.torch import load_file, save_file

from lowra import recover_checkpoints, recover_stack
from lowra.checkpoints.reading import StoredState
from lowra.errors import LowraError
from lowra.methods.mean_lora import MeanLora
from lowra.methods.subspace_intersection import SubspaceIntersection
from lowra.recovery.session import Request, foresee, make_plan

TUNED = [f"model.layers.{i}.self_attn.{part}.weight" for i in range(LAYERS) for part in ("q_proj", "v_proj")]


def decisions(report) -> dict[str, str]:
    return {record["name"]: record["decision"] for record in report.records}


def close(found, expected) -> bool:
    # Within the rounding of the float32 merges: an ulp of weights of this size is 4e-9, the closed form averages three.
    return all(torch.allclose(found[name], expected[name], rtol=0, atol=1e-8) for name in expected)


def test_three_models_in_the_base_out(tmp_path: Path) -> None:
    base = base_state()
    report = recover_checkpoints(three(tmp_path), tmp_path / "out", adapters=True)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert list(StoredState(tmp_path / "out").metadata.values()) == [{"format": "pt"}]
    assert found.keys() == base.keys()
    assert close(found, base)
    for record in report.records:
        if record["name"] in TUNED:
            assert (record["decision"], record["certainty"]) == ("recovered", "certified")
            assert list(record["ranks"].values()) == [3, 3, 3]
        else:
            assert record["decision"] == "copied"
            assert torch.equal(found[record["name"]], base[record["name"]])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapters",
        "config.json",
        "model.safetensors",
        "recovery.json",
        "recovery.png",
        "tokenizer.json",
    ]
    held = json.loads((tmp_path / "out" / "recovery.json").read_text())
    assert held["tensors"] == list(report.records)
    assert held["counts"] == {"copied": 10, "certified": 4}
    text = (tmp_path / "out" / "README.md").read_text()
    assert "of 4 matrices changed by updates of low rank, 4 are certified" in text
    again = recover_checkpoints(three_again(tmp_path), tmp_path / "out", adapters=True)
    assert again.folder == tmp_path / "out"  # there already, made by the same command
    assert again.records == report.records


def three_again(folder: Path) -> list[Path]:
    return [folder / f"m{i}" for i in range(3)]


def test_adapters_give_back_the_models(tmp_path: Path) -> None:
    models = three(tmp_path, parts=("q_proj", "up_proj"))
    recover_checkpoints(models, tmp_path / "out", adapters=True)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for model in models:
        own, held = load_file(model / "model.safetensors"), tmp_path / "out" / "adapters" / model.name
        config = json.loads((held / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (3, 3)
        factors = load_file(held / "adapter_model.safetensors")
        for path in config["target_modules"]:
            a, b = (factors[f"base_model.model.{path}.lora_{part}.weight"] for part in "AB")
            merged = found[f"{path}.weight"] + b @ a
            # The factors are float32 and so is their sum: some ulp of the weight.
            assert torch.allclose(merged, own[f"{path}.weight"], rtol=0, atol=5e-8)


def test_layouts_may_differ_between_the_models_of_one_attack(tmp_path: Path) -> None:
    base = base_state()
    states = [tuned(base, i) for i in range(5)]
    models = [save(tmp_path / "sharded", states[0], shards=3), save(tmp_path / "single", states[1])]
    wrapped = renamed(states[2], lambda name: f"base_model.model._orig_mod.{name}")
    models.append(save(tmp_path / "wrapped", wrapped))
    dropped = renamed(states[3], lambda name: name.removeprefix("model."))
    del dropped["lm_head.weight"]
    models.append(save(tmp_path / "dropped", dropped))
    (tmp_path / "bin").mkdir()
    torch.save(states[4], tmp_path / "bin" / "pytorch_model.bin")
    models.append(tmp_path / "bin")
    report = recover_checkpoints(models, tmp_path / "out")
    found = dict(StoredState(tmp_path / "out"))
    assert len(StoredState(tmp_path / "out").files) == 3
    assert close(found, base)
    ranks = {record["name"]: record["ranks"] for record in report.records if "ranks" in record}
    assert sorted(ranks) == sorted(TUNED)
    assert all(list(found.values()) == [3] * 5 for found in ranks.values())
    # The PyTorch file first: the result is safetensors under its names.
    report = recover_checkpoints([models[4], *models[:2]], tmp_path / "out2", jobs=2)
    assert close(load_file(tmp_path / "out2" / "model.safetensors"), base)


def test_a_tied_embedding_saved_once_or_twice(tmp_path: Path) -> None:
    base = base_state()
    base["lm_head.weight"] = base["model.embed_tokens.weight"].clone()
    states = [tuned(base, i, parts=("q_proj", "embed_tokens")) for i in range(3)]
    for i, state in enumerate(states):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        if i:
            del state["lm_head.weight"]
    models = [save(tmp_path / f"m{i}", state) for i, state in enumerate(states)]
    recover_checkpoints(models, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert close(found, base)
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])


def test_added_tokens_extra_heads_and_mixed_dtypes(tmp_path: Path) -> None:
    base = base_state(dtype=torch.bfloat16)
    states = [{k: v.float() for k, v in tuned({n: t.float() for n, t in base.items()}, i).items()} for i in range(3)]
    for i, state in enumerate(states):
        grown = torch.randn(i, 48)
        state["model.embed_tokens.weight"] = torch.cat([state["model.embed_tokens.weight"], grown])
        state["score.weight"] = torch.randn(2 + i, 48)
    models = [save(tmp_path / f"m{i}", state) for i, state in enumerate(reversed(states))]
    report = recover_checkpoints(models, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    # A bfloat16 base under float32 merges comes back to the last bit.
    assert all(torch.equal(found[name][: base[name].shape[0]], base[name].float()) for name in base)
    assert torch.equal(found["model.embed_tokens.weight"][60:], states[2]["model.embed_tokens.weight"][60:])
    records = {record["name"]: record for record in report.records}
    assert records["model.embed_tokens.weight"]["rows_not_recovered"] == 2
    assert records["score.weight"]["decision"] == "first"
    assert records[TUNED[0]]["grid"] == "bf16"


def test_models_of_another_base_are_named_and_left_out(tmp_path: Path) -> None:
    base, other = base_state(0), base_state(1)
    noisy = {n: t + 0.003 * torch.randn(t.shape) if "proj" in n else t for n, t in base.items()}
    models = [save(tmp_path / f"a{i}", tuned(base, i)) for i in range(3)]
    strangers = [save(tmp_path / f"b{i}", tuned(other, 10 + i)) for i in range(3)]
    four_bit = save(tmp_path / "four_bit", tuned(noisy, 20))
    plan = make_plan(Request((str(strangers[0]), *map(str, models), str(four_bit)), None, SubspaceIntersection()))
    names = [Path(model.label).name for model in plan.models]
    assert [names[i] for i in plan.used] == ["a0", "a1", "a2"]
    said = {names[i]: kin.looks_like for i, kin in plan.strangers.items()}
    assert said == {
        "b0": "another base model",
        "four_bit": "a base changed in every entry, as by a 4-bit round trip, or a strong full fine-tune",
    }
    report = recover_checkpoints([*strangers[:1], *models, four_bit], tmp_path / "out")
    assert close(load_file(tmp_path / "out" / "model.safetensors"), base)
    assert "**left out**: another base model" in report.card
    both = recover_checkpoints([*models, *strangers], None)
    assert "share a base of their own; `models='[" in both.card
    with pytest.raises(LowraError, match="No 3 of the models share a base"):
        recover_checkpoints([models[0], strangers[0], four_bit], tmp_path / "none")


def test_what_several_models_agree_on_is_the_bases(tmp_path: Path) -> None:
    base = base_state()
    parts = [("q_proj", "k_proj"), ("q_proj",), ("q_proj",)]
    models = [save(tmp_path / f"m{i}", tuned(base, i, parts=part)) for i, part in enumerate(parts)]
    report = recover_checkpoints(models, tmp_path / "out")
    assert decisions(report)["model.layers.0.self_attn.k_proj.weight"] == "agreed"
    found = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.self_attn.k_proj.weight"]
    assert torch.equal(found, base["model.layers.0.self_attn.k_proj.weight"])


def test_changes_of_full_rank_are_named_for_what_they_look_like(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    base = base_state()
    names = {"full": TUNED[0], "ia3": TUNED[1], "dora": TUNED[2], "oft": TUNED[3]}
    big = {name: torch.randn(96, 96, generator=generator) * 0.05 for name in (*names.values(), "model.lokr.weight")}
    base |= big | {f"untouched.{i}.weight": torch.randn(8, 8, generator=generator) for i in range(8)}
    models = []
    for i in range(3):
        state = tuned(base, i, parts=("k_proj", "o_proj"))
        for kind, name in names.items():
            weight = base[name]
            noise = torch.randn(96, 96, generator=generator)
            scale = 1 + 0.05 * torch.randn(96, 1, generator=generator)
            update = noise[:, :2] @ noise[:2] * 0.01
            state[name] = {
                "full": weight + 0.001 * noise,
                "ia3": weight * scale,
                "dora": scale * (weight + update),
                "oft": torch.linalg.matrix_exp(0.05 * (noise - noise.mT)) @ weight,
            }[kind].contiguous()
        kron = torch.kron(noise[:6, :6], noise[:16, :16]) * 0.001
        state["model.lokr.weight"] = base["model.lokr.weight"] + kron
        models.append(save(tmp_path / f"m{i}", state))
    records = {record["name"]: record for record in recover_checkpoints(models, tmp_path / "out").records}
    for kind in ("ia3", "dora"):
        assert "DoRA" in records[names[kind]]["status"]
        assert (records[names[kind]]["decision"], records[names[kind]]["certainty"]) == ("recovered", "up_to_scale")
    assert "OFT" in records[names["oft"]]["status"]
    assert records[names["oft"]]["decision"] == records[names["full"]]["decision"] == "mean"
    assert "LoKr" in records["model.lokr.weight"]["status"]
    assert records["model.lokr.weight"]["certainty"] == "certified"
    assert "looks" not in records[names["full"]]["status"]
    assert "differ by a full rank" in records[names["full"]]["status"]
    assert records["model.layers.0.self_attn.k_proj.weight"]["certainty"] == "certified"


def test_experts_and_convolutions(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    base = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.randn(4, 32, 48, generator=generator) * 0.05,
        "conv.weight": torch.randn(24, 16, 3, 3, generator=generator) * 0.05,
        "conv1d.weight": torch.randn(24, 16, 3, generator=generator) * 0.05,
        "head.weight": torch.randn(24, 24, generator=generator),
    }
    states = []
    for i in range(3):
        state = tuned(base, i, parts=("conv",))
        updates = torch.randn(4, 32, 2, generator=generator) @ torch.randn(4, 2, 48, generator=generator) * 0.01
        state["model.layers.0.mlp.experts.gate_up_proj"] = base["model.layers.0.mlp.experts.gate_up_proj"] + updates
        states.append(state)
    models = [save(tmp_path / f"m{i}", state) for i, state in enumerate(states)]
    report = recover_checkpoints(models, tmp_path / "out")
    assert close(load_file(tmp_path / "out" / "model.safetensors"), base)
    record = next(r for r in report.records if r["name"].endswith("gate_up_proj"))
    assert record["matrices"] == ["certified"] * 4
    assert list(record["ranks"].values()) == [2, 2, 2]


def test_audit_writes_no_weights(tmp_path: Path) -> None:
    models = [*three(tmp_path), save(tmp_path / "m3", tuned(base_state(), 3))]
    report = recover_checkpoints(models, None, report=tmp_path / "audit")
    assert sorted(path.name for path in (tmp_path / "audit").iterdir()) == [
        "README.md",
        "recovery.json",
        "recovery.png",
    ]
    assert "With one release fewer (the last one withheld), 4 of these 4 matrices would be certified" in report.card
    assert "What these releases give away" in report.card
    few = recover_checkpoints(models[:3], None)
    assert few.folder is None
    assert "So few models leave a block of every matrix open." in few.card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audit", "m0", "m1", "m2", "m3"]


def test_dry_run_foresees(tmp_path: Path) -> None:
    plan = make_plan(Request(tuple(map(str, three(tmp_path))), tmp_path / "out", SubspaceIntersection()))
    text = foresee(plan)
    assert "14 tensors" in text
    assert "10 look identical, 4 to recover, 0 to keep." in text
    assert "certified, ranks 3, 3, 3" in text
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_other_methods_and_granted_ranks(tmp_path: Path) -> None:
    models = three(tmp_path)
    report = recover_checkpoints(models, tmp_path / "mean", method=MeanLora())
    assert report.counts == {"copied": 10, "uncertified": 4}
    states = [load_file(model / "model.safetensors") for model in models]
    mean = torch.stack([state[TUNED[0]] for state in states]).mean(0)
    assert torch.allclose(load_file(tmp_path / "mean" / "model.safetensors")[TUNED[0]], mean, atol=1e-7)
    granted = recover_checkpoints(models, tmp_path / "granted", rank=3)
    assert granted.counts == {"copied": 10, "certified": 4}


def test_which_weights_are_sure(tmp_path: Path) -> None:
    base = {name: weight for name, weight in base_state(dtype=torch.bfloat16).items() if "layers.1" not in name}
    base[TUNED[0]] = (torch.randn(128, 128, generator=torch.Generator().manual_seed(5)) * 0.05).bfloat16()
    models = [save(tmp_path / f"m{i}", tuned(base, i, rank=2, parts=(TUNED[0],), size=0.02)) for i in range(3)]
    report = recover_checkpoints(models, tmp_path / "out", sure=True)
    (record,) = (record for record in report.records if record["decision"] == "recovered")
    mask = load_file(tmp_path / "out" / "sure.safetensors")
    assert list(mask) == [TUNED[0]]
    sure = mask[TUNED[0]]
    right = StoredState(tmp_path / "out")[TUNED[0]] == base[TUNED[0]]
    assert record["sure"] == pytest.approx(float(sure.double().mean()))
    assert 0.5 < record["sure"] < 1
    assert float(right[sure].double().mean()) > 0.995
    assert float(right[sure].double().mean()) > float(right[~sure].double().mean())
    assert "sure.safetensors" in report.card
    with pytest.raises(LowraError, match="sure=true writes a file"):
        recover_checkpoints(models, None, sure=True)


def test_one_stack() -> None:
    base = base_state()[TUNED[0]].bfloat16().float()
    generator = torch.Generator().manual_seed(0)
    updates = [torch.randn(48, 2, generator=generator) @ torch.randn(2, 48, generator=generator) / 50 for _ in range(4)]
    found = recover_stack([base + update for update in updates])
    assert torch.equal(found.candidates[0], base)
    assert found.stats["certificate"] == "certified"
    half = recover_stack(torch.stack([base + update for update in updates]).bfloat16(), rank=2)
    assert half.candidates.shape == (1, 48, 48)
    with pytest.raises(LowraError, match="expected floating point"):
        recover_stack(torch.ones(3, 4, 4, dtype=torch.int64))


def test_foreign_names_cannot_break_the_card(tmp_path: Path) -> None:
    base = {**base_state(), "layers.0.$x_|`<b>.weight": torch.randn(24, 24)}
    models = [save(tmp_path / f"m{i}", tuned(base, i, parts=("q_proj", "$x"))) for i in range(3)]
    report = recover_checkpoints(models, tmp_path / "out")
    row = next(line for line in report.card.splitlines() if "$x" in line and line.startswith("| $x"))
    assert "<b>" not in row
    assert row.replace("\\|", "").count("|") == 8


def test_single_files(tmp_path: Path) -> None:
    base = renamed(base_state(), lambda name: f"model.diffusion_model.{name}")
    files = []
    for i in range(3):
        files.append(tmp_path / f"style{i}.safetensors")
        save_file(tuned(base, i), files[-1])
    (tmp_path / "ckpt").mkdir()
    torch.save({"state_dict": tuned(base, 3), "epoch": 4}, tmp_path / "ckpt" / "style3.ckpt")
    recover_checkpoints([*files, tmp_path / "ckpt"], tmp_path / "out")
    assert close(load_file(tmp_path / "out" / "style0.safetensors"), base)


def test_half_precision_variants_of_a_pipeline(tmp_path: Path) -> None:
    base = base_state(dtype=torch.float16)
    for i in range(3):
        folder = tmp_path / f"m{i}"
        for component, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
            (folder / component).mkdir(parents=True)
            variant = ".fp16" if i != 1 else ""
            save_file(tuned(base, i), folder / component / f"{stem}{variant}.safetensors")
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "X", "unet": [], "text_encoder": []}))
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    report = recover_checkpoints([tmp_path / f"m{i}" for i in range(3)], tmp_path / "out")
    assert (tmp_path / "out" / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists()
    assert (tmp_path / "out" / "text_encoder" / "model.fp16.safetensors").exists()
    assert (tmp_path / "out" / "scheduler" / "scheduler_config.json").exists()
    assert {record["component"] for record in report.records} == {"unet", "text_encoder"}
