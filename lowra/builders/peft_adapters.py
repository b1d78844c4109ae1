"""PEFT adapters to benchmark layers: factors from adapter folders, names from the base checkpoint.

Adapter folders (`adapter_config.json`, `adapter_model.safetensors`) name modules as the library that trained them
calls them in memory; the benchmark names layers as the base checkpoint's file does. For ViT the two differ since
transformers 5 (`vit.layers.0.attention.q_proj` is stored as `vit.encoder.layer.0.attention.attention.query.weight`).
The map between them is traced through transformers' own saving code, so it holds for every architecture.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowra.bench.schema import Layer
from lowra.bench.updates import Update
from lowra.builders.adapter_kinds import (
    PARTS,
    SHARED,
    ia3_on_inputs,
    key_pattern,
    peft_type,
    peft_update,
    rank_and_alpha,
)
from lowra.checkpoints.reading import StoredState
from lowra.errors import LowraError


class Adapter:
    """A PEFT adapter folder, opened lazily: headers and configuration now, tensors when asked for.

    Read are LoRA with its variants (rank-stabilised scales, DoRA, PiSSA and OLoRA converted or not, MiCA), VeRA,
    (IA)^3, LoHa, LoKr and OFT, and our own folders of whole differences (`lowra.builders.kinds`).
    modules: the module paths it adapts, in memory names, sorted. name: of the updates, the folder's own by default.
    type: PEFT's, a key of `lowra.builders.adapter_kinds.PARTS`.
    Raises LowraError for a folder that is no adapter of these kinds, that adapts nothing, or whose configuration holds
    ranks and alphas that are none.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.folder = folder
        self.name = name or folder.name
        config_path, weights_path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
        for path in (config_path, weights_path):
            if not path.exists():
                raise LowraError(f"{folder} is not a PEFT adapter: it lacks {path.name}.")
        try:
            self.config: dict[str, Any] = json.loads(config_path.read_text(encoding="utf-8"))
            if not isinstance(self.config, dict):
                raise ValueError(f"{config_path.name} holds no settings")
            self._file = safe_open(weights_path, framework="pt")
        except (SafetensorError, ValueError, OSError) as error:
            raise LowraError(f"The adapter in {folder} cannot be read ({error}); build it again.") from None
        self.type = peft_type(self.config, folder)
        if self.config.get("fan_in_fan_out"):
            raise LowraError(f"{folder} adapts transposed weights (fan_in_fan_out); subset=custom reads such adapters.")
        self._keys: dict[str, dict[str, str]] = {}
        self._shared: dict[str, str] = {}
        pattern = key_pattern(self.type)
        for key in self._file.keys():  # noqa: SIM118 (safe_open is no mapping)
            if match := pattern.match(key):
                self._keys.setdefault(match["module"], {})[match["part"]] = key
            elif key in SHARED:
                self._shared[key] = key
        self.modules = tuple(sorted(self._keys, key=natural_order))
        if not self.modules:
            raise LowraError(
                f"{weights_path} holds no tensors of {self.type} modules; expected keys that end in "
                f"{' or '.join(PARTS[self.type])}."
            )
        for module in self.modules:
            rank_and_alpha(self.config, module, folder)

    def update(self, module: str, weight: Tensor) -> Update:
        """One module's update of its weight (d, k), which PiSSA and OLoRA take a part of.

        Raises LowraError when a tensor is missing, its rank is not the configured one, or it was never trained.
        """
        keys = self._keys[module] | self._shared
        parts = {part: self._file.get_tensor(key) for part, key in keys.items()}
        update = peft_update(self.name, self.config, module, parts, weight, self.folder)
        if update.factors and not update.B.any():
            raise LowraError(f"Module {module!r} of the adapter in {self.folder} has B = 0: it was never trained.")
        if update.idle:
            raise LowraError(f"Module {module!r} of the adapter in {self.folder} changes nothing: was it ever trained?")
        return update

    @property
    def scaled_biases(self) -> tuple[str, ...]:
        """The modules whose bias, where they have one, changes with the weight: (IA)^3 scales outputs."""
        if self.type != "IA3":
            return ()
        shapes = {module: self._file.get_slice(self._keys[module]["ia3_l"]).get_shape() for module in self.modules}
        return tuple(module for module, shape in shapes.items() if not ia3_on_inputs(self.config, module, shape))


def natural_order(name: str) -> tuple[tuple[int, str], ...]:
    """A sorting key that puts layer 2 before layer 10."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name))


# ---- Names ------------------------------------------------------------------------------------------------------


def checkpoint_state(model: Any) -> dict[str, Tensor]:
    """A transformers model's state dict under the names `save_pretrained` would write."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, model.state_dict()))


def skeleton(base: Path) -> Any:
    """The architecture of a transformers checkpoint folder without weights (on the meta device).

    Raises LowraError when `config.json` is missing or names no class of transformers.
    """
    import transformers

    if not (base / "config.json").exists():
        raise LowraError(f"{base} has no config.json; expected a model saved by transformers.")
    try:
        config = transformers.AutoConfig.from_pretrained(base)
    except Exception as error:  # transformers raises several kinds for a damaged file
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise LowraError(f"{base / 'config.json'} cannot be read ({first}); fetch it again.") from None
    name = (config.architectures or ["none"])[0]
    if not hasattr(transformers, name):
        raise LowraError(f"{base}/config.json names architecture {name!r}, which transformers does not have.")
    with torch.device("meta"):
        return getattr(transformers, name)(config)


def checkpoint_names(model: Any) -> dict[str, str]:
    """For each parameter of a transformers model: its name in memory to its name in the checkpoint file.

    Traced rather than tabulated: distinct tensors go through transformers' own conversion for saving and are
    recognised by identity when they come out. Parameters that saving merges or splits are left out; the weights
    LoRA targets are only renamed. The model may be on the meta device.
    """
    from transformers.core_model_loading import revert_weight_conversion

    probes = {name: torch.empty(tensor.shape, device="meta") for name, tensor in model.state_dict().items()}
    saved = {id(tensor): name for name, tensor in revert_weight_conversion(model, dict(probes)).items()}
    return {name: saved[id(tensor)] for name, tensor in probes.items() if id(tensor) in saved}


def layer_names(base: Path, modules: Mapping[str, object] | tuple[str, ...]) -> dict[str, str]:
    """Module paths of an adapter to the base checkpoint's keys, e.g. `...attention.query.weight`.

    Adapters saved under the checkpoint's own names (by older libraries) are accepted as they are.
    Raises LowraError naming a module that the checkpoint does not have.
    """
    stored = StoredState(base)
    names = {module: f"{module}.weight" for module in modules}
    if all(name in stored for name in names.values()):
        return names
    traced = checkpoint_names(skeleton(base))
    for module, name in names.items():
        names[module] = traced.get(name, name)
        if names[module] not in stored:
            raise LowraError(
                f"Module {module!r} of the adapter is not in the base checkpoint {base}; "
                f"its {len(stored)} tensors are named like {next(iter(stored))!r}."
            )
    return names


# ---- Layers -----------------------------------------------------------------------------------------------------


def lora_layers(base: Path, adapters: Mapping[str, Path], *, pre_ft_name: str, model: str = "") -> Iterator[Layer]:
    """The rows of a benchmark data set, a layer at a time: base weight and every adapter's factors.

    base: folder of the base checkpoint (safetensors). adapters: LoRA name to adapter folder, in column order.
    pre_ft_name: the base model's public name. model: the component the layers belong to.
    No more than one layer is in memory. Raises LowraError when adapters target different modules, or do not fit.
    """
    opened = {name: Adapter(folder, name) for name, folder in adapters.items()}
    first_name, first = next(iter(opened.items()))
    for name, adapter in opened.items():
        if difference := sorted(set(first.modules) ^ set(adapter.modules)):
            raise LowraError(
                f"LoRAs {first_name!r} and {name!r} adapt different modules ({difference[0]!r} is in one only); "
                "all LoRAs of a subset must target the same layers."
            )
    stored = StoredState(base)
    names = layer_names(base, first.modules)
    for module in sorted(first.modules, key=lambda module: natural_order(names[module])):
        weight = stored[names[module]].float().flatten(1)  # (d, k)
        updates = []
        for name, adapter in opened.items():
            update = adapter.update(module, weight)
            if misfit := update.misfit(*weight.shape):
                raise LowraError(
                    f"LoRA {name!r} updates {module!r} {misfit}; the base weight is {weight.shape[0]} x "
                    f"{weight.shape[1]}."
                )
            updates.append(update)
        yield Layer(model, names[module], pre_ft_name, weight, tuple(updates))
