"""Causal language models at tiny size: the mini recipes end to end, and stand-ins in the public formats of rows."""

import dataclasses
import json

import pytest
import torch
from datasets import Dataset
from hydra import compose, initialize_config_dir
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowra.bench.schema import open_dataset
from lowra.builders.base import recipe_key
from lowra.builders.causal_lm import DpoBuilder, Rows, SftBuilder
from lowra.builders.causal_lm_mini import (
    DocumentationChats,
    DocumentationPreferences,
    Miniature,
    MiniMistral,
    documentation,
)
from lowra.builders.kinds import KINDS, Kinds
from lowra.builders.stages import finished
from lowra.checks import make
from lowra.errors import LowraError
from lowra.paths import conf_dir
from lowra.quiet import quiet

BASE = MiniMistral(
    vocab_size=384,
    hidden_size=32,
    intermediate_size=64,
    layers=2,
    heads=4,
    kv_heads=1,
    context=32,
    steps=3,
    batch=4,
    learning_rate=0.01,
    weight_decay=0.1,
    seed=0,
)
TINY = {
    "n_models": 2,
    "rank": 2,
    "alpha": 4,
    "batch": 4,
    "max_length": 96,
    "learning_rate": 0.01,
    "eval_rows": 4,
    "logging_steps": 1,
}


def recipe(name):
    with initialize_config_dir(str(conf_dir()), version_base=None):
        return make(compose(overrides=[f"+builder={name}"]).builder, "builder")


def sft(**changes):
    builder = recipe("mistral_sft_mini")
    small = Miniature(BASE, DocumentationChats(rows=24, seed=0))
    return dataclasses.replace(builder, **TINY | {"miniature": small} | changes)


def sft_on(base, **changes):
    """The stage on a base model and rows of a user's own."""
    return sft(**{"base": base, "data": DocumentationChats(rows=24, seed=0), "miniature": None} | changes)


def dpo(sft_builder, **changes):
    builder = recipe("mistral_dpo_mini")
    data = DocumentationPreferences(rows=16, seed=0)
    settings = TINY | {
        "learning_rate": 0.002,
        "max_prompt_length": 64,
        "max_length": 128,
        "miniature": data,
        "sft": sft_builder,
    }
    return dataclasses.replace(builder, **settings | changes)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def built(cache):
    builder = sft()
    builder.check()
    return builder.build(cache / f"mistral_sft-mini-{recipe_key(builder)}")


@pytest.fixture(scope="module")
def base(built):
    """A base model as a user would have it: a folder."""
    return built.base


def tokenizer_of(base, builder):
    with quiet():
        return builder.tokenizer(base)


def adapters_of(built):
    return sorted(path for path in (built.dataset.parents[1] / "adapters").iterdir() if path.is_dir())


def weights_of(model):
    return {name: value.float() for name, value in model.state_dict().items()}


def true_format(folder, columns, rows):
    """A data set folder as the Hub serves it: parquet files named by split."""
    folder.mkdir(parents=True)
    Dataset.from_dict({column: [row[column] for row in rows] for column in columns}).to_parquet(
        str(folder / "train-00000-of-00001.parquet")
    )
    return Rows(str(folder), "train", None)


def ultrachat(folder, n=20):
    rows = [
        {
            "prompt": f"Say {i}.",
            "prompt_id": str(i),
            "messages": [
                {"content": f"Say {i}.", "role": "user"},
                {"content": f"Here is number {i}, as you asked.", "role": "assistant"},
                {"content": "Thank you!", "role": "user"},
                {"content": "You are welcome.", "role": "assistant"},
            ],
        }
        for i in range(n)
    ]
    return true_format(folder, ["prompt", "prompt_id", "messages"], rows)


def ultrafeedback(folder, n=12):
    def chat(i, answer):
        return [{"content": f"Say {i}.", "role": "user"}, {"content": answer, "role": "assistant"}]

    rows = [
        {
            "prompt": f"Say {i}.",
            "prompt_id": str(i),
            "chosen": chat(i, f"Number {i}."),
            "rejected": chat(i, "No."),
            "messages": chat(i, f"Number {i}."),
            "score_chosen": 8.0,
            "score_rejected": 3.5,
        }
        for i in range(n)
    ]
    return true_format(folder, list(rows[0]), rows)


# ---- The miniature, end to end ------------------------------------------------------------------------------------


def test_mini_sft_is_a_subset_in_the_published_names_and_precision(built):
    table = open_dataset(built.dataset)
    projections = [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(2) for p in "koqv"]
    assert [info.name for info in table.infos] == projections
    assert {(info.d, info.k) for info in table.infos} == {(32, 32), (8, 32)}  # k and v are narrower
    assert table.model_names == ("sft-00", "sft-01")
    for index in range(len(table)):
        layer = table.read(index)
        assert torch.equal(layer.weight, layer.weight.bfloat16().float())
        for lora in layer.loras:
            assert (lora.rank, lora.alpha) == (2, 4.0)
            assert not torch.equal(lora.B, lora.B.bfloat16().float())
        assert not torch.equal(layer.loras[0].A, layer.loras[1].A)
    assert built.report["base"]["loss_last"] < built.report["base"]["loss_first"]
    assert built.report["sft"]["after"]["loss"] < built.report["sft"]["before"]["loss"]
    assert len(json.loads((built.evaluation / "prompts.json").read_text())) == 100


def test_rows_of_the_data_set_merge_as_peft_merges(built):
    table = open_dataset(built.dataset)
    layers = [table.read(index) for index in range(len(table))]
    for i, adapter in enumerate(adapters_of(built)):
        model = AutoModelForCausalLM.from_pretrained(built.base, dtype=torch.float32)
        merged = weights_of(PeftModel.from_pretrained(model, str(adapter)).merge_and_unload())
        for layer in layers:
            ours = layer.weight + layer.loras[i].delta()
            assert (ours - layer.weight).abs().max() > 1e-4
            torch.testing.assert_close(ours, merged[layer.name], rtol=0, atol=1e-6)


LEAVES = {
    "rslora": "lora",
    "pissa": "lora",
    "mica": "lora",
    "vera": "lora",
}  # as what a kind is stored, if not as itself


@pytest.mark.parametrize("kind", KINDS[1:])
def test_every_kind_is_fine_tuned_on_the_same_base(cache, built, kind):
    builder = sft(kind=kind)
    builder.check()
    own = builder.build(cache / f"mistral_sft-mini-{recipe_key(builder)}")
    assert own.base == built.base
    assert own.report["base"] == built.report["base"]
    assert own.report["sft"]["after"]["loss"] < own.report["sft"]["before"]["loss"]
    table = open_dataset(own.dataset)
    assert [info.name for info in table.infos] == [info.name for info in open_dataset(built.dataset).infos]
    merged = []
    for adapter in adapters_of(own) if kind != "full" else []:
        model = AutoModelForCausalLM.from_pretrained(own.base, dtype=torch.float32)
        merged.append(weights_of(PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()))
    for index in range(len(table)):
        layer = table.read(index)
        for i, update in enumerate(layer.loras):
            assert update.kind == LEAVES.get(kind, kind)
            ours = update.apply(layer.weight)
            assert (ours - layer.weight).abs().max() > 1e-5
            if merged:
                torch.testing.assert_close(ours, merged[i][layer.name], rtol=0, atol=1e-6)


def test_settings_of_kinds_that_cannot_be(cache):
    with pytest.raises(LowraError, match=r"builder\.kind is 'boft'; expected one of lora, rslora"):
        sft(kind="boft").check()
    with pytest.raises(LowraError, match=r"builder\.kind=oft needs a size"):
        sft(kind="oft", kinds=Kinds()).check()
    with pytest.raises(LowraError, match=r"builder\.sft\.kind is dora; DPO continues SFT models that are LoRAs"):
        dpo(sft(kind="dora")).check()


def test_a_finished_subset_is_not_built_again(built, monkeypatch):
    monkeypatch.setattr("trl.SFTTrainer.__init__", None)
    again = sft().build(built.dataset.parents[1])
    assert again == built


@pytest.mark.parametrize("continues", ["merged_sft", "sft_adapter", "base"])
def test_dpo_builds_on_the_sft_stage_beside_it(cache, built, continues, monkeypatch):
    monkeypatch.setattr("trl.SFTTrainer.__init__", None)  # the SFT stage is there: it must not be trained again
    builder = dpo(sft(), continues=continues)
    builder.check()
    result = builder.build(cache / f"mistral_dpo-mini-{recipe_key(builder)}")
    assert result.base == built.base
    table, before = open_dataset(result.dataset), open_dataset(built.dataset)
    assert table.model_names == ("dpo-00", "dpo-01")
    for index in range(len(table)):
        layer, start = table.read(index), before.read(index)
        assert torch.equal(layer.weight, start.weight)
        for lora, old in zip(layer.loras, start.loras, strict=True):
            assert lora.rank == 2
            # Only a continued adapter stays near the one it came from; a fresh one starts at B = 0. (A starts the
            # same in both stages: it is drawn with the model's seed.)
            near = (lora.B - old.B).norm() < 0.5 * old.B.norm()
            assert bool(near) == (continues == "sft_adapter")
            assert not torch.equal(lora.A, old.A)
    # What is left in an adapter's folder is the adapter: no reference copy, no checkpoints.
    assert all(not any(path.is_dir() for path in adapter.iterdir()) for adapter in adapters_of(result))
    assert result.report["dpo"]["after"]["rewards/margins"] != 0
    assert result.report["dpo"]["before"]["rewards/margins"] == pytest.approx(0, abs=1e-6)


def test_merged_sft_differs_from_base_as_the_start_of_dpo(base, built):
    builder = dpo(sft())
    tokenizer = tokenizer_of(base, builder.sft)
    with quiet():
        model = PeftModel.from_pretrained(builder._model(base), str(adapters_of(built)[0])).merge_and_unload()
    changed = [n for n, w in weights_of(builder._model(base)).items() if not torch.equal(w, weights_of(model)[n])]
    assert len(changed) == 8
    assert tokenizer.pad_token == "</s>"


# ---- Texts --------------------------------------------------------------------------------------------------------


def test_chats_are_rendered_as_the_handbook_renders_them(base):
    builder = recipe("mistral_sft_build")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = builder.chat_template
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}]
    assert builder.render(tokenizer, chat) == "<|system|>\n</s>\n<|user|>\nhi</s>\n<|assistant|>\nok</s>\n"
    own = [{"role": "system", "content": "Be brief."}, *chat]
    assert builder.render(tokenizer, own).startswith("<|system|>\nBe brief.</s>\n<|user|>\n")
    bare = dataclasses.replace(builder, system=None)
    assert bare.render(tokenizer, chat).startswith("<|user|>\n")


def test_sft_tokens_are_bos_text_eos_and_all_count(base):
    builder = sft()
    tokenizer = tokenizer_of(base, builder)
    rows = builder._tokens(tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for row in rows:
        assert row["input_ids"][0] == bos
        assert row["input_ids"][-1] == eos
        assert row["input_ids"].count(bos) == 1
        assert row["labels"] == row["input_ids"]
        assert row["input_ids"].count(eos) == 1 + 5  # the end, and one a message


def test_each_model_has_its_own_share_of_the_rows(base):
    builder = sft()
    rows = Dataset.from_dict({"x": list(range(100))})
    shares = [builder._split(rows, seed) for seed in (0, 1, 0)]
    assert [len(train) for train, _ in shares] == [80] * 3
    assert [len(held_out) for _, held_out in shares] == [4] * 3
    assert set(shares[0][0]["x"]) == set(shares[2][0]["x"]) != set(shares[1][0]["x"])
    assert not set(shares[0][0]["x"]) & set(shares[0][1]["x"])


def test_preference_pairs_split_into_prompt_and_answers(base, tmp_path):
    builder = dpo(sft(), data=ultrafeedback(tmp_path / "feedback"), miniature=None)
    pair = builder._pairs(tokenizer_of(base, builder.sft))[3]
    assert pair == {
        "prompt": "<|system|>\n</s>\n<|user|>\nSay 3.</s>\n",
        "chosen": "<|assistant|>\nNumber 3.</s>\n",
        "rejected": "<|assistant|>\nNo.</s>\n",
    }


def test_long_prompts_keep_their_end(base):
    builder = dpo(sft(), max_length=40, max_prompt_length=12)
    tokenizer = tokenizer_of(base, builder.sft)
    whole = dataclasses.replace(builder, max_length=10_000)._pairs(tokenizer)
    for cut, full in zip(builder._pairs(tokenizer), whole, strict=True):
        assert full["prompt"].endswith(cut["prompt"])
        assert len(tokenizer(cut["prompt"], add_special_tokens=False)["input_ids"]) == 12
        assert cut["chosen"] == full["chosen"]


def test_rejected_answers_of_the_miniature_have_the_words_of_the_chosen_ones():
    for row in DocumentationPreferences(rows=20, seed=1).load():
        chosen, rejected = row["chosen"][-1]["content"], row["rejected"][-1]["content"]
        assert sorted(chosen.split()) == sorted(rejected.split())
        assert row["chosen"][0] == row["rejected"][0] == {"role": "user", "content": row["prompt"]}


# ---- Full size, on stand-ins --------------------------------------------------------------------------------------


def test_full_size_recipe_on_rows_in_the_public_formats(base, tmp_path):
    small = {"n_models": 1, "rank": 2, "alpha": 2, "epochs": 2, "eval_rows": 0}
    small |= {"batch": 2, "accumulation": 2, "max_length": 64, "gradient_checkpointing": True, "learning_rate": 0.01}
    first = dataclasses.replace(recipe("mistral_sft_build"), **small, base=base, data=ultrachat(tmp_path / "chat"))
    data = ultrafeedback(tmp_path / "feedback")
    builder = dataclasses.replace(recipe("mistral_dpo_build"), **small, data=data, sft=first, max_prompt_length=40)
    builder = dataclasses.replace(builder, n_models=2, models=[1], sft=dataclasses.replace(first, n_models=2))
    builder.check()
    folder = tmp_path / f"mistral_dpo-build-{recipe_key(builder)}"
    with pytest.raises(LowraError, match=r"1 of 2 models are built in .*Still to build: dpo-00"):
        builder.build(folder)
    # The models a cluster's jobs build are one subset, and the last job writes it.
    other, whole = (dataclasses.replace(builder, models=models) for models in ([0], None))
    assert recipe_key(builder) == recipe_key(other) == recipe_key(whole)
    result = other.build(folder)
    assert whole.build(folder) == result
    assert (result.base, result.evaluation) == (base, None)
    layer = open_dataset(result.dataset).read(0)
    assert layer.name == "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(layer.weight, layer.weight.bfloat16().float())
    assert not torch.equal(layer.loras[0].B, layer.loras[0].B.bfloat16().float())  # adapters train in float32
    stage_before = tmp_path / f"mistral_sft-build-{recipe_key(whole.sft)}" / "adapters"
    assert sorted(path.name for path in stage_before.iterdir()) == ["00", "01"]


def test_a_model_does_not_depend_on_what_was_built_before_it(base, built, tmp_path):
    torch.manual_seed(5)
    (adapter,) = sft_on(base, models=[1]).adapters(tmp_path / "x")
    alone, among = (load_file(path / "adapter_model.safetensors") for path in (adapter, adapters_of(built)[1]))
    assert all(torch.equal(alone[name], among[name]) for name in among)


def test_a_killed_build_resumes_from_its_checkpoint(base, tmp_path, monkeypatch):
    from trl import SFTTrainer

    builder = sft_on(base, models=[0], save_steps=1, eval_rows=0)
    steps = []
    step = SFTTrainer.training_step

    def killed_at_third(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "training_step", killed_at_third)
    with pytest.raises(KeyboardInterrupt):
        builder.adapters(tmp_path / "x")
    assert steps == [0, 1, 2]
    (adapter,) = builder.adapters(tmp_path / "x")
    report = finished(adapter)
    assert steps == [0, 1, 2, *range(2, report["steps"])]
    assert not (adapter / "checkpoints").exists()


# ---- Bad input ----------------------------------------------------------------------------------------------------


def test_missing_base(tmp_path):
    with pytest.raises(LowraError, match=r"not a model with its tokenizer.*builder\.base=FOLDER.*source=mini"):
        sft_on(str(tmp_path)).check()


def test_tokenizer_without_chat_template(base):
    with pytest.raises(LowraError, match=r"no chat template; give builder\.chat_template"):
        sft_on(base, chat_template=None).check()
    with pytest.raises(LowraError, match=r"miniature's tokenizer has no chat template"):
        dpo(sft(chat_template=None)).check()


def test_rows_without_the_needed_columns(base, tmp_path):
    feedback, chat = ultrafeedback(tmp_path / "feedback"), ultrachat(tmp_path / "chat")
    with pytest.raises(LowraError, match=r"lacks column chosen, rejected; it has prompt, prompt_id, messages"):
        dpo(sft(), data=chat, miniature=None).check()
    plain = true_format(tmp_path / "plain", ["messages"], [{"messages": "hello"}] * 5)
    with pytest.raises(LowraError, match=r"'messages' of the training data does not hold messages but 'hello'"):
        sft_on(base, data=plain).check()
    with pytest.raises(LowraError, match=r"Cannot load split 'train_sft'.*builder\.data\.path=FOLDER"):
        sft_on(base, data=dataclasses.replace(feedback, split="train_sft")).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"continues": "dpo"}, r"continues is 'dpo'; expected one of base, merged_sft, sft_adapter"),
        ({"models": [0, 2]}, r"models=\[0, 2\].*0 to 1"),
        ({"models": []}, r"models is \[\]; expected a list \(each a whole number\), not empty or null"),
        ({"dtype": "int8"}, r"dtype is 'int8'; expected one of bfloat16, float16, float32"),
        ({"fraction": 0}, r"fraction is 0; expected a number, above 0 and at most 1"),
        ({"learning_rate": -1}, r"builder.learning_rate is -1; expected a number, above 0"),
        ({"learning_rate": "abc"}, r"builder.learning_rate is 'abc'; expected a number, above 0"),
        ({"batch": 0}, r"builder.batch is 0; expected a whole number, at least 1"),
        ({"targets": []}, r"builder.targets is \[\]; expected a list"),
        ({"targets": ["query"]}, r"Unknown module in builder.targets 'query'; known: down_proj, gate_proj, k_proj"),
        ({"rank": 9}, r"builder.rank is 9; the narrowest of builder.targets holds 1 to 8"),
        ({"loss": "logistic"}, r"builder.loss is 'logistic'; expected one of sigmoid"),
        ({"optimizer": "adam"}, r"Unknown builder.optimizer 'adam'; known: .*adamw_torch"),
        ({"scheduler": "cosinus"}, r"Unknown builder.scheduler 'cosinus'; known: .*cosine"),
        ({"data": DocumentationChats(3, 0)}, r"builder.data and builder.miniature are both given"),
        ({"max_prompt_length": 128}, r"no room for answers"),
        ({"continues": "sft_adapter", "rank": 3}, r"must be the same"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(LowraError, match=message):
        dpo(sft(), **changes).check()


def test_several_visible_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(LowraError, match=r"4 GPUs are visible.*CUDA_VISIBLE_DEVICES"):
        sft().check()


def test_more_rows_than_the_standard_library_has():
    with pytest.raises(LowraError, match=f"1000000 rows.*{len(documentation())} names"):
        DocumentationChats(rows=1_000_000, seed=0).load()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mistral_sft_mini", SftBuilder),
        ("mistral_sft_build", SftBuilder),
        ("mistral_dpo_mini", DpoBuilder),
        ("mistral_dpo_build", DpoBuilder),
    ],
)
def test_recipes_are_complete(name, kind):
    builder = recipe(name)
    assert isinstance(builder, kind)
    assert builder.n_models == 15
    # Rank over width is the same in miniature.
    if isinstance(builder, SftBuilder) and builder.miniature is not None:
        sizes = builder.miniature.model
        assert builder.rank / sizes.hidden_size == 64 / 4096
        assert sizes.heads // sizes.kv_heads == 32 // 8


def test_a_base_of_ones_own_is_taken_or_refused_never_ignored(base):
    local = dataclasses.replace(recipe("mistral_dpo_build"), sft=dataclasses.replace(sft_on(base)))
    assert local.base == base  # what the run and its metrics ask for
    with pytest.raises(LowraError, match=r"builder.base and builder.data are for builds from a given model"):
        dpo(sft(base="/local")).check()
