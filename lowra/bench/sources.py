"""Where a subset comes from: `source=mini|published|build|synthetic`, each an object that opens and explains itself.

Nothing falls back silently: what cannot be had is an error that names the alternatives.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from lowra.bench.schema import LayerTable, open_dataset, open_hub
from lowra.bench.synthetic import Family, SyntheticTable
from lowra.builders.base import Builder, Built, recipe_key
from lowra.checks import Count, Name, OneOf, make, make_as
from lowra.code import code_digest
from lowra.digests import remembered
from lowra.errors import LowraError
from lowra.packages import BUILDERS, require, versions
from lowra.paths import conf_dir, register_resolvers

KINDS = ("image_classifier", "causal_lm", "text_to_image")
"""Kinds of model; metrics name those they can score."""


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


@dataclass(frozen=True)
class Subset:
    """A model family and its LoRAs: a file of conf/subset.

    name: of the file, the folders and the draws. title: for captions. n_loras: how many models the paper attacks at
    once. steps: Spectral DeTuning's. kind: of model, one of `KINDS`; None where there is no model, only weights.
    hub_config: the subset's name in the published data set, None where it is not in there. base: the base model's Hub
    id or folder. synthetic: layer shapes and statistics (`lowra.bench.synthetic.Family`), None where nobody wrote them.
    """

    name: Name
    title: Name
    n_loras: Any  # checked where the run's own n_loras is, which it is the default of
    steps: Count
    kind: Annotated[str, OneOf(KINDS)] | None = None
    hub_config: str | None = None
    base: str | None = None
    synthetic: Mapping[str, Any] | None = None


class Source(Protocol):
    """What a file of conf/source becomes."""

    @property
    def name(self) -> str:
        """The file's."""
        ...

    @property
    def weights_only(self) -> bool:
        """Whether there is no model to run, only weights to compare."""
        ...

    @property
    def miniature(self) -> bool:
        """Whether the models are small ones made here, not the paper's."""
        ...

    @property
    def caption(self) -> str:
        """Where the numbers come from: a part of a sentence, in Markdown, that a reader cannot miss."""
        ...

    @property
    def base(self) -> str | None:
        """The base model's Hub id or folder, as far as it is known before anything is built; or None."""
        ...

    def check(self) -> None:
        """Raise LowraError for anything that would stop `open` later; nothing is built, and little is read."""
        ...

    def open(self) -> Data:
        """Build, fetch, open or generate the subset."""
        ...


@dataclass(frozen=True)
class Recipe:
    """A source that builds: a builder's recipe and the cache it builds in.

    subset: the entries of `Subset`. builder: the recipe of conf/builder/<subset>_<source>.yaml, None where there is
    none. cache_dir: where built subsets are kept, a folder a recipe.
    """

    name: Name
    subset: Mapping[str, Any]
    builder: Mapping[str, Any] | None
    cache_dir: Name

    weights_only = False
    miniature = False

    def make_builder(self) -> Builder:
        """The builder. Raises LowraError where there is none, or for a setting that it does not have or cannot use."""
        subset = self.subset["name"]
        if self.builder is None:
            known = sorted(path.stem for path in (conf_dir() / "builder").glob(f"*_{self.name}.yaml"))
            raise LowraError(
                f"Subset {subset!r} cannot be made by source={self.name}: there is no conf/builder/{subset}_{self.name}"
                f".yaml. Use source=published with source.path=FOLDER, or another subset "
                f"({', '.join(stem.removesuffix(f'_{self.name}') for stem in known)})."
            )
        require(f"source={self.name}", *BUILDERS)
        try:
            return make(self.builder, "builder")
        except LowraError as error:
            raise LowraError(f"{error} (conf/builder/{subset}_{self.name}.yaml says what the settings are.)") from None

    @property
    def base(self) -> str | None:
        """The base model that the recipe names; None where it makes one."""
        return self.make_builder().base

    def folder(self, builder: Builder) -> Path:
        """The cache folder of a recipe: another recipe is another folder."""
        return Path(self.cache_dir) / f"{self.subset['name']}-{self.name}-{recipe_key(builder)}"

    def check(self) -> None:
        """Raise LowraError for a recipe that cannot be built."""
        make_as(Subset, self.subset, "subset")
        self.check_recipe(self.make_builder())

    def check_recipe(self, builder: Builder) -> None:
        """Raise LowraError for anything that would stop the build."""
        builder.check()

    def build(self) -> Built:
        """Build what is not built yet. Raises LowraError where the cache cannot be written."""
        builder = self.make_builder()
        self.check_recipe(builder)
        folder = self.folder(builder)
        if self.miniature:  # dozens of tiny models are loaded; a progress bar for each would drown ours
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        made = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            made = True
            return builder.build(folder)
        except OSError as error:
            if made and not str(error.filename).startswith(str(folder.parent)):
                raise  # a file of somewhere else
            raise LowraError(
                f"The cache folder {str(folder.parent)[:80]!r} cannot be used ({error.strerror}); "
                "give cache_dir=FOLDER, one that can be written."
            ) from None

    def open(self) -> Data:
        """Build what is not built yet, and open it."""
        built = self.build()
        return Data(open_dataset(built.dataset), built.base, built.evaluation, built.report)


@dataclass(frozen=True)
class Mini(Recipe):
    """The family in miniature, pre-trained and fine-tuned on this machine.

    lpips_trunk: the trunk that LPIPS judges a miniature with (see conf/metrics/lpips.yaml).
    """

    lpips_trunk: str

    miniature = True
    caption = "**a miniature built and attacked on one machine, NOT the paper's experiment**"

    def check_recipe(self, builder: Builder) -> None:
        """Raise LowraError for settings that do not go together.

        Nothing but settings, code, packages and GPUs has a say in that where the base is made here, so what passed once
        is not asked again: to ask, model libraries are imported, which is most of the time of a run with nothing to do.
        """
        if getattr(builder, "miniature", None) is None:  # a recipe for given models, at the wrong source or as asked
            builder.check()
            return
        kind = type(builder)
        installed = versions(("torch", *BUILDERS))
        known = [kind.__qualname__, code_digest(kind.__module__), installed, torch.cuda.device_count()]
        recipe = dataclasses.asdict(builder)  # type: ignore[call-overload]  # builders are dataclasses
        what = json.dumps(["passed its check", *known, recipe], sort_keys=True, default=str)
        remembered(what, [], lambda: builder.check() or "yes")  # type: ignore[func-returns-value]


@dataclass(frozen=True)
class Build(Recipe):
    """The subset at full size, by the recipes of Appendix D."""

    caption = "LoRAs built at full size by this project's recipes"


@dataclass(frozen=True)
class Own(Recipe):
    """One's own LoRAs on one's own base (`lowra.builders.custom`)."""

    caption = "LoRAs of one's own"


@dataclass(frozen=True)
class Published:
    """LoWRA-Bench from the Hub, or data in its schema on disk.

    path: a folder of parquet files, a parquet file or a `save_to_disk` folder; None fetches from the Hub. repo: the
    data set's Hub id. split: of the data set.
    """

    name: Name
    subset: Mapping[str, Any]
    path: str | None
    repo: Name
    split: Name

    miniature = False

    @property
    def _subset(self) -> Subset:
        return make_as(Subset, self.subset, "subset")

    @property
    def weights_only(self) -> bool:
        """Whether no model is known that the weights belong to."""
        return self._subset.kind is None

    @property
    def base(self) -> str | None:
        """The base model that the subset names."""
        return self._subset.base

    @property
    def caption(self) -> str:
        """Where the numbers come from."""
        return "a data set on disk" if self._subset.hub_config is None else "the published LoWRA-Bench data"

    def check(self) -> None:
        """Raise LowraError when the subset is not in the published data set and no folder is given, or it is none."""
        if self.path is not None:
            open_dataset(Path(self.path), self._subset.hub_config, self.split)
        elif self._subset.hub_config is None:
            raise LowraError(
                f"subset={self._subset.name} is not in the published data set; give source.path=FOLDER, data on disk."
            )

    def open(self) -> Data:
        """Open the folder, or fetch from the Hub."""
        subset = self._subset
        if self.path is not None:
            table = open_dataset(Path(self.path), subset.hub_config, self.split)
        else:
            self.check()
            table = open_hub(self.repo, str(subset.hub_config), self.split)
        return Data(table, subset.base)


@dataclass(frozen=True)
class Synthetic:
    """A family's layer shapes with generated weights and updates.

    table: settings of `lowra.bench.synthetic.SyntheticTable`.
    """

    name: Name
    subset: Mapping[str, Any]
    table: Mapping[str, Any]

    weights_only = True
    miniature = False
    base = None
    caption = "**true layer shapes with generated weights and LoRA updates, NOT the paper's data**"

    def check(self) -> None:
        """Raise LowraError where the subset has no layer shapes, or for settings that cannot work."""
        self.open()

    def open(self) -> Data:
        """The table; its layers are made when they are read."""
        subset = make_as(Subset, self.subset, "subset")
        table = make_as(SyntheticTable, {**self.table, "family": family(subset)}, "source.table")
        return Data(table)


def family(subset: Subset) -> Family:
    """A subset's synthetic family. Raises LowraError where it has none."""
    if subset.synthetic is None:
        raise LowraError(
            f"source=synthetic needs a family's layer shapes; subset={subset.name} has none (subset.synthetic is null)."
        )
    known = {"name": subset.name, "base": subset.base or subset.name}
    return make_as(Family, known | dict(subset.synthetic), "subset.synthetic")


def synthetic_table(subset: str, **settings: Any) -> SyntheticTable:
    """The synthetic table of a file in conf/subset, without a run: for scripts. settings: `SyntheticTable`'s."""
    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", overrides=[f"subset={subset}", "source=synthetic"])
    return SyntheticTable(family(make_as(Subset, cfg.subset, "subset")), **settings)


def make_source(cfg: DictConfig) -> Source:
    """The source of a configuration.

    Raises LowraError for settings that it does not have or cannot use, and for subset=custom anywhere but on disk.
    """
    if cfg.subset.name == "custom" and cfg.source.name in ("mini", "build") and cfg.builder.base is not None:
        # One's own adapters: read, not trained, so that there is no miniature of them.
        fields = {"subset": cfg.subset, "builder": cfg.builder, "cache_dir": cfg.cache_dir}
        return make_as(Own, {"name": "build", **fields}, "source")
    if cfg.subset.name == "custom" and cfg.source.name != "published":
        raise LowraError(
            f"subset=custom is read from disk and cannot come from source={cfg.source.name}: "
            "give source=published source.path=FOLDER, or builder.base=BASE builder.adapters='[A,B,C]'."
        )
    return make(cfg.source, "source")
