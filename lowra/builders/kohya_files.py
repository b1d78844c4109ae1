"""LoRA files of Stable Diffusion pipelines, read and written; LyCORIS' LoHa, LoKr, DoRA and OFT files read.

People's files spell the same module in many ways. For the query of the first attention:

    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight          kohya
    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight     diffusers, until 2023
    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight               diffusers, later
    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight                  PEFT

All are looked up in a table made from the base model's own module names, so a key either is a module of the base or is
refused by name; nothing is guessed from underscores, and nothing is skipped. Each module keeps its own alpha. (The
loader of diffusers turns them into one alpha per component with exceptions that do not take: files that mix alphas
load wrongly there, without a word.)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lowra.bench.updates import Update, check_alpha, check_rank
from lowra.builders.adapter_kinds import LYCORIS_PARTS, lycoris_update
from lowra.checkpoints.reading import component_folder
from lowra.errors import LowraError


@dataclass(frozen=True)
class Module:
    """A linear layer or 1x1 convolution of the base model that LoRAs adapt.

    component: "unet" or "text_encoder". path: its name in today's libraries, without `text_model.`. shape: of its
    weight, (d, k) or (d, k, 1, 1).
    """

    component: str
    path: str
    shape: tuple[int, ...]

    @property
    def layer_name(self) -> str:
        """The checkpoint's key, as the published data set has it: text encoders carry `text_model.` there."""
        return f"{'text_model.' if self.component == 'text_encoder' else ''}{self.path}.weight"

    @property
    def kohya_name(self) -> str:
        """The module's name in a kohya file."""
        flat = self.path.replace(".", "_")
        return f"lora_te_text_model_{flat}" if self.component == "text_encoder" else f"lora_unet_{flat}"


# ---- What a file should hold ------------------------------------------------------------------------------------


def modules_of(unet_config: Mapping[str, Any], text_config: Mapping[str, Any]) -> list[Module]:
    """The modules that LoRAs of a Stable Diffusion pipeline adapt, 264 for SD 1.5 (Table 1); no weights are loaded.

    Linear layers and 1x1 convolutions of the UNet's attention blocks (192: q, k, v, out, proj_in, proj_out and ff,
    twelve per block), then the text encoder's linear layers (72, six per layer).
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(unet_config))
        text_encoder = CLIPTextModel(CLIPTextConfig(**text_config))
    return [
        Module("unet", path, tuple(module.weight.shape))
        for path, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and "attentions." in path
    ] + [
        Module("text_encoder", path.removeprefix("text_model."), tuple(module.weight.shape))
        for path, module in text_encoder.named_modules()
        if isinstance(module, nn.Linear) and "layers." in path
    ]


def expected_modules(base: str | Path) -> list[Module]:
    """The modules of a base pipeline, from its configuration files alone (see `modules_of`).

    base: a diffusers folder or a Hub id. Raises LowraError when it is not a Stable Diffusion pipeline.
    """
    configs = []
    for component, kind in (("unet", "UNet2DConditionModel"), ("text_encoder", "CLIPTextModel")):
        path = component_folder(base, component) / "config.json"
        if not path.exists():
            raise LowraError(f"{path} is missing; expected {str(base)!r} to be a diffusers folder of a {kind}.")
        try:
            configs.append(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise LowraError(f"{path} is no JSON ({error}); fetch it again.") from None
    return modules_of(configs[0], configs[1])


# ---- Spellings --------------------------------------------------------------------------------------------------

_FACTOR = re.compile(
    r"^(?P<module>.+?)"
    r"(\.lora_(?P<kohya>down|up)"
    r"|\.lora_(?P<peft>[AB])(\.default)?"
    r"|[._]lora(_linear_layer)?\.(?P<diffusers>down|up))"
    r"\.weight$"
)
_ALPHA = re.compile(r"^(?P<module>.+?)([._]lora(_linear_layer)?)?\.alpha$")
_OTHER = re.compile(rf"^(?P<module>.+?)\.(?P<part>{'|'.join(LYCORIS_PARTS)})$")
_MAGNITUDE = re.compile(r"^(?P<module>.+?)\.lora_magnitude_vector(\.default)?(\.weight)?$")
_ROLES = {"down": "A", "up": "B", "A": "A", "B": "B"}

# Parts of keys of other methods, for a refusal that says which.
_OTHER_METHODS = {
    "lora_mid": "a Tucker-decomposed LoCon (LyCORIS)",
    "diff": "a full weight difference (LyCORIS)",
    "norm": "a normalisation layer (LyCORIS)",
    "emb": "a textual-inversion embedding",
}
_METHODS = {"hada": "LoHa", "lokr": "LoKr", "oft": "OFT", "rescale": "OFT"}  # by the first part of a tensor's name
_SDXL = re.compile(r"lora_te2_|text_encoder_2|(input|output)_blocks|middle_block|transformer_blocks[._][1-9]")


def _spellings(module: Module) -> Iterable[str]:
    """Every name of a module in front of a factor's suffix, PEFT's wrapper prefix left out."""
    yield module.kohya_name
    yield f"{module.component}.{module.path}"
    yield module.path
    if module.component == "text_encoder":
        yield module.kohya_name.replace("lora_te_", "lora_te1_", 1)
        yield f"text_encoder.text_model.{module.path}"
        yield f"text_model.{module.path}"


def _plain(name: str) -> str:
    """A module's name without the wrappers that training libraries put around it."""
    name = name.replace("base_model.model.", "").replace(".processor.", ".")
    # Attention processors call the projections of a text encoder as those of a UNet, and drop the index of `to_out`.
    name = re.sub(r"\.self_attn\.to_(q|k|v|out)$", r".self_attn.\1_proj", name)
    return re.sub(r"\.to_out$", ".to_out.0", name)


# ---- Reading ----------------------------------------------------------------------------------------------------


class LoraFile:
    """One LoRA file, checked against the base model when opened and read module by module.

    Beside LoRA, LyCORIS' LoHa, LoKr and OFT are read, and DoRA, with norms of outputs or of inputs (conventions:
    `lowra.builders.adapter_kinds.lycoris_update`).
    Raises LowraError on opening for a file that is not safetensors, keys of other methods, modules that the base does
    not have or whose shape does not fit, half-present factors and values that are not finite, alphas included. An alpha
    may be missing: the scale is 1 then, as in diffusers.
    name: of the updates, the file's own by default.
    """

    def __init__(self, path: Path, modules: Sequence[Module], name: str | None = None) -> None:
        self.path = path
        self.name = name or path.stem
        if not path.is_file():
            raise LowraError(f"LoRA file {path} does not exist.")
        try:
            self._file = safe_open(path, framework="pt")
            keys = list(self._file.keys())
        except (SafetensorError, OSError) as error:
            raise LowraError(
                f"{path} is not a readable safetensors file ({error}); only safetensors are read, since pickles "
                "(.pt, .ckpt) can run code."
            ) from None
        self._settings = self._adapter_settings(keys)
        names = {spelling: module for module in modules for spelling in _spellings(module)}
        parts: dict[Module, dict[str, str]] = {}
        for key in keys:
            role, name = self._parse(key)
            module = names.get(_plain(name))
            if module is None:
                hint = "; it looks like an SDXL LoRA" if _SDXL.search(key) else ""
                raise LowraError(
                    f"{path.name} adapts {name!r}, which is not among the base model's {len(modules)} modules{hint}. "
                    f"Known modules are like {modules[0].kohya_name!r}."
                )
            if role in parts.setdefault(module, {}):
                raise LowraError(f"{path.name} holds module {name!r} twice, as {key!r} and {parts[module][role]!r}.")
            parts[module][role] = key
        for module, found in parts.items():
            self._check_shapes(module, found)
        self._keys = {module: parts[module] for module in modules if module in parts}
        self.untrained = tuple(module for module in self._keys if not self._is_trained(module))

    @property
    def modules(self) -> tuple[Module, ...]:
        """The modules the file adapts, in the base model's order."""
        return tuple(self._keys)

    def read(self, module: Module) -> Update:
        """The update of one module, factors in float32."""
        keys = self._keys[module]
        parts = {part: self._file.get_tensor(key) for part, key in keys.items() if part != "alpha"}
        whose = f"Module {module.kohya_name!r} in {self.path.name}"
        where = f"of module {module.kohya_name!r} in {self.path.name}"
        rank = check_rank(parts["A"].shape[0], f"The rank {where}") if "A" in parts else 1
        alpha, kind = None, "lora"
        if "alpha" in keys:
            tensor = self._file.get_tensor(keys["alpha"])
            stored: Any = tensor.item() if tensor.numel() == 1 else tensor.tolist()
            alpha = check_alpha(stored, rank, f"The alpha {where}")
        elif "A" in parts:
            stored, kind = _configured_alpha(self._settings.get(module.component, {}), module, rank)
            alpha = check_alpha(stored, rank, f"The alpha {where}")
        if set(parts) == {"A", "B"}:
            return Update(
                self.name, rank, alpha or 0.0, parts["A"].flatten(1).float(), parts["B"].flatten(1).float(), kind
            )
        if kind == "rslora" and alpha is not None:
            alpha *= math.sqrt(rank)
        return lycoris_update(self.name, parts, alpha, whose)

    def _parse(self, key: str) -> tuple[str, str]:
        """A key's role ("A", "B", "alpha" or one of `LYCORIS_PARTS`) and the name in front of it."""
        if match := _FACTOR.match(key):
            return _ROLES[match["kohya"] or match["peft"] or match["diffusers"]], match["module"]
        if match := _ALPHA.match(key):
            return "alpha", match["module"]
        if match := _OTHER.match(key):
            return match["part"], match["module"]
        if match := _MAGNITUDE.match(key):
            return "dora_scale", match["module"]
        methods = [method for part, method in _OTHER_METHODS.items() if part in key]
        raise LowraError(
            f"{self.path.name} holds {key!r}, which is {methods[0] if methods else 'not a key of a LoRA'}; LoRA is "
            "read (lora_down, lora_up, alpha; diffusers' and PEFT's spellings too), and LyCORIS' DoRA, LoHa, LoKr, OFT."
        )

    def _check_shapes(self, module: Module, keys: dict[str, str]) -> None:
        kinds = sorted({_METHODS.get(part.partition("_")[0], "LoRA") for part in set(keys) - {"alpha", "dora_scale"}})
        if len(kinds) > 1:
            raise LowraError(f"{self.path.name} holds module {module.kohya_name!r} twice, as {' and '.join(kinds)}.")
        if kinds not in ([], ["LoRA"]):
            return  # `_is_trained` reads it whole
        if missing := [role for role in ("A", "B") if role not in keys]:
            raise LowraError(
                f"{self.path.name} lacks {'lora_down (A)' if missing == ['A'] else 'lora_up (B)'} of module "
                f"{module.kohya_name!r}; the file is incomplete."
            )
        d, k = module.shape[:2]
        if "dora_scale" not in keys and self._settings.get(module.component, {}).get("use_dora"):
            raise LowraError(
                f"{self.path.name} is DoRA and lacks the magnitudes (lora_magnitude_vector) of module "
                f"{module.kohya_name!r}; save it again with all its tensors."
            )
        a, b = (tuple(self._file.get_slice(keys[role]).get_shape()) for role in ("A", "B"))
        if a[:1] != b[1:2] or a[1:2] != (k,) or b[:1] != (d,) or math.prod(a[2:]) * math.prod(b[2:]) != 1:
            raise LowraError(
                f"{self.path.name} is of another architecture: module {module.kohya_name!r} has A {a} and B {b}, but "
                f"the base model's weight is {module.shape}, so A must be (r, {k}) and B ({d}, r)."
            )

    def _is_trained(self, module: Module) -> bool:
        update = self.read(module)
        if misfit := update.misfit(*module.shape[:2]):
            raise LowraError(
                f"{self.path.name} is of another architecture: it updates module {module.kohya_name!r} {misfit}, but "
                f"the base model's weight is {module.shape}."
            )
        if not all(bool(torch.isfinite(part).all()) for part in (update.A, update.B, *update.tensors.values())):
            raise LowraError(f"{self.path.name} has NaN or infinite values in module {module.kohya_name!r}.")
        return not update.idle

    def _adapter_settings(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """PEFT's LoraConfig per component, where the file's alphas are kept there instead of in tensors.

        Newer diffusers write it into the file's header; a PEFT adapter folder has it in `adapter_config.json`.
        """
        settings: dict[str, dict[str, Any]] = {"unet": {}, "text_encoder": {}}
        for name, value in json.loads((self._file.metadata() or {}).get("lora_adapter_metadata", "{}")).items():
            component, _, field = name.partition(".")
            settings.setdefault(component, {})[field] = value
        if any(key.startswith("base_model.model.") for key in keys):
            config = self.path.with_name("adapter_config.json")
            if not config.exists():
                raise LowraError(
                    f"{self.path} is a PEFT adapter, whose alpha is in adapter_config.json; put that file beside it."
                )
            settings = dict.fromkeys(settings, json.loads(config.read_text()))
        return settings


def _configured_alpha(settings: Mapping[str, Any], module: Module, rank: int) -> tuple[Any, str]:
    """A module's alpha by PEFT's rules, and its kind of update; the rank itself (scale 1) where none is configured."""
    kind = "rslora" if settings.get("use_rslora") else "lora"
    if "lora_alpha" not in settings:
        return rank, "lora"
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module.path):
            return value, kind
    return settings["lora_alpha"], kind


# ---- Writing ----------------------------------------------------------------------------------------------------


def write_kohya(path: Path, updates: Mapping[Module, Update], dtype: torch.dtype = torch.float16) -> None:
    """Write a plain LoRA as kohya's scripts do: three keys per module, 1x1 convolutions four-dimensional.

    dtype: of the factors; float16 is what most published files have.
    """
    tensors: dict[str, Tensor] = {}
    for module, update in updates.items():
        kernel = module.shape[2:]
        a, b = (factor.reshape(*factor.shape, *kernel).to(dtype).contiguous() for factor in (update.A, update.B))
        tensors |= {f"{module.kohya_name}.lora_down.weight": a, f"{module.kohya_name}.lora_up.weight": b}
        tensors[f"{module.kohya_name}.alpha"] = torch.tensor(update.lora_alpha, dtype=dtype)
    save_file(tensors, path, metadata={"ss_network_module": "networks.lora"})
