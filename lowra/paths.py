"""Where configs, results and the cache stand: found from the package, never from the current directory."""

from __future__ import annotations

import os
from pathlib import Path

from omegaconf import OmegaConf

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parent if (_PACKAGE.parent / "conf" / "config.yaml").exists() else None


def conf_dir() -> Path:
    """The configs: the checkout's `conf/`, or the copy a wheel carries."""
    return _CHECKOUT / "conf" if _CHECKOUT else _PACKAGE / "conf"


def results_dir() -> Path:
    """The checkout's `results/`; an installed package has none, so the user's `./results`."""
    return _CHECKOUT / "results" if _CHECKOUT else Path.cwd() / "results"


def cache_dir() -> Path:
    """Built subsets: `$LOWRA_CACHE`, the checkout's `cache/`, or `~/.cache/lowra` for an installed package."""
    if "LOWRA_CACHE" in os.environ:
        return Path(os.environ["LOWRA_CACHE"]).expanduser()
    return _CHECKOUT / "cache" if _CHECKOUT else Path.home() / ".cache" / "lowra"


def register_resolvers() -> None:
    """Make `${results_dir:}` and `${cache_dir:}` known to the configs."""
    OmegaConf.register_new_resolver("results_dir", lambda: str(results_dir()), replace=True)
    OmegaConf.register_new_resolver("cache_dir", lambda: str(cache_dir()), replace=True)
