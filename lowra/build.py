"""Build a subset without attacking it: `python -m lowra.build subset=vit source=build builder.tasks=[dtd]`."""

from __future__ import annotations

from omegaconf import DictConfig

from lowra.bench.sources import build_folder, make_builder
from lowra.cli import command


def build(cfg: DictConfig) -> None:
    """Build what the configuration names and say where it lies."""
    builder = make_builder(cfg)
    builder.check()
    built = builder.build(build_folder(cfg, builder))
    print(f"dataset: {built.dataset}\nbase model: {built.base}\nevaluation inputs: {built.evaluation}")


if __name__ == "__main__":
    command(build)
