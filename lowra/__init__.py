"""lowra: the open benchmark for pre-fine-tuning weight recovery."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowra.api import recover_checkpoints, recover_stack

__version__ = "0.1.0"
__all__ = ["__version__", "recover_checkpoints", "recover_stack"]


def __getattr__(name: str) -> Any:
    """The functions of `lowra.api`, imported when first asked for: a command's `--help` needs none of it."""
    if name in ("recover_checkpoints", "recover_stack"):
        from lowra import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
