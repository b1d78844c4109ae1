"""Stable Diffusion as a single file beside pipelines in folders: one layout for all models of an attack.

A single file has the names of the original repository ("model.diffusion_model.input_blocks..."), a pipeline those of
diffusers. Which is which is asked of diffusers' own converters, on a tag instead of each tensor.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lowra.checkpoints.matching import same_tensors
from lowra.checkpoints.reading import Checkpoint, StoredState, TensorInfo
from lowra.errors import LowraError
from lowra.packages import require

_UNET = "model.diffusion_model."


def aligned(models: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The models in the first one's layout; files are read as they are, under other names.

    Raises LowraError where a single file is not Stable Diffusion 1.x, whose text encoder and U-Net are diffusers'.
    """
    first = models[0]
    if _is_single(first):
        return [first, *(_as_single(model, first) if _is_pipeline(model) else model for model in models[1:])]
    if _is_pipeline(first):
        return [first, *(_as_pipeline(model, first) if _is_single(model) else model for model in models[1:])]
    return list(models)


def _is_single(model: Checkpoint) -> bool:
    return len(model.components) == 1 and any(name.startswith(_UNET) for name in next(iter(model.components.values())))


def _is_pipeline(model: Checkpoint) -> bool:
    return "unet" in model.components and not any(name.startswith(_UNET) for name in model.components["unet"])


def _as_pipeline(single: Checkpoint, pipeline: Checkpoint) -> Checkpoint:
    """A single file as a pipeline's components."""
    parts = _parts(single, pipeline)
    return Checkpoint(
        single.label, single.place, {part: StoredState.of(single.place, infos) for part, infos in parts.items()}
    )


def _as_single(pipeline: Checkpoint, single: Checkpoint) -> Checkpoint:
    """A pipeline under the names of a single file; what only one of them has stays away."""
    infos = []
    for part, theirs in _parts(single, pipeline).items():
        ours = pipeline.components[part]
        stored = {info.name: info.stored for info in theirs}
        for name, mine in same_tensors(StoredState.of(single.place, theirs), ours).items():
            infos.append(replace(ours.infos[mine], name=stored[name], stored=mine))
    return Checkpoint(
        pipeline.label, pipeline.place, {next(iter(single.components)): StoredState.of(pipeline.place, infos)}
    )


def _parts(single: Checkpoint, pipeline: Checkpoint) -> dict[str, list[TensorInfo]]:
    """The tensors of a single file by component, under diffusers' names."""
    require(f"a single file ({single.label}) beside a pipeline ({pipeline.label})", "diffusers")
    from diffusers.loaders import single_file_utils as convert

    state = next(iter(single.components.values()))
    names = list(state)
    # Converters move tensors about and drop dimensions of length one; a tag survives both.
    tags = {name: torch.full((1,) * len(state.shape(name)), float(i)) for i, name in enumerate(names)}
    made: dict[str, dict[str, Any]] = {}
    try:
        config = json.loads((pipeline.place / "unet" / "config.json").read_text())
        made["unet"] = convert.convert_ldm_unet_checkpoint(dict(tags), config)
        if "text_encoder" in pipeline.components:
            made["text_encoder"] = convert.convert_ldm_clip_checkpoint(dict(tags))
        if "vae" in pipeline.components:
            config = json.loads((pipeline.place / "vae" / "config.json").read_text())
            made["vae"] = convert.convert_ldm_vae_checkpoint(dict(tags), config)
    except (OSError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise LowraError(
            f"{single.label} is a single file and {pipeline.label} a folder, and diffusers cannot tell their tensors "
            f"apart ({type(error).__name__}: {error}); convert one to the other's layout."
        ) from None
    parts = {}
    for part, tensors in made.items():
        held = [(name, names[int(tag.flatten()[0])]) for name, tag in tensors.items() if tag is not None]
        parts[part] = [replace(state.infos[stored], name=name, stored=stored) for name, stored in held]
    return parts
