"""Where configs, results and the cache stand: found from the package, never from the current directory."""

from __future__ import annotations

import os
from pathlib import Path

from hydra.utils import get_object
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
    """Make `${results_dir:}`, `${cache_dir:}` and `${default:...}` known to the configs.

    `${default:package.module.Class.field}` is a field's default, so that a config can name a setting (for people to
    see and to change) without declaring its value a second time.
    """
    OmegaConf.register_new_resolver("default", get_object, replace=True)
    OmegaConf.register_new_resolver("results_dir", lambda: str(results_dir()), replace=True)
    OmegaConf.register_new_resolver("cache_dir", lambda: str(cache_dir()), replace=True)
