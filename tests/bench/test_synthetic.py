"""Synthetic layers: the families' true shapes, the promised statistics, and the same numbers wherever they are made."""

from collections import Counter

import pytest
import torch

from lowra.bench.schema import LayerTable
from lowra.bench.synthetic import FAMILIES, SyntheticTable
from lowra.errors import LowraError


def shapes(family, component=None):
    return Counter((i.d, i.k) for i in SyntheticTable(family).infos if component in (None, i.model))


def test_vit_layers():
    table = SyntheticTable("vit")
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
    names = {(i.model, i.name) for i in SyntheticTable("stable_diffusion").infos}
    assert len(names) == 264
    assert ("unet", "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0.weight") in names
    assert ("unet", "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight") in names
    assert ("text_encoder", "text_model.encoder.layers.11.mlp.fc2.weight") in names
    assert {i.d for i in SyntheticTable("stable_diffusion").infos if i.name.startswith("up_blocks.1.")} >= {1280}


@pytest.mark.parametrize("family", ["mistral_sft", "mistral_dpo"])
def test_mistral_layers(family):
    assert shapes(family) == {(4096, 4096): 64, (1024, 4096): 64}
    assert SyntheticTable(family).infos[2].name == "model.layers.0.self_attn.v_proj.weight"


def test_reads_like_stored_data():
    table: LayerTable = SyntheticTable("vit", n_models=4)
    layer = table.read(3)
    assert len(table) == len(table.infos) == 24
    assert [lora.name for lora in layer.loras] == list(table.model_names)
    assert (layer.model, layer.name, layer.pre_ft_name) == ("", table.infos[3].name, "google/vit-base-patch16-224")
    for lora, rank in zip(layer.loras, table.infos[3].ranks, strict=True):
        assert lora.rank == rank
        assert (lora.A.shape, lora.B.shape) == ((rank, 768), (768, rank))
        assert lora.A.dtype == lora.B.dtype == layer.weight.dtype == torch.float32


def test_any_part_of_any_layer_is_made_alone():
    whole = SyntheticTable("vit").read(5)
    state = torch.get_rng_state()
    part = SyntheticTable("vit").read(5, [11, 2])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(part.weight, whole.weight)
    for got, expected in zip(part.loras, (whole.loras[11], whole.loras[2]), strict=True):
        assert got.name == expected.name
        assert torch.equal(got.A, expected.A)
        assert torch.equal(got.B, expected.B)
    assert not torch.equal(SyntheticTable("vit").read(6, [0]).weight, whole.weight)
    assert not torch.equal(SyntheticTable("vit", seed=1).read(5, [0]).weight, whole.weight)


def test_base_weights_lie_on_the_published_grid():
    coarse = SyntheticTable("mistral_sft").read(1, [0, 1]).weight
    assert torch.equal(coarse, coarse.bfloat16().float())
    fine = SyntheticTable("vit").read(0, [0, 1]).weight
    assert not torch.equal(fine, fine.bfloat16().float())
    # 590k independent normal numbers: their rms has a relative deviation of 1e-3.
    assert fine.square().mean().sqrt().item() == pytest.approx(FAMILIES["vit"].weight_rms, rel=5e-3)


def test_updates_have_the_size_spectrum_and_correlation_asked_for():
    table = SyntheticTable("vit", column_cosine=0.5, row_cosine=0.5, decay=0.1, update_rms=1e-3)
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
    table = SyntheticTable("vit", shared_a=True)
    first, second = table.read(0, [0, 1]).loras
    assert torch.equal(first.A, second.A)
    assert not torch.equal(first.B, second.B)
    assert not torch.equal(table.read(1, [0]).loras[0].A, first.A)


def test_fingerprint_follows_every_parameter():
    variants = [{}, {"seed": 1}, {"norm_spread": 2.0}, {"shared_a": True}, {"decay": 0.5}, {"n_models": 3}]
    prints = [SyntheticTable("vit", **v).fingerprint() for v in variants] + [
        SyntheticTable("mistral_sft").fingerprint()
    ]
    assert len(set(prints)) == len(prints)
    assert SyntheticTable("vit").fingerprint() == prints[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "bert"}, "Unknown synthetic family 'bert'; known: mistral_dpo, mistral_sft"),
        ({"n_models": 1}, "at least 2 models; got n_models=1"),
        ({"norm_spread": 0.5}, "norm_spread is largest over smallest"),
        ({"norm_spread": float("nan")}, "norm_spread is largest over smallest"),
        ({"decay": 0.0}, "decay in"),
        ({"update_rms": -1.0}, "update_rms is positive"),
        ({"column_cosine": 1.5}, "Cosines are 0 to 1"),
    ],
)
def test_bad_parameters_are_named(options, message):
    with pytest.raises(LowraError, match=message):
        SyntheticTable(**{"family": "vit", **options})
