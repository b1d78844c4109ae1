"""Many processes on one machine: tasks to workers, results back as they come.

loky starts the workers; each computes on its share of the cores, so that the thread pools of several BLAS libraries do
not spin against each other. Work and tasks are pickled; results come in the order they are ready.

Commands fork their workers from one server that has imported what they need (`started`): torch once instead of in
every worker, and its pages shared. Elsewhere a worker starts as a program of its own, which does not run the user's
main module, as a fork from a server would.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from lowra.errors import LowraError
from lowra.imports import uncollected

_USED: list[Any] = []  # the executor, where there is one

T = TypeVar("T")
R = TypeVar("R")

# A worker imports torch (some 3 s, 0.4 GB) before its first task: not worth it for less.
MIN_TASKS = 16
WORKER_BYTES = 0.5e9

# Seconds of work that wait for each worker, so that none is idle while this process is busy with what came.
AHEAD = 10

# Seconds until a worker that nothing is asked of ends.
IDLE = 300

# How many threads a library may start of itself, by environment variables of the usual ones.
THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


def choose_jobs(tasks: int, cores: int, bytes_per_task: float, device: str) -> int:
    """How many processes to use where nobody says: by the cores, the memory and the size of the tasks.

    bytes_per_task: peak memory of one task. A GPU is used by one process.
    """
    import psutil

    if device != "cpu" or tasks < MIN_TASKS:
        return 1
    room = psutil.virtual_memory().available * 0.7 / (WORKER_BYTES + bytes_per_task)
    return max(1, min(cores, tasks, int(room)))


def cores() -> int:
    """The processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of(jobs: int) -> int:
    """Threads of each of so many processes: its share of the cores, or fewer where OMP_NUM_THREADS says so."""
    if jobs == 1:
        import torch

        return min(torch.get_num_threads(), cores())
    most = os.environ.get("OMP_NUM_THREADS", "")  # torch may not be imported yet
    return max(1, min(int(most) if most.isdecimal() else cores(), cores() // jobs))


@contextlib.contextmanager
def started(jobs: int | None, *modules: str, threads: int | None = None) -> Iterator[None]:
    """Workers, or their server, that import some modules now, while this process plans what they have to do.

    A `run` inside gives it to them if jobs and threads are the same. On leaving, the workers are stopped; a server ends
    with this process. jobs: None where they are chosen later. threads: of each, by default their share.
    """
    forked = _may_fork()
    if forked:
        multiprocessing.set_forkserver_preload(list(modules))
    if jobs is None or jobs == 1:
        yield
        return
    threads = threads or threads_of(jobs)
    if forked:
        _start_server(threads)
    else:
        executor = _executor(jobs, threads)
        with _signals_blocked():
            for _ in range(jobs):
                executor.submit(_import, *modules)
    try:
        yield
    finally:
        _stop()


def _may_fork() -> bool:
    """Whether workers may be forked from a server: they run the main module, which has to be one of ours for that."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    name = spec.name.split(".")[0] if spec is not None else Path(getattr(main, "__file__", None) or "").stem
    return name == "lowra" and "forkserver" in multiprocessing.get_all_start_methods()


def run(
    work: Callable[[T], R], tasks: Iterable[T], jobs: int, threads: int, alone: Callable[[], bool] = lambda: True
) -> Iterator[tuple[T, R]]:
    """Each task with its result, as results come.

    jobs: processes; 1 works in this one. threads: of each. Tasks are taken as workers become free, and where nobody
    else works at the same ones (alone) some before, see `AHEAD`.
    Raises LowraError when a worker is killed, or the work cannot be sent to another process; exceptions of the work
    come through. Closing the iterator, or an interrupt, stops the workers at once.
    """
    if jobs == 1:
        import torch

        torch.set_num_threads(threads)
        for task in tasks:
            yield task, work(task)
        return
    yield from _parallel(work, tasks, jobs, threads, alone)


def _parallel(
    work: Callable[[T], R], tasks: Iterable[T], jobs: int, threads: int, alone: Callable[[], bool]
) -> Iterator[tuple[T, R]]:
    import cloudpickle

    try:
        sent = cloudpickle.dumps(work)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise LowraError(f"The work cannot be sent to other processes ({error}); use jobs=1.") from None
    name = f"{os.getpid()}-{time.monotonic_ns()}"
    waiting = iter(tasks)
    pending: set[Future[tuple[T, R, float]]] = set()
    finished, seconds = 0, 0.0

    def wanted() -> float:
        return jobs * max(2, AHEAD * finished / seconds if seconds and alone() else 0)

    def fill() -> None:
        while len(pending) < wanted():  # asked anew: taking a task may show that others are at work
            try:
                task = next(waiting)
            except StopIteration:
                return
            with _signals_blocked():  # a worker may be started
                pending.add(executor.submit(_worker, name, sent, task, threads))

    executor = _executor(jobs, threads)
    try:
        fill()
        while pending:
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                pending.remove(future)
                task, result, took = future.result()
                finished, seconds = finished + 1, seconds + took
                fill()
                yield task, result
    except (BrokenProcessPool, EOFError, ConnectionError):  # the last two where the workers' server is gone
        raise LowraError(
            "A worker process was killed, perhaps for want of memory; what was finished is kept. Start the same "
            "command again with fewer processes, such as jobs=1."
        ) from None
    finally:
        if pending:  # an error, an interrupt, or nobody wants the rest
            _stop()


def _executor(jobs: int, threads: int) -> Any:
    """The processes, the same as long as jobs and threads are."""
    from loky import get_reusable_executor

    # Large layers leave more on a worker's heap than loky takes for sound: it starts another, and nobody need know.
    warnings.filterwarnings("ignore", "A worker (stopped|was restarted) while some jobs", UserWarning)
    forked = _may_fork()
    if forked:
        _start_server(threads)
    _USED[:] = [
        get_reusable_executor(
            jobs,
            context=multiprocessing.get_context("forkserver") if forked else None,
            timeout=IDLE,
            # Watched from its first moment: a worker that is still importing when its parent is killed would wait.
            initializer=_watch,
            initargs=(os.getpid(), forked),
            env=dict.fromkeys(THREADS, str(threads)),
        )
    ]
    return _USED[0]


def _stop() -> None:
    """End the workers, at work or not."""
    for executor in _USED:
        executor.shutdown(wait=True, kill_workers=True)
    _USED.clear()


def _start_server(threads: int) -> None:
    """The server that workers are forked from, unless it runs: with so many threads, finding the modules found here.

    Left to itself it looks for modules in the working directory first.
    """
    from multiprocessing import forkserver

    before = dict(os.environ)
    os.environ.update(dict.fromkeys(THREADS, str(threads)))
    os.environ["PYTHONPATH"] = os.pathsep.join(place or os.curdir for place in sys.path)
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        with _signals_blocked():
            forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started inside never see an interrupt: it is the parent's to answer, which stops them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- In a worker ------------------------------------------------------------------------------------------------

_WORK: dict[str, Callable[[Any], Any]] = {}


def _worker(name: str, sent: bytes, task: Any, threads: int) -> tuple[Any, Any, float]:
    """One task in a worker process, its result and its seconds; the work is unpickled once."""
    if name not in _WORK:
        import torch

        _WORK.clear()
        torch.set_num_threads(threads)
        _WORK[name] = pickle.loads(sent)
    began = time.monotonic()
    return task, _WORK[name](task), time.monotonic() - began


def _import(*modules: str) -> None:
    with uncollected():
        for module in modules:
            importlib.import_module(module)


def _watch(user: int, forked: bool) -> None:
    """Watch over the process that uses this worker, from a thread. forked: whether by a server of it."""
    threading.Thread(target=_leave_with, args=(user, forked), daemon=True).start()


def _leave_with(user: int, forked: bool) -> None:
    """End this worker when the process that uses it is gone, so that a killed run leaves nobody behind."""
    if forked and (parent := multiprocessing.parent_process()) is not None:
        parent.join()
    while not forked and os.getppid() == user:
        time.sleep(1)
    os._exit(1)
