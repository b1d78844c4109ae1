"""What the command lines have in common: configs, quiet libraries, and mistakes told in one sentence."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import hydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig

from lowra.errors import LowraError, unknown
from lowra.paths import conf_dir, register_resolvers


def command(work: Callable[[DictConfig], Any], config: str = "config") -> None:
    """Compose the configuration from the command line and do the work.

    A user's mistake is one sentence and exit status 2, an interrupt says how to go on (130); other exceptions are bugs
    of ours and keep their traceback.
    """
    register_resolvers()
    quiet_libraries()

    @hydra.main(config_path=str(conf_dir()), config_name=config, version_base="1.3")
    def main(cfg: DictConfig) -> None:
        # Inside of Hydra, which would print a traceback of its own.
        tell_mistakes(lambda: work(cfg))

    tell_mistakes(lambda: check_choices(sys.argv[1:], config))
    main()


def tell_mistakes(work: Callable[[], Any]) -> None:
    """Turn a LowraError or an interrupt into a line on stderr and an exit status."""
    try:
        work()
    except LowraError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\nstopped; the same command continues where this one stopped.", file=sys.stderr)
        raise SystemExit(130) from None


def check_choices(arguments: Sequence[str], config: str = "config") -> None:
    """Raise LowraError for a subset, source, method or metric that no config file is named after, listing the known.

    Hydra's own message for an element of a list names none. Command lines with flags (`--help`) are left to Hydra.
    """
    if any(argument.startswith("-") for argument in arguments):
        return
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            hydra.compose(config, overrides=list(arguments))
    except MissingConfigException as error:
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        kind = {"methods": "method", "metrics": "metric"}.get(group, group)
        known = [path.stem for path in (conf_dir() / group).glob("*.yaml")]
        if not group or not known:
            return
        raise unknown(kind, name, known, "One of your own needs its config found: see the README.") from None
    except HydraException:
        return  # Hydra reports it, with the place


def quiet_libraries() -> None:
    """Silence what libraries say to people who train by hand; errors stay. They read this when first imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
