"""Which layers were fine-tuned (App. G): compare checkpoints tensor by tensor.

LoRA changes the weights it targets in every fine-tuned model and nothing else, so comparing the published models
shows which layers there are to recover, without access to the base model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lowra.checkpoints.reading import StoredState
from lowra.errors import LowraError


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
