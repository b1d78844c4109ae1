"""Synthetic layers: the families' true shapes, the promised statistics, and the same numbers wherever they are made."""

import hashlib
import pickle
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hydra import compose, initialize_config_dir

from lowra.bench.schema import LayerTable
from lowra.bench.sources import make_source, synthetic_table
from lowra.bench.synthetic import Family, SyntheticTable, layer_shapes
from lowra.errors import LowraError
from lowra.paths import conf_dir, register_resolvers


def shapes(family, component=None):
    return Counter((i.d, i.k) for i in synthetic_table(family).infos if component in (None, i.model))


def test_vit_layers():
    table = synthetic_table("vit")
    assert shapes("vit") == {(768, 768): 24}
    assert table.infos[1].name == "vit.encoder.layer.0.attention.attention.value.weight"


def test_stable_diffusion_layers():
    # 16 attention blocks x 12 and 12 text layers x 6; the histogram of SD 1.5's own modules.
    unet = {}
    for width, blocks in ((320, 5), (640, 5), (1280, 6)):
        unet[(width, width)] = 8 * blocks  # attn1 q k v out, attn2 q out, proj_in, proj_out
        unet[(width, 768)] = 2 * blocks
        unet[(8 * width, width)] = blocks
        unet[(width, 4 * width)] = blocks
    assert shapes("stable_diffusion", "unet") == unet
    assert shapes("stable_diffusion", "text_encoder") == {(768, 768): 48, (3072, 768): 12, (768, 3072): 12}
    names = {(i.model, i.name) for i in synthetic_table("stable_diffusion").infos}
    assert len(names) == 264
    assert ("unet", "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0.weight") in names
    assert ("unet", "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight") in names
    assert ("text_encoder", "text_model.encoder.layers.11.mlp.fc2.weight") in names
    assert {i.d for i in synthetic_table("stable_diffusion").infos if i.name.startswith("up_blocks.1.")} >= {1280}


@pytest.mark.parametrize("family", ["mistral_sft", "mistral_dpo"])
def test_mistral_layers(family):
    assert shapes(family) == {(4096, 4096): 64, (1024, 4096): 64}
    assert synthetic_table(family).infos[2].name == "model.layers.0.self_attn.v_proj.weight"


def test_reads_like_stored_data():
    table: LayerTable = synthetic_table("vit", n_models=4)
    layer = table.read(3)
    assert len(table) == len(table.infos) == 24
    assert [lora.name for lora in layer.loras] == list(table.model_names)
    assert (layer.model, layer.name, layer.pre_ft_name) == ("", table.infos[3].name, "google/vit-base-patch16-224")
    for lora, rank in zip(layer.loras, table.infos[3].ranks, strict=True):
        assert lora.rank == rank
        assert (lora.A.shape, lora.B.shape) == ((rank, 768), (768, rank))
        assert lora.A.dtype == lora.B.dtype == layer.weight.dtype == torch.float32


def test_any_part_of_any_layer_is_made_alone():
    whole = synthetic_table("vit").read(5)
    state = torch.get_rng_state()
    part = synthetic_table("vit").read(5, [11, 2])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(part.weight, whole.weight)
    for got, expected in zip(part.loras, (whole.loras[11], whole.loras[2]), strict=True):
        assert got.name == expected.name
        assert torch.equal(got.A, expected.A)
        assert torch.equal(got.B, expected.B)
    assert not torch.equal(synthetic_table("vit").read(6, [0]).weight, whole.weight)
    assert not torch.equal(synthetic_table("vit", seed=1).read(5, [0]).weight, whole.weight)


def test_base_weights_lie_on_the_published_grid():
    coarse = synthetic_table("mistral_sft").read(1, [0, 1]).weight
    assert torch.equal(coarse, coarse.bfloat16().float())
    fine = synthetic_table("vit").read(0, [0, 1]).weight
    assert not torch.equal(fine, fine.bfloat16().float())
    # 590k independent normal numbers: their rms has a relative deviation of 1e-3.
    assert fine.square().mean().sqrt().item() == pytest.approx(synthetic_table("vit").family.weight_rms, rel=5e-3)


def test_updates_have_the_size_spectrum_and_correlation_asked_for():
    family = synthetic_table("vit").family
    table = SyntheticTable(replace(family, column_cosine=0.5, row_cosine=0.5, decay=0.1, update_rms=1e-3))
    updates = torch.stack([lora.delta() for lora in table.read(0).loras]).double()  # (15, d, k)
    sizes = updates.square().mean((1, 2)).sqrt()
    assert 4 < sizes.max() / sizes.min() < 11  # 15 log-uniform sizes in a range of 10, plus the fuzz below
    assert 1e-3 / 4 < sizes.min() < sizes.max() < 1e-3 * 4  # sqrt(10) to each side of the middle
    values = torch.linalg.svdvals(updates[0])
    assert (values > 1e-5 * values[0]).sum() == 16
    # Random columns of length 768 are orthogonal to 1/sqrt(768) = 4%, and 16 of them stretch the ends of the spectrum.
    assert values[15] / values[0] == pytest.approx(0.1, rel=0.3)
    flat = updates.flatten(1) / updates.flatten(1).norm(dim=1, keepdim=True)
    correlation = flat @ flat.T
    # 0.5 on either side; the leading pairs of directions carry most of the weight and each is 4% off.
    assert (correlation.sum() - 15).item() / (15 * 14) == pytest.approx(0.25, abs=0.05)


def test_shared_a_is_shared_within_a_layer_only():
    table = synthetic_table("vit", shared_a=True)
    first, second = table.read(0, [0, 1]).loras
    assert torch.equal(first.A, second.A)
    assert not torch.equal(first.B, second.B)
    assert not torch.equal(table.read(1, [0]).loras[0].A, first.A)


def test_fingerprint_follows_every_parameter():
    family = synthetic_table("vit").family
    variants = [{}, {"seed": 1}, {"norm_spread": 2.0}, {"shared_a": True}, {"n_models": 3}]
    prints = [SyntheticTable(family, **v).fingerprint() for v in variants]
    prints += [SyntheticTable(replace(family, decay=0.5)).fingerprint(), synthetic_table("mistral_sft").fingerprint()]
    assert len(set(prints)) == len(prints)
    assert synthetic_table("vit").fingerprint() == prints[0]


# Made with the code as it was when families were Python: layer indices, and a digest of two models' numbers there.
BEFORE_FAMILIES_WERE_DATA = [
    ("vit", {}, [0, 1, 23], "7523e36cdf27a80a"),
    ("vit", {"shared_a": True, "seed": 3, "n_models": 4}, [0, 1, 23], "a3a46486f8f265d8"),
    ("stable_diffusion", {}, [0, 1, 263], "25e8f63779473e59"),
    ("mistral_sft", {}, [1, 126], "775087d4b3fc5c26"),
    ("mistral_dpo", {"shared_a": True, "seed": 3, "n_models": 4}, [1, 126], "eda6fd74db706de7"),
]


@pytest.mark.parametrize(("family", "options", "layers", "expected"), BEFORE_FAMILIES_WERE_DATA)
def test_the_numbers_are_those_of_the_committed_results(family, options, layers, expected):
    probe = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    if hashlib.sha256(probe.numpy()).hexdigest()[:16] != "43678415636bbad8":
        pytest.skip("this torch draws other numbers from a seed than the one the digests were made with")
    table = synthetic_table(family, **options)
    digest = hashlib.sha256()
    for index in layers:
        layer = table.read(index, [0, 3])
        digest.update(repr((layer.model, layer.name, table.infos[index].ranks)).encode())
        for tensor in (layer.weight, *(factor for u in layer.loras for factor in (u.A, u.B))):
            digest.update(tensor.numpy().tobytes())
        digest.update(repr([(u.name, u.rank, u.alpha) for u in layer.loras]).encode())
    assert digest.hexdigest()[:16] == expected


def test_another_process_makes_the_same_table():
    table = synthetic_table("mistral_dpo", n_models=2)
    again = pickle.loads(pickle.dumps(table))
    assert again == table
    assert again.fingerprint() == table.fingerprint()
    assert torch.equal(again.read(1).loras[1].B, table.read(1).loras[1].B)


def test_a_family_of_ones_own_needs_a_config_only(tmp_path):
    # Of the layers of Llama-3-8B, for one block, in the scale of Mistral's.
    (tmp_path / "subset").mkdir()
    (tmp_path / "subset" / "llama.yaml").write_text(
        """
defaults:
  - mistral_sft
  - _self_
name: llama
title: Llama
hub_config: null
base: meta-llama/Meta-Llama-3-8B
synthetic:
  layers:
    - blocks: ["model.layers.{0..1}"]
      shapes: {self_attn.k_proj: [1024, 4096], mlp.down_proj: [512, 64]}
  rank: 8
  alpha: 16
"""
    )
    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        search = f"hydra.searchpath=[file://{tmp_path}]"
        cfg = compose("config", overrides=[search, "subset=llama", "source=synthetic", "source.table.n_models=3"])
    source = make_source(cfg)
    source.check()
    table = source.open().table
    assert source.weights_only
    assert [(info.name, info.d, info.k, info.ranks) for info in table.infos] == [
        ("model.layers.0.self_attn.k_proj.weight", 1024, 4096, (8, 8, 8)),
        ("model.layers.0.mlp.down_proj.weight", 512, 64, (8, 8, 8)),
        ("model.layers.1.self_attn.k_proj.weight", 1024, 4096, (8, 8, 8)),
        ("model.layers.1.mlp.down_proj.weight", 512, 64, (8, 8, 8)),
    ]
    layer = table.read(3)
    assert layer.loras[2].delta().shape == layer.weight.shape == (512, 64)
    assert layer.loras[0].name == "llama-synthetic-00"
    assert table.family.update_rms == 4.6e-5  # inherited


SMALL = {
    "name": "small",
    "base": "small",
    "layers": [{"blocks": ["block"], "shapes": {"q": [8, 6]}}],
    "grid": "float32",
    "weight_rms": 0.1,
    "rank": 2,
    "alpha": 2,
    "update_rms": 0.01,
    "column_cosine": 0.1,
    "row_cosine": 0.1,
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 0.0}, "subset.synthetic.decay is 0.0; expected a number, above 0 and at most 1"),
        ({"update_rms": -1.0}, "update_rms is -1.0; expected a number, above 0"),
        ({"column_cosine": 1.5}, "column_cosine is 1.5; expected a number, at least 0 and at most 1"),
        ({"weight_rms": float("nan")}, "weight_rms is nan; expected a number"),
        ({"grid": "int4"}, "grid is 'int4'; expected one of float32, bfloat16, float16"),
        ({"rank": 7}, "hold ranks 1 to 6; got rank=7"),
        ({"layers": []}, "names no layer"),
        ({"layers": [{"blocks": ["a"], "shapes": {"q": [8]}}]}, r"layers holds .* expected blocks: \[NAME"),
        ({"layers": [{"blocks": ["a", "a"], "shapes": {"q": [8, 6]}}]}, "or one twice"),
    ],
)
def test_impossible_families_are_refused(options, message):
    with pytest.raises(LowraError, match=message):
        Family(**SMALL | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_models": 1}, "source.table.n_models is 1; expected a whole number, at least 2"),
        ({"norm_spread": 0.5}, "norm_spread is 0.5; expected a number, at least 1"),
        ({"norm_spread": float("nan")}, "norm_spread is nan"),
        ({"seed": -1}, "seed is -1; expected a whole number, at least 0"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(LowraError, match=message):
        SyntheticTable(Family(**SMALL), **options)


def test_ranges_in_names_are_counted_out():
    (group,) = [{"component": "unet", "blocks": ["a.{0..1}.b.{8..10}", "c"], "shapes": {"q": [2, 3]}}]
    names = [name for _, name, _, _ in layer_shapes([group])]
    assert names == [f"a.{i}.b.{j}.q.weight" for i in (0, 1) for j in (8, 9, 10)] + ["c.q.weight"]
