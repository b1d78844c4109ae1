from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from planted_checkpoints import pipelines
from safetensors.torch import load_file, save_file

from lowra.bench.merging import merge
from lowra.bench.schema import open_dataset
from lowra.bench.sources import make_source
from lowra.builders.custom import CustomBuilder
from lowra.checkpoints.reading import StoredState
from lowra.errors import LowraError


def base_model(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder, max_shard_size="60KB")
    return folder


def experts_model(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=3,
    )
    transformers.GptOssForCausalLM(config).save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path, seed: int, **settings: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """A random adapter of the base in `folder`, and the state dict that PEFT merges from it."""
    torch.manual_seed(seed)
    kind = getattr(transformers, transformers.AutoConfig.from_pretrained(base).architectures[0])
    model = get_peft_model(kind.from_pretrained(base), LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(std=0.02)
    model.save_pretrained(folder)
    model.merge_and_unload().save_pretrained(folder.with_name(f"{folder.name}_merged"))
    return folder, dict(StoredState(folder.with_name(f"{folder.name}_merged")))


RECIPES: list[dict[str, Any]] = [
    {"r": 2, "lora_alpha": 4, "rank_pattern": {"h.1.attn.c_attn": 3}, "alpha_pattern": {"h.1.attn.c_attn": 5}},
    {"r": 3, "lora_alpha": 8, "use_rslora": True, "modules_to_save": ["ln_f"]},
    {"r": 4, "lora_alpha": 4, "fan_in_fan_out": True},
]


def test_peft_folders_become_a_data_set_and_merged_checkpoints(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    made = [
        adapter(base, tmp_path / f"a{i}", i + 1, target_modules=["c_attn"], **recipe)
        for i, recipe in enumerate(RECIPES)
    ]
    folders = [str(folder) for folder, _ in made]
    built = CustomBuilder(str(base), folders, merged=True).build(tmp_path / "built")
    table = open_dataset(built.dataset)
    assert table.model_names == ("a0", "a1", "a2")
    assert [info.ranks for info in table.infos] == [(2, 3, 4), (3, 3, 4)]
    for index, info in enumerate(table.infos):
        stack = merge(table.read(index))
        for i, (_, merged) in enumerate(made):
            # PEFT scales B A after the product, as this does; Conv1D's is transposed, which may cost an ulp.
            assert torch.allclose(stack[i], merged[info.name], rtol=0, atol=3e-8), (info.name, i)
    for i, (_, merged) in enumerate(made):
        own = StoredState(Path(built.report["merged"]) / f"a{i}")
        assert set(own) == set(merged)
        assert all(torch.allclose(own[name], merged[name], rtol=0, atol=3e-8) for name in own)
    assert CustomBuilder(str(base), folders, merged=True).build(tmp_path / "built") == built


def test_merges_round_once_or_twice(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    folders = [
        str(adapter(base, tmp_path / name, seed, target_modules=["c_attn"], r=4, lora_alpha=64)[0])
        for seed, name in enumerate("ab")
    ]
    for order in ("once", "twice"):
        built = CustomBuilder(str(base), folders, merged=True, dtype="bfloat16", order=order).build(tmp_path / "b")
        own = StoredState(Path(built.report["merged"]) / "a")
        table = open_dataset(built.dataset)
        expected = merge(table.read(0), torch.bfloat16, order)[0]
        assert own[table.infos[0].name].dtype == torch.bfloat16
        assert torch.equal(own[table.infos[0].name].float(), expected)
        assert {info.dtype for info in own.infos.values()} == {torch.bfloat16}


def test_parameters_of_experts(tmp_path: Path) -> None:
    base = experts_model(tmp_path / "base")
    stored = StoredState(base)
    name = next((n for n in stored if n.endswith("experts.gate_up_proj")), None)
    assert name is not None
    settings: dict[str, Any] = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"], "r": 2}
    folder, merged = adapter(base, tmp_path / "a", 1, **settings)
    other, _ = adapter(base, tmp_path / "b", 2, **settings)
    built = CustomBuilder(str(base), [str(folder), str(other)], merged=True).build(tmp_path / "built")
    table = open_dataset(built.dataset)
    assert [info.name for info in table.infos] == [f"{name}[{e}]" for e in range(3)]
    own = StoredState(Path(built.report["merged"]) / "a")
    assert torch.allclose(own[name], merged[name], rtol=0, atol=3e-8)
    assert not torch.allclose(own[name], stored[name], rtol=0, atol=1e-4)


def test_bad_adapters(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    first, _ = adapter(base, tmp_path / "a", 1, target_modules=["c_attn"], r=2)
    second, _ = adapter(base, tmp_path / "b", 2, target_modules=["c_fc"], r=2)
    with pytest.raises(LowraError, match="There is no adapter at"):
        CustomBuilder(str(base), [str(first), str(tmp_path / "none")]).check()
    with pytest.raises(LowraError, match="No layer is changed by all of a, b"):
        CustomBuilder(str(base), [str(first), str(second)]).build(tmp_path / "x")
    weights = first / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:50])
    with pytest.raises(LowraError, match="is no readable PEFT adapter"):
        CustomBuilder(str(base), [str(first), str(second)]).check()
    weights.write_bytes(whole)
    config = first / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 2', '"r": 5'))
    with pytest.raises(LowraError, match="is 5, and the factors' is 2"):
        CustomBuilder(str(base), [str(first), str(second)]).check()
    assert load_file(weights)


def test_the_benchmark_runs_on_it(tmp_path: Path, configure: Any) -> None:
    cfg = configure("subset=custom")
    with pytest.raises(LowraError, match=r"source\.path=FOLDER, or builder\.base=BASE"):
        make_source(cfg)
    base = base_model(tmp_path / "base")
    folders = [
        str(adapter(base, tmp_path / name, seed, target_modules=["c_attn"], r=2)[0]) for seed, name in enumerate("ab")
    ]
    settings = [f"builder.base={base}", f"builder.adapters=[{','.join(folders)}]"]
    with pytest.raises(LowraError, match="at least 2 LoRAs of one base; got 1"):
        make_source(configure("subset=custom", settings[0], f"builder.adapters=[{folders[0]}]")).check()
    source = make_source(configure("subset=custom", *settings))
    source.check()
    data = source.open()
    assert data.base == str(base)
    assert len(data.table) == 2
    assert not source.miniature


def test_lora_files_of_a_pipeline_in_both_spellings(tmp_path: Path) -> None:
    import diffusers
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from diffusers.utils import convert_state_dict_to_kohya
    from peft import get_peft_model_state_dict

    factors: dict[int, dict[str, dict[str, torch.Tensor]]] = {0: {}, 1: {}, 2: {}}
    pipelines(tmp_path, lambda i, part, model: factors[i].update({part: get_peft_model_state_dict(model)}))
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", ""], "text_encoder": ["", ""]}
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
    plain = {
        part: {key.removeprefix("base_model.model."): tensor for key, tensor in found.items()}
        for part, found in factors[0].items()
    }
    told = {"r": 2, "lora_alpha": 8}  # without it diffusers takes the rank for alpha
    StableDiffusionLoraLoaderMixin.save_lora_weights(
        tmp_path / "a",
        unet_lora_layers=plain["unet"],
        text_encoder_lora_layers=plain["text_encoder"],
        unet_lora_adapter_metadata=told,
        text_encoder_lora_adapter_metadata=told,
    )
    files = [tmp_path / "a"]
    for i in (1, 2):
        both = {k.replace("base_model.model", part): t for part, found in factors[i].items() for k, t in found.items()}
        files.append(tmp_path / f"kohya{i}.safetensors")
        # kohya's trainer knows the text encoder with the level that transformers 5 took out.
        spelt = {k.replace("lora_te1_", "lora_te_text_model_"): t for k, t in convert_state_dict_to_kohya(both).items()}
        assert any(name.endswith(".alpha") for name in spelt)  # the rank, for want of a configuration
        save_file({k: torch.tensor(8.0) if k.endswith(".alpha") else t for k, t in spelt.items()}, files[-1])
    builder = CustomBuilder(str(tmp_path / "base"), tuple(map(str, files)), merged=True)
    builder.check()
    built = builder.build(tmp_path / "out")
    table = open_dataset(built.dataset)
    assert len(table) == 21
    assert {info.model for info in table.infos} == {"unet", "text_encoder"}
    merged = sorted(Path(built.report["merged"]).iterdir())
    assert len(merged) == 3
    for i, place in enumerate(merged):  # as PEFT merges them
        for part in ("unet", "text_encoder"):
            ours, theirs = StoredState(place / part), StoredState(tmp_path / f"m{i}" / part)
            assert set(ours) == set(theirs)
            assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-6) for name in theirs), place
    diffusers.UNet2DConditionModel.from_pretrained(merged[1] / "unet")
