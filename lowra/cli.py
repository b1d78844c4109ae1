"""What the command lines have in common: configs, quiet libraries, signals, and mistakes told in one sentence.

Nothing heavy is imported here: `--help` answers at once, and an interrupt is understood from the first moment.
"""

from __future__ import annotations

import difflib
import errno
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lowra import signals
from lowra.errors import LowraError, unknown

if TYPE_CHECKING:
    from omegaconf import DictConfig


def command(work: Callable[[DictConfig], Any], config: str = "config") -> None:
    """Compose the configuration from the command line and do the work.

    Until the work calls `lowra.signals.stop`, when its libraries are imported, a signal ends the process on the spot.

    A user's mistake is one sentence and exit status 2, a signal says how to go on (128 + its number); what ran but
    failed in part (a result with `failures`) is status 1. Other exceptions are bugs of ours and keep their traceback.
    """
    signals.leave()
    failed: list[Any] = []

    def whole() -> None:
        import hydra

        from lowra.paths import conf_dir, register_resolvers

        register_resolvers()
        quiet_libraries()
        check_choices(sys.argv[1:], config)

        @hydra.main(config_path=str(conf_dir()), config_name=config, version_base="1.3")
        def main(cfg: DictConfig) -> None:
            # Inside of Hydra, which would print a traceback of its own.
            result = _in_job(lambda: work(cfg))
            failed.extend(getattr(result, "failures", ()))

        main()

    tell_mistakes(whole)
    if failed:
        raise SystemExit(1)


def _in_job(work: Callable[[], Any]) -> Any:
    """Do the work of one job; of several (`-m`), one that fails must not take the others down."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import CompactHydraException
    from hydra.types import RunMode

    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return tell_mistakes(work)
    try:
        result = tell_mistakes(work)
    except SystemExit as error:
        if signals.came():
            raise  # whoever stops a sweep means all of it
        raise CompactHydraException(f"A job of the sweep ended with exit status {error.code}; see above.") from None
    if getattr(result, "failures", ()):
        raise CompactHydraException("A job of the sweep ended with exit status 1; see above.")
    return result


def tell_mistakes(work: Callable[[], Any]) -> Any:
    """Turn a LowraError or an interrupt into a line on stderr and an exit status.

    Libraries turn interrupts into errors of their own (an import that failed, a broken pool): what is raised after a
    signal came is its doing.
    """
    open_streams()
    try:
        result = work()
        sys.stdout.flush()  # here, where it can still be said that it cannot be written
        return result
    except (Exception, KeyboardInterrupt) as error:
        if signals.came() or isinstance(error, KeyboardInterrupt):
            number = signals.came() or signal.SIGINT
            print(signals.sentence(number), file=sys.stderr)
            raise SystemExit(128 + number) from None
        if isinstance(error, LowraError):
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        if isinstance(error, OSError) and error.filename is None and error.errno in (errno.EPIPE, errno.ENOSPC):
            # Or the interpreter's end would say it again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if error.errno == errno.EPIPE:  # nobody reads on, as after `| head`
                raise SystemExit(128 + signal.SIGPIPE) from None
            print(f"error: Cannot write ({error.strerror}).", file=sys.stderr)
            raise SystemExit(2) from None
        raise


def check_choices(arguments: Sequence[str], config: str = "config") -> None:
    """Raise LowraError for a config file or a setting that does not exist, naming those that do.

    Hydra's own messages name none of the elements of a list, or advise to add what was misspelled. Command lines with
    flags (`--help`) are left to Hydra.
    """
    import hydra
    from hydra.errors import (
        ConfigCompositionException,
        HydraException,
        MissingConfigException,
        OverrideParseException,
    )

    from lowra.paths import conf_dir

    if any(argument.startswith("-") for argument in arguments):
        return
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = hydra.compose(config, overrides=list(arguments))
    except MissingConfigException as error:
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        kind = {"methods": "method", "metrics": "metric"}.get(group, group)
        known = [path.stem for path in (conf_dir() / group).glob("*.yaml")]
        if not group or not known:
            return
        raise unknown(kind, name, known, "One of your own needs its config found: see the README.") from None
    except ConfigCompositionException as error:
        raise _misspelt(error, config, arguments) from None
    except OverrideParseException:
        raise _unreadable(arguments, config) from None
    except HydraException:
        return  # Hydra reports it, with the place
    except ValueError as error:  # what Hydra does not expect of a group, such as methods=null
        raise LowraError(f"{error}. Expected names of config files, such as methods=[mean_lora].") from None
    for argument in arguments:  # the builder's group is optional, so that a wrong name would pass without a word
        group, equals, name = argument.partition("=")
        if group == "builder" and equals and name not in ("", "null") and cfg.get("builder") is None:
            raise unknown("builder", name, [path.stem for path in (conf_dir() / "builder").glob("*.yaml")])


def _unreadable(arguments: Sequence[str], config: str) -> LowraError:
    """What is wrong with the first argument that Hydra's grammar does not know, and how it is written."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    def readable(text: str) -> bool:
        try:
            OverridesParser.create().parse_override(text)
        except HydraException:
            return False
        return True

    argument = next(argument for argument in arguments if not readable(argument))
    key, equals, value = argument.partition("=")
    example = {"recover": "models='[A,B,C]' output=OUT"}.get(config, "subset=vit")
    if not equals:
        return LowraError(f"{argument!r} is no setting; expected KEY=VALUE, such as {example}.")
    if key != key.strip() or value != value.strip():
        return LowraError(f"{argument!r} has spaces at its =; write {key.strip()}={value.strip()}.")
    end = {"[": "]", "{": "}"}.get(value[:1])
    if end is not None and value.count(value[0]) > value.count(end):
        closed = f"'{key}={value[0]}...{end}'"
        return LowraError(
            f"{argument!r} is not closed; a shell parts arguments at spaces, so put the whole in quotes: {closed}."
        )
    if end is not None:
        return LowraError(f"{argument!r} cannot be read; put names that hold spaces or signs in quotes of their own.")
    escaped = value.replace('"', '\\"')
    quoted = f'{key}="{escaped}"'
    how = f"; put the value in quotes of its own: {shlex.quote(quoted)}" if readable(quoted) else ""
    return LowraError(f"{argument!r} cannot be read{how}.")


def _misspelt(error: Exception, config: str, arguments: Sequence[str]) -> LowraError:
    """Hydra's message about an override that does not fit, as a sentence with the nearest settings."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig

    text = " ".join(str(error).split())
    cause = " ".join(str(error.__cause__ or "").split())
    key = cause.split("'")[1] if cause.startswith("Key '") else ""
    if not key:
        return LowraError(f"{text.rstrip('.')}. {cause}".strip())
    from lowra.paths import conf_dir

    keys = [argument.partition("=")[0].lstrip("+") for argument in arguments]
    choices = [a for a, key in zip(arguments, keys, strict=True) if "." not in key or key == "hydra.searchpath"]
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            whole = hydra.compose(config, overrides=choices)
        except HydraException:  # the mistake is one of them
            whole = hydra.compose(config)
    place = next(
        (line.split(":", 1)[1].strip() for line in str(error.__cause__).splitlines() if "full_key:" in line), key
    )
    node: Any = whole
    for part in place.split(".")[:-1]:
        node = node.get(part) if isinstance(node, DictConfig) else None
    known = sorted(map(str, node)) if isinstance(node, DictConfig) else sorted(map(str, whole))
    near = difflib.get_close_matches(key, known, 1)
    return unknown("setting", place, known, f"Did you mean {near[0]}?" if near else "")


def open_streams() -> None:
    """Open what is closed of stdin, stdout and stderr on nothing: a file opened later would take its number.

    What libraries say of their own on stderr would be written into that file.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: those below are open by now
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 (to the end)


def quiet_libraries() -> None:
    """Silence what libraries say to people who train by hand; errors stay. They read this when first imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
