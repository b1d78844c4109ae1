"""Many processes on one machine: tasks to workers, results back as they come.

joblib's loky starts the workers; each computes on its share of the cores, so that the thread pools of several BLAS
libraries do not spin against each other. Work and tasks are pickled; results come in the order they are ready.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from lowra.errors import LowraError
from lowra.imports import uncollected

T = TypeVar("T")
R = TypeVar("R")

# A worker imports torch (some 3 s, 0.4 GB) before its first task: not worth it for less.
MIN_TASKS = 16
WORKER_BYTES = 0.5e9


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
def started(jobs: int | None, *modules: str) -> Iterator[None]:
    """Workers that start now and import some modules, while this process plans what a `run` inside has for them to do.

    loky gives a later `run` the same processes if jobs and threads are the same. On leaving they are stopped.
    jobs: None where they are chosen later.
    """
    if jobs is None or jobs == 1:
        yield
        return
    imported = _workers(_import, [modules] * jobs, jobs, threads_of(jobs))
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of results that nobody took: there are none
            imported.close()


def run(work: Callable[[T], R], tasks: Iterable[T], jobs: int, threads: int) -> Iterator[tuple[T, R]]:
    """Each task with its result, as results come.

    jobs: processes; 1 works in this one. threads: of each. tasks are taken one by one as workers become free.
    Raises LowraError when a worker is killed, or the work cannot be sent to another process; exceptions of the work
    come through. Closing the iterator, or an interrupt, stops the workers at once.
    """
    if jobs == 1:
        import torch

        torch.set_num_threads(threads)
        for task in tasks:
            yield task, work(task)
        return
    yield from _parallel(work, tasks, jobs, threads)


def _parallel(work: Callable[[T], R], tasks: Iterable[T], jobs: int, threads: int) -> Iterator[tuple[T, R]]:
    import cloudpickle

    try:
        sent = cloudpickle.dumps(work)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise LowraError(f"The work cannot be sent to other processes ({error}); use jobs=1.") from None
    name = f"{os.getpid()}-{time.monotonic_ns()}"
    results = _workers(_worker, ((name, sent, task, threads) for task in tasks), jobs, threads)
    try:
        yield from results
    except BrokenProcessPool:
        raise LowraError(
            "A worker process was killed, perhaps for want of memory; what was finished is kept. Start the same "
            "command again with fewer processes, such as jobs=1."
        ) from None
    finally:
        results.close()  # ends the workers where they are still at work


def _workers(
    work: Callable[..., Any], arguments: Iterable[tuple[Any, ...]], jobs: int, threads: int
) -> Generator[Any, None, None]:
    """Results of calls in worker processes as they come; closing the iterator stops the processes."""
    from joblib import Parallel, delayed, parallel_config

    # Large layers leave more on a worker's heap than loky takes for sound: it starts another, and nobody need know.
    warnings.filterwarnings("ignore", "A worker stopped while some jobs", UserWarning)
    # Watched from its first moment: a worker that is still importing when its parent is killed would wait for minutes.
    watched = {"initializer": _watch_parent, "initargs": (os.getpid(),)}
    with _signals_blocked(), parallel_config(backend="loky", inner_max_num_threads=threads, **watched):
        pool = Parallel(n_jobs=jobs, return_as="generator_unordered", pre_dispatch=2 * jobs, batch_size=1)
        results: Generator[Any, None, None] = pool(delayed(work)(*each) for each in arguments)
    return results


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Workers started inside never see an interrupt: it is the parent's to answer, which stops them."""
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


def _worker(name: str, sent: bytes, task: Any, threads: int) -> tuple[Any, Any]:
    """One task in a worker process; the work is unpickled once."""
    if name not in _WORK:
        import torch

        _WORK.clear()
        torch.set_num_threads(threads)
        _WORK[name] = pickle.loads(sent)
    return task, _WORK[name](task)


def _import(*modules: str) -> None:
    with uncollected():
        for module in modules:
            importlib.import_module(module)


def _watch_parent(parent: int) -> None:
    threading.Thread(target=_leave_with_parent, args=(parent,), daemon=True).start()


def _leave_with_parent(parent: int) -> None:
    """End this worker when the process that started it is gone, so that a killed run leaves nobody behind."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
