"""PEFT adapters of every kind to layers, against PEFT's own merge."""

import json

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from lowra.bench.schema import open_dataset, write_dataset
from lowra.builders.peft_adapters import Adapter, checkpoint_names, checkpoint_state, layer_names, lora_layers, skeleton
from lowra.checkpoints.detect import changed_weights
from lowra.errors import LowraError


def tiny_vit():
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config)


def tiny_mistral():
    config = transformers.MistralConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        vocab_size=50,
    )
    return transformers.MistralForCausalLM(config)


FAMILIES = {"vit": (tiny_vit, ["q_proj", "v_proj"]), "mistral": (tiny_mistral, ["q_proj", "k_proj", "v_proj"])}


def save_adapter(base, folder, targets, *, train=True, seed=0, **settings):
    """An adapter with random factors, standing in for a trained one."""
    torch.manual_seed(seed)
    model = getattr(transformers, json.loads((base / "config.json").read_text())["architectures"][0])
    settings = {"r": 4, "lora_alpha": 6, **settings}
    peft = get_peft_model(model.from_pretrained(base), LoraConfig(target_modules=targets, **settings))
    if train:
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    peft.save_pretrained(folder)
    return folder


@pytest.fixture(params=sorted(FAMILIES))
def family(request, tmp_path):
    make, targets = FAMILIES[request.param]
    torch.manual_seed(1)
    make().save_pretrained(tmp_path / "base")
    return tmp_path / "base", targets


SETTINGS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "mixed ranks and alphas": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.*q_proj": 3}},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_layers_equal_pefts_merge(family, tmp_path, settings):
    base, targets = family
    folders = {f"l{i}": save_adapter(base, tmp_path / f"l{i}", targets, seed=i, **settings) for i in range(2)}
    layers = list(lora_layers(base, folders, pre_ft_name="tiny"))
    assert len(layers) == 2 * len(targets)
    stored = load_file(base / "model.safetensors")
    for i, folder in enumerate(folders.values()):
        model = type(skeleton(base)).from_pretrained(base)
        PeftModel.from_pretrained(model, folder).merge_and_unload().save_pretrained(tmp_path / f"merged{i}")
        merged = load_file(tmp_path / f"merged{i}" / "model.safetensors")
        assert set(merged) == set(stored)
        assert changed_weights([stored, merged]) == tuple(sorted(layer.name for layer in layers))
        for layer in layers:
            assert torch.equal(layer.weight, stored[layer.name])
            torch.testing.assert_close(layer.weight + layer.loras[i].delta(), merged[layer.name], atol=1e-6, rtol=0)


def test_layers_come_in_depth_order_and_survive_the_data_set(family, tmp_path):
    base, targets = family
    folders = {f"l{i}": save_adapter(base, tmp_path / f"l{i}", targets, seed=i, r=i + 2) for i in range(2)}
    layers = list(lora_layers(base, folders, pre_ft_name="tiny", model="part"))
    table = open_dataset(write_dataset(iter(layers), tmp_path / "dataset"))
    assert table.model_names == ("l0", "l1")
    assert [info.name for info in table.infos] == [layer.name for layer in layers]
    assert {info.ranks for info in table.infos} == {(2, 3)}
    assert ["1." in layer.name for layer in layers] == sorted("1." in layer.name for layer in layers)
    for i, layer in enumerate(layers):
        assert torch.equal(table.read(i).loras[1].delta(), layer.loras[1].delta())


def test_names_are_traced_through_transformers_saving(tmp_path):
    model = tiny_vit()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    names = checkpoint_names(skeleton(tmp_path))
    assert sorted(names.values()) == sorted(stored)
    assert names["vit.layers.1.attention.q_proj.weight"] == "vit.encoder.layer.1.attention.attention.query.weight"
    memory = model.state_dict()
    assert all(torch.equal(memory[name], stored[names[name]]) for name in memory)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in checkpoint_state(model).items())


def test_adapters_in_the_checkpoints_own_names_are_read(tmp_path):
    """The paper's era saved adapters under the names that are now only on disk."""
    tiny_vit().save_pretrained(tmp_path / "base")
    module = "vit.encoder.layer.0.attention.attention.query"
    assert layer_names(tmp_path / "base", (module,)) == {module: f"{module}.weight"}


def test_unknown_module_is_named(tmp_path):
    tiny_vit().save_pretrained(tmp_path / "base")
    with pytest.raises(LowraError, match=r"Module 'vit\.layers\.7\.attention\.q_proj' .* is not in the base"):
        layer_names(tmp_path / "base", ("vit.layers.7.attention.q_proj",))


def test_untrained_adapter_is_named(family, tmp_path):
    base, targets = family
    folder = save_adapter(base, tmp_path / "lora", targets, train=False)
    with pytest.raises(LowraError, match=r"_proj' .* has B = 0: it was never trained"):
        list(lora_layers(base, {"a": folder}, pre_ft_name="tiny"))


def test_adapters_of_different_modules_are_refused(family, tmp_path):
    base, targets = family
    folders = {n: save_adapter(base, tmp_path / f"l{n}", targets[:n]) for n in (1, 2)}
    with pytest.raises(LowraError, match="adapt different modules"):
        list(lora_layers(base, folders, pre_ft_name="tiny"))


def test_missing_factor_wrong_rank_and_wrong_base_are_named(family, tmp_path):
    base, targets = family
    folder = save_adapter(base, tmp_path / "lora", targets)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    first = next(name for name in tensors if "q_proj.lora_A" in name)

    save_file({name: tensor for name, tensor in tensors.items() if name != first}, path)
    with pytest.raises(LowraError, match=r"Module .*q_proj' of the adapter .* has no lora_A"):
        list(lora_layers(base, {"a": folder}, pre_ft_name="tiny"))
    save_file({**tensors, first: tensors[first][:3].contiguous()}, path)
    with pytest.raises(LowraError, match="configuration says rank 4"):
        list(lora_layers(base, {"a": folder}, pre_ft_name="tiny"))
    save_file({**tensors, first: tensors[first][:, :5].contiguous()}, path)
    with pytest.raises(LowraError, match=r"updates .* by a 16 x 5 matrix; the base weight is 16 x 16"):
        list(lora_layers(base, {"a": folder}, pre_ft_name="tiny"))


def test_folders_that_are_no_adapter(tmp_path):
    with pytest.raises(LowraError, match=r"lacks adapter_config\.json"):
        Adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "BOFT"}')
    with pytest.raises(LowraError, match=r"lacks adapter_model.safetensors"):
        Adapter(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LowraError, match="Unknown PEFT type 'BOFT'; known: FULL, IA3"):
        Adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(
        LowraError, match="holds no tensors of LORA modules; expected keys that end in lora_A or lora_B"
    ):
        Adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(LowraError, match="cannot be read"):
        Adapter(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, r"The rank of module .* is 0; expected a whole number, 1 or more"),
        ({"r": "4"}, r"The rank of module .* is '4'"),
        ({"r": None}, r"The rank of module .* is missing"),
        ({"lora_alpha": "6"}, r"The alpha of module .* is '6'; expected a finite number"),
        ({"lora_alpha": None}, r"The alpha of module .* is missing"),
        ({"lora_alpha": [6]}, r"The alpha of module .* is \[6\]"),
        ({"lora_alpha": 1e300}, r"The alpha of module .* is 1e\+300"),
        ({"lora_alpha": float("nan")}, r"The alpha of module .* is nan"),
        ({"alpha_pattern": {"q_proj": "x"}}, r"The alpha of module .*q_proj.* is 'x'"),
        ({"rank_pattern": 3}, r"rank_pattern of the adapter .* is 3; expected modules and numbers"),
    ],
)
def test_ranks_and_alphas_that_are_none_are_refused_on_opening(tmp_path, changes, message):
    torch.manual_seed(1)
    tiny_mistral().save_pretrained(tmp_path / "base")
    folder = save_adapter(tmp_path / "base", tmp_path / "l0", ["q_proj", "v_proj"])
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(LowraError, match=message):
        Adapter(folder)


def test_rank_stabilised_updates_keep_their_kind_until_they_are_stored(tmp_path):
    torch.manual_seed(1)
    tiny_mistral().save_pretrained(tmp_path / "base")
    folders = {
        f"l{i}": save_adapter(tmp_path / "base", tmp_path / f"l{i}", ["q_proj"], use_rslora=True) for i in (0, 1)
    }
    layers = list(lora_layers(tmp_path / "base", folders, pre_ft_name="tiny"))
    update = layers[0].loras[0]
    assert (update.kind, update.rank, update.alpha, update.scale) == ("rslora", 4, 6, 3.0)
    stored = open_dataset(write_dataset(iter(layers), tmp_path / "dataset")).read(0).loras[0]
    assert (stored.kind, stored.alpha, stored.scale) == ("lora", 12.0, 3.0)
