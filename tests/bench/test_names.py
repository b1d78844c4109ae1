from __future__ import annotations

import pytest

from lowra.bench.names import depths, layer_type


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("vit.encoder.layer.11.attention.attention.query.weight", "attention.attention.query"),
        ("model.layers.3.self_attn.q_proj.weight", "self_attn.q_proj"),
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.weight", "attn1.to_out.0"),
        ("mid_block.attentions.0.proj_in.weight", "proj_in"),
        ("text_model.encoder.layers.7.mlp.fc1.weight", "mlp.fc1"),
        ("classifier.weight", "classifier"),
    ],
)
def test_layer_type(name: str, kind: str) -> None:
    assert layer_type(name) == kind


def test_depth_follows_the_network_not_the_alphabet() -> None:
    unet = [
        "up_blocks.1.attentions.0.proj_in.weight",
        "mid_block.attentions.0.proj_in.weight",
        "down_blocks.0.attentions.1.proj_in.weight",
        "down_blocks.0.attentions.0.proj_in.weight",
        "down_blocks.0.attentions.0.proj_out.weight",
    ]
    assert depths([("unet", name) for name in unet]) == (3, 2, 1, 0, 0)
    text = [f"model.layers.{i}.self_attn.q_proj.weight" for i in (10, 2, 0)]
    assert depths([("", name) for name in text]) == (2, 1, 0)


def test_components_are_counted_apart() -> None:
    labels = [("unet", "mid_block.attentions.0.proj_in"), ("text_encoder", "text_model.encoder.layers.0.mlp.fc1")]
    assert depths(labels) == (0, 0)
