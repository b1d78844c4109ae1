"""Reading the results of a run back: the two tables and what is known of the run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lowra.errors import LowraError


@dataclass(frozen=True)
class Results:
    """One results folder. `layers` and `trials` hold the last run's cells only."""

    folder: Path
    run: dict[str, Any]
    layers: pd.DataFrame
    trials: pd.DataFrame

    @property
    def methods(self) -> list[str]:
        """The methods of the run, in the order they were asked for."""
        return [name for name in self.run["methods"] if name in set(self.trials["method"])]

    def pretty(self, method: str) -> str:
        """A method's name for tables and legends."""
        return str(self.run["methods"][method]["pretty"])

    @property
    def title(self) -> str:
        """The subset's name for captions."""
        return str(self.run["config"]["subset"]["title"])

    @property
    def caption(self) -> str:
        """Where the numbers come from, in a sentence a reader cannot miss."""
        where = {
            "mini": "**a miniature built and attacked on one machine, NOT the paper's experiment**",
            "published": "the published LoWRA-Bench data" if self.run["subset"] != "custom" else "a data set on disk",
            "build": "LoRAs built at full size by this project's recipes",
            "synthetic": "**true layer shapes with generated weights and LoRA updates, NOT the paper's data**",
        }[self.run["source"]]
        config = self.run["config"]
        trials = self.trials["trial"].nunique()
        text = (
            f"{self.title}, source={self.run['source']}: {where}. {len(self.run['models'])} LoRA models, "
            f"{self.layers.groupby(['layer_model', 'layer_name']).ngroups} layers, {trials} draws."
        )
        if config["merge"]["dtype"] != "float32":
            text += f" Merged weights stored in {config['merge']['dtype']} (the paper's are float32)."
        if not config["knows_rank"]:
            text += " The LoRA rank is not given to the methods."
        return f"{text} {config['note']}" if config.get("note") else text


def load(folder: Path) -> Results:
    """Read a results folder; raises LowraError when no run has finished there."""
    needed = [folder / name for name in ("run.json", "layers.parquet", "trials.parquet")]
    missing = [path.name for path in needed if not path.exists()]
    if missing:
        raise LowraError(
            f"{folder} holds no finished run ({', '.join(missing)} missing); expected results/SUBSET/SOURCE."
        )
    run = json.loads(needed[0].read_text())
    cells = set(run["cells"])
    trials = pd.read_parquet(needed[2])
    trials = trials[trials["cell"].isin(cells)]
    layers = pd.read_parquet(needed[1])
    keys = ["n_loras", "trial", "method", "merge_dtype", "knows_rank"]
    layers = layers.merge(trials[keys], on=keys)
    return Results(folder, run, layers, trials)
