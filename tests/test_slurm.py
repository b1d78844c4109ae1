"""Shards as jobs of a real Slurm: one cancelled, one killed, all resubmitted; the union is an undisturbed run's."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
from conftest import planted_layers

from lowra.bench.schema import write_dataset
from lowra.records import read

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts" / "slurm"
SHARDS = 8
PATIENCE = 400  # seconds for eight jobs: most of it is eight times the import of torch

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sbatch"))) or os.geteuid() != 0,
    reason="needs root and Slurm: apt-get install slurm-wlm munge",
)


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Slurm of one node; the environment that speaks to it and runs this lowra."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"LOWRA_SLURM_PORT": str(port), "LOWRA_SLURM_CPUS": "4", "OMP_NUM_THREADS": "1"}
    env |= {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    folder = tmp_path / "slurm"
    try:
        started = subprocess.run(
            [SCRIPTS / "one_node.sh", "start", folder], env=env, capture_output=True, text=True, timeout=60
        )
        assert started.returncode == 0, started.stderr
        name, value = started.stdout.strip().removeprefix("export ").split("=")
        yield env | {name: value}
    finally:
        subprocess.run([SCRIPTS / "one_node.sh", "stop", folder], env=env, timeout=60)


def wait(what: str, there: Callable[[], object]) -> object:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := there():
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited {PATIENCE} s for {what}")


def process(shard: str, results: Path) -> int | None:
    """The process of a shard of ours."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if f"shard={shard}" in arguments and f"results_dir={results}" in arguments:
            return int(folder.name)
    return None


def test_cancelled_and_killed_jobs_resubmitted_equal_an_undisturbed_run(tmp_path: Path, slurm: dict[str, str]) -> None:
    data = write_dataset(planted_layers(layers=4, d=24, k=20), tmp_path / "data")
    settings = ["subset=custom", "source=published", f"source.path={data}", "n_loras=3", "trials=4"]
    settings += ["methods=[mean_lora,spectral_detuning]", "subset.steps=3000", f"cache_dir={tmp_path / 'cache'}"]
    results = tmp_path / "runs"
    whole, folder = tmp_path / "whole" / "custom" / "published", results / "custom" / "published"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*arguments], env=slurm, cwd=tmp_path, capture_output=True, text=True, check=True)

    def submit() -> str:
        output = f"--output={tmp_path}/%A_%a.log"
        command = ["sbatch", "--parsable", output, str(SCRIPTS / "shards.sbatch"), *settings, f"results_dir={results}"]
        return run(*command).stdout.strip()

    def gone(job: str) -> bool:
        return not run("squeue", "--noheader", f"--jobs={job}").stdout.strip()

    def states(job: str) -> list[str]:
        shown = run("scontrol", "show", "job", job).stdout.split()
        return sorted(word.removeprefix("JobState=") for word in shown if word.startswith("JobState="))

    def journalled(shard: str) -> int | None:
        pid = process(shard, results)
        journals = list(folder.glob(f"records/*-{pid}-*.jsonl")) if pid else []
        return pid if any(path.read_bytes().count(b'"kind":"layer"') > 1 for path in journals) else None

    job = submit()
    killed = wait("shard 3 to have records", lambda: journalled(f"3/{SHARDS}"))
    os.kill(int(str(killed)), signal.SIGKILL)
    wait("shard 5 to have records", lambda: journalled(f"5/{SHARDS}"))
    run("scancel", f"{job}_5")
    wait("the jobs to end", lambda: gone(job))
    assert states(job) == ["CANCELLED", *["COMPLETED"] * (SHARDS - 2), "FAILED"]
    half = read([folder]).layers
    assert 2 * 2 < len(half) < 4 * 4 * 2

    job = submit()
    wait("the resubmitted jobs to end", lambda: gone(job))
    assert states(job) == ["COMPLETED"] * SHARDS
    after = read([folder]).layers
    # What was there was not done again.
    assert set(zip(half["key"], half["finished"], strict=True)) <= set(
        zip(after["key"], after["finished"], strict=True)
    )
    done = run(sys.executable, "-m", "lowra.run", *settings, f"results_dir={results}", "jobs=1")
    assert "32 of 32 recovered layers are there" in done.stderr
    run(sys.executable, "-m", "lowra.run", *settings, f"results_dir={tmp_path / 'whole'}", "jobs=1")

    tables = []
    for place in (folder, whole):
        table = read([place]).layers.sort_values("key").reset_index(drop=True)
        tables.append(table.drop(columns=["context", "folder", "seconds", "finished"]))
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert len(tables[0]) == 32
