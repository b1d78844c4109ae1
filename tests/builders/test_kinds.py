"""Kinds of fine-tuning: PEFT's configuration of each, and whole weights without PEFT."""

import dataclasses

import pytest
import torch
import transformers

from lowra.builders.kinds import KINDS, Kinds, Settings, Tuning, save_difference, target_modules, weights_of
from lowra.builders.peft_adapters import Adapter, lora_layers
from lowra.checkpoints.reading import StoredState
from lowra.errors import LowraError

TUNING = Tuning("lora", 3, 5.0, 0.1, ("q_proj", "fc2"), size=4, heads=("classifier",))


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def opened(base):
    return transformers.ViTForImageClassification.from_pretrained(base)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "full"])
def test_every_kind_starts_as_the_base_and_trains_nothing_else(base, kind):
    tuning = dataclasses.replace(TUNING, kind=kind)
    tuning.check(16)
    model = tuning.wrap(opened(base))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("q_proj" in name or "fc2" in name or "classifier" in name for name in trained)
    assert any("classifier" in name for name in trained)
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        # PiSSA takes the base apart and adds it up again; the others begin with a change of exactly nothing.
        torch.testing.assert_close(model.eval()(pixels).logits, opened(base).eval()(pixels).logits, atol=1e-5, rtol=0)


def test_whole_weights_are_trained_alone_and_stored_as_a_difference(base, tmp_path):
    tuning = dataclasses.replace(TUNING, kind="full")
    model = tuning.wrap(opened(base))
    before = weights_of(model, tuning.targets)
    assert set(before) == set(target_modules(model, tuning.targets))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(trained) == {f"{name}.weight" for name in before} | {"classifier.weight", "classifier.bias"}
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 0.1 * torch.randn_like(parameter)
    save_difference(model, before, tmp_path / "a", tuning.heads)
    assert Adapter(tmp_path / "a").modules == tuple(before)
    model.save_pretrained(tmp_path / "trained")
    merged = StoredState(tmp_path / "trained")
    for layer in lora_layers(base, {"a": tmp_path / "a"}, pre_ft_name="tiny"):
        # W + (W' - W) in float32: an ulp of the larger.
        torch.testing.assert_close(layer.loras[0].apply(layer.weight), merged[layer.name], atol=1e-7, rtol=0)


def test_sizes_that_a_kind_cannot_have():
    assert Kinds().of("vera") == Settings()
    for kind in ("oft", "lokr"):
        with pytest.raises(LowraError, match=rf"builder\.kind={kind} needs a size"):
            dataclasses.replace(TUNING, kind=kind, size=None).check(16)
    with pytest.raises(LowraError, match=r"kinds\.oft\.size is 4; its blocks must divide the 18 inputs"):
        dataclasses.replace(TUNING, kind="oft").check(18)
