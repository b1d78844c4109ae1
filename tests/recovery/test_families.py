"""Models as their libraries make and save them: adapters merged by PEFT, recovered, loaded, the same outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from planted_checkpoints import pipelines
from safetensors.torch import save_file

from lowra import recover_checkpoints
from lowra.checkpoints.reading import StoredState

VOCABULARY = 64


def distilbert() -> Any:
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=48, hidden_dim=96, n_layers=2, n_heads=4, max_position_embeddings=32
    )
    return transformers.DistilBertForMaskedLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=4, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


def mistral() -> Any:
    config = transformers.MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return transformers.MistralForCausalLM(config)


def mixtral() -> Any:
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=32,
    )
    return transformers.MixtralForCausalLM(config)


FAMILIES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "distilbert": (distilbert, ["q_lin", "v_lin"]),
    "gpt2": (gpt2, ["c_attn"]),
    "mistral": (mistral, ["q_proj", "v_proj", "down_proj"]),
    "mixtral": (mixtral, ["q_proj", "v_proj"]),
}


def finetuned(base: Path, kind: type, targets: list[str], seed: int, **settings: Any) -> Any:
    """The base with a random LoRA of it, as PEFT holds it."""
    torch.manual_seed(seed)
    model = get_peft_model(kind.from_pretrained(base), LoraConfig(target_modules=targets, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(24).view(2, 12) % VOCABULARY
    return model.eval()(input_ids=ids).logits


RECIPES = [{"r": 2, "lora_alpha": 4}, {"r": 3, "lora_alpha": 8, "use_rslora": True}, {"r": 4, "lora_alpha": 4}]


@pytest.mark.parametrize("family", FAMILIES)
def test_recovered_models_load_and_say_what_the_base_says(tmp_path: Path, family: str) -> None:
    make, targets = FAMILIES[family]
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path / "base")
    kind, expected = type(model), logits(model)
    tuned = []
    for i, recipe in enumerate(RECIPES):
        own = finetuned(tmp_path / "base", kind, targets, i + 1, **recipe)
        merged = own.merge_and_unload()
        merged.save_pretrained(tmp_path / f"m{i}", max_shard_size="60KB" if i != 1 else "1GB")
        tuned.append(logits(merged))
    models = [tmp_path / f"m{i}" for i in range(3)]
    report = recover_checkpoints(models, tmp_path / "out", adapters=True)
    asked = [record for record in report.records if record["decision"] == "recovered"]
    assert len(asked) == 2 * len(targets)
    assert {record["certainty"] for record in asked} == {"certified"}
    for record in asked:
        assert list(record["ranks"].values()) == [2, 3, 4], record["name"]
    found = kind.from_pretrained(tmp_path / "out")
    # Weights within the rounding of float32; two layers hardly raise it.
    assert torch.allclose(logits(found), expected, atol=2e-6)
    assert not torch.allclose(tuned[0], expected, atol=1e-4)
    again = PeftModel.from_pretrained(found, str(tmp_path / "out" / "adapters" / "m0"))
    assert torch.allclose(logits(again), tuned[0], atol=2e-6)


def test_heads_of_their_own_come_with_the_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = distilbert()
    base.save_pretrained(tmp_path / "base")
    kind = transformers.DistilBertForSequenceClassification
    outputs = []
    for i in range(3):
        own = finetuned(
            tmp_path / "base", kind, ["q_lin"], i + 1, r=2, modules_to_save=["classifier", "pre_classifier"]
        )
        merged = own.merge_and_unload()
        merged.save_pretrained(tmp_path / f"m{i}")
        outputs.append(logits(merged))
    report = recover_checkpoints([tmp_path / f"m{i}" for i in range(3)], tmp_path / "out", adapters=True)
    heads = {r["name"]: r["decision"] for r in report.records if "classifier" in r["name"]}
    assert set(heads.values()) <= {"mean", "copied"}
    again = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "out"), str(tmp_path / "out" / "adapters" / "m1"))
    assert torch.allclose(logits(again), outputs[1], atol=2e-6)


def test_stable_diffusion_pipelines(tmp_path: Path) -> None:
    pipelines(tmp_path)
    report = recover_checkpoints([tmp_path / f"m{i}" for i in range(3)], tmp_path / "out")
    asked = [record for record in report.records if record["decision"] == "recovered"]
    assert {record["component"] for record in asked} == {"unet", "text_encoder"}
    assert {record["certainty"] for record in asked} == {"certified"}
    unet, found = (diffusers.UNet2DConditionModel.from_pretrained(tmp_path / p / "unet") for p in ("base", "out"))
    sample, state = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 32)
    with torch.no_grad():
        expected, got = (m(sample, 10, encoder_hidden_states=state).sample for m in (unet, found))
    assert torch.allclose(got, expected, atol=1e-5)
    transformers.CLIPTextModel.from_pretrained(tmp_path / "out" / "text_encoder")


def original_name(part: str, name: str) -> str:
    """What the original repository calls a tensor of the little pipeline: its U-Net has one layer in two blocks."""
    if part == "text_encoder":
        return f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"
    places = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.0.attentions.0": "input_blocks.1.1",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "down_blocks.1.resnets.0": "input_blocks.3.0",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "up_blocks.0.resnets.0": "output_blocks.0.0",
        "up_blocks.0.resnets.1": "output_blocks.1.0",
        "up_blocks.0.upsamplers.0": "output_blocks.1.1",
        "up_blocks.1.resnets.0": "output_blocks.2.0",
        "up_blocks.1.attentions.0": "output_blocks.2.1",
        "up_blocks.1.resnets.1": "output_blocks.3.0",
        "up_blocks.1.attentions.1": "output_blocks.3.1",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    place = max((known for known in places if name.startswith(f"{known}.")), key=len)
    rest = name.removeprefix(place)
    if ".resnets." in f".{place}":
        for ours, theirs in (
            ("norm1", "in_layers.0"),
            ("conv1", "in_layers.2"),
            ("time_emb_proj", "emb_layers.1"),
            ("norm2", "out_layers.0"),
            ("conv2", "out_layers.3"),
            ("conv_shortcut", "skip_connection"),
        ):
            rest = rest.replace(f".{ours}.", f".{theirs}.")
    return f"model.diffusion_model.{places[place]}{rest}"


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("first", [0, 1])
def test_a_single_file_beside_pipelines(tmp_path: Path, first: int, suffix: str) -> None:
    pipelines(tmp_path)

    def original(model: str) -> dict[str, torch.Tensor]:
        states = {part: dict(StoredState(tmp_path / model / part)) for part in ("unet", "text_encoder")}
        return {original_name(part, name): t for part, state in states.items() for name, t in state.items()}

    single = tmp_path / f"style{suffix}"
    unused = {"model_ema.decay": torch.ones(())}
    if suffix == ".ckpt":
        torch.save({"state_dict": original("m1") | unused}, single)
    else:
        save_file(original("m1") | unused, single)
    models = [tmp_path / "m0", tmp_path / "m2"]
    models.insert(1 - first, single)
    report = recover_checkpoints(models, tmp_path / "out")
    asked = [record for record in report.records if record["decision"] == "recovered"]
    # to_q and to_v twice, and proj_in, of four attentions; q_proj of one layer of text
    assert len(asked) == 21
    assert {record["certainty"] for record in asked} == {"certified"}
    if first == 1:
        written = next((tmp_path / "out").glob("style*"))
        found, base = dict(StoredState(written)), original("base")
        assert set(found) == set(base) | set(unused)
    else:
        found, base = {}, {}
        for part in ("unet", "text_encoder"):
            found |= dict(StoredState(tmp_path / "out" / part))
            base |= dict(StoredState(tmp_path / "base" / part))
    for name, weight in base.items():
        assert torch.allclose(found[name], weight, atol=1e-6), name


def gpt_oss() -> Any:
    config = transformers.GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    return transformers.GptOssForCausalLM(config)


# gpt-oss stores a layer's experts as one tensor (experts, in, out), Mixtral a matrix for each.
@pytest.mark.parametrize("make", [gpt_oss, mixtral])
def test_adapters_of_experts_give_the_models_back(tmp_path: Path, make: Callable[[], Any]) -> None:
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "base")
    kind = type(make())
    outputs = []
    for i in range(3):
        torch.manual_seed(i + 1)
        config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters)
        own = get_peft_model(kind.from_pretrained(tmp_path / "base"), config)
        with torch.no_grad():
            for name, parameter in own.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
        merged = own.merge_and_unload()
        merged.save_pretrained(tmp_path / f"m{i}")
        outputs.append(logits(merged))
    report = recover_checkpoints([tmp_path / f"m{i}" for i in range(3)], tmp_path / "out", adapters=True)
    batches = [r for r in report.records if "experts" in r["name"] and not r["name"].endswith("bias")]
    assert batches
    assert {record["certainty"] for record in batches} == {"certified"}
    assert "lacks" not in report.card
    for i in range(3):
        base = kind.from_pretrained(tmp_path / "out")
        again = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapters" / f"m{i}"))
        assert torch.allclose(logits(again), outputs[i], atol=1e-5)
        assert not torch.allclose(logits(again), outputs[i - 1], atol=1e-3)
