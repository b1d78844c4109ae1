"""Every kind of PEFT's and LyCORIS' adapters against PEFT's own merge, and against LyCORIS' formulas."""

import json

import pytest
import torch
import transformers
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

from lowra.builders import adapter_kinds
from lowra.builders.adapter_kinds import lycoris_update
from lowra.builders.custom import CustomBuilder
from lowra.builders.peft_adapters import Adapter, lora_layers, skeleton
from lowra.checkpoints.reading import StoredState
from lowra.errors import LowraError

TARGETS = ["q_proj", "fc1", "projection"]  # ViT's square and wide linear layers, and a convolution of 4 x 4 pixels
LINEAR = ["q_proj", "fc1", "fc2"]

# Recipes for PEFT, with the kind that they are read as.
RECIPES = {
    "lora": ("lora", LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS)),
    "rslora": ("rslora", LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=TARGETS)),
    "dora": ("dora", LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=TARGETS)),
    "dora rslora": ("dora", LoraConfig(r=3, lora_alpha=5, use_dora=True, use_rslora=True, target_modules=LINEAR)),
    "pissa": ("lora", LoraConfig(r=3, lora_alpha=5, init_lora_weights="pissa", target_modules=LINEAR)),
    "olora": ("lora", LoraConfig(r=3, lora_alpha=5, init_lora_weights="olora", target_modules=LINEAR)),
    "mica": ("lora", LoraConfig(r=3, lora_alpha=5, init_lora_weights="mica", target_modules=LINEAR)),
    "orthogonal": ("lora", LoraConfig(r=4, lora_alpha=5, init_lora_weights="orthogonal", target_modules=LINEAR)),
    "ia3": ("ia3", IA3Config(target_modules=TARGETS, feedforward_modules=["fc1"])),
    "ia3 inputs": ("ia3", IA3Config(target_modules=TARGETS, feedforward_modules=TARGETS)),
    "loha": ("loha", LoHaConfig(r=3, alpha=5, rank_pattern={"fc1": 2}, target_modules=TARGETS)),
    "loha core": ("loha", LoHaConfig(r=3, alpha=5, use_effective_conv2d=True, target_modules=["projection"])),
    "lokr": ("lokr", LoKrConfig(r=2, alpha=5, alpha_pattern={"q_proj": 3}, target_modules=TARGETS)),
    "lokr both": ("lokr", LoKrConfig(r=1, alpha=3, decompose_both=True, decompose_factor=4, target_modules=TARGETS)),
    "lokr whole": ("lokr", LoKrConfig(r=64, alpha=32, decompose_factor=4, target_modules=TARGETS)),
    "lokr core": ("lokr", LoKrConfig(r=1, alpha=3, use_effective_conv2d=True, target_modules=["projection"])),
    "vera": ("lora", VeraConfig(r=5, target_modules=LINEAR)),
    "vera wide": ("lora", VeraConfig(r=40, target_modules=LINEAR)),
    "oft": ("oft", OFTConfig(oft_block_size=4, target_modules=TARGETS)),
    "oft exact": ("oft", OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=TARGETS)),
    "oft short": ("oft", OFTConfig(oft_block_size=8, num_cayley_neumann_terms=3, target_modules=LINEAR)),
    "oft long": ("oft", OFTConfig(oft_block_size=8, num_cayley_neumann_terms=7, target_modules=LINEAR)),
    "oft bounded": ("oft", OFTConfig(oft_block_size=4, coft=True, eps=0.05, target_modules=LINEAR)),
    "oft shared": ("oft", OFTConfig(oft_block_size=4, block_share=True, target_modules=LINEAR)),
}


def tiny_vit(folder):
    torch.manual_seed(1)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=3,
        initializer_range=0.3,
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return folder


def tiny_gpt2(folder):
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=16, initializer_range=0.3
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def opened(base):
    return type(skeleton(base)).from_pretrained(base)


def save_random(base, folder, config, seed=0, convert=False):
    """An adapter of which every trained number was moved at random, in `folder`, as PEFT saves it."""
    torch.manual_seed(seed)
    peft = get_peft_model(opened(base), config)
    if convert:
        peft.save_pretrained(folder / "start")
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    start = {"path_initial_model_for_weight_conversion": str(folder / "start")} if convert else {}
    peft.save_pretrained(folder, **start)
    return folder


def merged_by_peft(base, folder):
    merged = folder.with_name(f"{folder.name}_merged")
    PeftModel.from_pretrained(opened(base), folder).merge_and_unload().save_pretrained(merged)
    return dict(StoredState(merged))


def assert_equal(ours, theirs, what):
    # Both are float32 chains of a few products and sums: some ulps of the largest entry.
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max(), what


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_kind_is_merged_as_peft_merges_it(tmp_path, recipe):
    kind, config = RECIPES[recipe]
    base = tiny_vit(tmp_path / "base")
    folder = save_random(base, tmp_path / "a", config)
    layers = list(lora_layers(base, {"a": folder}, pre_ft_name="tiny"))
    assert len(layers) == sum(1 if target == "projection" else 2 for target in config.target_modules)
    theirs = merged_by_peft(base, folder)
    for layer in layers:
        (update,) = layer.loras
        assert update.kind == kind
        found = update.apply(layer.weight)
        assert_equal(found, theirs[layer.name].flatten(1), layer.name)
        assert (found - layer.weight).abs().max() > 1e-3
        if kind in ("loha", "lokr"):
            numerical = torch.linalg.matrix_rank(update.delta(torch.float64), rtol=1e-7)
            assert numerical <= update.limit(*layer.weight.shape)
    biases = Adapter(folder).scaled_biases
    assert bool(biases) == (recipe == "ia3")


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_from_the_base_are_read_converted_and_not(tmp_path, start):
    base = tiny_vit(tmp_path / "base")
    _, config = RECIPES[start]
    folders = {name: save_random(base, tmp_path / name, config, convert=name == "b") for name in "ab"}
    assert json.loads((folders["b"] / "adapter_config.json").read_text())["r"] == 6
    theirs = merged_by_peft(base, folders["b"])
    for layer in lora_layers(base, folders, pre_ft_name="tiny"):
        raw, converted = layer.loras
        assert (raw.rank, converted.rank) == (6, 6)
        assert_equal(converted.apply(layer.weight), theirs[layer.name], layer.name)
        assert_equal(raw.apply(layer.weight), theirs[layer.name], layer.name)


CONV1D = {
    "dora": LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "pissa": LoraConfig(r=3, init_lora_weights="pissa", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "ia3": IA3Config(target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"], fan_in_fan_out=True),
    "vera": VeraConfig(r=5, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
}


@pytest.mark.parametrize("recipe", CONV1D)
def test_transposed_layers_too(tmp_path, recipe):
    """GPT-2 stores weights as (in, out); whole checkpoints are compared, (IA)^3's scaled biases among them."""
    base = tiny_gpt2(tmp_path / "base")
    folders = [save_random(base, tmp_path / name, CONV1D[recipe], seed) for seed, name in enumerate("ab")]
    built = CustomBuilder(str(base), [str(folder) for folder in folders], merged=True).build(tmp_path / "built")
    for folder in folders:
        theirs = merged_by_peft(base, folder)
        ours = StoredState(tmp_path / "built" / built.report["merged"] / folder.name)
        assert set(ours) == set(theirs)
        for name in ours:
            assert_equal(ours[name], theirs[name], name)


@pytest.mark.parametrize("recipe", ["dora", "ia3", "loha", "lokr", "oft"])
def test_ones_own_adapters_of_every_kind(tmp_path, recipe):
    base = tiny_vit(tmp_path / "base")
    folder = save_random(base, tmp_path / "a", RECIPES[recipe][1])
    other = save_random(base, tmp_path / "b", RECIPES["lora"][1])
    builder = CustomBuilder(str(base), [str(folder), str(other)], merged=True)
    builder.check()
    built = builder.build(tmp_path / "built")
    theirs = merged_by_peft(base, folder)
    ours = StoredState(tmp_path / "built" / built.report["merged"] / "a")
    for name in theirs:
        assert_equal(ours[name], theirs[name], name)


# ---- Bad input --------------------------------------------------------------------------------------------------


def changed(folder, config=None, **tensors):
    """Change an adapter folder; tensors: what takes a key's place by its ending, None takes it out."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    path = folder / "adapter_model.safetensors"
    stored = load_file(path)
    for ending, tensor in tensors.items():
        for key in [key for key in stored if key.removesuffix(".weight").endswith(ending)]:
            del stored[key]
            if tensor is not None:
                stored[key] = tensor.clone()
    save_file(stored, path)


@pytest.mark.parametrize(
    ("recipe", "config", "tensors", "message"),
    [
        ("dora", {}, {"lora_magnitude_vector": None}, r"Module '.*' .* is DoRA and has no lora_magnitude_vector"),
        ("lora", {"peft_type": "BOFT"}, {}, r"Unknown PEFT type 'BOFT'; known: FULL, IA3, LOHA, LOKR, LORA, OFT, VERA"),
        ("lora", {"init_lora_weights": "corda"}, {}, r"init_lora_weights='corda'.*path_initial_model_for_weight_conv"),
        ("pissa", {"init_lora_weights": "pissa_niter_4"}, {}, r"init_lora_weights='pissa_niter_4'"),
        ("lora", {"use_qalora": True}, {}, r"is a variant of LoRA \(use_qalora\) that is not read"),
        ("dora", {"init_lora_weights": "pissa"}, {}, r"is a DoRA started by 'pissa'"),
        ("oft", {"peft_version": None}, {}, r"OFT adapter .* is of a PEFT before 0\.18"),
        ("loha", {}, {"hada_w2_b": None}, r"lacks hada_w2_b; the file is incomplete"),
        ("lokr", {}, {"lokr_w2_b": None}, r"lacks lokr_w2_b; or lokr_w2 in their place"),
        ("lokr whole", {}, {"lokr_w1": torch.ones(3, 4)}, r"with w1 \(3, 4\), w2 .*, where LoKr has .* p q = d"),
        ("ia3", {}, {"ia3_l": torch.full((7, 1), 2.0)}, r"with scale \(7, 1\), where \(IA\)\^3 has scale \(d, 1\)"),
        ("ia3", {}, {"ia3_l": torch.ones(16, 1)}, r"changes nothing: was it ever trained"),
        ("vera", {}, {"vera_A": None}, r"lacks base_model\.vera_A; save it with save_projection=True"),
        ("loha", {"alpha": None}, {}, r"The alpha of module .* is missing"),
    ],
)
def test_adapters_that_cannot_be_read(tmp_path, recipe, config, tensors, message):
    base = tiny_vit(tmp_path / "base")
    folder = save_random(base, tmp_path / "a", RECIPES[recipe][1])
    changed(folder, config, **tensors)
    with pytest.raises(LowraError, match=message):
        list(lora_layers(base, {"a": folder}, pre_ft_name="tiny"))


# ---- LyCORIS ----------------------------------------------------------------------------------------------------

D, K, R = 12, 8, 3


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


WEIGHT = normal(D, K, seed=5)


def assert_lycoris(parts, alpha, expected, kind):
    update = lycoris_update("x", parts, alpha, "Module 'm' in x.safetensors")
    assert update.kind == kind
    assert update.misfit(D, K) is None
    assert_equal(update.apply(WEIGHT), expected, kind)
    return update


def test_lycoris_loha():
    parts = {f"hada_w{i}_{ab}": normal(*((D, R) if ab == "a" else (R, K)), seed=i) for i in (1, 2) for ab in "ab"}
    product = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    assert_lycoris(parts, 6.0, WEIGHT + 2 * product, "loha")  # alpha / r
    assert_lycoris(parts, None, WEIGHT + product, "loha")


def test_lycoris_lokr_and_its_scale():
    w1, a, b = normal(3, 2), normal(4, 2), normal(2, 4)
    assert_lycoris({"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}, 6.0, WEIGHT + 3 * torch.kron(w1, a @ b), "lokr")
    # Both whole: 1, whatever alpha says; that is the rank then, and the file has no other word of it.
    assert_lycoris({"lokr_w1": w1, "lokr_w2": a @ b}, 6.0, WEIGHT + torch.kron(w1, a @ b), "lokr")
    a1, b1 = normal(3, 1), normal(1, 2)
    both = {"lokr_w1_a": a1, "lokr_w1_b": b1, "lokr_w2": a @ b}
    update = assert_lycoris(both, 0.5, WEIGHT + 0.5 * torch.kron(a1 @ b1, a @ b), "lokr")
    assert update.rank == 4  # rank one times four


def test_lycoris_lokr_of_a_convolution_with_a_core():
    w1, core, a, b = normal(3, 2), normal(2, 2, 3, 3), normal(2, 4), normal(2, 5)
    parts = {"lokr_w1": w1, "lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b}
    update = lycoris_update("x", parts, 2.0, "m")
    w2 = torch.einsum("ijkl,ip,jq->pqkl", core, a, b)
    expected = torch.kron(w1[:, :, None, None], w2.contiguous())  # (12, 10, 3, 3)
    assert_equal(update.delta(), expected.flatten(1), "core")


@pytest.mark.parametrize("on", ["outputs", "inputs"])
def test_lycoris_dora_by_rows_or_columns(on):
    a, b = normal(R, K), normal(D, R)
    moved = WEIGHT + 2 * b @ a
    norms = moved.norm(dim=1 if on == "outputs" else 0, keepdim=True)
    scale = norms * (1 + 0.1 * normal(*norms.shape).abs())
    expected = moved * scale / norms
    assert_lycoris({"A": a, "B": b, "dora_scale": scale}, 6.0, expected, "dora")
    stored = scale[:, :, None, None] if on == "outputs" else scale.reshape(1, K, 1, 1)
    assert_lycoris({"A": a[..., None, None], "B": b[..., None, None], "dora_scale": stored}, 6.0, expected, "dora")


def test_lycoris_rotations_with_bound_and_rescale():
    blocks, rescale = 0.2 * normal(3, 4, 4), 1 + 0.1 * normal(D, 1)

    def rotated(q):
        r = (torch.eye(4) + q) @ torch.linalg.inv(torch.eye(4) - q)
        return torch.einsum("knm,kni->kmi", r, WEIGHT.reshape(3, 4, K)).reshape(D, K)

    q = blocks - blocks.mT
    assert_lycoris({"oft_blocks": blocks}, 0.0, rotated(q), "oft")
    assert_lycoris({"oft_blocks": blocks, "rescale": rescale}, None, rescale * rotated(q), "oft")
    assert_lycoris({"oft_blocks": blocks}, 0.05, rotated(q * 0.05 * D / q.norm()), "oft")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"hada_w1_a": torch.ones(D, R)}, "lacks hada_w1_b, hada_w2_a, hada_w2_b"),
        ({"lokr_w1": torch.ones(3, 2)}, "lacks lokr_w2_a, lokr_w2_b; or lokr_w2"),
        ({"lokr_w1": torch.ones(3, 2), "dora_scale": torch.ones(D, 1)}, "dora_scale with another kind than LoRA"),
        ({"oft_blocks": torch.ones(2, 3, 4, 4)}, "BOFT has four dimensions"),
        (
            {"A": torch.ones(R, K), "B": torch.ones(D, R), "dora_scale": torch.ones(3, 4)},
            r"dora_scale of shape \(3, 4\); expected norms of outputs, \(d, 1\), or of inputs, \(1, k\)",
        ),
    ],
)
def test_lycoris_tensors_that_are_no_modules(parts, message):
    with pytest.raises(LowraError, match=message):
        lycoris_update("x", parts, 1.0, "Module 'm' in x.safetensors")


def test_parts_are_named_once():
    """Every tensor of PEFT's modules of a type that is read is a part, so none is passed over."""
    from peft.tuners.ia3.layer import IA3Layer
    from peft.tuners.loha.layer import LoHaLayer
    from peft.tuners.lokr.layer import LoKrLayer
    from peft.tuners.oft.layer import OFTLayer
    from peft.tuners.vera.layer import VeraLayer

    layers = {"IA3": IA3Layer, "LOHA": LoHaLayer, "LOKR": LoKrLayer, "OFT": OFTLayer, "VERA": VeraLayer}
    for name, layer in layers.items():
        theirs = {part for part in layer.adapter_layer_names if "embedding" not in part}
        assert theirs == set(adapter_kinds.PARTS[name])
