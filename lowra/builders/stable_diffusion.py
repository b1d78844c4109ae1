"""Stable Diffusion LoRAs found in the wild, collected into the LoWRA-Bench format (Appendix D.3, Table 8).

264 layers: twelve modules of each of the UNet's sixteen attention blocks, and six of each of the text encoder's twelve
layers. (The text of D.3 counts 192, the UNet's alone; Table 1 has 264.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor
from tqdm import tqdm

from lowra.bench.schema import Layer, write_dataset
from lowra.builders.base import Built
from lowra.builders.kohya_files import LoraFile, Module, expected_modules
from lowra.builders.stable_diffusion_mini import Miniature
from lowra.builders.stages import stage
from lowra.checkpoints.reading import component_folder, load_state_dict, resolve
from lowra.checks import Count, Positive, Range, check_fields
from lowra.errors import LowraError

CIVITAI = Path(__file__).with_name("civitai.json")


@dataclass(frozen=True)
class Adapter:
    """A LoRA file and the name it goes by."""

    name: str
    path: Path


def collect(base: str, adapters: Sequence[Adapter], folder: Path, *, allow_missing: bool = False) -> dict[str, Any]:
    """Write the data set of LoRA files of one base model to `folder`, a layer at a time.

    base: diffusers folder or Hub id. allow_missing: keep only the layers that every file has trained, instead of
    refusing files that leave layers out. Ranks and alphas may differ between files and layers.
    Returns what was found: number of layers, layers left out, ranks and alphas per file.
    Raises LowraError for a file that does not fit (see `LoraFile`) or, unless allowed, lacks modules.
    """
    modules, files = open_files(base, adapters, allow_missing=allow_missing)
    trained = [set(file.modules) - set(file.untrained) for file in files]
    kept = [module for module in modules if all(module in mine for mine in trained)]
    if not kept:
        raise LowraError("No layer is adapted by every LoRA file; take files that adapt the same layers.")
    found: dict[str, dict[str, set[float]]] = {a.name: {"rank": set(), "alpha": set()} for a in adapters}

    def layers() -> Iterator[Layer]:
        component, state = "", dict[str, Tensor]()
        for module in tqdm(kept, desc="collecting layers", leave=False):
            if module.component != component:  # one component in memory at a time
                component = module.component
                state = load_state_dict(component_folder(base, component))
            weight = state[resolve(module.layer_name, state)]
            updates = tuple(file.read(module) for file in files)
            for update in updates:
                found[update.name]["rank"].add(update.rank)
                found[update.name]["alpha"].add(update.alpha)
            yield Layer(component, module.layer_name, base_name(base), weight.flatten(1).float(), updates)

    write_dataset(layers(), folder)
    return {
        "layers": len(kept),
        "left_out": [module.layer_name for module in modules if module not in kept],
        "ranks": {name: sorted(values["rank"]) for name, values in found.items()},
        "alphas": {name: sorted(values["alpha"]) for name, values in found.items()},
    }


def base_name(base: str) -> str:
    """The name a base model goes by in the data set: its Hub id, or its folder's name."""
    return Path(base).name if Path(base).is_dir() else base


def open_files(
    base: str, adapters: Sequence[Adapter], *, allow_missing: bool = False
) -> tuple[list[Module], list[LoraFile]]:
    """The base model's modules, and the LoRA files opened and checked against them.

    Raises LowraError for a file that does not fit, or that lacks a module or never trained it (B = 0), unless allowed.
    """
    modules = expected_modules(base)
    files = [LoraFile(adapter.path, modules, adapter.name) for adapter in adapters]
    advice = "Take another file, or set allow_missing=true to leave those layers out for all LoRAs."
    for file in files if not allow_missing else []:
        if missing := [module.kohya_name for module in modules if module not in file.modules]:
            raise LowraError(
                f"{file.path.name} adapts {len(file.modules)} of the base model's {len(modules)} modules; missing: "
                f"{', '.join(missing)}. {advice}"
            )
        if file.untrained:
            raise LowraError(
                f"{file.path.name} has {len(file.untrained)} untrained modules (B is zero), the first "
                f"{file.untrained[0].kohya_name!r}. {advice}"
            )
    return modules, files


@dataclass(frozen=True)
class StableDiffusionBuilder:
    """The subset of Table 8: LoRA files of SD 1.5 from a folder; in miniature, of a pipeline and LoRAs trained here.

    base: diffusers folder or Hub id of SD 1.5 (the paper's runwayml repository is gone; this is its community copy).
    loras: folder of `.safetensors` files, from `scripts/download_civitai.py` or downloaded by hand.
    miniature: what is trained instead, where base and loras are None.
    count: how many LoRAs there must be. allow_missing: see `collect`.
    guidance, inference_steps: scale and denoising steps that pictures are generated with, here and by the metric.
    """

    base: str | None
    loras: str | None
    miniature: Miniature | None
    count: Annotated[int, Range(2)]
    allow_missing: bool
    guidance: Positive
    inference_steps: Count

    def check(self) -> None:
        """Open every file and compare it with the base model's modules; in miniature, look at the sizes alone."""
        check_fields(self, "builder")
        if self.miniature is None:
            open_files(str(self.base), self.adapters(), allow_missing=self.allow_missing)
            return
        if self.base is not None or self.loras is not None:
            raise LowraError(
                "builder.base and builder.loras are for builds from given files, and builder.miniature trains its own; "
                "use source=build, or builder.miniature=null."
            )
        self.miniature.check(self.count)

    def build(self, folder: Path) -> Built:
        """Collect the files into `folder`; in miniature, after training what is not trained yet."""
        report: dict[str, Any] = {}
        evaluation = None
        if self.miniature is None:
            base, adapters = str(self.base), self.adapters()
        else:
            base, evaluation = str(folder / "base"), folder / "evaluation"
            paths, report = self.miniature.build(folder, self.count, self.guidance, self.inference_steps)
            adapters = [Adapter(style, path) for style, path in paths.items()]
        report["dataset"] = stage(
            folder / "collected",
            lambda place: collect(base, adapters, place / "dataset", allow_missing=self.allow_missing),
        )
        return Built(folder / "collected" / "dataset", base, evaluation, report)

    def adapters(self) -> list[Adapter]:
        """The LoRA files: those named by a version id of Table 8 in its order, then all others by name.

        Raises LowraError when the folder is missing or does not hold `count` files.
        """
        if self.loras is None or self.base is None:
            raise LowraError(
                "The full-size Stable Diffusion build needs builder.base and builder.loras=FOLDER, a folder of LoRA "
                "files (python scripts/download_civitai.py FOLDER fetches those of Table 8); or use source=mini."
            )
        folder = Path(self.loras).expanduser()
        if not folder.is_dir():
            raise LowraError(
                f"LoRA folder {folder} does not exist; fetch the files of Table 8 with "
                f"`python scripts/download_civitai.py {folder}`, or give a folder of files of your own."
            )
        table = json.loads(CIVITAI.read_text())
        paths = {path.stem: path for path in sorted(folder.glob("*.safetensors"))}
        listed = {str(entry["version"]): entry for entry in table}
        adapters = [Adapter(entry["name"], paths.pop(version)) for version, entry in listed.items() if version in paths]
        adapters += [Adapter(stem, path) for stem, path in paths.items()]
        if len(adapters) != self.count:
            absent = [entry["url"] for entry in table if entry["name"] not in {a.name for a in adapters}]
            raise LowraError(
                f"{folder} holds {len(adapters)} .safetensors files; expected count={self.count}. Of Table 8 these are "
                f"not there as <version id>.safetensors: {', '.join(absent) or 'none'}."
            )
        return adapters
