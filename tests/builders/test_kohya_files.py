"""LoRA files: every spelling, alphas, and refusals. The second oracle is diffusers' own loader."""

import json
import re

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from lowra.bench.updates import Update
from lowra.builders.kohya_files import LoraFile, expected_modules, modules_of, write_kohya
from lowra.builders.stable_diffusion_mini import make_tokenizer
from lowra.errors import LowraError

RANK = 3
SD15_UNET = {
    "cross_attention_dim": 768,
    "block_out_channels": [320, 640, 1280, 1280],
    "attention_head_dim": 8,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SD15_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 49408,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Stable Diffusion pipeline in diffusers' folder format."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(["a red circle"])
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=16,
            )
        ),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        ),
        scheduler=PNDMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def modules(base):
    return expected_modules(base)


def make_factors(modules, alpha=lambda module: 1.5, rank=RANK):
    generator = torch.Generator().manual_seed(1)
    return {
        module: Update(
            "lora",
            rank,
            alpha(module),
            torch.randn(rank, module.shape[1], generator=generator),
            torch.randn(module.shape[0], rank, generator=generator),
        )
        for module in modules
    }


def assert_reads(path, modules, factors):
    file = LoraFile(path, modules)
    assert file.modules == tuple(modules)
    assert file.untrained == ()
    for module, lora in factors.items():
        read = file.read(module)
        torch.testing.assert_close(read.A, lora.A)
        torch.testing.assert_close(read.B, lora.B)
        assert read.lora_alpha == pytest.approx(lora.alpha)


def test_stable_diffusion_15_has_264_modules():
    modules = modules_of(SD15_UNET, SD15_TEXT)
    assert len(modules) == 264
    assert sum(module.component == "unet" for module in modules) == 192
    assert len({module.kohya_name for module in modules}) == 264
    shapes = [module.shape for module in modules]
    counts = {shape: shapes.count(shape) for shape in set(shapes)}
    expected = {(768, 768): 48, (3072, 768): 12, (768, 3072): 12}
    for width, blocks in ((320, 5), (640, 5), (1280, 6)):
        expected[width, width] = 6 * blocks
        expected[width, width, 1, 1] = 2 * blocks
        expected[width, 768] = 2 * blocks
        expected[8 * width, width] = blocks
        expected[width, 4 * width] = blocks
    assert counts == expected
    names = {module.kohya_name: module.layer_name for module in modules}
    assert (
        names["lora_te_text_model_encoder_layers_11_self_attn_out_proj"]
        == "text_model.encoder.layers.11.self_attn.out_proj.weight"
    )
    assert (
        names["lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn1_to_out_0"]
        == "up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_out.0.weight"
    )


def test_kohya_round_trip_with_mixed_alphas_and_ranks(modules, tmp_path):
    factors = make_factors(modules, alpha=lambda module: 0.5 + len(module.path) % 4)
    small = make_factors(modules[:5], rank=2)
    write_kohya(tmp_path / "lora.safetensors", factors | small, torch.float32)
    assert_reads(tmp_path / "lora.safetensors", modules, factors | small)


def test_float16_and_convolution_layout(modules, tmp_path):
    write_kohya(tmp_path / "lora.safetensors", make_factors(modules))
    stored = load_file(tmp_path / "lora.safetensors")
    assert stored["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"].shape == (RANK, 16, 1, 1)
    assert stored["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"].shape == (16, RANK, 1, 1)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    file = LoraFile(tmp_path / "lora.safetensors", modules)
    conv = next(module for module in modules if module.path.endswith("proj_in"))
    assert file.read(conv).A.shape == (RANK, 16)
    assert file.read(conv).A.dtype == torch.float32


def test_without_alpha_the_scale_is_one(modules, tmp_path):
    factors = make_factors(modules, alpha=lambda module: RANK)
    write_kohya(tmp_path / "full.safetensors", factors, torch.float32)
    stored = {k: v for k, v in load_file(tmp_path / "full.safetensors").items() if not k.endswith(".alpha")}
    save_file(stored, tmp_path / "lora.safetensors")
    assert_reads(tmp_path / "lora.safetensors", modules, factors)


def respell(path, style):
    """A kohya-independent spelling of (component, path) in front of the factor's suffix, and both suffixes."""
    component, inside = path
    text = component == "text_encoder"
    if style == "processor":
        inside = re.sub(r"attn(\d)\.to_", r"attn\1.processor.to_", inside).replace("to_out.0", "to_out")
        inside = re.sub(r"self_attn\.(q|k|v|out)_proj", r"self_attn.to_\1", inside)
        suffix = "_lora" if re.search(r"\.to_\w+$", inside) else ".lora_linear_layer" if text else ".lora"
        return f"{component}.{'text_model.' if text else ''}{inside}{suffix}", "down.weight", "up.weight"
    if style == "bare":
        inside = inside.replace("to_out.0", "to_out")
        suffix = "_lora" if re.search(r"\.to_\w+$", inside) else ".lora"
        return f"{'text_model.' if text else ''}{inside}{suffix}", "down.weight", "up.weight"
    if style == "later":
        return f"{component}.{inside}.lora", "down.weight", "up.weight"
    if style == "peft":
        return f"{component}.{'text_model.' if text else ''}{inside}", "lora_A.weight", "lora_B.weight"
    return f"{component}.base_model.model.{inside}", "lora_A.default.weight", "lora_B.default.weight"


@pytest.mark.parametrize("style", ["processor", "bare", "later", "peft", "wrapped"])
def test_spellings(modules, tmp_path, style):
    factors = make_factors(modules, alpha=lambda module: RANK)
    stored = {}
    for module, lora in factors.items():
        name, down, up = respell((module.component, module.path), style)
        kernel = module.shape[2:]
        stored[f"{name}.{down}"] = lora.A.reshape(*lora.A.shape, *kernel)
        stored[f"{name}.{up}"] = lora.B.reshape(*lora.B.shape, *kernel)
    save_file(stored, tmp_path / "lora.safetensors")
    assert_reads(tmp_path / "lora.safetensors", modules, factors)


def test_lora_te1_prefix(modules, tmp_path):
    factors = make_factors(modules)
    write_kohya(tmp_path / "te.safetensors", factors, torch.float32)
    stored = {k.replace("lora_te_", "lora_te1_"): v for k, v in load_file(tmp_path / "te.safetensors").items()}
    save_file(stored, tmp_path / "lora.safetensors")
    assert_reads(tmp_path / "lora.safetensors", modules, factors)


def peft_keys(factors, prefix=True):
    return {
        f"{m.component if prefix else 'base_model.model'}.{m.path}.lora_{part}.weight": getattr(lora, part).clone()
        for m, lora in factors.items()
        for part in "AB"
    }


def test_alpha_from_the_header_that_diffusers_writes(modules, tmp_path):
    settings = {
        "unet.lora_alpha": 2,
        "unet.alpha_pattern": {"to_q": 5},
        "text_encoder.lora_alpha": 7,
        "text_encoder.use_rslora": True,
    }

    def alpha(module):
        if module.component == "text_encoder":
            return 7 * RANK**0.5
        return 5 if module.path.endswith("to_q") else 2

    factors = make_factors(modules, alpha)
    path = tmp_path / "lora.safetensors"
    save_file(peft_keys(factors), path, metadata={"lora_adapter_metadata": json.dumps(settings)})
    assert_reads(path, modules, factors)


def test_peft_adapter_needs_its_config(modules, tmp_path):
    unet = [module for module in modules if module.component == "unet"]
    factors = make_factors(unet, alpha=lambda module: 6)
    path = tmp_path / "adapter_model.safetensors"
    save_file(peft_keys(factors, prefix=False), path)
    with pytest.raises(LowraError, match=r"adapter_config\.json"):
        LoraFile(path, unet)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6, "r": RANK}))
    assert_reads(path, unet, factors)


def test_agrees_with_diffusers(base, modules, tmp_path):
    # diffusers is right where each component has one alpha; ours is checked against it there.
    factors = make_factors(modules, alpha=lambda module: 1.5 if module.component == "unet" else 2.0)
    write_kohya(tmp_path / "lora.safetensors", factors, torch.float32)
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    before = {c: dict(getattr(pipeline, c).state_dict()) for c in ("unet", "text_encoder")}
    before = {c: {name: w.clone() for name, w in state.items()} for c, state in before.items()}
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    pipeline.fuse_lora(lora_scale=1.0)
    pipeline.unload_lora_weights()
    file = LoraFile(tmp_path / "lora.safetensors", modules)
    for module in modules:
        name = f"{module.path}.weight"
        state = getattr(pipeline, module.component).state_dict()
        theirs = (state[name].double() - before[module.component][name].double()).flatten(1)
        lora = file.read(module)
        ours = lora.alpha / RANK * (lora.B.double() @ lora.A.double())
        assert (theirs - ours).norm() <= 1e-6 * ours.norm(), module.path


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", r"twice, as LoHa and LoRA"),
        ("lora_unet_mid_block_attentions_0_proj_in.lokr_w1", r"twice, as LoKr and LoRA"),
        ("lora_unet_mid_block_attentions_0_proj_in.dora_scale", r"magnitude \(1, 1\), where DoRA has"),
        ("lora_unet_mid_block_attentions_0_proj_in.diff", r"a full weight difference"),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_mid.weight", r"Tucker"),
        ("lora_unet_mid_block_attentions_0_proj_in.something", r"not a key of a LoRA"),
        ("lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight", r"resnets_0_conv1.*not among the base model's 60"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha", r"lora_te2_text.*SDXL"),
        ("lora_unet_input_blocks_4_1_proj_in.lora_up.weight", r"input_blocks_4_1.*SDXL"),
    ],
)
def test_foreign_keys_are_refused_by_name(modules, tmp_path, key, message):
    write_kohya(tmp_path / "good.safetensors", make_factors(modules))
    save_file(load_file(tmp_path / "good.safetensors") | {key: torch.ones(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(LowraError, match=message) as caught:
        LoraFile(tmp_path / "lora.safetensors", modules)
    assert key.split(".")[0] in str(caught.value)


def lycoris_parts(kind, d, k, kernel):
    """Random tensors of a module of one of LyCORIS' kinds; widths are multiples of 4."""
    generator = torch.Generator().manual_seed(d + k)

    def normal(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    match kind:
        case "loha":
            return {f"hada_w{i}_{ab}": normal(*((d, 2) if ab == "a" else (2, k))) for i in (1, 2) for ab in "ab"}
        case "lokr":
            return {"lokr_w1": normal(4, 2), "lokr_w2": normal(d // 4, k // 2, *kernel)}
        case "oft":
            return {"oft_blocks": normal(d // 4, 4, 4)}
    factors = {"lora_down.weight": normal(2, k, *kernel), "lora_up.weight": normal(d, 2, *kernel)}
    return factors | {"dora_scale": 1 + normal(d, 1, *kernel).abs()}


def write_lycoris(path, modules, kind, **changes):
    stored = {}
    for module in modules:
        parts = lycoris_parts(kind, *module.shape[:2], module.shape[2:]) | {"alpha": torch.tensor(0.0)}
        stored |= {f"{module.kohya_name}.{name}": tensor for name, tensor in parts.items()}
    save_file({key: tensor for key, tensor in (stored | changes).items() if tensor is not None}, path)
    return path


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr", "oft"])
def test_lycoris_files_are_read_module_by_module(modules, tmp_path, kind):
    path = write_lycoris(tmp_path / "x.safetensors", modules, kind)
    if kind in ("dora", "loha"):  # an alpha of 0 is a scale of 0; LoKr's factors are whole, OFT's is a bound
        assert {LoraFile(path, modules).read(module).scale for module in modules} <= {0.0, 1.0}
        path = write_lycoris(
            path, modules, kind, **{f"{module.kohya_name}.alpha": torch.tensor(3.0) for module in modules}
        )
    file = LoraFile(path, modules)
    assert file.modules == tuple(modules)
    assert file.untrained == ()
    for module in modules:
        update = file.read(module)
        d, k = module.shape[:2]
        assert (update.kind, update.name, update.misfit(d, k)) == (kind, "x", None)
        parts = lycoris_parts(kind, d, k, module.shape[2:])
        if kind == "dora":
            assert update.scale == 1.5
            assert torch.equal(update.tensors["magnitude"], parts["dora_scale"].reshape(d, 1))
        if kind == "lokr":
            assert torch.equal(update.delta(), torch.kron(parts["lokr_w1"], parts["lokr_w2"].flatten(1)))
        if kind == "loha":
            product = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
            torch.testing.assert_close(update.delta(), 1.5 * product)
        if kind == "oft":
            weight = torch.eye(d, k)
            gram = update.apply(weight).mT @ update.apply(weight)
            torch.testing.assert_close(gram, weight.mT @ weight)


@pytest.mark.parametrize(
    ("kind", "part", "tensor", "message"),
    [
        ("lokr", "lokr_w1", torch.ones(3, 2), r"another architecture: it updates module '.*' with w1 \(3, 2\), w2"),
        ("lokr", "lokr_w2", None, r"Module '.*' in x.safetensors lacks lokr_w2_a, lokr_w2_b"),
        ("loha", "hada_w1_a", torch.full((16, 2), torch.nan), "NaN or infinite values"),
        ("dora", "lora_up.weight", None, r"lacks lora_up \(B\)"),
        ("oft", "oft_blocks", torch.ones(2, 2, 2, 2), "BOFT"),
    ],
)
def test_lycoris_files_that_do_not_fit(modules, tmp_path, kind, part, tensor, message):
    module = next(module for module in modules if module.shape[:2] == (16, 16))
    path = write_lycoris(tmp_path / "x.safetensors", modules, kind, **{f"{module.kohya_name}.{part}": tensor})
    with pytest.raises(LowraError, match=message):
        LoraFile(path, modules)


def test_dora_of_peft_needs_its_magnitudes(modules, tmp_path):
    unet = [module for module in modules if module.component == "unet"]
    stored = peft_keys(make_factors(unet, alpha=lambda module: 6), prefix=False)
    path = tmp_path / "adapter_model.safetensors"
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6, "r": RANK, "use_dora": True}))
    save_file(stored, path)
    with pytest.raises(LowraError, match="is DoRA and lacks the magnitudes"):
        LoraFile(path, unet)
    norms = {f"base_model.model.{m.path}.lora_magnitude_vector": torch.full((m.shape[0],), 2.0) for m in unet}
    save_file(stored | norms, path)
    update = LoraFile(path, unet).read(unet[0])
    assert (update.kind, update.scale) == ("dora", 2.0)
    torch.testing.assert_close(update.apply(torch.ones(16, 16)).norm(dim=1), torch.full((16,), 2.0))


def test_other_shapes_half_modules_and_duplicates_are_refused(modules, tmp_path):
    write_kohya(tmp_path / "good.safetensors", make_factors(modules))
    good = load_file(tmp_path / "good.safetensors")
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    path = tmp_path / "lora.safetensors"
    for change, message in (
        ({f"{name}.lora_down.weight": torch.ones(RANK, 99)}, rf"another architecture: module '{name}'.*\(3, 99\)"),
        ({f"{name}.lora_up.weight": torch.ones(16, RANK + 1)}, rf"another architecture: module '{name}'"),
        ({f"{name}.lora_up.weight": None}, rf"lacks lora_up \(B\) of module '{name}'"),
        ({f"unet.{modules[0].path}.lora_A.weight": torch.ones(RANK, 16)}, r"holds module .* twice"),
        ({f"{name}.lora_up.weight": torch.full((16, RANK), torch.nan)}, r"NaN or infinite values"),
    ):
        save_file({k: v for k, v in (good | change).items() if v is not None}, path)
        with pytest.raises(LowraError, match=message):
            LoraFile(path, modules)


def test_unreadable_files_are_refused(modules, tmp_path):
    (tmp_path / "lora.pt").write_bytes(b"PK pickle")
    with pytest.raises(LowraError, match="only safetensors are read"):
        LoraFile(tmp_path / "lora.pt", modules)
    with pytest.raises(LowraError, match="does not exist"):
        LoraFile(tmp_path / "none.safetensors", modules)


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (torch.tensor(float("nan")), "is nan; expected a finite number"),
        (torch.tensor(float("inf")), "is inf; expected a finite number"),
        (torch.tensor(1e300, dtype=torch.float64), r"is 1e\+300; expected a finite number"),
        (torch.tensor([1.0, 2.0]), r"is \[1.0, 2.0\]; expected a finite number"),
        (torch.tensor(True), "is True; expected a finite number"),
    ],
)
def test_alphas_that_are_none_are_refused_on_opening(modules, tmp_path, alpha, message):
    write_kohya(tmp_path / "good.safetensors", make_factors(modules))
    stored = load_file(tmp_path / "good.safetensors")
    stored[f"{modules[2].kohya_name}.alpha"] = alpha
    save_file(stored, tmp_path / "bad.safetensors")
    with pytest.raises(
        LowraError, match=rf"The alpha of module '{modules[2].kohya_name}' in bad.safetensors {message}"
    ):
        LoraFile(tmp_path / "bad.safetensors", modules)


def test_rank_zero_is_refused_on_opening(modules, tmp_path):
    write_kohya(tmp_path / "good.safetensors", make_factors(modules))
    stored = load_file(tmp_path / "good.safetensors")
    for key in [key for key in stored if key.startswith(f"{modules[2].kohya_name}.lora")]:
        stored[key] = stored[key][:0] if "lora_down" in key else stored[key][:, :0].contiguous()
    save_file(stored, tmp_path / "bad.safetensors")
    with pytest.raises(LowraError, match=rf"The rank of module '{modules[2].kohya_name}' in bad.safetensors is 0"):
        LoraFile(tmp_path / "bad.safetensors", modules)
