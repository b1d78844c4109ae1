"""Entries to the leaderboard: made from a method's own runs, and checked by running a piece of them again.

An entry is a folder: `entry.json` (which method, which settings), `records/records.parquet`, the method's own files
under `code/`, and the tables. It claims nothing that its records do not say.
"""

from __future__ import annotations

import importlib
import json
import math
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from lowra import reporting
from lowra.code import closure, code_digest, module_of
from lowra.errors import LowraError
from lowra.files import write_text
from lowra.paths import conf_dir, register_resolvers
from lowra.pipeline import layer_judge, run
from lowra.plan import Plan, make_variants, prepare
from lowra.pool import cores
from lowra.records import LAYER, Store, read
from lowra.reporting.escape import slug
from lowra.reporting.export import export
from lowra.testing import check_method

CLOSE = 0.1
"""Decades by which a recovery run again may miss the recorded W-Error. On one machine it is the same; another processor
adds up in another order, which moves the rounding that is left of an estimate by some hundredths of a decade."""

FORMAT = 1


def _compose(overrides: Sequence[str]) -> DictConfig:
    register_resolvers()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return compose("config", overrides=list(overrides))
    except HydraException as error:
        raise LowraError(f"These settings do not go together: {' '.join(str(error).split())}") from None


def submit(settings: Sequence[str], tracks: Sequence[str], subsets: Sequence[str], to: Path | None = None) -> Path:
    """Run one method on some tracks of some subsets and write its entry; returns the entry's folder.

    settings: as for `lowra.run`, with `methods=` naming the one method. The default folder is
    `results/leaderboard/<method>`; an entry there is replaced once the new one is whole. Raises LowraError for a folder
    that holds anything else, and for a method that breaks its contract (nothing is run then), fails on a layer, or can
    enter none of the tracks.
    """
    first = _compose([*settings, "metrics=[]"])
    if len(first.methods) != 1:
        raise LowraError(f"methods has {len(first.methods)} entries; submit one method, as methods=my_method.")
    (name,) = map(str, first.methods)
    variant = make_variants(first)[name]
    try:
        check_method(variant.method)
    except AssertionError as error:
        raise LowraError(f"Method {name!r} does not keep the contract: {error}") from None
    folder = to or Path("results") / "leaderboard" / slug(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        _entry(folder)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = []
        for track in tracks:
            if variant.method.needs_rank and not _compose([f"experiment={track}"]).knows_rank:
                print(f"{variant.label} needs the rank, which track {track} withholds: not entered.", file=sys.stderr)
                continue
            for subset in subsets:
                own = [*settings, "metrics=[]", f"experiment={track}", f"subset={subset}"]
                cfg = _compose([*own, f"results_dir={scratch}/{track}"])
                outcome = run(cfg)
                if outcome.failures:
                    raise LowraError(f"Nothing is submitted: {outcome.failures[0]}")
                folders.append(outcome.folder)
                asked = {key: OmegaConf.to_container(cfg)[key] for key in ("n_loras", "trials", "seed")}  # type: ignore[index, call-overload]
                runs.append({"track": track, "subset": subset, "source": str(cfg.source.name)} | asked)
        if not folders:
            raise LowraError(f"{variant.label} can enter none of the tracks {', '.join(tracks)}.")
        made = Path(scratch) / "entry"
        export(read(folders), folders, made)
        node = OmegaConf.to_container(first.methods[name], resolve=True)
        module = module_of(getattr(variant.method, "function", variant.method))
        entry = {
            "format": FORMAT,
            "name": name,
            "label": variant.label,
            "reference": variant.method.reference,
            "method": node,
            "variant": variant.key,
            "code": code_digest(module),
            "files": _keep_code(module, made / "code"),
            "runs": runs,
        }
        _put(made, folder)
    write_text(folder / "entry.json", json.dumps(entry, indent=1, ensure_ascii=False) + "\n")
    print(reporting.write(read([folder]), folder))
    return folder


def _put(made: Path, folder: Path) -> None:
    """Put what was made into an entry's folder in place of what is there; it is no entry until `entry.json` is new."""
    (folder / "entry.json").unlink(missing_ok=True)
    for name in ("records", "code"):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
    shutil.copytree(made, folder, dirs_exist_ok=True)


def _keep_code(module: str, to: Path) -> list[str]:
    """Copy a method's own files (none of lowra's) as they lie beside each other; returns their places."""
    kept = []
    for name, path in sorted(closure(module).items()):
        if name.split(".")[0] == "lowra":
            continue
        place = Path(*name.split("."))
        place = place / "__init__.py" if path.name == "__init__.py" else place.with_suffix(".py")
        (to / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to / place)
        kept.append(place.as_posix())
    return kept


# ---- Checking an entry ------------------------------------------------------------------------------------------


def verify(folder: Path, settings: Sequence[str] = (), seed: int | None = None) -> str:
    """Check an entry and run one of its draws and layers again; returns a sentence that says what was compared.

    It runs the method's code. settings: more settings of `lowra.run`, such as where a data set lies. seed: of the
    choice of draw and layer; None chooses anew each time. Raises LowraError for an entry whose records are not those of
    its method's code and options, hold a failure or NaN, miss a draw or a layer, are of other data than this machine
    has, or do not come out again.
    """
    entry = _entry(folder)
    store = Store(folder)
    store.refresh()
    records = store.all(LAYER)
    if store.damaged or not records:
        raise LowraError(f"{folder} holds no whole records: {'; '.join(store.damaged) or 'none'}.")
    _check_values(entry, records)
    choice = random.Random(seed)
    with _importable(folder / "code", entry):
        chosen = choice.choice(entry["runs"])
        plans = [(each, _plan(entry, each, settings)) for each in entry["runs"] if each["subset"] == chosen["subset"]]
        by_key = {record["key"]: record for record in records}
        for each, plan in plans:
            _check_plan(entry, each, plan, by_key, records)
        plan = next(plan for each, plan in plans if each is chosen)
        return _again(entry, chosen, plan, by_key, choice)


def _entry(folder: Path) -> dict[str, Any]:
    path = folder / "entry.json"
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        named = {"format", "name", "label", "method", "variant", "code", "files", "runs"}
        if not named <= set(entry) or entry["format"] != FORMAT or not entry["runs"]:
            raise ValueError(f"it needs {', '.join(sorted(named))}, of format {FORMAT}")
    except (OSError, ValueError, TypeError) as error:
        raise LowraError(f"{path} is no entry to the leaderboard ({error}); lowra.submit makes one.") from None
    return dict(entry)


def _check_values(entry: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
    for record in records:
        where = (
            f"{record['subset']}, draw {record['trial']} of {record['n_loras']} models, layer {record['layer_name']}"
        )
        if record["variant"] != entry["variant"]:
            raise LowraError(
                f"The record of {where} is of variant {record['variant']}, and the entry is of {entry['variant']}: it "
                "was not made by this method's code and options."
            )
        numbers = [record[name] for name in ("w_error", "exact_fraction", "seconds")]
        if record["failed"] or any(value is None or math.isnan(value) for value in numbers):
            raise LowraError(f"The record of {where} failed or is not a number; an entry has neither.")


@contextmanager
def _importable(code: Path, entry: Mapping[str, Any]) -> Iterator[None]:
    """The entry's own files found before any others, and forgotten afterwards."""
    names = {Path(file).parts[0].removesuffix(".py") for file in entry["files"]}
    if "lowra" in names:
        raise LowraError("An entry may not bring files of lowra's own.")
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in names}
    sys.path.insert(0, str(code.resolve()))
    code_digest.cache_clear()
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(code.resolve()))
        for name in [name for name in sys.modules if name.split(".")[0] in names]:
            del sys.modules[name]
        sys.modules.update(before)
        code_digest.cache_clear()


def _plan(entry: Mapping[str, Any], each: Mapping[str, Any], settings: Sequence[str]) -> Plan:
    asked = [f"experiment={each['track']}", f"subset={each['subset']}", f"source={each['source']}", "metrics=[]"]
    cfg = _compose([*asked, "methods=[mean_lora]", *settings])
    cfg.methods = OmegaConf.create({entry["name"]: entry["method"]})
    for name in ("n_loras", "trials", "seed"):
        cfg[name] = each[name]
    return prepare(cfg)


def _check_plan(
    entry: Mapping[str, Any],
    each: Mapping[str, Any],
    plan: Plan,
    by_key: Mapping[str, Mapping[str, Any]],
    records: Sequence[Mapping[str, Any]],
) -> None:
    what = f"track {each['track']} of {each['subset']}"
    variant = plan.variants[entry["name"]]
    if variant.key != entry["variant"]:
        raise LowraError(
            f"The entry is of variant {entry['variant']}, and its code and options make {variant.key} with this "
            "version of lowra: submit it again."
        )
    claimed = {r["data"] for r in records if r["subset"] == each["subset"] and r["source"] == each["source"]}
    if claimed != {plan.fingerprint}:
        raise LowraError(
            f"The records of {what} are of data {', '.join(sorted(claimed)) or 'nobody'}; here it is "
            f"{plan.fingerprint}. Miniatures are the same where processor and versions are: check it on such a machine."
        )
    missing = [
        (draw, index) for draw in plan.draws for index in plan.layers if plan.key(draw, index, variant) not in by_key
    ]
    if missing:
        draw, index = missing[0]
        raise LowraError(
            f"{len(missing)} records of {what} are missing, the first of draw {draw}, layer {plan.info(index).label}; "
            "an entry holds every draw and layer of its tracks."
        )


def _again(
    entry: Mapping[str, Any],
    each: Mapping[str, Any],
    plan: Plan,
    by_key: Mapping[str, Mapping[str, Any]],
    choice: random.Random,
) -> str:
    variant = plan.variants[entry["name"]]
    draw, index = choice.choice(plan.draws), choice.choice(plan.layers)
    task = plan.task(draw, index, (variant.name,))
    (found,) = layer_judge(plan, cores()).judge(task)
    record = by_key[plan.key(draw, index, variant)]
    what = f"draw {draw}, layer {plan.info(index).label} of track {each['track']}"
    if found["failed"]:
        raise LowraError(f"Run again, {what} {found['status']}")
    if not abs(found["w_error"] - record["w_error"]) <= CLOSE:
        raise LowraError(
            f"Run again, {what} has W-Error {found['w_error']:.3f}; the record says {record['w_error']:.3f}."
        )
    return (
        f"{entry['label']}: records whole and of this method's code; {what} run again: W-Error {found['w_error']:.3f}, "
        f"recorded {record['w_error']:.3f}."
    )
