"""Work in other processes: the same results, errors that come through, nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from lowra import pool
from lowra.errors import LowraError


def square(task: int) -> tuple[int, int, int]:
    return task * task, os.getpid(), torch.get_num_threads()


def test_one_job_works_here() -> None:
    found = dict(pool.run(square, range(5), 1, 2))
    assert {task: value[0] for task, value in found.items()} == {i: i * i for i in range(5)}
    assert {value[1] for value in found.values()} == {os.getpid()}


@pytest.fixture(params=[False, True], ids=["started", "forked"])
def forked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Workers as programs of their own, and as forks of a server (of the command's, usually)."""
    monkeypatch.setattr(pool, "_may_fork", lambda: request.param)
    yield request.param
    pool._stop()


def test_two_jobs_work_elsewhere_with_their_share_of_threads(forked: bool) -> None:
    found = dict(pool.run(square, range(12), 2, 1))
    assert {task: value[0] for task, value in found.items()} == {i: i * i for i in range(12)}
    assert os.getpid() not in {value[1] for value in found.values()}
    assert {value[2] for value in found.values()} == {1}


def test_workers_started_ahead_do_the_work_and_are_stopped(forked: bool, recwarn: pytest.WarningsRecorder) -> None:
    # With torch, as a run's: loky takes 300 MB more than after a worker's first task for a leak, and starts another.
    with pool.started(2, "torch"):
        ahead = {process.pid for process in psutil.Process().children(recursive=True)}
        found = dict(pool.run(square, range(12), 2, 1))
        if not forked:  # else there is their server only
            assert {value[1] for value in found.values()} <= ahead
        workers = [psutil.Process(value[1]) for value in found.values()]
    psutil.wait_procs(workers, timeout=10)
    assert not any(worker.is_running() for worker in workers)
    assert not recwarn.list


@pytest.mark.parametrize("jobs", [None, 1])
def test_no_workers_are_started_for_one_process_or_a_number_chosen_later(jobs: int | None) -> None:
    before = set(psutil.Process().children())
    with pool.started(jobs, "lowra.pool"):
        assert set(psutil.Process().children()) <= before


def test_cores_are_shared_out_as_far_as_threads_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "cores", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [pool.threads_of(jobs) for jobs in (2, 5, 12, 40)] == [6, 2, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert [pool.threads_of(jobs) for jobs in (2, 5, 12)] == [2, 2, 1]


def dozing(seconds: float) -> float:
    time.sleep(seconds)
    return time.monotonic()


def test_tasks_are_taken_as_workers_become_free(forked: bool) -> None:
    taken = []

    def tasks() -> Iterator[float]:
        for i in range(400):  # far more than waits for a worker
            taken.append(i)
            yield 0.25

    results = pool.run(dozing, tasks(), 2, 1)
    next(results)
    assert len(taken) <= 2 * pool.AHEAD / 0.25 + 2
    results.close()


def test_workers_go_on_while_what_they_found_is_looked_at(forked: bool) -> None:
    results = pool.run(dozing, [0.05] * 60, 2, 1)
    next(results)
    time.sleep(1.0)
    back = time.monotonic()
    assert sum(done < back for _, done in results) > 8  # of 20 that one worker alone finds in that time


def test_no_more_than_the_next_task_waits_where_others_work_too(forked: bool) -> None:
    results = pool.run(dozing, [0.05] * 60, 2, 1, alone=lambda: False)
    next(results)
    time.sleep(1.0)
    back = time.monotonic()
    assert sum(done < back for _, done in results) <= 4


def test_no_more_tasks_are_taken_when_taking_one_shows_that_others_work_too(forked: bool) -> None:
    taken = []

    def tasks() -> Iterator[float]:
        for i in range(400):
            taken.append(i)
            yield 0.05

    results = pool.run(dozing, tasks(), 2, 1, alone=lambda: len(taken) < 7)
    next(results)
    assert len(taken) == 7
    results.close()


HOARD: list[torch.Tensor] = []


def hoarding(task: int) -> int:
    HOARD.append(torch.ones(90_000_000))  # 360 MB, as the heap keeps of a large layer
    time.sleep(1.1)  # workers are looked at once a second
    return task


def test_a_worker_that_has_grown_is_replaced_without_a_word(forked: bool, recwarn: pytest.WarningsRecorder) -> None:
    assert sorted(result for _, result in pool.run(hoarding, range(6), jobs=2, threads=1)) == [*range(6)]
    assert not [str(warning.message) for warning in recwarn if "worker" in str(warning.message)]


def failing(task: int) -> int:
    raise LowraError(f"task {task} cannot be done")


def test_errors_come_through(forked: bool) -> None:
    with pytest.raises(LowraError, match="task 0 cannot be done"):
        list(pool.run(failing, [0], 2, 1))


def dying(task: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return task


def test_a_killed_worker_is_a_sentence(forked: bool) -> None:
    with pytest.raises(LowraError, match=r"A worker process was killed.*jobs=1"):
        list(pool.run(dying, [0, 1], 2, 1))


def test_a_killed_server_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_may_fork", lambda: True)
    results = pool.run(dozing, range(10_000), 2, 1)
    next(results)
    servers = [each for each in psutil.Process().children() if "forkserver" in " ".join(each.cmdline())]
    for server in servers:
        server.kill()
    with pytest.raises(LowraError, match=r"A worker process was killed.*jobs=1"):
        list(results)
    assert len(servers) == 1


def test_work_that_cannot_be_sent_is_a_sentence(forked: bool) -> None:
    held = threading.Lock()
    with pytest.raises(LowraError, match=r"cannot be sent to other processes.*jobs=1"):
        list(pool.run(lambda task: held, [0], 2, 1))


CODE = """
import os, sys, time
sys.path.insert(0, {here!r})
from lowra import pool
pool._may_fork = lambda: {forked}
def slow(task):
    os.write(1, f'worker {{os.getpid()}}\\n'.encode())  # one write: two print at once
    time.sleep(60)
if __name__ == '__main__':
    for _ in pool.run(slow, range(4), 2, 1):
        pass
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks processes up in /proc")
@pytest.mark.parametrize("forked", [False, True], ids=["started", "forked"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_leaves_no_workers(tmp_path: Path, number: signal.Signals, forked: bool) -> None:
    script = tmp_path / "stopped_run.py"
    script.write_text(CODE.format(here=str(Path(pool.__file__).parents[1]), forked=forked))
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    workers = [int(process.stdout.readline().split()[1]) for _ in range(2)]
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    process.wait(timeout=30)
    deadline = time.monotonic() + 20
    while any(alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(worker) for worker in workers)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks processes up in /proc")
@pytest.mark.parametrize("forked", [False, True], ids=["started", "forked"])
def test_a_run_killed_while_its_workers_start_leaves_none(tmp_path: Path, forked: bool) -> None:
    script = tmp_path / "starting_run.py"
    script.write_text(CODE.format(here=str(Path(pool.__file__).parents[1]), forked=forked))
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(workers := started_by(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert len(workers) >= 2
    deadline = time.monotonic() + 60  # for importing torch, twice, before they look
    while any(alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(worker) for worker in workers)


def started_by(parent: int) -> list[int]:
    """The workers that a process has started or its server forked, the server too; not what counts their resources."""
    try:
        found = psutil.Process(parent).children(recursive=True)
        return [each.pid for each in found if "resource_tracker" not in " ".join(each.cmdline())]
    except psutil.Error:
        return []


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_jobs_are_chosen_by_cores_memory_and_work() -> None:
    assert pool.choose_jobs(100, 2, 1e6, "cpu") == 2
    assert pool.choose_jobs(pool.MIN_TASKS - 1, 2, 1e6, "cpu") == 1
    assert pool.choose_jobs(100, 8, 1e15, "cpu") == 1
    assert pool.choose_jobs(100, 8, 1e6, "cuda") == 1
