"""Where configs, runs and the cache stand: found from the package, never from the current directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lowra.errors import LowraError

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parent if (_PACKAGE.parent / "conf" / "config.yaml").exists() else None


def conf_dir() -> Path:
    """The configs: the checkout's `conf/`, or the copy a wheel carries."""
    return _CHECKOUT / "conf" if _CHECKOUT else _PACKAGE / "conf"


def runs_dir() -> Path:
    """Where a user's runs go: the checkout's `runs/`, which git ignores, or `./runs` for an installed package."""
    return _CHECKOUT / "runs" if _CHECKOUT else Path.cwd() / "runs"


def cache_dir() -> Path:
    """Built subsets: `$LOWRA_CACHE`, the checkout's `cache/`, or `~/.cache/lowra` for an installed package."""
    if "LOWRA_CACHE" in os.environ:
        return Path(os.environ["LOWRA_CACHE"]).expanduser()
    return _CHECKOUT / "cache" if _CHECKOUT else Path.home() / ".cache" / "lowra"


def default(name: str) -> Any:
    """A default that lowra's own code declares, by its dotted name; raises LowraError for names of other packages.

    Configs are shared between people, and importing whatever they name would run it.
    """
    if not name.startswith("lowra."):
        raise LowraError(f"${{default:{name}}} names no default of lowra's; configs may refer to those alone.")
    from hydra.utils import get_object

    return get_object(name)


def register_resolvers() -> None:
    """Make `${runs_dir:}`, `${cache_dir:}` and `${default:...}` known to the configs.

    `${default:lowra.module.Class.field}` is a field's default, so that a config can name a setting (for people to
    see and to change) without declaring its value a second time.
    """
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("default", default, replace=True)
    OmegaConf.register_new_resolver("runs_dir", lambda: str(runs_dir()), replace=True)
    OmegaConf.register_new_resolver("cache_dir", lambda: str(cache_dir()), replace=True)
