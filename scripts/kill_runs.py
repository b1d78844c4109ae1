"""Kill runs at random moments and compare the tables that come out with an undisturbed run's.

    python scripts/kill_runs.py --kills 60 --processes 1 2 4

Each round starts so many processes on one folder, kills them all (-9) after a random time and starts anew; at the end
one process finishes. Checked: no finished record is lost or altered, and all numbers but times are those of a run that
nobody disturbed. The data are a small planted set, with and without a metric of whole models.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from lowra.bench.schema import Layer, write_dataset
from lowra.bench.updates import Update
from lowra.records import LAYER, Store, read, trials

SLOW = "import time\n\ndef f(stack):\n    time.sleep(0.05)\n    return stack.median(0).values\n"
TIMES = ["seconds", "finished", "context", "folder"]


def data(folder: Path, layers: int = 8, models: int = 8) -> Path:
    """A small data set in the LoWRA-Bench schema."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.05

    def rows(i: int) -> Layer:
        loras = tuple(Update(f"task_{j}", 2, 4.0, normal(2, 48), normal(64, 2)) for j in range(models))
        return Layer("", f"model.layers.{i}.self_attn.q_proj.weight", "base", normal(64, 48), loras)

    return write_dataset((rows(i) for i in range(layers)), folder)


def command(dataset: Path, results: Path, subset: list[str]) -> list[str]:
    """The run that is killed."""
    methods = ["methods=[lora_ft,mean_lora,spectral_detuning]", "methods.spectral_detuning.steps=100"]
    slow = "+methods.slow={_target_: slow_method.f, _partial_: true}"
    source = subset or ["subset=custom", "source=published", f"source.path={dataset}", "n_loras=[3,4]"]
    return [sys.executable, "-m", "lowra.run", *source, *methods, slow, f"results_dir={results}"]


def finished(folder: Path) -> dict[str, float]:
    """The records that are there and did not fail: key to W-Error."""
    store = Store(folder)
    store.refresh()
    return {record["key"]: record["w_error"] for record in store.all(LAYER) if not record["failed"]}


def main() -> None:
    """Kill, resume, compare; exit status 1 where anything differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=60, help="rounds in all")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="on one folder at a time")
    parser.add_argument("--seconds", type=float, default=8.0, help="a round is killed within so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="a run with metrics instead: subset=vit trials=3 ...")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    lost = altered = unequal = 0
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        (work / "slow_method.py").write_text(SLOW)
        dataset = data(work / "data")
        quiet = {"cwd": work, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

        def whole(results: Path) -> Path:
            subprocess.run(command(dataset, results, arguments.overrides), check=True, **quiet)  # type: ignore[call-overload]
            return next(path.parent for path in results.rglob("records"))

        undisturbed = read([whole(work / "undisturbed")])
        for processes in arguments.processes:
            results = work / f"killed-{processes}"
            for _ in range(arguments.kills // len(arguments.processes)):
                known = finished(folder) if (folder := next((p.parent for p in results.rglob("records")), None)) else {}
                running = [
                    subprocess.Popen(command(dataset, results, arguments.overrides), **quiet)  # type: ignore[call-overload]
                    for _ in range(processes)
                ]
                time.sleep(rng.uniform(0.5, arguments.seconds))
                for process in running:
                    process.kill()
                    process.wait()
                if folder := next((p.parent for p in results.rglob("records")), None):
                    now = finished(folder)
                    lost += len(set(known) - set(now))
                    altered += sum(now[key] != value for key, value in known.items() if key in now)
                    total = len(undisturbed.layers)
                    print(f"{processes} processes: {len(now)} of {total} records", flush=True)
                    if len(now) == total and rng.random() < 0.5:
                        shutil.rmtree(results)
            ended = read([whole(results)])
            for name in ("layers", "scores"):
                ours, theirs = (
                    getattr(records, name).drop(columns=TIMES, errors="ignore") for records in (ended, undisturbed)
                )
                order = [column for column in ("key", "label", "column", "n_loras", "trial") if column in ours]
                ours, theirs = (t.sort_values(order, ignore_index=True) if len(t) else t for t in (ours, theirs))
                if not ours.equals(theirs):
                    unequal += 1
                    print(f"{processes} processes: {name} differ from the undisturbed run's")
            assert len(trials(ended.layers, ended.scores)) == len(trials(undisturbed.layers, undisturbed.scores))
    print(f"{lost} finished records lost, {altered} altered, {unequal} tables unequal after {arguments.kills} kills")
    if lost or altered or unequal:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
