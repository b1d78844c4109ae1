"""Checkpoints as files: what they hold is known from headers, a tensor is read when it is asked for, whole or in part.

One checkpoint is a `StoredState`: the weights of one component under the names in its files, which differ from the
attribute paths of today's libraries (transformers renames modules on load). A model is a `Checkpoint`: its components,
and the other files beside them. Formats: safetensors, single or sharded with an index; half-precision variants; and
PyTorch's zip files through `weights_only=True` where there is no safetensors.

Bytes are read with `pread` into memory of our own. Mapped pages would count as this process's memory, a whole shard of
them before long; only PyTorch's own files are mapped, which it reads no other way.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowra.errors import LowraError

# File names of a component's weights, in order of preference, and the precisions a variant of it may be named by.
STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
VARIANTS = ("", "fp16", "bf16", "fp32")

# Of a Hub repository: configurations, tokenizers, and the weights transformers and diffusers load; not the single-file
# and half-precision copies that lie beside them.
_HUB_FILES = ["*.json", "*.txt", "*.model", "*model.safetensors", "*model-*-of-*.safetensors"]

# safetensors' names of number formats. Those PyTorch lacks here are refused where they are met.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

_HEADER_LIMIT = 10**8  # bytes; safetensors' own limit
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor. offset: of its first byte in the file, -1 in a PyTorch file.

    stored: its name in the file, where `name` is another.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int
    stored: str = ""

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self.numel * self.dtype.itemsize


class StoredState(Mapping[str, Tensor]):
    """The weights of one component, from a folder or a single file, as a mapping that reads what is asked for.

    Opening reads headers only. A `StoredState` can be sent to another process, which opens the files anew.
    Raises LowraError when there are no weights, a file is cut short or is none, a shard is missing from the index or
    from the folder, or unpickling would run code.
    """

    def __init__(self, place: Path) -> None:
        self.place = Path(place)
        self.files = weight_files(self.place)
        if not self.files:
            raise LowraError(f"{place} holds no safetensors weights; {_what_instead(self.place)}")
        self.infos: dict[str, TensorInfo] = {}
        self.metadata: dict[Path, dict[str, str]] = {}
        self._pickled: dict[Path, dict[str, Tensor]] = {}
        for path in self.files:
            for info in self._open(path):
                if info.name in self.infos:
                    raise LowraError(f"Tensor {info.name!r} is in {self.infos[info.name].path.name} and in {path}.")
                self.infos[info.name] = info
        _check_index(self.place, self.infos)

    @classmethod
    def of(cls, place: Path, infos: Iterable[TensorInfo]) -> StoredState:
        """Tensors of opened files under other names (see `TensorInfo.stored`)."""
        state = cls.__new__(cls)
        state.place, state.metadata, state._pickled = place, {}, {}
        state.infos = {info.name: info for info in infos}
        state.files = sorted({info.path for info in state.infos.values()})
        return state

    def _open(self, path: Path) -> Iterator[TensorInfo]:
        if path.suffix in _PICKLES:
            self._pickled[path] = tensors = unpickled(path)
            self.metadata[path] = {}
            return (TensorInfo(name, t.dtype, tuple(t.shape), path, -1) for name, t in tensors.items())
        infos, self.metadata[path] = read_header(path)
        return iter(infos)

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name).view(self.infos[name].shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self.infos

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pickled": {}}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header alone."""
        return self.infos[name].shape

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Entries [start, stop) of a tensor, flat and in the stored dtype, in memory of their own."""
        info = self.infos[name]
        stop = info.numel if stop is None else min(stop, info.numel)
        out = torch.empty(max(0, stop - start), dtype=info.dtype)
        if info.offset < 0:
            if info.path not in self._pickled:
                self._pickled[info.path] = unpickled(info.path)
            return out.copy_(self._pickled[info.path][info.stored or name].reshape(-1)[start:stop])
        if out.numel():
            view = memoryview(out.view(torch.uint8).numpy().data)
            with open(info.path, "rb", buffering=0) as file:
                file.seek(info.offset + start * info.dtype.itemsize)
                done = 0
                while done < len(view):
                    got = file.readinto(view[done:])
                    if not got:
                        raise LowraError(f"{info.path} ends inside tensor {name!r}; fetch it again.")
                    done += got
        return out

    def expect(self, name: str) -> None:
        """Tell the operating system that a tensor is read next: it fetches ahead, into memory of its own."""
        info = self.infos[name]
        if info.offset >= 0 and hasattr(os, "posix_fadvise"):
            with open(info.path, "rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), info.offset, info.nbytes, os.POSIX_FADV_WILLNEED)

    def same_bytes(self, name: str, other: StoredState, theirs: str) -> bool:
        """Whether two tensors are the same place in the same file (a hard link or a copy by name), without reading."""
        a, b = self.infos[name], other.infos[theirs]
        if a.offset < 0 or a.offset != b.offset or a.dtype != b.dtype or a.shape != b.shape:
            return False
        return os.path.samefile(a.path, b.path)


# ---- Files ------------------------------------------------------------------------------------------------------


def read_header(path: Path) -> tuple[list[TensorInfo], dict[str, str]]:
    """The tensors of a safetensors file and its metadata, from its header alone.

    Raises LowraError when it is no safetensors file, is cut short, or its header contradicts itself.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_HEADER_LIMIT, size - 8):
                raise ValueError("no header")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        infos = [_header_entry(path, name, entry, 8 + length) for name, entry in header.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LowraError(f"{path} is not a readable safetensors file ({error}); fetch it again.") from None
    end = 8 + length
    for info in sorted(infos, key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:
            raise LowraError(f"{path} is not a readable safetensors file (its header leaves holes); fetch it again.")
        end += info.nbytes
    if end != size:
        raise LowraError(
            f"{path} is not a readable safetensors file ({size:,} bytes, its header describes {end:,}: "
            f"{'cut short' if size < end else 'bytes added'}); fetch it again."
        )
    return infos, metadata


def _header_entry(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    if entry["dtype"] not in DTYPES:
        raise LowraError(
            f"Tensor {name!r} of {path} has the number format {entry['dtype']}; known: {', '.join(DTYPES)}. Quantised "
            "weights need to be dequantised first."
        )
    begin, end = entry["data_offsets"]
    info = TensorInfo(name, DTYPES[entry["dtype"]], tuple(int(size) for size in entry["shape"]), path, start + begin)
    if min(info.shape, default=0) < 0 or end - begin != info.nbytes:
        raise ValueError(f"tensor {name!r} has {end - begin} bytes, not {info.nbytes}")
    return info


def unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file, mapped where it can be; nothing but tensors is ever unpickled.

    A state dict nested under `state_dict` (as in Stable Diffusion's .ckpt) is found. Raises LowraError otherwise.
    """
    arguments: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        try:
            held = torch.load(path, mmap=True, **arguments)
        except RuntimeError:  # files older than PyTorch 1.6 cannot be mapped
            held = torch.load(path, **arguments)
    except pickle.UnpicklingError as error:
        first = str(error).splitlines()[0]
        raise LowraError(
            f"{path} is refused: it holds more than tensors, and unpickling it could run foreign code "
            f"(weights_only: {first}). Ask for a safetensors file."
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise LowraError(f"{path} is not a readable PyTorch file ({first}); fetch it again.") from None
    if isinstance(held, Mapping) and isinstance(held.get("state_dict"), Mapping):
        held = held["state_dict"]
    tensors = (
        {str(k): v.detach() for k, v in held.items() if isinstance(v, Tensor)} if isinstance(held, Mapping) else {}
    )
    if not tensors:
        raise LowraError(f"{path} holds no state dict; expected names and tensors.")
    return tensors


def weight_files(place: Path) -> list[Path]:
    """The files that make up one checkpoint: a file itself, or those a folder's index lists, or its single file.

    Safetensors before PyTorch's files, full precision before variants; [] where there is none.
    Raises LowraError when an index names a file that is missing or lies elsewhere, or leaves a shard out.
    """
    if place.is_file():
        return [place]
    for suffix in (".safetensors", ".bin"):
        for variant in VARIANTS:
            for stem in STEMS:
                index = _index_path(place, stem, suffix, variant)
                if index.exists():
                    return _indexed(index)
                single = place / f"{stem}{'.' + variant if variant else ''}{suffix}"
                if single.exists():
                    return [single]
    loose = sorted(path for suffix in (".safetensors", ".ckpt") for path in place.glob(f"*{suffix}"))
    loose = [path for path in loose if path.name != "adapter_model.safetensors"]
    if len(loose) > 1:
        names = ", ".join(path.name for path in loose[:5])
        raise LowraError(f"{place} holds {len(loose)} weight files and no index ({names}); name the file itself.")
    return loose


def _index_path(folder: Path, stem: str, suffix: str, variant: str) -> Path:
    return folder / f"{stem}{suffix}.index{'.' + variant if variant else ''}.json"


def _weight_map(index: Path) -> dict[str, str]:
    try:
        places = json.loads(index.read_text())["weight_map"]
        return {str(name): str(file) for name, file in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LowraError(f"{index} is not a readable index ({error}); fetch it again.") from None


def _indexed(index: Path) -> list[Path]:
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        if Path(name).name != name or name in ("", ".", ".."):
            raise LowraError(f"{index} names {name!r}, which is not a file beside it; do not trust this checkpoint.")
        if not (index.parent / name).exists():
            raise LowraError(f"{index} names {name}, which is not in {index.parent}; fetch it again.")
    shard = re.compile(re.sub(r"-\d+-of-", r"-\\d+-of-", re.escape(names[0]).replace(r"\-", "-")) if names else "$^")
    extra = sorted(
        path.name for path in index.parent.iterdir() if shard.fullmatch(path.name) and path.name not in names
    )
    if extra:
        raise LowraError(f"{index} does not list the shard {extra[0]}, which lies beside it; fetch the index again.")
    return [index.parent / name for name in names]


def _check_index(place: Path, infos: Mapping[str, TensorInfo]) -> None:
    """Every tensor the index promises is in the shard it names."""
    if place.is_file() or not infos:
        return
    first = next(iter(infos.values())).path
    stem, suffix = re.split(r"[.-]", first.name)[0], first.suffix
    for variant in VARIANTS:
        index = _index_path(place, stem, suffix, variant)
        if not index.exists():
            continue
        for name, file in _weight_map(index).items():
            if name not in infos or infos[name].path.name != file:
                raise LowraError(f"{index} says that tensor {name!r} is in {file}, and it is not; fetch both again.")
        return


def _what_instead(place: Path) -> str:
    if not place.exists():
        return "it does not exist."
    names = sorted(path.name for path in place.iterdir())
    if "adapter_config.json" in names:
        return "it is a PEFT adapter: merge it into its base model and save that."
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return f"{gguf[0]} is a GGUF file: convert it back to safetensors (transformers loads GGUF and saves it)."
    inside = sorted(path.parent.name for path in place.glob("*/*.safetensors"))
    if inside:
        return f"there are some in its folder {inside[0]}."
    return "expected model.safetensors or its shards, a diffusers pipeline, or pytorch_model.bin."


# ---- Models -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk. label: as the user named it. place: its folder or file. components: by folder name, "" the root.

    Picklable: another process opens the files anew.
    """

    label: str
    place: Path
    components: dict[str, StoredState]

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json (or model_index.json), {} where it has none or it is unreadable."""
        for name in ("config.json", "model_index.json"):
            path = self.place / name
            if path.is_file():
                try:
                    held = json.loads(path.read_text())
                except (OSError, ValueError):
                    return {}
                return held if isinstance(held, dict) else {}
        return {}


def open_checkpoint(place: str | Path, label: str | None = None) -> Checkpoint:
    """Open a model by its headers: a transformers folder, a diffusers pipeline, or a single file.

    Raises LowraError for a place without weights, and for quantised weights, with the way to dequantise them.
    """
    folder, label = Path(place), str(place) if label is None else label
    if not folder.exists():
        raise LowraError(f"There is no model at {place}.")
    if folder.suffix == ".gguf":
        raise LowraError(f"{place} is a GGUF file, which is quantised; {_DEQUANTISE['gguf']}")
    names = [""] if folder.is_file() or weight_files(folder) else []
    if folder.is_dir():
        names += _component_names(folder)
    components = {name: StoredState(folder / name if name else folder) for name in names or [""]}
    checkpoint = Checkpoint(label, folder, components)
    refuse_quantised(checkpoint)
    for state in components.values():
        if unmerged := next((name for name in state if re.search(r"[._]lora_(A|B|up|down)\b", name)), None):
            raise LowraError(
                f"{label} holds LoRA factors ({unmerged!r}), not merged weights: merge them into the base, save that."
            )
    return checkpoint


def _component_names(folder: Path) -> list[str]:
    """Folders with weights of the model: a pipeline's components, sentence-transformers' heads."""
    named: list[str] = []
    for listing in ("model_index.json", "modules.json"):
        path = folder / listing
        if path.is_file():
            try:
                held = json.loads(path.read_text())
            except ValueError as error:
                raise LowraError(f"{path} is not readable JSON ({error}); fetch it again.") from None
            named += [k for k in held if not k.startswith("_")] if isinstance(held, dict) else []
            named += [str(m.get("path", "")) for m in held if isinstance(m, dict)] if isinstance(held, list) else []
    for name in named:
        if name and (Path(name).name != name or name == ".."):
            raise LowraError(
                f"{folder} names the component {name!r}, which lies outside; do not trust this checkpoint."
            )
    return [name for name in named if name and (folder / name).is_dir() and weight_files(folder / name)]


_DEQUANTISE = {
    "gptq": "load it with transformers and GPTQModel, dequantise every layer, and save that",
    "awq": "load it with transformers, `model.dequantize()`, and save that",
    "bitsandbytes": "load it with transformers, `model.dequantize()`, and save that",
    "fp8": "load it with transformers and `FineGrainedFP8Config(dequantize=True)`, and save that",
    "gguf": "load it with transformers' `from_pretrained(..., gguf_file=...)`, which dequantises, and save that",
}
_QUANTISED_KEYS = (
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "gptq"),
    (re.compile(r"\.(SCB|absmax|quant_map|nested_absmax|quant_state\..+)$"), "bitsandbytes"),
    (re.compile(r"\.(weight_scale|weight_scale_inv|input_scale)$"), "fp8"),
)


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Raise LowraError for quantised weights, told by the configuration or by the headers.

    A merge that was quantised lost the low bits all recovery rests on; what dequantises it gives models that differ by
    the quantisation's own error.
    """
    settings = checkpoint.config.get("quantization_config")
    method = str(settings.get("quant_method", "")).lower() if isinstance(settings, dict) else ""
    found, where = method, "its configuration"
    for state in checkpoint.components.values():
        for name, info in state.infos.items():
            kind = next((kind for pattern, kind in _QUANTISED_KEYS if pattern.search(name)), "")
            kind = "fp8" if "float8" in str(info.dtype) else kind
            if kind and not found:
                found, where = kind, f"tensor {name!r}"
    if found:
        route = _DEQUANTISE.get(found, "load it with the library that made it, dequantise, and save that")
        raise LowraError(
            f"{checkpoint.label} is quantised ({found}, by {where}). Recovery compares weights at full precision: "
            f"{route}; what the quantisation rounded away stays lost."
        )


def component_folder(base: str | Path, component: str = "") -> Path:
    """The local folder of a base model's component; a Hub id is fetched.

    Raises LowraError when `base` is neither a folder nor reachable on the Hub.
    """
    folder = Path(base)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(base), allow_patterns=_HUB_FILES, ignore_patterns=["safety_checker/*"]))
        except Exception as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise LowraError(
                f"Base model {str(base)!r} is not a local folder and cannot be had from the Hub ({first}); "
                "give a local folder, or use source=mini."
            ) from None
    inside = folder / component if component else folder
    if not inside.is_dir():
        raise LowraError(f"{folder} has no component {component!r}; expected a folder of that name in it.")
    return inside


def load_state_dict(folder: Path) -> dict[str, Tensor]:
    """The state dict stored in a folder, single file or sharded, under the names in the file, all of it in memory."""
    return dict(StoredState(folder))


# ---- Putting weights in -----------------------------------------------------------------------------------------


def resolve(name: str, state: Mapping[str, Tensor]) -> str:
    """The state dict's key for a published layer name.

    Published names may lack `.weight`, and may carry the `text_model.` prefix that newer transformers no longer write.
    Raises LowraError when no spelling is there.
    """
    full = name if name.endswith(".weight") else f"{name}.weight"
    spellings = (full, full.removeprefix("text_model."), f"text_model.{full}")
    for spelling in spellings:
        if spelling in state:
            return spelling
    raise LowraError(
        f"The base checkpoint has no layer {name!r}; it holds {len(state)} others, e.g. {next(iter(state))!r}."
    )


def with_weights(
    state: Mapping[str, Tensor], weights: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """A copy of `state` with the given layers replaced.

    weights: layer name to (d, k) matrix; a convolution's shape is restored from the checkpoint.
    dtype: of the whole result (None keeps each tensor's own). Raises LowraError where a shape does not fit.
    """
    result = {
        name: tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
        for name, tensor in state.items()
    }
    for name, weight in weights.items():
        key = resolve(name, state)
        target = result[key]
        if weight.numel() != target.numel() or weight.shape[0] != target.shape[0]:
            raise LowraError(
                f"Recovered layer {name!r} has shape {tuple(weight.shape)}; the checkpoint's is {tuple(target.shape)}."
            )
        result[key] = weight.reshape(target.shape).to(target.dtype)
    return result


def other_files(checkpoint: Checkpoint) -> Sequence[Path]:
    """What lies in a model's folder beside its weights, relative: configurations, tokenizers, code; sorted.

    Other copies of the weights (ONNX, GGUF, checkpoints of the training) are no part of it, nor is anything hidden.
    """
    if checkpoint.place.is_file():
        return []
    kept = []
    for path in sorted(checkpoint.place.rglob("*")):
        inside = path.relative_to(checkpoint.place)
        hidden = any(part.startswith((".", "checkpoint-")) for part in inside.parts)
        weights = path.suffix in _WEIGHT_SUFFIXES or ".index" in path.name
        # An adapter's configuration beside whole weights: libraries would look for the adapter, which is not copied.
        if path.is_file() and not hidden and not weights and path.name != "adapter_config.json":
            kept.append(inside)
    return kept


_WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".onnx",
    ".msgpack",
    ".h5",
    ".tflite",
    ".ot",
)
