"""Fine-tuning of each kind, by PEFT: `builder.kind=dora`, and what each kind has otherwise than plain LoRA.

A kind is a way of training; what it leaves on disk is read by `lowra.builders.peft_adapters` as one of the kinds of
`lowra.bench.updates` (PiSSA, VeRA and MiCA end as plain LoRA).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowra.checks import Count, Positive
from lowra.errors import LowraError


@dataclass(frozen=True)
class Settings:
    """What a kind has otherwise than the recipe's plain LoRA; None: as LoRA has it.

    learning_rate, rank, alpha: by the recipe's names. size: a side of OFT's blocks, or of LoKr's w1 (its `factor`).
    """

    learning_rate: Positive | None = None
    rank: Count | None = None
    alpha: Positive | None = None
    size: Count | None = None


@dataclass(frozen=True)
class Kinds:
    """The settings of every kind there is; those not mentioned are trained by the recipe as it stands.

    lora: Hu et al. 2021. rslora: Kalajdzievski 2023. dora: Liu et al. 2024. pissa: LoRA from the leading singular
    vectors of the base, Meng et al. 2024. mica: LoRA whose B is frozen to the base's last left singular vectors (PEFT's
    `init_lora_weights="mica"`). ia3: (IA)^3, Liu et al. 2022. loha: Hyeon-Woo et al. 2022. lokr: Yeh et al. 2024.
    vera: Kopiczko et al. 2024. oft: Qiu et al. 2023. full: the target weights themselves.
    """

    lora: Settings = Settings()
    rslora: Settings = Settings()
    dora: Settings = Settings()
    pissa: Settings = Settings()
    mica: Settings = Settings()
    ia3: Settings = Settings()
    loha: Settings = Settings()
    lokr: Settings = Settings()
    vera: Settings = Settings()
    oft: Settings = Settings()
    full: Settings = Settings()

    def of(self, kind: str) -> Settings:
        """One kind's."""
        settings: Settings = getattr(self, kind)
        return settings


KINDS = tuple(field.name for field in dataclasses.fields(Kinds))
"""The kinds of fine-tuning that builders know."""

SIZED = ("lokr", "oft")
"""Those that need `Settings.size`."""

RANDOM_A = ("lora", "rslora", "dora")
"""Those that train from a random A, which can be frozen and shared."""

# Modules that PEFT takes for the second layer of a feed-forward block: (IA)^3 scales their inputs.
_FEEDFORWARD = ("fc2", "down_proj")


@dataclass(frozen=True)
class Tuning:
    """One fine-tune's kind with its sizes.

    kind: of `KINDS`. rank, alpha, dropout, targets: as LoRA's. size: see `Settings`. heads: modules trained whole
    beside it. task: PEFT's task type, None for none.
    """

    kind: str
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    size: int | None = None
    heads: tuple[str, ...] = ()
    task: str | None = None

    def check(self, width: int) -> None:
        """Raise LowraError for sizes that a kind cannot have on layers of `width` inputs."""
        if self.kind in SIZED and self.size is None:
            raise LowraError(f"builder.kind={self.kind} needs a size; give builder.kinds.{self.kind}.size=...")
        if self.kind == "oft" and width % int(self.size or 1):
            raise LowraError(
                f"builder.kinds.oft.size is {self.size}; its blocks must divide the {width} inputs of a layer."
            )

    def config(self) -> Any:
        """PEFT's configuration; None for kind "full", which is no adapter."""
        import peft

        common: dict[str, Any] = {"target_modules": list(self.targets), "task_type": self.task}
        if self.heads:
            common["modules_to_save"] = list(self.heads)
        match self.kind:
            case "lora" | "rslora" | "dora" | "pissa" | "mica":
                variants: dict[str, dict[str, Any]] = {
                    "rslora": {"use_rslora": True},
                    "dora": {"use_dora": True},
                    "pissa": {"init_lora_weights": "pissa"},
                    "mica": {"init_lora_weights": "mica"},
                }
                own = variants.get(self.kind, {})
                return peft.LoraConfig(
                    r=self.rank,
                    lora_alpha=self.alpha,  # type: ignore[arg-type] # PEFT says int and takes any number
                    lora_dropout=self.dropout,
                    bias="none",
                    **common,
                    **own,
                )
            case "ia3":
                inner = [target for target in self.targets if target in _FEEDFORWARD]
                return peft.IA3Config(feedforward_modules=inner, **common)
            case "loha":
                return peft.LoHaConfig(r=self.rank, alpha=self.alpha, **common)  # type: ignore[arg-type]
            case "lokr":
                factor = int(self.size or 0)
                return peft.LoKrConfig(r=self.rank, alpha=self.alpha, decompose_factor=factor, **common)  # type: ignore[arg-type]
            case "vera":
                return peft.VeraConfig(r=self.rank, vera_dropout=self.dropout, **common)
            case "oft":
                return peft.OFTConfig(oft_block_size=int(self.size or 0), **common)
        return None

    def wrap(self, model: Any) -> Any:
        """The model as it is trained: PEFT's around it, or for "full" itself with all but targets and heads frozen."""
        if (config := self.config()) is not None:
            from peft import get_peft_model

            return get_peft_model(model, config)
        self.freeze(model)
        return model

    def freeze(self, model: Any) -> None:
        """Let only the weights of targets, and heads, be trained."""
        trained = {f"{name}.weight" for name in target_modules(model, self.targets)}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained or name.split(".")[0] in self.heads)


def target_modules(model: Any, targets: Sequence[str]) -> list[str]:
    """The paths of a model's linear layers that are called as the targets."""
    found = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    return [name for name in found if name.split(".")[-1] in targets]


def weights_of(model: Any, targets: Sequence[str]) -> dict[str, Tensor]:
    """Copies of the targets' weights by module path, (d, k) float32 each."""
    return {
        name: model.get_submodule(name).weight.detach().float().cpu().clone() for name in target_modules(model, targets)
    }


def save_difference(model: Any, before: dict[str, Tensor], folder: Path, heads: Sequence[str] = ()) -> None:
    """Write what whole-weight training changed, in the layout of an adapter folder (type FULL), with the heads.

    before: `weights_of` the model before it was trained.
    """
    from safetensors.torch import save_file

    after = weights_of(model, list({name.split(".")[-1] for name in before}))
    stored = {f"base_model.model.{name}.difference": after[name] - weight for name, weight in before.items()}
    for name, tensor in model.state_dict().items():
        if name.split(".")[0] in heads:
            stored[f"base_model.model.{name}"] = tensor.detach().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "FULL", "target_modules": sorted({name.split(".")[-1] for name in before})}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
