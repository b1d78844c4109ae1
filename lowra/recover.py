"""Recover the base model of n fine-tuned checkpoints: python -m lowra.recover models='[A,B,C]' output=OUT."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from lowra import signals
from lowra.cli import command
from lowra.errors import LowraError, unknown


def main() -> None:
    """Run the command line."""
    command(recover, config="recover")


def recover(cfg: DictConfig) -> None:
    """Plan, and carry out, audit, or only foresee, as the configuration says."""
    from lowra.configured import make_method, whole_node
    from lowra.recovery.session import Request, carry_out, foresee, make_plan

    signals.stop()
    for key, expected in (("models", "models='[A,B,C]'"), ("output", "output=FOLDER, or output=null for an audit")):
        if OmegaConf.is_missing(cfg, key):
            raise LowraError(f"{key} has no value; give {expected}.")
    if cfg.method not in cfg.methods:
        raise unknown(
            "method", cfg.method, cfg.methods, f"One of your own: methods=[{cfg.method}] method={cfg.method}."
        )
    name = str(cfg.method)
    method = make_method(whole_node(cfg, name, cfg.methods[name]), name)
    dry = _truth(cfg.dry_run, "dry_run")
    request = Request(
        models=_names(cfg.models),
        output=_folder(cfg.output, "output"),
        report=_folder(cfg.report, "report"),
        method=method,
        rank=_integer(cfg.rank, "rank", optional=True),
        keep=str(cfg.keep),
        seed=_integer(cfg.seed, "seed") or 0,
        jobs=_integer(cfg.jobs, "jobs") or 0,
        adapters=_truth(cfg.adapters, "adapters"),
        sure=_truth(cfg.sure, "sure"),
        command=shlex.join(["python", "-m", "lowra.recover", *sys.argv[1:]]),
    )
    if dry or (request.output is None and request.report is None):
        signals.nothing_kept()
    plan = make_plan(request, say=_say)
    if dry:
        print(foresee(plan))
        return
    report = carry_out(plan, say=_say, progress=sys.stderr.isatty())
    if report.folder is None:
        print(report.card)
    else:
        print(f"{', '.join(f'{count} {name}' for name, count in report.counts.items())}: {report.folder}/README.md")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, ListConfig) or not all(isinstance(name, str) and name for name in value):
        raise LowraError(f"models={value}: expected a list of folders, files or Hub ids, models='[A,B,C]'.")
    return tuple(str(Path(name).expanduser()) if name.startswith("~") else name for name in value)


def _folder(value: Any, what: str) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        quoted = f"; in quotes where it is a number, {what}=\"'{value}'\"" if isinstance(value, int | float) else ""
        raise LowraError(f"{what}={value}: expected a folder's name, or null{quoted}.")
    from lowra.recovery.session import placed

    return placed(Path(value).expanduser())


def _integer(value: Any, what: str, *, optional: bool = False) -> int | None:
    if value is None and optional:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise LowraError(f"{what}={value}: expected a whole number{', or null' if optional else ''}.")
    return value


def _truth(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise LowraError(f"{what}={value}: expected true or false.")
    return value


if __name__ == "__main__":
    main()
