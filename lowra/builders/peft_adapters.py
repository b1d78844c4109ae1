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
from lowra.bench.updates import Update, check_alpha, check_rank
from lowra.checkpoints.reading import StoredState
from lowra.errors import LowraError

_FACTOR = re.compile(r"^base_model\.model\.(.+)\.lora_([AB])\.weight$")


class Adapter:
    """A PEFT LoRA adapter folder, opened lazily: headers and configuration now, factors when asked for.

    modules: the module paths it adapts, in memory names, sorted. name: of the updates, the folder's own by default.
    Raises LowraError for a folder that is not a plain LoRA adapter, that adapts nothing, or whose configuration holds
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
        if self.config.get("peft_type") != "LORA" or self.config.get("use_dora") or self.config.get("fan_in_fan_out"):
            raise LowraError(f"{folder} is not a plain LoRA adapter; LoRA without DoRA or transposed weights is read.")
        self._keys: dict[tuple[str, str], str] = {}
        for key in self._file.keys():  # noqa: SIM118 (safe_open is no mapping)
            if match := _FACTOR.match(key):
                self._keys[match[1], match[2]] = key
        self.modules = tuple(sorted({module for module, _ in self._keys}, key=natural_order))
        if not self.modules:
            raise LowraError(f"{weights_path} holds no LoRA factors; expected keys ending in lora_A.weight.")
        self._settings = {module: self._checked(module) for module in self.modules}

    def update(self, module: str) -> Update:
        """One module's update; with `use_rslora` it is of kind "rslora".

        Raises LowraError when a factor is missing, its rank is not the configured one, or B is zero (never trained).
        """
        tensors = []
        for part in "AB":
            if (module, part) not in self._keys:
                raise LowraError(f"The adapter in {self.folder} has no lora_{part} for module {module!r}.")
            tensor = self._file.get_tensor(self._keys[module, part]).float()
            # The factors of 1x1 convolutions have two trailing dimensions of length 1.
            tensors.append(tensor.flatten(1))
        a, b = tensors  # (r, k), (d, r)
        rank, alpha = self._settings[module]
        if a.shape[0] != rank or b.shape[1] != rank:
            raise LowraError(
                f"Module {module!r} of the adapter in {self.folder} has factors {tuple(a.shape)} and {tuple(b.shape)}; "
                f"its configuration says rank {rank}."
            )
        if not b.any():
            raise LowraError(f"Module {module!r} of the adapter in {self.folder} has B = 0: it was never trained.")
        return Update(self.name, rank, alpha, a, b, "rslora" if self.config.get("use_rslora") else "lora")

    def _checked(self, module: str) -> tuple[int, float]:
        """A module's rank and alpha as the configuration has them."""
        where = f"of module {module!r} in {self.folder / 'adapter_config.json'}"
        rank = check_rank(self._setting("r", "rank_pattern", module), f"The rank {where}")
        return rank, check_alpha(self._setting("lora_alpha", "alpha_pattern", module), rank, f"The alpha {where}")

    def _setting(self, default: str, pattern: str, module: str) -> Any:
        """A module's own rank or alpha where PEFT's patterns give one, else the adapter's."""
        patterns = self.config.get(pattern) or {}
        if not isinstance(patterns, dict):
            raise LowraError(
                f"{pattern} of the adapter in {self.folder} is {patterns!r}; expected modules and numbers."
            )
        return patterned(patterns, module, self.config.get(default))


def patterned(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """A module's entry among PEFT's patterns (`rank_pattern`, `alpha_pattern`), as PEFT matches them."""
    if not patterns:
        return default
    from peft.utils.other import get_pattern_key  # peft takes seconds to import

    return patterns.get(get_pattern_key(list(patterns), module), default)


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
            update = adapter.update(module)
            if (update.B.shape[0], update.A.shape[1]) != tuple(weight.shape):
                raise LowraError(
                    f"LoRA {name!r} updates {module!r} by a {update.B.shape[0]} x {update.A.shape[1]} matrix; the base "
                    f"weight is {weight.shape[0]} x {weight.shape[1]}."
                )
            updates.append(update)
        yield Layer(model, names[module], pre_ft_name, weight, tuple(updates))
