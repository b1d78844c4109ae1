"""The commands as a user meets them."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
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


def test_a_slip_of_the_finger_is_told_before_torch_is_loaded_or_a_process_started(tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['lowra.run', 'subset=vit', 'jobs=2', 'trials=many']\n"
        "try:\n    runpy.run_module('lowra.run', run_name='__main__')\n"
        "except SystemExit as end:\n    print('status', end.code)\n"
        "print('heavy:', [m for m in ('torch', 'pandas', 'loky') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert "error: trials is 'many'; expected a whole number." in done.stderr
    assert done.stdout.splitlines() == ["status 2", "heavy: []"]
    assert not list(tmp_path.iterdir())


def test_the_console_command_runs(tmp_path: Path) -> None:
    done = lowra("run", "subset=nope", cwd=tmp_path)
    assert done.returncode == 2
    assert "Unknown subset 'nope'" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["hydra", "omegaconf", "numpy", "torch", "torch.nn", "pyarrow", "transformers"])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_at_the_start_is_no_traceback(tmp_path: Path, module: str, sent: signal.Signals) -> None:
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        pytest.skip(f"{module} is not installed")
    # While such libraries are imported an interrupt raised in them may be swallowed, or come out as another error.
    code = (
        "import os, runpy, sys, threading, time\n"
        "def interrupt():\n"
        f"    while {module!r} not in sys.modules:\n"
        "        time.sleep(0.0005)\n"
        f"    os.kill(os.getpid(), {int(sent)})\n"
        "threading.Thread(target=interrupt, daemon=True).start()\n"
        f"sys.argv = ['lowra.run', 'subset=vit', 'results_dir={tmp_path}', 'cache_dir={tmp_path}']\n"
        "runpy.run_module('lowra.run', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 128 + sent
    assert "Traceback" not in done.stderr
    assert "stopped" in done.stderr


def test_one_failed_job_of_several_does_not_take_the_others_down(dataset: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "lowra.run", "-m", "subset=custom", "source=published", f"source.path={dataset}"]
    arguments += ["methods=[mean_lora]", "trials=1", "n_loras=99,3", f"results_dir={tmp_path}/out"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ))
    assert done.returncode != 0
    assert "n_loras is 99, but subset 'custom' has 6 models" in done.stderr
    assert (tmp_path / "out/custom/published/table.md").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_cannot_be_written_is_no_traceback(tmp_path: Path) -> None:
    code = "from lowra.cli import tell_mistakes; tell_mistakes(lambda: print('a table'))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (2, "error: Cannot write (No space left on device).\n")
    read, write = os.pipe()
    os.close(read)  # nobody reads on
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
    done = subprocess.run(["sh", "-c", f'exec "{sys.executable}" -c "{code}" >&-'], stderr=subprocess.PIPE, timeout=300)
    assert (done.returncode, done.stderr) == (0, b"")  # closed by whoever wants nothing said


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("recover", ["A", "B", "C"], "'A' is no setting; expected KEY=VALUE, such as models='[A,B,C]' output=OUT."),
        ("recover", ["models=[a,", "b]"], "'models=[a,' is not closed; a shell parts arguments at spaces"),
        ("recover", ["models=[a (1),b,c]", "output=x"], "put names that hold spaces or signs in quotes of their own"),
        ("recover", ["models=[a,b,c]", "output=x (1)"], """quotes of its own: 'output="x (1)"'."""),
        ("run", ["vit"], "'vit' is no setting; expected KEY=VALUE, such as subset=vit."),
        ("run", ["subset = vit"], "'subset = vit' has spaces at its =; write subset=vit."),
        ("run", ["subset=vit", 'note=he said "hi'], """of its own: 'note="he said \\"hi"'."""),
        ("run", ["subset=vit", "layers=^a(b|c)$"], """of its own: 'layers="^a(b|c)$"'."""),
    ],
)
def test_what_hydras_grammar_does_not_know_is_told_with_the_way_to_write_it(
    command: str, arguments: list[str], message: str, tmp_path: Path
) -> None:
    done = lowra(command, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_do_not_lend_their_numbers_to_files(closed: str, tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from lowra.cli import open_streams\n"
        "open_streams()\n"
        "number = os.open('file', os.O_CREAT | os.O_WRONLY)\n"
        "os.write(2, b'a warning')\n"
        "print('to nobody'); print('nor this', file=sys.stderr); sys.stderr.isatty()\n"
        "os.write(number, str(number).encode())"
    )
    done = subprocess.run(["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, code], cwd=tmp_path)
    assert done.returncode == 0
    assert int((tmp_path / "file").read_text()) > 2
