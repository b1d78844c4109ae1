"""The pipeline: `python -m lowra.run subset=vit`.

plan -> source -> draw L models ten times -> layer by layer: merge, recover, judge -> records -> report.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowra import signals
from lowra.cli import command
from lowra.imports import uncollected

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run(cfg: DictConfig) -> Any:
    """Recover and score all that the configuration names and that is not there yet; write the tables, print them.

    Returns the finished `lowra.pipeline.Outcome`. Raises LowraError for a user's mistake.
    """
    from lowra import pool
    from lowra.settings import check_settings

    check_settings(cfg)  # before any process is started
    # Imported for the workers while this process does it; pandas too, which pyarrow asks for at its first layer, and
    # this module with its command line, which is the main one.
    with pool.started(cfg.jobs, "lowra.judge", "pandas", "lowra.cli"):
        with uncollected():
            import pandas  # noqa: F401

            from lowra.pipeline import run as work

        signals.stop()
        return work(cfg)


if __name__ == "__main__":
    command(run)
