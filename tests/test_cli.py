"""The commands as a user meets them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def lowra(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "lowra", *arguments], capture_output=True, text=True, **options)  # type: ignore[call-overload]


def test_alone_it_lists_the_commands() -> None:
    done = lowra()
    assert done.returncode == 0
    for name in ("run", "build", "report"):
        assert f"lowra {name}" in done.stdout


def test_an_unknown_command_lists_the_known() -> None:
    done = lowra("rum")
    assert done.returncode == 2
    assert "Unknown command 'rum'; known: run, build," in done.stderr


@pytest.mark.parametrize("command", ["run", "report", "build"])
def test_help_helps_without_loading_torch(command: str) -> None:
    code = (
        f"import sys, runpy; sys.argv = ['lowra', {command!r}, '--help']\n"
        "try:\n    runpy.run_module('lowra', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "print('heavy:', [m for m in ('torch', 'transformers', 'pandas', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "heavy: []" in done.stdout, done.stderr
    assert len(done.stdout) > 300


def test_the_console_command_runs(tmp_path: Path) -> None:
    done = lowra("run", "subset=nope", cwd=tmp_path)
    assert done.returncode == 2
    assert "Unknown subset 'nope'" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("delay", [0.2, 0.6, 1.2])
def test_an_interrupt_at_the_start_is_no_traceback(tmp_path: Path, delay: float) -> None:
    arguments = [sys.executable, "-m", "lowra.run", "subset=vit", f"results_dir={tmp_path}", f"cache_dir={tmp_path}"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    # Before Python has come to our first line (0.1 s on a quiet machine) an interrupt is the interpreter's.
    if "lowra" in said or "stopped" in said:
        assert process.returncode in (130, -signal.SIGINT)
        assert "Traceback" not in said


def test_one_failed_job_of_several_does_not_take_the_others_down(dataset: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "lowra.run", "-m", "subset=custom", "source=published", f"source.path={dataset}"]
    arguments += ["methods=[mean_lora]", "trials=1", "n_loras=99,3", f"results_dir={tmp_path}/out"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ))
    assert done.returncode != 0
    assert "n_loras is 99, but subset 'custom' has 6 models" in done.stderr
    assert (tmp_path / "out/custom/published/table.md").exists()
