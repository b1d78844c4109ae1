"""Build a subset without attacking it: `python -m lowra.build subset=vit source=build builder.data=FOLDER`."""

from __future__ import annotations

from omegaconf import DictConfig

from lowra.bench.sources import make_source
from lowra.cli import command
from lowra.errors import LowraError


def build(cfg: DictConfig) -> None:
    """Build what the configuration names and say where it lies. Raises LowraError for a source that builds nothing."""
    source = make_source(cfg)
    if not hasattr(source, "build"):
        raise LowraError(f"source={source.name} builds nothing; give source=mini or source=build.")
    built = source.build()
    print(f"dataset: {built.dataset}\nbase model: {built.base}\nevaluation inputs: {built.evaluation}")


if __name__ == "__main__":
    command(build)
