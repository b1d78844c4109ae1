"""One's own LoRAs on one's own base: a data set in the LoWRA-Bench schema, and the merged checkpoints if wanted.

Read are PEFT adapter folders (LoRA with its variants, (IA)^3, LoHa, LoKr, VeRA, OFT; patterns of ranks and alphas,
transposed weights, modules trained whole, parameters of experts) on a transformers base, and kohya's, LyCORIS',
diffusers' and PEFT's files on a pipeline.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowra.bench.merging import DTYPES, ORDERS
from lowra.bench.schema import Layer, write_dataset
from lowra.bench.updates import Update
from lowra.builders.adapter_kinds import SHARED, ia3_on_inputs, key_pattern, peft_type, peft_update, rank_and_alpha
from lowra.builders.base import Built
from lowra.builders.kohya_files import LoraFile, expected_modules
from lowra.builders.peft_adapters import natural_order
from lowra.checkpoints.reading import Checkpoint, component_folder, open_checkpoint, other_files, resolve
from lowra.checkpoints.writing import Shard, index_name, index_text, pieces, plan_shards
from lowra.checks import Name, Names, OneOf
from lowra.digests import file_digest
from lowra.errors import LowraError
from lowra.recovery.adapters import memory_modules
from lowra.recovery.tensors import view_of


@dataclass(frozen=True)
class Place:
    """A matrix of the base: a tensor of a component, and which of a batch where it is one (experts), else None."""

    component: str
    tensor: str
    index: int | None = None

    @property
    def layer_name(self) -> str:
        """Its name in the data set; experts are numbered."""
        return self.tensor if self.index is None else f"{self.tensor}[{self.index}]"


class OwnAdapter(Protocol):
    """A fine-tune's adapter: its updates by place, and the tensors it replaces whole."""

    name: str
    places: tuple[Place, ...]
    whole: tuple[Place, ...]

    def update(self, place: Place, weight: Tensor) -> Update:
        """The update of one matrix (d, k), in the orientation of the checkpoint."""
        ...

    def replacement(self, place: Place) -> Tensor:
        """The tensor that replaces the base's."""
        ...


class PeftFolder:
    """A PEFT adapter folder on a transformers base; opened lazily.

    Raises LowraError for kinds that are not read, factors of other ranks than configured, and modules the base lacks.
    """

    def __init__(self, folder: Path, base: Checkpoint, name: str) -> None:
        self.folder, self.name = folder, name
        config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
        try:
            self.config: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
            self._file = safe_open(weights, framework="pt")
            keys = list(self._file.keys())
        except (SafetensorError, ValueError, OSError) as error:
            raise LowraError(
                f"{folder} is no readable PEFT adapter ({error}); expected adapter_config.json and "
                "adapter_model.safetensors."
            ) from None
        self.type = peft_type(self.config, folder)
        pattern = key_pattern(self.type)
        component = next(iter(base.components))
        state = base.components[component]
        stored = {path: (tensor, kind) for tensor, (path, kind) in memory_modules(base, component).items()}
        pairs: dict[str, dict[str, str]] = {}
        self._shared: dict[str, str] = {}
        whole: dict[Place, str] = {}
        for key in keys:
            if match := pattern.match(key):
                # PEFT wraps a module once per parameter it adapts in it; the keys keep the wrappers apart.
                pairs.setdefault(key[: match.start("part") - 1], {})[match["part"]] = key
            elif key in SHARED:
                self._shared[key] = key
            elif key.startswith("base_model.model."):
                path, _, parameter = key.removeprefix("base_model.model.").rpartition(".")
                tensor = stored.get(path, (f"{path}.weight", ""))[0].removesuffix(".weight") + f".{parameter}"
                if tensor in state:
                    whole[Place(component, tensor)] = key
        self._whole = whole
        self._biases: dict[Place, Tensor] = {}  # those that change with an output's scale, as they are then
        self._modules: dict[Place, tuple[str, dict[str, str], bool]] = {}  # module, keys, whether it is transposed
        parameters = {str(p).rpartition(".")[2] for p in self.config.get("target_parameters") or ()}
        for prefix, found in pairs.items():
            module = prefix.removeprefix("base_model.model.").replace(".base_layer", "")
            tensor, kind = stored.get(module, (f"{module}.weight", ""))
            transposed = bool(kind == "Conv1D" or self.config.get("fan_in_fan_out"))
            if self.type == "LORA":
                if not {"lora_A", "lora_B"} <= set(found):
                    raise LowraError(f"{folder} has only {next(iter(found))} of {prefix!r}; it is incomplete.")
                a, b = (tuple(self._file.get_slice(found[f"lora_{part}"]).get_shape()) for part in "AB")
                candidates = [f"{module}.{parameter}" for parameter in sorted(parameters)]
                candidates = [name for name in candidates if name in state and self._fit(state.shape(name), a, b)]
                if len(candidates) > 1:
                    raise LowraError(
                        f"{prefix!r} of {folder} fits several parameters of the base: {', '.join(candidates)}."
                    )
                if candidates:
                    place = Place(component, candidates[0])
                    self._add_experts(place, state.shape(candidates[0]), module, found, a, b)
                    continue
            if tensor not in state:
                raise LowraError(
                    f"{folder} adapts {module!r}, no tensor of the base {base.label}; its {len(state)} tensors "
                    f"are named like {next(iter(state))!r}."
                )
            self._modules[Place(component, tensor)] = (module, found, transposed)
            self._checked(module, a[0] if self.type == "LORA" else None)
            bias = f"{tensor.removesuffix('.weight')}.bias"
            if self.type == "IA3" and bias in state:
                scale = self._file.get_tensor(found["ia3_l"]).float()
                if not ia3_on_inputs(self.config, module, scale.shape):
                    self._biases[Place(component, bias)] = state[bias].float() * scale.flatten()
        if not self._modules:
            raise LowraError(f"{weights} holds no tensors of {self.type} modules.")
        self.places = tuple(self._modules)
        self.whole = (*whole, *self._biases)

    @staticmethod
    def _fit(shape: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> bool:
        return len(shape) >= 2 and {a[1], b[0]} == set(shape[-2:]) and a[0] == b[1]

    def _add_experts(
        self,
        place: Place,
        shape: tuple[int, ...],
        module: str,
        keys: dict[str, str],
        a: tuple[int, ...],
        b: tuple[int, ...],
    ) -> None:
        """A parameter named by `target_parameters`: (out, in), or a batch of experts in either orientation."""
        experts = shape[0] if len(shape) == 3 else 1
        # Where both fit, PEFT takes experts for (in, out), and a plain matrix for (out, in).
        transposed = (a[1], b[0]) == shape[-2:] if shape[-2] != shape[-1] else experts > 1
        for index in range(experts):
            one = replace(place, index=index if len(shape) == 3 else None)
            self._modules[one] = (module, keys, transposed)
            self._checked(module, a[0] // experts)

    def _checked(self, module: str, found: int | None) -> int:
        """The rank by the configuration and its patterns, which LoRA's factors must have."""
        rank, _ = rank_and_alpha(self.config, module, self.folder)
        if found is not None and rank != found:
            raise LowraError(f"The rank of {module!r} in {self.folder} is {rank}, and the factors' is {found}.")
        return rank

    def update(self, place: Place, weight: Tensor) -> Update:
        """The update of one matrix (d, k), in the orientation of the checkpoint."""
        module, keys, transposed = self._modules[place]
        parts = {part: self._file.get_tensor(key) for part, key in (keys | self._shared).items()}
        if place.index is not None:
            rank = self._checked(module, None)
            a, b = parts["lora_A"], parts["lora_B"]
            experts = a.shape[0] // rank
            parts["lora_A"] = a.view(experts, rank, -1)[place.index]  # (r, in)
            parts["lora_B"] = b.view(b.shape[0], rank, experts)[:, :, place.index]  # (out, r)
        turned = weight.mT if transposed else weight
        update = peft_update(self.name, self.config, module, parts, turned, self.folder)
        return update.T if transposed else update

    def replacement(self, place: Place) -> Tensor:
        """The tensor that replaces the base's."""
        return self._biases[place] if place in self._biases else self._file.get_tensor(self._whole[place])


class PipelineFile:
    """A LoRA file of a Stable Diffusion pipeline, in any of its spellings (see `lowra.builders.kohya_files`)."""

    whole: tuple[Place, ...] = ()

    def __init__(self, path: Path, base: Checkpoint, name: str) -> None:
        self.name = name
        self._file = LoraFile(_file_in(path), expected_modules(base.place), name)
        self._modules = {
            Place(m.component, resolve(m.layer_name, base.components[m.component])): m for m in self._file.modules
        }
        self.places = tuple(self._modules)

    def update(self, place: Place, weight: Tensor) -> Update:
        """The update of one matrix (d, k)."""
        return self._file.read(self._modules[place])

    def replacement(self, place: Place) -> Tensor:
        """Never asked for: such files replace nothing."""
        raise KeyError(place)


def _file_in(path: Path) -> Path:
    """The file itself, or the one in an adapter's folder."""
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        if (path / name).is_file():
            return path / name
    return path


@dataclass(frozen=True)
class CustomBuilder:
    """The data set of one base and its adapters, and with `merged` every merged checkpoint.

    base: folder or Hub id. adapters: folders or files. merged: write the merged checkpoints as well. dtype: the format
    they are stored in. order: "once" rounds W + M, "twice" rounds M first (`lowra.bench.merging`).
    """

    base: Name
    adapters: Names
    merged: bool = False
    dtype: Annotated[str, OneOf(tuple(DTYPES))] = "float32"
    order: Annotated[str, OneOf(ORDERS)] = "once"

    def check(self) -> None:
        """Raise LowraError for adapters that are not there, or that do not fit the base."""
        self._opened()

    def _opened(self) -> tuple[Checkpoint, list[OwnAdapter]]:
        base = open_checkpoint(component_folder(self.base), label=self.base)
        paths = [Path(adapter) for adapter in self.adapters]
        if len(paths) < 2:
            raise LowraError(f"A data set holds at least 2 LoRAs of one base; got {len(paths)} in builder.adapters.")
        if missing := next((path for path in paths if not path.exists()), None):
            raise LowraError(f"There is no adapter at {missing}.")
        names = adapter_names(paths)
        kind: type[PeftFolder] | type[PipelineFile] = PipelineFile if "unet" in base.components else PeftFolder
        return base, [kind(path, base, name) for path, name in zip(paths, names, strict=True)]

    def build(self, folder: Path) -> Built:
        """Make the data set and the merged checkpoints in `folder`; what is there of the same files is kept."""
        base, adapters = self._opened()
        digest = "-".join(file_digest(_file_in(Path(adapter)))[:6] for adapter in self.adapters)[:60]
        places, apart = common_places(adapters)
        dataset = folder / f"dataset-{digest}"
        if not dataset.exists():
            write_dataset((layer(base, place, adapters) for place in places), dataset)
        report: dict[str, Any] = {"layers": len(places), "layers that only some adapters change": len(apart)}
        if self.merged:
            for adapter in adapters:
                place = folder / f"merged-{self.dtype}-{self.order}-{digest}" / adapter.name
                if not place.exists():
                    write_merged(base, adapter, place, DTYPES[self.dtype], self.order)
            report["merged"] = str(folder / f"merged-{self.dtype}-{self.order}-{digest}")
        return Built(dataset, str(base.place), None, report)


def adapter_names(paths: Sequence[Path]) -> list[str]:
    """A name per adapter: its own, or with its folder's where several are called alike."""
    names = [path.stem if path.is_file() else path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [f"{path.resolve().parent.name}_{name}" for path, name in zip(paths, names, strict=True)]
    return [f"{name}_{i}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def common_places(adapters: Sequence[OwnAdapter]) -> tuple[list[Place], list[Place]]:
    """The matrices that all adapters change, in natural order, and those that only some do.

    Raises LowraError when there is none that all change: a layer's row holds every model's update.
    """
    sets = [set(adapter.places) for adapter in adapters]
    shared = set.intersection(*sets)
    if not shared:
        raise LowraError(f"No layer is changed by all of {', '.join(adapter.name for adapter in adapters)}.")
    order = lambda place: (place.component, natural_order(place.tensor), place.index or 0)  # noqa: E731
    return sorted(shared, key=order), sorted(set.union(*sets) - shared, key=order)


def base_matrix(base: Checkpoint, place: Place) -> Tensor:
    """A matrix of the base, (d, k) float32."""
    state = base.components[place.component]
    if place.index is None:
        return state[place.tensor].float().flatten(1)
    view = view_of(state.shape(place.tensor))
    size = view.d * view.k
    flat = state.read(place.tensor, place.index * size, (place.index + 1) * size)
    return flat.float().view(view.d, view.k)


def layer(base: Checkpoint, place: Place, adapters: Sequence[OwnAdapter]) -> Layer:
    """One row of the data set. Raises LowraError for factors that do not fit the base's matrix."""
    weight = base_matrix(base, place)
    updates = tuple(fitting(adapter, place, weight) for adapter in adapters)
    return Layer(place.component, place.layer_name, base.label, weight, updates)


def fitting(adapter: OwnAdapter, place: Place, weight: Tensor) -> Update:
    """An adapter's update of a matrix (d, k), its shape checked."""
    update = adapter.update(place, weight)
    if misfit := update.misfit(*weight.shape):
        raise LowraError(
            f"Adapter {adapter.name!r} changes {place.layer_name!r} {misfit}; the base's is {weight.shape[0]} x "
            f"{weight.shape[1]}."
        )
    return update


def merged_matrix(weight: Tensor, update: Update, dtype: torch.dtype, order: str) -> Tensor:
    """W' (d, k) in `dtype`: the sum rounded once, or the update before it as well (see `lowra.bench.merging`)."""
    if order == "twice":
        return update.difference(weight, dtype).float().add_(weight).to(dtype)
    return update.apply(weight).to(dtype)


def write_merged(base: Checkpoint, adapter: OwnAdapter, folder: Path, dtype: torch.dtype, order: str) -> None:
    """A merged checkpoint in the base's layout, a tensor at a time; the folder appears when it is complete."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    changed: dict[tuple[str, str], list[Place]] = {}
    for place in adapter.places:
        changed.setdefault((place.component, place.tensor), []).append(place)
    whole = {(place.component, place.tensor): place for place in adapter.whole}
    for component, state in base.components.items():
        shards = {
            name: [replace(entry, dtype=dtype) if entry.dtype.is_floating_point else entry for entry in entries]
            for name, entries in plan_shards(state).items()
        }
        for name, entries in shards.items():
            for tensor, slot in Shard.planned(partial / component / name, entries, {}).create().items():
                if (component, tensor) in whole:
                    slot.write(adapter.replacement(whole[component, tensor]).to(slot.dtype))
                    continue
                for start, stop in pieces(slot.numel, torch.float32):
                    slot.write(state.read(tensor, start, stop).to(slot.dtype), start)
                for place in changed.get((component, tensor), ()):
                    weight = base_matrix(base, place)
                    merged = merged_matrix(weight, fitting(adapter, place, weight), dtype, order)
                    slot.write(merged, (place.index or 0) * weight.numel())
        if len(shards) > 1:
            (partial / component / index_name(state.files[0])).write_text(index_text(shards))
    for inside in other_files(base):
        (partial / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base.place / inside, partial / inside)
    partial.rename(folder)
