"""The tensors of an adapter's module to an update: every kind of PEFT's that is read, and of LyCORIS'.

Formulas are those by which the libraries merge; conventions that differ between them are noted where they do. Updates
are made for weights (out, in), convolutions seen as (out, in x kernel).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowra.bench.updates import Update, check_alpha, check_rank, lora
from lowra.errors import LowraError, unknown

_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")

PARTS: Mapping[str, tuple[str, ...]] = {
    "LORA": ("lora_A", "lora_B", "lora_magnitude_vector"),
    "IA3": ("ia3_l",),
    "LOHA": (*_LOHA, "hada_t1", "hada_t2"),
    "LOKR": _LOKR,
    "VERA": ("vera_lambda_b", "vera_lambda_d"),
    "OFT": ("oft_R",),
    # Not PEFT's: a difference of whole weights in the layout of an adapter folder, as our builders write it.
    "FULL": ("difference",),
}
"""PEFT's types that are read, and the tensors that a module of each has."""

LYCORIS_PARTS = (*_LOHA, "hada_t1", "hada_t2", *_LOKR, "oft_blocks", "rescale", "dora_scale")
"""The tensors of LyCORIS' modules that are read, plain LoRA's apart."""

SHARED = ("base_model.vera_A", "base_model.vera_B")
"""The tensors that all modules of a PEFT adapter share, by their keys."""

# LoRA's initial values that leave the base as it is, and those that take a part out of it that can be known again.
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
_BASE_STARTS = ("pissa", "olora")

# Settings of PEFT's LoRA that make W' something else than the factors say.
_OTHER_LORAS = (
    "arrow_config",
    "alora_invocation_tokens",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)


def peft_type(config: Mapping[str, Any], folder: object) -> str:
    """The PEFT type of an adapter's configuration.

    Raises LowraError for types that are not read, and for LoRAs whose start changed the base in a way that the adapter
    does not tell.
    """
    found = config.get("peft_type")
    if found not in PARTS:
        raise unknown("PEFT type", found, PARTS, f"It is that of the adapter in {folder}.")
    start = config.get("init_lora_weights", True)
    if found == "LORA" and isinstance(start, str) and start not in (*_PLAIN_STARTS, *_BASE_STARTS):
        raise LowraError(
            f"The adapter in {folder} was started by init_lora_weights={start!r}, which may change the base in a way "
            "that the adapter does not tell; save it with path_initial_model_for_weight_conversion."
        )
    if found == "LORA" and start in _BASE_STARTS and config.get("use_dora"):
        raise LowraError(f"The adapter in {folder} is a DoRA started by {start!r}; only LoRAs started so are read.")
    if found == "LORA" and (other := [setting for setting in _OTHER_LORAS if config.get(setting)]):
        raise LowraError(
            f"The adapter in {folder} is a variant of LoRA ({other[0]}) that is not read; those read are plain LoRA, "
            "use_rslora and use_dora."
        )
    if found == "OFT" and config.get("use_cayley_neumann", True) and not config.get("peft_version"):
        raise LowraError(
            f"The OFT adapter in {folder} is of a PEFT before 0.18, whose rotations today's PEFT computes otherwise; "
            "train it again, or merge it there and read the merged model."
        )
    return str(found)


def key_pattern(peft_type: str) -> re.Pattern[str]:
    """What the keys of a PEFT type's tensors look like: groups `module` and `part`."""
    parts = "|".join(PARTS[peft_type])
    return re.compile(rf"^base_model\.model\.(?P<module>.+?)(?:\.base_layer)*\.(?P<part>{parts})(?:\.weight)?$")


def rank_and_alpha(config: Mapping[str, Any], module: str, folder: object) -> tuple[int, float]:
    """A module's rank and alpha by an adapter's configuration and its patterns; (0, 0) for types without.

    Raises LowraError for those that none can be.
    """
    found = config.get("peft_type")
    if found not in ("LORA", "LOHA", "LOKR"):
        return 0, 0.0
    where = f"of module {module!r} in {folder}/adapter_config.json"
    values = []
    for default, pattern in (("r", "rank_pattern"), ("lora_alpha" if found == "LORA" else "alpha", "alpha_pattern")):
        patterns = config.get(pattern) or {}
        if not isinstance(patterns, dict):
            raise LowraError(f"{pattern} of the adapter in {folder} is {patterns!r}; expected modules and numbers.")
        values.append(patterned(patterns, module, config.get(default)))
    rank = check_rank(values[0], f"The rank {where}")
    return rank, check_alpha(values[1], rank, f"The alpha {where}")


def patterned(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """A module's entry among PEFT's patterns (`rank_pattern`, `alpha_pattern`), as PEFT matches them."""
    if not patterns:
        return default
    from peft.utils.other import get_pattern_key  # peft takes seconds to import

    return patterns.get(get_pattern_key(list(patterns), module), default)


# ---- PEFT -------------------------------------------------------------------------------------------------------


def peft_update(
    name: str, config: Mapping[str, Any], module: str, parts: Mapping[str, Tensor], weight: Tensor, folder: object
) -> Update:
    """A module's update from a PEFT adapter's tensors.

    config: the adapter's. parts: tensors by `PARTS`, with the adapter's `SHARED` ones. weight: the base's (d, k), for
    starts that take a part of it out (in float32: PEFT rounds what is left of a 16-bit base once more).
    Raises LowraError for tensors that are missing or no module's.
    """
    found = peft_type(config, folder)
    whose = f"Module {module!r} of the adapter in {folder}"
    rank, alpha = rank_and_alpha(config, module, folder)
    parts = {part: tensor.float() for part, tensor in parts.items()}
    match found:
        case "LORA":
            return _peft_lora(name, config, parts, weight, rank, alpha, whose)
        case "IA3":
            return Update.of(name, "ia3", {"scale": _ia3_scale(config, module, parts["ia3_l"], weight)})
        case "LOHA":
            return _loha(name, parts, alpha / rank, whose)
        case "LOKR":
            return _lokr(name, parts, alpha / rank, whose)
        case "VERA":
            _need(parts, (*PARTS["VERA"], *SHARED), whose, "save it with save_projection=True")
            d, k = weight.shape
            a, b = (parts[key] for key in SHARED)  # cut to the layer's size (Kopiczko et al. 2024)
            a, b = parts["vera_lambda_d"][:, None] * a[:, :k], parts["vera_lambda_b"][:, None] * b[:d]
            return lora(name, a, b)
        case "OFT":
            return Update.of(name, "oft", {"input_blocks": _peft_rotation(config, parts["oft_R"], weight.shape[1])})
    return Update.of(name, "full", {"difference": parts["difference"].flatten(1)})


def _peft_lora(
    name: str,
    config: Mapping[str, Any],
    parts: Mapping[str, Tensor],
    weight: Tensor,
    rank: int,
    alpha: float,
    whose: str,
) -> Update:
    for part in ("lora_A", "lora_B"):
        if part not in parts:
            raise LowraError(f"{whose} has no {part}; the file is incomplete.")
    a, b = parts["lora_A"].flatten(1), parts["lora_B"].flatten(1)  # (r, k), (d, r)
    if a.shape[0] != rank or b.shape[1] != rank:
        raise LowraError(
            f"{whose} has factors {tuple(a.shape)} and {tuple(b.shape)}; its configuration says rank {rank}."
        )
    update = Update(name, rank, alpha, a, b, "rslora" if config.get("use_rslora") else "lora")
    if config.get("use_dora"):
        if "lora_magnitude_vector" not in parts:
            raise LowraError(
                f"{whose} is DoRA and has no lora_magnitude_vector, without which the norms of its rows are unknown; "
                "save it again with all its tensors."
            )
        magnitude = {"magnitude": parts["lora_magnitude_vector"].reshape(-1, 1)}
        return Update(name, rank, update.lora_alpha, a, b, "dora", magnitude)
    start = config.get("init_lora_weights", True)
    if start not in _BASE_STARTS:
        return update
    if min(weight.shape) < rank:
        raise LowraError(f"{whose} has rank {rank} and was started from parts of a {tuple(weight.shape)} weight.")
    if start == "pissa":  # Meng et al. 2024: the leading part of the singular value decomposition
        left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
        root = (values[:rank] / update.scale).sqrt()
        return update.less(root[:, None] * right[:rank], left[:, :rank] * root)
    q, r = torch.linalg.qr(weight.float())  # OLoRA, Büyükakyüz 2024: the first columns of Q, scaled like any B A
    return update.less(r[:rank], q[:, :rank])


def ia3_on_inputs(config: Mapping[str, Any], module: str, shape: Sequence[int]) -> bool:
    """Whether (IA)^3 scales a module's inputs and not its outputs. shape: of `ia3_l`.

    Linear layers show it, (1, in) against (out, 1); those of convolutions are (1, channels, 1, 1) in both cases.
    """
    if len(shape) == 2:
        return shape[0] == 1
    named = config.get("feedforward_modules") or ()
    if isinstance(named, str):
        return bool(re.fullmatch(named, module))
    return any(module.endswith(suffix) for suffix in named)


def _ia3_scale(config: Mapping[str, Any], module: str, stored: Tensor, weight: Tensor) -> Tensor:
    """(IA)^3's scale, (d, 1) or (1, k)."""
    flat = stored.flatten()
    if not ia3_on_inputs(config, module, stored.shape):
        return flat[:, None]
    return flat.repeat_interleave(max(1, weight.shape[1] // len(flat)))[None]  # a kernel has one scale


def _peft_rotation(config: Mapping[str, Any], stored: Tensor, k: int) -> Tensor:
    """PEFT's rotations (k, b), as `input_blocks`: x R goes into the layer, so W' = W R^T.

    stored: (n, b (b - 1) / 2), the upper triangles of skew-symmetric Q; n = 1 where the blocks share one.
    """
    size = round((1 + math.sqrt(1 + 8 * stored.shape[1])) / 2)
    rows, columns = torch.triu_indices(size, size, 1)
    q = torch.zeros(len(stored), size, size)
    q[:, rows, columns] = stored
    q = q - q.mT
    if config.get("coft"):  # constrained OFT: no further than eps from no rotation
        bound = float(config.get("eps", 6e-5)) / math.sqrt(len(q))
        norms = q.norm(dim=(1, 2), keepdim=True)
        q = torch.where(norms <= bound, q, bound * q / norms)
    eye = torch.eye(size).expand_as(q)
    if config.get("use_cayley_neumann", True):
        r = _cayley_series(q, int(config.get("num_cayley_neumann_terms", 5)))
    else:
        r = torch.linalg.solve(eye + q, eye - q, left=False)  # (I - Q) (I + Q)^-1
    if config.get("block_share"):
        r = r.expand(k // size, size, size)
    return r.mT.reshape(-1, size)


def _cayley_series(q: Tensor, terms: int) -> Tensor:
    """(I + Q) (I - Q)^-1 = I + 2 Q + 2 Q^2 + ..., cut as PEFT does: the last of the terms counts once."""
    result, power = torch.eye(q.shape[1]).expand_as(q).clone(), q
    if terms > 1:
        result += 2 * q
    if terms > 2:
        for _ in range(max(2, terms - 2) - 1):
            power = power @ q
            result += 2 * power
        result += power @ q
    return result


# ---- LoHa and LoKr, which PEFT has from LyCORIS -----------------------------------------------------------------


def _need(parts: Mapping[str, Tensor], names: Sequence[str], whose: str, advice: str) -> None:
    if missing := [name for name in names if name not in parts]:
        raise LowraError(f"{whose} lacks {', '.join(missing)}; {advice}.")


def _loha(name: str, parts: Mapping[str, Tensor], scale: float, whose: str) -> Update:
    """LoHa; of convolutions also with a core t (r, r, kernel), by Tucker's decomposition."""
    _need(parts, _LOHA, whose, "the file is incomplete")
    tensors: dict[str, Tensor] = {}
    for i in (1, 2):
        a, b = parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"]
        if (core := parts.get(f"hada_t{i}")) is not None:
            a, b = a.mT, torch.einsum("ij...,jk->ik...", core, b)  # (d, r), (r, in, kernel)
        tensors |= {f"w{i}_a": a.contiguous(), f"w{i}_b": b.flatten(1)}
    tensors["w1_a"] = scale * tensors["w1_a"]
    return Update.of(name, "loha", tensors, tensors["w1_b"].shape[0] * tensors["w2_b"].shape[0])


def _lokr(name: str, parts: Mapping[str, Tensor], scale: float, whose: str) -> Update:
    """LoKr, each of w1 and w2 whole or of low rank; w2 of convolutions may have a kernel and a core t2 as well."""
    limit, factors = 1, []
    for i in (1, 2):
        core = parts.get(f"lokr_t{i}")
        if (whole := parts.get(f"lokr_w{i}")) is None:
            _need(
                parts, (f"lokr_w{i}_a", f"lokr_w{i}_b"), whose, f"or lokr_w{i} in their place; the file is incomplete"
            )
            a, b = parts[f"lokr_w{i}_a"], parts[f"lokr_w{i}_b"]
            whole = a @ b.flatten(1) if core is None else torch.einsum("ij...,ip,jq->pq...", core, a, b)
            limit *= b.shape[0]
        else:
            limit *= min(whole.flatten(1).shape)
        factors.append(whole.flatten(1))
    return Update.of(name, "lokr", {"w1": scale * factors[0], "w2": factors[1].contiguous()}, limit)


# ---- LyCORIS ----------------------------------------------------------------------------------------------------


def lycoris_update(name: str, parts: Mapping[str, Tensor], alpha: float | None, whose: str) -> Update:
    """A module's update from the tensors of LyCORIS' or kohya's file that are not plain LoRA's alone.

    parts: tensors by `LYCORIS_PARTS`, and A (r, k), B (d, r) with `dora_scale`. alpha: as stored, None where it is not.
    The scale is alpha / r, 1 without alpha, and 1 where both factors of LoKr are whole, whatever alpha says. (LyCORIS
    has rank-stabilised scales in the alpha it writes.)

    `dora_scale` has the norms of rows of W + M, one an output, (d, 1) with ones for a kernel; or in files of LyCORIS'
    `wd_on_out=False` of columns, one an input, (1, k). Both are read, told apart by their shapes; of a convolution with
    a kernel only the first. `oft_blocks` rotate outputs, W'_b = R_b^T W_b with R = (I + Q) (I - Q)^-1, and
    alpha bounds the norm of Q by alpha d.

    Raises LowraError for tensors that are missing, of several kinds, or of a convention that is not read.
    """
    parts = {part: tensor.float() for part, tensor in parts.items()}
    scale = parts.get("dora_scale")
    if "A" in parts or "B" in parts:
        a, b = parts["A"].flatten(1), parts["B"].flatten(1)
        rank = check_rank(a.shape[0], f"The rank of {whose[0].lower()}{whose[1:]}")
        if scale is None:
            return Update(name, rank, rank if alpha is None else alpha, a, b)
        return Update(name, rank, rank if alpha is None else alpha, a, b, "dora", {"magnitude": _norms(scale, whose)})
    if scale is not None:
        raise LowraError(f"{whose} has dora_scale with another kind than LoRA; only DoRA on plain LoRA is read.")
    if any(part.startswith("hada_") for part in parts):
        rank = parts["hada_w1_b"].shape[0] if "hada_w1_b" in parts else 1
        return _loha(name, parts, 1.0 if alpha is None else alpha / rank, whose)
    if any(part.startswith("lokr_") for part in parts):
        stated = next((parts[part] for part in ("lokr_w1_b", "lokr_w2_b") if part in parts), None)
        return _lokr(name, parts, 1.0 if alpha is None or stated is None else alpha / stated.shape[0], whose)
    _need(parts, ("oft_blocks",), whose, "the file is incomplete")
    return Update.of(name, "oft", {"output_blocks": _lycoris_rotation(parts, alpha or 0.0, whose)})


def _norms(stored: Tensor, whose: str) -> Tensor:
    """`dora_scale` as DoRA's magnitude, (d, 1) or (1, k)."""
    shape = tuple(stored.shape)
    if stored.ndim == 1 or math.prod(shape[1:]) == 1:
        return stored.reshape(-1, 1)
    if shape[0] == 1 and math.prod(shape[2:]) == 1:
        return stored.reshape(1, -1)
    raise LowraError(
        f"{whose} has dora_scale of shape {shape}; expected norms of outputs, (d, 1), or of inputs, (1, k), with ones "
        "for the sizes of a kernel."
    )


def _lycoris_rotation(parts: Mapping[str, Tensor], constraint: float, whose: str) -> Tensor:
    """LyCORIS' rotations (d, b), as `output_blocks`; with `rescale`, their rows scaled."""
    blocks = parts["oft_blocks"]
    if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2]:
        raise LowraError(
            f"{whose} has oft_blocks of shape {tuple(blocks.shape)}; expected (n, b, b), a rotation a block. (BOFT has "
            "four dimensions and is not read.)"
        )
    q = blocks - blocks.mT
    bound, norm = constraint * blocks.shape[0] * blocks.shape[1], float(q.norm())
    if 0 < bound < norm:
        q = q * (bound / norm)
    eye = torch.eye(q.shape[1]).expand_as(q)
    r = torch.linalg.solve(eye - q, eye + q, left=False)  # (I + Q) (I - Q)^-1
    rotation = r.mT.reshape(-1, q.shape[1])
    return rotation if "rescale" not in parts else rotation * parts["rescale"].reshape(-1, 1)
