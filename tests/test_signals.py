"""Signals: answered on the spot while libraries are imported, raised afterwards, and never forgotten."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest


def ended(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


SWALLOWED = """
import os, signal
from lowra import signals
signals.leave()
signals.stop()
try:
    os.kill(os.getpid(), {number})
    while True: pass
except BaseException as error:
    print(type(error).__name__, error)
print(signals.came())
signals.check()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_was_swallowed_is_raised_again(number: signal.Signals) -> None:
    done = ended(SWALLOWED.format(number=int(number)))
    assert done.stdout.split() == ["Stopped", number.name, str(int(number))]
    assert done.stderr.rstrip().endswith(f"Stopped: {number.name}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_while_nothing_is_open_a_signal_ends_the_process(number: signal.Signals) -> None:
    done = ended(f"import os; from lowra import signals; signals.leave(); os.kill(os.getpid(), {int(number)}); 1 / 0")
    assert done.returncode == 128 + number
    assert "the same command continues where this one stopped" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("theirs", ["signal.SIG_IGN", "lambda number, frame: print('theirs')"])
def test_who_answers_already_is_left_to_it(theirs: str) -> None:
    done = ended(
        f"import os, signal; signal.signal(signal.SIGHUP, {theirs})\n"
        "from lowra import signals; signals.leave(); signals.stop(); os.kill(os.getpid(), signal.SIGHUP); print('on')"
    )
    assert done.returncode == 0
    assert done.stdout.split()[-1] == "on"
    assert ("theirs" in done.stdout) == ("theirs" in theirs)


@pytest.mark.parametrize("command", ["report", "submit"])
def test_what_is_written_is_cleaned_away(command: str) -> None:
    # Once its libraries are there a command must not end on the spot: a file may be half-written.
    handler = ended(
        "import signal, sys\n"
        "from lowra import signals\n"
        f"from lowra import {command}\n"
        f"sys.argv = ['lowra {command}', '.' if {command!r} == 'report' else 'methods=none']\n"
        "real = signals.stop\n"
        "def stop():\n    real()\n    print(signal.getsignal(signal.SIGINT).__name__)\n    raise SystemExit(0)\n"
        f"signals.stop = stop\n{command}.main()\n"
    )
    assert handler.stdout.strip() == "_stop", handler.stderr
