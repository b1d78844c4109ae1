"""The plan of a run: settings checked and work listed, before anything is built, recovered or written."""

from __future__ import annotations

import functools
import json
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

import lowra
from lowra.bench import draws as drawing
from lowra.bench.defences import Defence
from lowra.bench.merging import ORDERS, merge_dtype
from lowra.bench.names import depths, layer_type
from lowra.bench.schema import LayerInfo
from lowra.bench.sources import make_source
from lowra.code import code_digest, digest, module_of
from lowra.configured import make, make_method, options, usual_options, whole_node
from lowra.errors import LowraError, unknown
from lowra.methods import Method
from lowra.metrics.base import Metric
from lowra.packages import versions
from lowra.paths import conf_dir
from lowra.pool import cores
from lowra.records import Store, key_of
from lowra.settings import check_settings, n_loras

PACKAGES = ("torch", "transformers", "diffusers", "peft", "trl", "datasets", "sentence-transformers", "lpips", "numpy")


@dataclass(frozen=True)
class Variant:
    """One method with its options: a row of the tables.

    name: its key in the configuration. label: its name in tables, with what differs from the shipped options in
    brackets. options: what its config says. key: a digest of target, options and code.
    """

    name: str
    method: Method
    label: str
    options: dict[str, Any]
    key: str


# Layers that are given to a process as one, at most, and numbers in their merges: four layers of a ViT miniature. More
# gain little, leave other processes idle at the end, and do not fit into the caches.
TOGETHER = 4
TOGETHER_ENTRIES = 2**18


@dataclass(frozen=True)
class Task:
    """One layer of one draw, and the variants that have still to recover it: what a process works on at a time.

    seed: of the observation. draw_seed: what is drawn once for all layers of a draw. rank: the granted rank, None where
    the setting withholds it.
    """

    draw: drawing.Draw
    index: int
    variants: tuple[str, ...]
    seed: int
    draw_seed: int
    rank: int | None


@dataclass(frozen=True)
class Setting:
    """What all records of a run share and are named by, as plain values.

    merge_order: how the merges were made, in words: a setting that tables never mix.
    """

    subset: str
    seed: int
    merge_dtype: str
    merge_order: str
    foreign: int
    knows_rank: bool


@dataclass(frozen=True)
class Plan:
    """A run, checked and opened.

    layers: positions in the table. depths: of all layers of the table. fingerprint: of the data. folder: where the
    run's records go. judge_code: digest of the code that merges and scores weights. defence: what is done to them
    before; defended: its name and options.
    """

    cfg: DictConfig
    variants: dict[str, Variant]
    metrics: dict[str, Metric]
    source: Any
    data: Any
    fingerprint: str
    layers: tuple[int, ...]
    depths: tuple[int, ...]
    draws: tuple[drawing.Draw, ...]
    device: torch.device
    folder: Path
    judge_code: str
    defence: Defence | None = None
    defended: str = ""

    def info(self, index: int) -> LayerInfo:
        """What is known of a layer without reading it."""
        info: LayerInfo = self.data.table.infos[index]
        return info

    @functools.cached_property
    def setting(self) -> Setting:
        """What the configuration says of every record: looked up in it, it would be most of the time of a key."""
        cfg = self.cfg
        foreign = cfg.merge.foreign
        words = [str(cfg.merge.order)] + ([f"{foreign} foreign"] if foreign else [])
        order = ", ".join(words + ([self.defended] if self.defended else []))
        return Setting(cfg.subset.name, cfg.seed, cfg.merge.dtype, order, foreign, cfg.knows_rank)

    def seed(self, draw: drawing.Draw, index: int) -> int:
        """The seed of a layer's observation: the same for every method."""
        return ((self.setting.seed * 1_000_003 + draw.trial) * 1_000_003 + index) % 2**63

    def draw_seed(self, draw: drawing.Draw) -> int:
        """The seed of what is drawn once for all layers of a draw."""
        return (self.setting.seed * 1_000_003 + draw.trial) % 2**63

    def rank(self, draw: drawing.Draw, index: int) -> int:
        """The largest rank among a draw's updates of a layer: what the paper's attacker is told."""
        ranks = self.info(index).ranks
        return max(ranks[model] for model in draw.models)

    def granted(self, draw: drawing.Draw, index: int) -> int | None:
        """The rank the setting grants, or None."""
        return self.rank(draw, index) if self.setting.knows_rank else None

    def key(self, draw: drawing.Draw, index: int, variant: Variant) -> str:
        """The key of a record: all that decides its numbers and nothing else."""
        setting = self.setting
        strangers = self.draw_seed(draw) if setting.foreign else 0
        defended = [setting.seed] if self.defence else []
        return key_of(
            {
                "data": self.fingerprint,
                "layer": self.info(index).label,
                "models": draw.models,
                "seed": self.seed(draw, index),
                "merge": [setting.merge_dtype, setting.merge_order, strangers, *defended],
                "rank": self.granted(draw, index),
                "variant": variant.key,
                "judge": self.judge_code,
                "device": self.device.type,
            }
        )

    def keys(self) -> Iterator[str]:
        """The keys of all records the run was asked for."""
        for draw in self.draws:
            for index in self.layers:
                for variant in self.variants.values():
                    yield self.key(draw, index, variant)

    def tasks(self, store: Store, draw: drawing.Draw, names: Sequence[str]) -> Iterator[Task]:
        """The layers of a draw that lack a record of one of the named variants."""
        for index in self.layers:
            lacking = tuple(n for n in names if not store.done("layer", self.key(draw, index, self.variants[n])))
            if lacking:
                yield self.task(draw, index, lacking)

    def task(self, draw: drawing.Draw, index: int, variants: tuple[str, ...]) -> Task:
        """One layer of a draw, to be recovered by the named variants."""
        return Task(draw, index, variants, self.seed(draw, index), self.draw_seed(draw), self.granted(draw, index))

    def alike(self, task: Task) -> tuple[int, int, int | None]:
        """What layers of a draw must share to be recovered together: shape and granted rank."""
        info = self.info(task.index)
        return info.d, info.k, task.rank

    def together(self, task: Task) -> int:
        """How many layers like a task's are worked at as one: more than one only where calls cost more than numbers."""
        if self.device.type != "cpu" or not any(
            hasattr(each.method, "recover_batch") for each in self.variants.values()
        ):
            return 1
        info = self.info(task.index)
        return max(1, min(TOGETHER, TOGETHER_ENTRIES // (task.draw.n_loras * info.d * info.k)))

    def coordinates(self, draw: drawing.Draw, index: int, variant: Variant) -> dict[str, Any]:
        """What a record says besides what was measured: where it belongs."""
        setting, info = self.setting, self.info(index)
        return {
            "kind": "layer",
            "key": self.key(draw, index, variant),
            "subset": setting.subset,
            "source": self.source.name,
            "data": self.fingerprint,
            "n_loras": draw.n_loras,
            "trial": draw.trial,
            "models": list(draw.models),
            "seed": setting.seed,
            "variant": variant.key,
            "method": variant.name,
            "pretty": variant.method.pretty,
            "label": variant.label,
            "reference": variant.method.reference,
            "options": json.dumps(variant.options, sort_keys=True, default=str),
            "merge_dtype": setting.merge_dtype,
            "merge_order": setting.merge_order,
            "knows_rank": setting.knows_rank,
            "device": self.device.type,
            "layer_model": info.model,
            "layer_name": info.name,
            "layer_type": layer_type(info.name),
            "depth": self.depths[index],
            "d": info.d,
            "k": info.k,
            "rank": self.rank(draw, index),
        }

    def context(self, jobs: int, threads: int) -> dict[str, Any]:
        """What one needs to know to trust or repeat the records of this process."""
        cfg = self.cfg
        return {
            "command": " ".join(["python -m lowra.run", *map(_without_folders, sys.argv[1:])]),
            "config": _portable(OmegaConf.to_container(cfg, resolve=True)),
            "title": cfg.subset.title,
            "kind": cfg.subset.get("kind"),
            "caption": self.source.caption,
            "note": cfg.note,
            "models": list(self.data.table.model_names),
            "build": _portable(self.data.report),
            "versions": {"lowra": lowra.__version__, "python": sys.version.split()[0]} | versions(PACKAGES),
            "machine": machine(),
            "jobs": jobs,
            "threads": threads,
            "device": str(self.device),
        }


@functools.cache
def machine() -> dict[str, Any]:
    """What a reader of timings wants to know of the computer."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"processor": name, "cores": cores(), "system": platform.system(), "gpus": gpus}


def _portable(value: Any) -> Any:
    """A configuration without the folders of one machine: where things lay does not matter to anyone else."""
    if isinstance(value, Mapping):
        return {str(k): _portable(v) for k, v in value.items() if k not in ("results_dir", "cache_dir")}
    if isinstance(value, list | tuple):
        return [_portable(v) for v in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~/")) else value


def _without_folders(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return f"{name}{equals}{_portable(value)}" if equals else argument


# ---- Settings ---------------------------------------------------------------------------------------------------


def check_merge(cfg: DictConfig) -> None:
    """Raise LowraError for ways of merging that are not known."""
    merge_dtype(cfg.merge.dtype)
    if cfg.merge.order not in ORDERS:
        raise unknown("merge.order", cfg.merge.order, ORDERS)
    if cfg.merge.order == "twice" and cfg.merge.dtype == "float32":
        raise LowraError(
            "merge.order=twice rounds each update before it is added, and float32 merges round nothing; choose "
            "merge.dtype=bfloat16 or float16 too, or merge.order=once."
        )


def check_device(name: Any) -> torch.device:
    """The device of a `device` setting; raises LowraError for one that recovery cannot run on."""
    known = "cpu, cuda, or one of several GPUs as cuda:1"
    try:
        device = torch.device(name if isinstance(name, str) else "")
    except RuntimeError:
        raise LowraError(f"device is {name!r}; expected {known}.") from None
    if device.type not in ("cpu", "cuda"):  # others lack float64, which recovery needs
        raise LowraError(f"device is {name!r}; expected {known}.")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise LowraError(f"device={name} was asked for, but torch finds no CUDA device; use device=cpu.")
        if (device.index or 0) >= torch.cuda.device_count():
            raise LowraError(f"device={name} was asked for, but there are {torch.cuda.device_count()} CUDA devices.")
    return device


# ---- What configs name ------------------------------------------------------------------------------------------


def make_defence(cfg: DictConfig) -> tuple[Defence | None, str]:
    """The defence of a run, None without one, and its name with its options; raises LowraError for one that is none."""
    node = cfg.get("defence")
    if node is None or node == {}:
        return None, ""
    if not isinstance(node, DictConfig):
        known = [path.stem for path in (conf_dir() / "defence").glob("*.yaml")]
        raise unknown("defence", node, known)
    made = make(node, "defence", str(node.get("_target_", "")))
    if not isinstance(made, Defence):
        raise LowraError(
            f"defence is a {type(made).__name__}; expected an object with release(merged, place), see conf/defence."
        )
    usual: dict[str, Any] = {field.name: field.default for field in fields(made)} if is_dataclass(made) else {}
    shown = [
        f"{key} {value}" for key, value in options(node).items() if value is not None and value != usual.get(key, False)
    ]
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(made).__name__).lower()
    return made, f"{name} ({', '.join(shown)})" if shown else name


def make_variants(cfg: DictConfig) -> dict[str, Variant]:
    """The methods of the run with their options, in the order asked for, each under a label of its own.

    A config may say `like: NAME` and only what differs. Raises LowraError for methods that are the same, that cannot
    be made, or that need the rank where the setting withholds it.
    """
    made = {}
    for name, node in cfg.methods.items():
        full = whole_node(cfg, str(name), node)
        method = make_method(full, str(name))
        if method.needs_rank and not cfg.knows_rank:
            raise LowraError(
                f"Method {name!r} needs the LoRA rank, which knows_rank=false withholds; drop one of them."
            )
        own = options(full)
        module = module_of(getattr(method, "function", getattr(method, "target", method)))
        key = digest(json.dumps([full["_target_"], own, code_digest(module)], sort_keys=True, default=str))
        usual = usual_options(cfg, str(full["_target_"]))
        differing = {k: v for k, v in own.items() if k not in usual or usual[k] != v}
        made[str(name)] = Variant(str(name), method, _labelled(method.pretty, differing), own, key)
    return _told_apart(made)


def _labelled(pretty: str, options: Mapping[str, Any]) -> str:
    text = ", ".join(
        f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in sorted(options.items())
    )
    return f"{pretty} ({text})" if text else pretty


def _told_apart(made: dict[str, Variant]) -> dict[str, Variant]:
    """The variants, those with one label told apart by the options that differ, or else by their names."""
    result = {}
    for name, variant in made.items():
        like = [other for other in made.values() if other.label == variant.label]
        if same := [other.name for other in like if other.key == variant.key and other.name != name]:
            raise LowraError(f"Methods {name!r} and {same[0]!r} are the same code with the same options; drop one.")
        label = variant.label
        if len(like) > 1:
            keys = {key for other in like for key in other.options}
            differ = [key for key in sorted(keys) if len({str(o.options.get(key)) for o in like}) > 1]
            own = {key: variant.options.get(key) for key in differ}
            label = _labelled(variant.method.pretty, own) if differ else f"{variant.label} ({name})"
        result[name] = Variant(name, variant.method, label, variant.options, variant.key)
    return result


def make_metrics(cfg: DictConfig, *, weights_only: bool) -> dict[str, Metric]:
    """The semantic metrics of the run; raises LowraError for one that cannot score this subset."""
    metrics = {}
    for name, node in (cfg.get("metrics") or {}).items():
        if weights_only:
            raise LowraError(
                f"Metric {', '.join(map(str, cfg.metrics))} runs models, but subset={cfg.subset.name} "
                f"source={cfg.source.name} holds weights only; use metrics=[]."
            )
        metric = make(node, "metric", str(name))
        kind = cfg.subset.get("kind")
        if kind not in metric.kinds:
            raise LowraError(
                f"Metric {name!r} scores models of kind {', '.join(metric.kinds)}, and subset {cfg.subset.name!r} "
                f"is of kind {kind}; use metrics=[]."
            )
        metrics[str(name)] = metric
    return metrics


def choose_layers(infos: Sequence[LayerInfo], pattern: str | None) -> tuple[int, ...]:
    """The positions of the layers whose label matches; raises LowraError when none does."""
    chosen = tuple(i for i, info in enumerate(infos) if pattern is None or re.search(pattern, info.label))
    if not chosen:
        raise LowraError(f"layers={pattern!r} matches none of {len(infos)} layers, e.g. {infos[0].label!r}.")
    return chosen


def in_shard(tasks: Sequence[tuple[drawing.Draw, int]], sizes: Sequence[float], shard: tuple[int, int]) -> set[int]:
    """The positions of the (draw, layer) pairs that fall to shard i of k, dealt out evenly by size.

    Which pairs have been done already plays no part, so that resubmitted shards are the same shards.
    """
    i, k = shard
    order = sorted(range(len(tasks)), key=lambda t: (-sizes[t], t))
    turns = [(turn % k) if (turn // k) % 2 == 0 else k - 1 - turn % k for turn in range(len(order))]
    return {task for task, turn in zip(order, turns, strict=True) if turn == i - 1}


def prepare(cfg: DictConfig) -> Plan:
    """Check everything, cheapest first; then build or open the data."""
    check_settings(cfg)
    check_merge(cfg)
    device = check_device(cfg.device)
    # TF32 would cost seven digits of the float32 products that merges and methods rely on.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    variants = make_variants(cfg)
    defence, defended = make_defence(cfg)
    source = make_source(cfg)
    metrics = make_metrics(cfg, weights_only=source.weights_only)
    folder = Path(cfg.results_dir).expanduser() / cfg.subset.name / cfg.source.name
    Store(folder).check_writable()
    source.check()
    for metric in metrics.values():
        metric.ready()
        if source.base is not None:  # a miniature makes its base and evaluation inputs itself
            metric.check(source.base, None, device)
    data = source.open()
    table = data.table
    chosen = [
        draw
        for n in n_loras(cfg)
        for draw in drawing.draws(cfg.subset.name, len(table.model_names), n, cfg.trials, cfg.seed)
    ]
    layers = choose_layers(table.infos, cfg.layers)
    for metric in metrics.values():
        metric.check(data.base or "", data.evaluation, device)
    judge_code = code_digest("lowra.bench.foreign") + code_digest("lowra.metrics.weight_error")
    if defence is not None:
        judge_code += code_digest(module_of(defence))
    return Plan(
        cfg=cfg,
        variants=variants,
        metrics=metrics,
        source=source,
        data=data,
        fingerprint=table.fingerprint(),
        layers=layers,
        depths=depths([(info.model, info.name) for info in table.infos]),
        draws=tuple(chosen),
        device=device,
        folder=folder,
        judge_code=digest(judge_code),
        defence=defence,
        defended=defended,
    )
