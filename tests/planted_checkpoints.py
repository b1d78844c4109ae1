"""Small checkpoints with planted low-rank updates, and the ways releases lay them out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH, LAYERS = 48, 2


def base_state(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A little language model's names: embeddings, projections, norms; values on the dtype's grid."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.05).to(dtype)

    state = {"model.embed_tokens.weight": normal(60, WIDTH)}
    for i in range(LAYERS):
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            state[f"model.layers.{i}.self_attn.{part}.weight"] = normal(WIDTH, WIDTH)
        state[f"model.layers.{i}.mlp.up_proj.weight"] = normal(2 * WIDTH, WIDTH)
        state[f"model.layers.{i}.input_layernorm.weight"] = normal(WIDTH)
    state["lm_head.weight"] = normal(60, WIDTH)
    return state


def tuned(
    state: Mapping[str, Tensor],
    seed: int,
    rank: int = 3,
    parts: Sequence[str] = ("q_proj", "v_proj"),
    size: float = 0.01,
) -> dict[str, Tensor]:
    """The state with an independent low-rank update on the weights named by `parts`, merged in float32."""
    generator = torch.Generator().manual_seed(1000 + seed)
    result = {}
    for name, weight in state.items():
        if any(part in name for part in parts) and weight.ndim >= 2:
            flat = weight.float().flatten(1)
            left = torch.randn(flat.shape[0], rank, generator=generator) * size
            update = left @ torch.randn(rank, flat.shape[1], generator=generator)
            result[name] = (flat + update).view(weight.shape).to(weight.dtype)
        else:
            result[name] = weight.clone()
    return result


def save(folder: Path, state: Mapping[str, Tensor], shards: int = 1, config: dict[str, object] | None = None) -> Path:
    """A checkpoint folder as transformers writes it, single or sharded."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or {"note": "planted"}))
    (folder / "tokenizer.json").write_text("{}")
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    places = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for shard in sorted(set(places.values())):
        held = {name: tensors[name] for name in tensors if places[name] == shard}
        save_file(held, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def renamed(state: Mapping[str, Tensor], change: Callable[[str], str]) -> dict[str, Tensor]:
    """The same tensors under other names."""
    return {change(name): tensor for name, tensor in state.items()}


def three(folder: Path, dtype: torch.dtype = torch.float32, **settings: object) -> list[Path]:
    """Three fine-tunes of one base, saved."""
    base = base_state(dtype=dtype)
    return [save(folder / f"m{i}", tuned(base, i, **settings)) for i in range(3)]  # type: ignore[arg-type]


def pipelines(folder: Path, seen: Callable[[int, str, Any], object] = lambda i, part, model: None) -> None:
    """A little Stable Diffusion, base/, and three LoRA fine-tunes of its U-Net and text encoder, m0/ to m2/.

    seen: is shown each PEFT model before it is merged.
    """
    import diffusers
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    config = transformers.CLIPTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    text = transformers.CLIPTextModel(config)
    unet.save_pretrained(folder / "base" / "unet")
    text.save_pretrained(folder / "base" / "text_encoder")
    for i in range(3):
        torch.manual_seed(i + 1)
        for part, model, targets in (
            ("unet", diffusers.UNet2DConditionModel, ["to_q", "to_v", "proj_in"]),
            ("text_encoder", transformers.CLIPTextModel, ["q_proj"]),
        ):
            own = get_peft_model(model.from_pretrained(folder / "base" / part), LoraConfig(r=2, target_modules=targets))
            for name, parameter in own.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.02)
            seen(i, part, own)
            own.merge_and_unload().save_pretrained(folder / f"m{i}" / part)
        index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", ""], "text_encoder": ["", ""]}
        (folder / f"m{i}" / "model_index.json").write_text(json.dumps(index))
