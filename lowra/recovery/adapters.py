"""Each model's own update as a PEFT adapter of the recovered base: extraction without having had the base.

A tensor's factors are kept in a scratch file when it is recovered and put together at the end, one at a time, so that
no adapter is ever in memory whole.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowra.checkpoints.matching import Match
from lowra.checkpoints.reading import Checkpoint, StoredState, TensorInfo
from lowra.checkpoints.writing import Entry, Shard, SpaceTold
from lowra.methods.subspace_intersection.noise import joined, rounding_noise, stored_as
from lowra.methods.subspace_intersection.ranges import OVERSAMPLING, Difference, row_space, triplets
from lowra.recovery.tensors import Sources, view_of

SCRATCH = ".factors"


def scratch_file(folder: Path, label: str) -> Path:
    """Where a tensor's factors are kept until the adapters are written."""
    return folder / f"{hashlib.sha256(label.encode()).hexdigest()[:24]}.safetensors"


def factored(
    match: Match, tensor: Sources, stack: Tensor, answer: Tensor, labels: Sequence[str], index: int
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The factors of W'_i - W of every model, by "MODEL.A.INDEX", and the rank found of each.

    stack: (n, d, k). answer: (d, k), taken as it is written, in the checkpoint's own format. Factors are balanced, B =
    U sqrt(S) (d, r) and A = sqrt(S) V^T (r, k), float32, so that W + B A is the model's own weight.
    """
    base = answer.to(match.info.dtype).float()
    storage = stored_as(stack, tensor.storage())
    factors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for at, model in enumerate(tensor.models):
        generator = torch.Generator().manual_seed(0)
        noise = rounding_noise(stack[at], storage)
        difference = Difference(stack[at], base, torch.float64)
        part = row_space(difference, joined(noise, noise), OVERSAMPLING + min(base.shape) // 32, generator)
        ranks[labels[model]] = part.rank
        if part.rank:
            left, values, right = triplets(difference, part.right)
            root = values.sqrt()
            factors[f"{model}.A.{index}"] = (right * root).mT.float().contiguous()  # (r, k)
            factors[f"{model}.B.{index}"] = (left * root).float().contiguous()  # (d, r)
    return factors, ranks


def keep_factors(folder: Path, match: Match, factors: Mapping[str, Tensor]) -> None:
    """Keep a tensor's factors until the adapters are put together."""
    if factors:
        folder.mkdir(parents=True, exist_ok=True)
        place = scratch_file(folder, match.label)
        with SpaceTold(place):
            save_file(dict(factors), place)


def write_adapters(
    folder: Path,
    scratch: Path,
    models: Sequence[Checkpoint],
    used: Sequence[int],
    records: Mapping[str, dict[str, Any]],
) -> dict[str, list[str]]:
    """Put the adapters together, `folder`/NAME[/COMPONENT] per model; returns what each does not carry, by label.

    records: by tensor label. A tensor that is neither of low rank nor in a module of its own cannot be carried.
    """
    names = adapter_names(models, used)
    written: dict[str, list[str]] = {models[model].label: [] for model in used}
    for component in models[used[0]].components:
        own = {label: record for label, record in records.items() if record["component"] == component}
        modules = memory_modules(models[used[0]], component)
        for model in used:
            place = folder / names[model] / component if component else folder / names[model]
            missing = write_adapter(place, scratch, models, used[0], model, component, own, modules)
            written[models[model].label] += missing
    return written


def adapter_names(models: Sequence[Checkpoint], used: Sequence[int]) -> dict[int, str]:
    """A folder name per model: its own folder's or file's, with its number where several are called alike."""
    places = {i: models[i].place.resolve() for i in used}
    plain = {i: (place.stem if place.is_file() else place.name) or f"model_{i}" for i, place in places.items()}
    several = {name for name in plain.values() if list(plain.values()).count(name) > 1}
    names: dict[int, str] = {i: name for i, name in plain.items() if name not in several}
    for i in plain.keys() - names.keys():
        name = f"{plain[i]}_{i}"
        while name in names.values():
            name += "_"
        names[i] = name
    return names


def write_adapter(
    place: Path,
    scratch: Path,
    models: Sequence[Checkpoint],
    first: int,
    model: int,
    component: str,
    records: Mapping[str, dict[str, Any]],
    modules: Mapping[str, tuple[str, str]],
) -> list[str]:
    """One component's adapter; returns the tensors of the model that it does not carry. modules: `memory_modules`."""
    label = models[model].label
    ranks: dict[str, int] = {}
    adapted: list[tuple[str, str, int, bool]] = []  # module's key in the adapter, tensor, rank, whether transposed
    whole: list[dict[str, Any]] = []
    batches: dict[str, dict[str, Any]] = {}  # of experts
    for key, record in records.items():
        if label not in record["models"] or record["certainty"] in ("copied", "agreed"):
            continue
        if "adapters" not in record:
            whole.append(record)
            continue
        rank = record["adapters"].get(label, 0)
        if not rank:
            continue
        if view_of(record["shape"]).count > 1:
            batches[key] = record
            continue
        path, kind = modules.get(record["name"], (record["name"].removesuffix(".weight"), ""))
        ranks[path] = rank
        adapted.append((f"base_model.model.{path}", key, rank, kind == "Conv1D"))  # whose weight is stored (in, out)
    folder = models[first].place / component if component else models[first].place
    experts = expert_parameters(folder, tuple(record["name"] for record in batches.values()))
    whole += [record for record in batches.values() if record["name"] not in experts]
    batches = {key: record for key, record in batches.items() if record["name"] in experts}
    # One rank for all matrices of a batch; PEFT has no other for a parameter than the adapter's own.
    shared = max((record["adapters"][label] for record in batches.values()), default=0)
    if not ranks and not batches:
        return [record["name"] for record in whole]
    common = shared or max(set(ranks.values()), key=lambda r: (list(ranks.values()).count(r), r))
    for key, record in batches.items():
        parameter = experts[record["name"]]
        adapted.append((parameter.key, key, common, parameter.transposed))
    state = models[model].components.get(component)
    saved, missing = whole_modules(state, whole, modules, ranks)
    entries = [Entry(name, info.dtype, info.shape) for name, info in saved.items()]
    values: dict[str, Callable[[], Tensor]] = {}
    if state is not None:
        values = {name: partial(state.read, info.name) for name, info in saved.items()}
    for stem, key, rank, transposed in adapted:
        shape = records[key]["shape"]
        for part in "AB":
            name = f"{stem}.lora_{part}.weight"
            entries.append(Entry(name, torch.float32, factor_shape(part, shape, rank, transposed=transposed)))
            values[name] = partial(factor, scratch_file(scratch, key), model, part, shape, rank, transposed=transposed)
    place.mkdir(parents=True, exist_ok=True)
    slots = Shard.planned(place / "adapter_model.safetensors", entries, {}).create()
    for name, slot in slots.items():
        slot.write(values[name]())
    pattern = {f"^{re.escape(path)}": rank for path, rank in sorted(ranks.items()) if rank != common}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(kind == "Conv1D" for path, kind in modules.values() if path in ranks),
        "target_modules": sorted(ranks),
        "target_parameters": [experts[record["name"]].name for record in batches.values()] or None,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "modules_to_save": sorted({_owner(name) for name in saved}) or None,
    }
    with SpaceTold(place / "adapter_config.json"):
        (place / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return missing


@dataclass(frozen=True)
class ExpertParameter:
    """How PEFT adapts a batch of experts: by the parameter's name. key: what its factors' names begin with.

    transposed: its matrices are (in, out) rather than (out, in).
    """

    name: str
    key: str
    transposed: bool


@functools.lru_cache
def expert_parameters(folder: Path, names: tuple[str, ...]) -> dict[str, ExpertParameter]:
    """The stored tensors among `names` that PEFT can adapt as parameters (`target_parameters`).

    PEFT wraps a module once for each of its parameters; what the factors are called is asked of PEFT itself.
    """
    if not names:
        return {}
    try:
        from peft import LoraConfig, get_peft_model

        from lowra.builders.peft_adapters import checkpoint_names, skeleton

        loaded = skeleton(folder)
        stored = checkpoint_names(loaded)
        memory = {name: parameter for parameter, name in stored.items()}
        config = LoraConfig(r=1, target_modules=[], target_parameters=[memory[n] for n in names if n in memory])
        wrapped = get_peft_model(loaded, config, low_cpu_mem_usage=True)
    except Exception:
        return {}  # a model of remote code, or of another library
    found = {}
    for key, module in wrapped.named_modules():
        if not hasattr(module, "parameter_name") or not hasattr(module, "lora_A"):
            continue
        owner = key.replace(".base_layer", "").removeprefix("base_model.model.")
        name = f"{owner}.{module.parameter_name}"
        transposed = bool(getattr(module.get_base_layer(), "is_transposed", False))  # type: ignore[operator]
        if name in stored:
            found[stored[name]] = ExpertParameter(name, key, transposed)
    return found


def factor_shape(part: str, shape: Sequence[int], rank: int, *, transposed: bool) -> tuple[int, ...]:
    """The shape PEFT gives a factor of a tensor: of a matrix, a convolution, or a batch of matrices.

    transposed: the matrices are stored (in, out).
    """
    if (count := view_of(shape).count) > 1:
        inside, outside = shape[1:] if transposed else shape[:0:-1]
        return (count * rank, inside) if part == "A" else (outside, rank * count)
    d, k, *kernel = shape
    if transposed:
        return (rank, d) if part == "A" else (k, rank)
    return (rank, k, *kernel) if part == "A" else (d, rank, *([1] * len(kernel)))


def factor(path: Path, model: int, part: str, shape: Sequence[int], rank: int, *, transposed: bool) -> Tensor:
    """A factor's entries from the scratch file, in the order of `factor_shape`; lower ranks are filled up with zeros.

    Of a batch A is (experts r, in) and B (out, r experts); a matrix is a batch of one.
    """
    view = view_of(shape)
    # M = B A, and M^T = A^T B^T: for (in, out) matrices the factors change places.
    stored = {"A": "B", "B": "A"}[part] if transposed else part
    whole = torch.zeros(view.count, rank, view.d if stored == "B" else view.k)
    with safe_open(path, framework="pt") as file:
        there = set(file.keys())
        for index in range(view.count):
            if (name := f"{model}.{stored}.{index}") in there:
                values = file.get_tensor(name)
                values = values.mT if stored == "B" else values  # (r, in or out)
                whole[index, : values.shape[0], : values.shape[1]] = values
    return (whole if part == "A" else whole.permute(2, 1, 0)).contiguous()


def _owner(name: str) -> str:
    return name.removeprefix("base_model.model.").rpartition(".")[0]


def whole_modules(
    state: StoredState | None,
    records: Sequence[dict[str, Any]],
    modules: Mapping[str, tuple[str, str]],
    adapted: Mapping[str, int],
) -> tuple[dict[str, TensorInfo], list[str]]:
    """Adapter names to tensors of modules that were trained whole (norms, heads), and the tensors nothing carries."""
    saved: dict[str, TensorInfo] = {}
    missing = []
    for record in records:
        stem, _, _ = record["name"].rpartition(".")
        path = modules.get(f"{stem}.weight", (stem, ""))[0]
        own = {} if state is None else {n: i for n, i in state.infos.items() if n.rpartition(".")[0] == stem}
        if not own or path in adapted:
            missing.append(record["name"])
        for name, info in own.items() if path not in adapted else ():
            saved[f"base_model.model.{path}.{name.rpartition('.')[2]}"] = info
    return saved, missing


def memory_modules(model: Checkpoint, component: str) -> dict[str, tuple[str, str]]:
    """Tensor name in the checkpoint to module path in memory and the module's class, where transformers knows them.

    Only weights are listed. PEFT names modules as the library calls them once loaded, which is not as files do.
    """
    state = model.components[component]
    plain = {name: (name.removesuffix(".weight"), "") for name in state if name.endswith(".weight")}
    folder = model.place / component if component else model.place
    if not (folder / "config.json").is_file():
        return plain
    try:
        if "model_type" not in json.loads((folder / "config.json").read_text()):
            return plain  # diffusers, whose files and modules are called alike, or a library we do not know
        from lowra.builders.peft_adapters import checkpoint_names, skeleton

        loaded = skeleton(folder)
        traced = checkpoint_names(loaded)
    except Exception:
        return plain  # a model of remote code, or of another library: its files' own names are the best guess
    kinds = {name: type(module).__name__ for name, module in loaded.named_modules()}
    known = {}
    for memory, stored in traced.items():
        if memory.endswith(".weight"):
            path = memory.removesuffix(".weight")
            known[stored] = (path, kinds.get(path, ""))
    return {**plain, **known}
