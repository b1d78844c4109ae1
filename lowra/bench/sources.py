"""Where a subset comes from: `source=mini|published|build|synthetic` turned into data on disk or in memory.

Nothing falls back silently: what cannot be had is an error that names the alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lowra.bench.schema import LayerTable, open_dataset, open_hub
from lowra.builders.base import Builder, recipe_key
from lowra.errors import LowraError


@dataclass(frozen=True)
class Data:
    """A subset, opened.

    table: its layers. base: the base model's folder or Hub id, None for weights-only data. evaluation: the builder's
    folder of evaluation inputs, None where the metric's own configuration names them. report: numbers about a build.
    """

    table: LayerTable
    base: str | None = None
    evaluation: Path | None = None
    report: dict[str, Any] = field(default_factory=dict)


def make_builder(cfg: DictConfig) -> Builder:
    """The builder of a (subset, source) pair; raises LowraError where there is none."""
    if cfg.get("builder") is None:
        raise LowraError(
            f"Subset {cfg.subset.name!r} cannot be made by source={cfg.source.name}; use source=published with "
            "source.path=FOLDER, or another subset (mistral_dpo, mistral_sft, stable_diffusion, vit)."
        )
    missing = sorted(OmegaConf.missing_keys(cfg.builder))
    if missing:
        raise LowraError(
            f"source={cfg.source.name} subset={cfg.subset.name} needs {missing[0]}=...; "
            f"conf/builder/{cfg.subset.name}_{cfg.source.name}.yaml says what it is."
        )
    return instantiate(cfg.builder, _convert_="object")


def build_folder(cfg: DictConfig, builder: Builder) -> Path:
    """The cache folder of a recipe: another recipe is another folder."""
    return Path(cfg.cache_dir) / f"{cfg.subset.name}-{cfg.source.name}-{recipe_key(builder)}"


def weights_only(cfg: DictConfig) -> bool:
    """Whether there is no model to run, only weights to compare."""
    return cfg.source.name == "synthetic" or cfg.subset.name == "custom"


def open_data(cfg: DictConfig) -> Data:
    """Build, fetch, open or generate the subset a configuration names."""
    source = cfg.source.name
    if source in ("mini", "build"):
        builder = make_builder(cfg)
        builder.check()
        built = builder.build(build_folder(cfg, builder))
        return Data(open_dataset(built.dataset), built.base, built.evaluation, built.report)
    if source == "synthetic":
        if cfg.subset.name == "custom":
            raise LowraError("source=synthetic needs a family's layer shapes; subset=custom has none. Name a subset.")
        return Data(instantiate(cfg.source.table, family=cfg.subset.name, _convert_="object"))
    if cfg.source.path is not None:
        table: LayerTable = open_dataset(Path(cfg.source.path))
    elif cfg.subset.hub_config is None:
        raise LowraError("subset=custom is read from disk: give source=published source.path=FOLDER.")
    else:
        table = open_hub(cfg.source.repo, cfg.subset.hub_config)
    return Data(table, cfg.subset.base)
