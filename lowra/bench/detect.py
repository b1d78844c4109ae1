"""Which layers were fine-tuned (App. G): compare checkpoints tensor by tensor.

LoRA changes the weights it targets in every fine-tuned model and nothing else, so comparing the published models
shows which layers there are to recover, without access to the base model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowra.errors import LowraError


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


def changed_weights(checkpoints: Sequence[Mapping[str, Tensor] | Path]) -> tuple[str, ...]:
    """The sorted names of the tensors that are not bit-for-bit the same in all checkpoints (App. G).

    checkpoints: two or more state dicts in one naming, or folders of safetensors files, read one tensor at a time.
    Raises LowraError when a name is missing from one of them, or shapes differ.
    """
    if len(checkpoints) < 2:
        raise LowraError(f"Finding changed layers compares at least 2 checkpoints; got {len(checkpoints)}.")
    states = [StoredState(state) if isinstance(state, Path) else state for state in checkpoints]
    labels = [str(state) if isinstance(state, Path) else f"checkpoint {i}" for i, state in enumerate(checkpoints)]
    first = states[0]
    for state, label in zip(states[1:], labels[1:], strict=True):
        if difference := sorted(set(first) ^ set(state)):
            owner, other = (labels[0], label) if difference[0] in first else (label, labels[0])
            raise LowraError(
                f"Tensor {difference[0]!r} is in {owner} and not in {other} ({len(difference)} such names); "
                "compare checkpoints of one architecture and one library version."
            )
    changed = []
    for name in sorted(first):
        reference = first[name]
        for state, label in zip(states[1:], labels[1:], strict=True):
            tensor = state[name]
            if tensor.shape != reference.shape:
                raise LowraError(
                    f"Tensor {name!r} has shape {tuple(reference.shape)} in {labels[0]} and {tuple(tensor.shape)} in "
                    f"{label}; leave out heads of different sizes before comparing."
                )
            if not torch.equal(tensor, reference):
                changed.append(name)
                break
    return tuple(changed)
