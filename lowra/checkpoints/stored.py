"""Checkpoints as files: state dicts in the checkpoint's own names, with recovered weights put in.

Layer names in a benchmark data set are those of the base model's checkpoint file, which differ from the attribute paths
of today's libraries (transformers renames modules on load). Recovered weights therefore go into a state dict that
the library owning the model loads; nothing here walks module attributes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lowra.errors import LowraError

_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")

# Of a Hub repository: configurations, tokenizers, and the weights transformers and diffusers load; not the single-file
# and half-precision copies that lie beside them.
_HUB_FILES = ["*.json", "*.txt", "*.model", "*model.safetensors", "*model-*-of-*.safetensors"]


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


class StoredState(Mapping[str, Tensor]):
    """A folder's safetensors weights, single file or sharded, as a mapping that reads a tensor when it is asked for.

    Opening reads the headers only. Raises LowraError when there is no readable safetensors file, or a shard is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = [path for path in _weight_files(folder) if path.exists()]
        if not paths:
            raise LowraError(f"{folder} holds no safetensors weights; expected model.safetensors or its shards.")
        self._places = {}
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise LowraError(f"{path} is not a readable safetensors file ({error}); fetch it again.") from None
            self._places.update(dict.fromkeys(file.keys(), file))

    def __getitem__(self, name: str) -> Tensor:
        return self._places[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header alone."""
        return tuple(self._places[name].get_slice(name).get_shape())


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up one checkpoint; the names an index lists must all be there."""
    for stem in ("model", "diffusion_pytorch_model"):
        index = folder / f"{stem}.safetensors.index.json"
        if index.exists():
            shards = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
            for shard in shards:
                if not shard.exists():
                    raise LowraError(f"{index} names {shard.name}, which is not in {folder}; fetch it again.")
            return shards
        if (folder / f"{stem}.safetensors").exists():
            return [folder / f"{stem}.safetensors"]
    return []


def load_state_dict(folder: Path) -> dict[str, Tensor]:
    """The state dict stored in a folder, single file or sharded, under the names in the file.

    Reads safetensors, or `.bin` files with `weights_only=True`. Raises LowraError if there is neither.
    """
    for stem in _STEMS:
        for suffix in (".safetensors", ".bin"):
            index = folder / f"{stem}{suffix}.index.json"
            if index.exists():
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
                return {name: t for shard in shards for name, t in _load(folder / shard).items()}
            if (folder / f"{stem}{suffix}").exists():
                return _load(folder / f"{stem}{suffix}")
    raise LowraError(f"{folder} holds no weights; expected model.safetensors, its shards, or pytorch_model.bin.")


def _load(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


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
