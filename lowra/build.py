"""Build a subset without attacking it: base model, LoRAs and data set, kept in the cache.

Usage:    python -m lowra.build [KEY=VALUE ...]        (keys as of python -m lowra.run)

Examples: python -m lowra.build subset=vit                                                     (the miniature)
          python -m lowra.build subset=vit source=build builder.data=FOLDER                    (full size)
          python -m lowra.build subset=vit source=build builder.data=FOLDER builder.tasks=[dtd,kitti]
          python -m lowra.build subset=vit builder.kind=dora                     (kinds: lowra.builders.kinds)
          python -m lowra.build subset=mistral_dpo source=build builder.models=[0,3]
          python -m lowra.build subset=custom builder.base=BASE builder.adapters=[A,B,C] builder.merged=true

Processes and machines that share cache_dir build parts of one subset side by side: builder.tasks (ViT) and
builder.models (language models) choose some of its models. A build that was stopped goes on where it was.
--cfg job shows the settings and changes nothing.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lowra import signals
from lowra.cli import command
from lowra.errors import LowraError
from lowra.paths import conf_dir

if TYPE_CHECKING:
    from omegaconf import DictConfig


def build(cfg: DictConfig) -> None:
    """Build what the configuration names and say where it lies. Raises LowraError for a source that builds nothing."""
    from lowra.bench.sources import Recipe, make_source

    signals.stop()
    source = make_source(cfg)
    if not isinstance(source, Recipe):
        raise LowraError(f"source={source.name} builds nothing; give source=mini or source=build.")
    built = source.build()
    parts = {"dataset": built.dataset, "base model": built.base, "evaluation inputs": built.evaluation}
    parts["merged checkpoints"] = built.report.get("merged")
    print("\n".join(f"{name}: {place}" for name, place in parts.items() if place is not None))


def help_text() -> str:
    """What `--help` prints: usage, and the recipes there are."""
    lines = []
    for path in sorted((conf_dir() / "builder").glob("*.yaml")):
        subset, _, source = path.stem.rpartition("_")
        lines.append(f"  subset={subset} source={source:6} conf/builder/{path.name}")
    return f"{__doc__}\nRecipes; each file says what its settings are (builder.SETTING=VALUE):\n" + "\n".join(lines)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text())
    else:
        command(build)
