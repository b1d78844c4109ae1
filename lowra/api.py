"""What Python users call: whole checkpoints, or one stack of merged weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowra.errors import LowraError
from lowra.methods.base import Method, Observation, Recovery, as_method
from lowra.methods.subspace_intersection import SubspaceIntersection

if TYPE_CHECKING:
    from lowra.recovery.session import Report


def recover_stack(
    stack: Tensor | Sequence[Tensor],
    rank: int | None = None,
    storage: torch.dtype | None = None,
    *,
    method: Method | None = None,
    seed: int = 0,
) -> Recovery:
    """Recover the shared weight of one layer from its merges.

    stack: (n, d, k), or n matrices of one shape, in any floating format. rank: of the updates where it is known.
    storage: the format the merges were stored in, whose rounding they carry; by default the coarsest that holds them.
    Returns the recovered weight as `candidates[0]` (d, k), with `status`, a sentence on how far to trust it, and
    `stats` (`certificate`, `ranks`, `grid`, `predicted_w_error`).
    Raises LowraError for a stack that no method can work on.

    >>> base = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    >>> updates = [torch.randn(40, 2) @ torch.randn(2, 30) / 100 for _ in range(3)]
    >>> found = recover_stack([base + update for update in updates])
    >>> found.stats["certificate"], found.stats["ranks"], torch.allclose(found.candidates[0], base, atol=1e-6)
    ('certified', '2,2,2', True)
    """
    if not isinstance(stack, Tensor):
        shapes = sorted({tuple(each.shape) for each in stack})
        if len(shapes) != 1:
            raise LowraError(f"The matrices have the shapes {shapes or '(none is given)'}; expected n of one shape.")
    merged = (stack if isinstance(stack, Tensor) else torch.stack(tuple(stack))).detach()
    if 0 in merged.shape:
        raise LowraError(f"The stack has shape {tuple(merged.shape)}; expected (n, d, k) with numbers in it.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int)):
        raise LowraError(f"rank is {rank!r}; expected a whole number, or None to let it be found.")
    if storage is None:
        storage = merged.dtype if merged.dtype in (torch.float16, torch.bfloat16) else torch.float32
    merged = merged.float() if merged.is_floating_point() else merged
    return (method or SubspaceIntersection()).recover(Observation(merged, rank, seed, storage))


def recover_checkpoints(
    models: Sequence[str | PathLike[str]],
    output: str | PathLike[str] | None = None,
    *,
    report: str | PathLike[str] | None = None,
    method: Method | None = None,
    rank: int | None = None,
    keep: str = "mean",
    adapters: bool = False,
    sure: bool = False,
    jobs: int = 1,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Recover the base model that fine-tuned checkpoints share, and write it.

    models: folders, single files or Hub ids. output: the folder to be made; None is an audit, which writes no weights.
    report: where an audit's card, records and picture go. keep: what stands for tensors changed in full, "mean" or
    "first". adapters: also write each model's own update as a PEFT adapter. sure: also write `sure.safetensors`, a mask
    per recovered tensor of the weights that are exact beyond reasonable doubt. jobs: processes. say: gets progress
    lines.
    Returns a `Report`: `records` (a dict per tensor), `counts` per certainty, `card` (Markdown), `folder`.
    Raises LowraError for models that do not fit together, a folder that is not empty, or a full disk. The same call
    continues what an interrupted one left.
    """
    from lowra.recovery.session import Request, carry_out, make_plan, placed

    if isinstance(models, str | PathLike):
        raise LowraError(f"models is {str(models)!r}; expected a list of folders, files or Hub ids.")
    request = Request(
        models=tuple(str(model) for model in models),
        output=None if output is None else placed(Path(output)),
        report=None if report is None else placed(Path(report)),
        method=as_method(method, "method") if method is not None else SubspaceIntersection(),
        rank=rank,
        keep=keep,
        seed=seed,
        jobs=jobs,
        adapters=adapters,
        sure=sure,
        command="lowra.recover_checkpoints(...)",
    )
    return carry_out(make_plan(request, say), say)
