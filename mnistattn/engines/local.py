"""Engine `local`: processes of this machine, of the standard library alone.

Not concurrent.futures' pool, which breaks as a whole when one of its processes dies. Here each
worker has a pipe of its own; one that dies is replaced, and its task is run again. Workers are
spawned, not forked (threads and locks of the caller are not copied), ignore Ctrl-C, which is the
caller's to handle, and end when the caller does, however it ends.
"""

import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from multiprocessing import connection, get_context, parent_process
from typing import Any

from tqdm import tqdm

from mnistattn.engines import RETRIES, Task, WorkerDied
from mnistattn.errors import InputError, MnistattnError

_AHEAD = 64  # tasks looked at, to find one whose resources are free


class Local:
    """`workers` processes, default one a core; 0: tasks run in this process, one after another.

    resources: what this machine has, such as {"GPU": 2}: as many tasks that ask for one run at a
    time.
    """

    def __init__(self, workers: int | None = None, resources: Mapping[str, float] | None = None):
        self._count = (os.cpu_count() or 1) if workers is None else workers
        self._capacity = dict(resources or {})
        self._workers: list[_Worker] = []

    def __enter__(self) -> "Local":
        return self

    def __exit__(self, *_) -> None:
        self._end()

    @property
    def pids(self) -> list[int]:
        """The workers' process ids."""
        return [worker.process.pid for worker in self._workers if worker.process.pid]

    def run(
        self, tasks: Iterable[Task], function: Callable[[Any], Any]
    ) -> Iterator[tuple[Task, Any]]:
        """See `mnistattn.engines.Engine`."""
        waiting = _Waiting(tasks, self._capacity)
        if self._count == 0:
            while (task := waiting.next()) is not None:
                yield task, function(task.argument)
                waiting.free(task)
            return
        try:
            yield from self._run(waiting, function)
        except BaseException:  # a failure, Ctrl-C, or the caller wants no more: nobody waits
            self._end()
            raise

    def _run(self, waiting: "_Waiting", function) -> Iterator[tuple[Task, Any]]:
        deaths: dict[int, int] = {}  # of workers, by task
        idle_deaths = 0
        while True:
            self._hand_out(waiting, function)
            busy = [worker for worker in self._workers if worker.task is not None]
            if not busy:
                return
            for worker in _ready(self._workers):
                task, reply = worker.task, worker.reply()
                if reply is None:
                    self._workers.remove(worker)
                    code = worker.end()
                    if task is None:
                        idle_deaths += 1
                        if idle_deaths > RETRIES * self._count:
                            raise MnistattnError(f"workers cannot start: they end {_how(code)}.")
                        continue
                    deaths[id(task)] = deaths.get(id(task), 0) + 1
                    if deaths[id(task)] > RETRIES:
                        how = f"its worker died {deaths[id(task)]} times, {_how(code)}."
                        raise WorkerDied(task.name, how)
                    waiting.again(task)
                    continue
                assert task is not None
                worker.task = None
                waiting.free(task)
                deaths.pop(id(task), None)
                good, value = reply
                if not good:
                    raise value
                self._hand_out(waiting, function)  # nobody is idle while the caller looks at it
                yield task, value

    def _hand_out(self, waiting: "_Waiting", function) -> None:
        """Give every free worker a task, starting workers as they are needed."""
        while True:
            free = next((w for w in self._workers if w.task is None), None)
            if free is None and len(self._workers) >= self._count:
                return
            task = waiting.next()
            if task is None:
                return
            if free is None:
                free = _Worker()
                self._workers.append(free)
            free.give(task, function)

    def _end(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.end()
        self._workers = []


class _Waiting:
    """Tasks that wait: those to be run again first, then in order, but none whose resources are
    all in use while one behind it could run."""

    def __init__(self, tasks: Iterable[Task], capacity: Mapping[str, float]):
        self._tasks, self._ahead = iter(tasks), deque[Task]()
        self._capacity, self._left = capacity, dict(capacity)

    def next(self) -> Task | None:
        """A task that can run now, its resources taken; None if there is none."""
        while len(self._ahead) < _AHEAD and (task := next(self._tasks, None)) is not None:
            for name, amount in task.resources.items():
                if amount > self._capacity.get(name, 0):
                    raise InputError(
                        f"{task.name} asks for {amount:g} {name}, and there is "
                        f"{self._capacity.get(name, 0):g} here."
                    )
            self._ahead.append(task)
            if not task.resources:
                break  # it can run: no need to look further
        for task in self._ahead:
            if all(self._left[name] >= amount for name, amount in task.resources.items()):
                self._ahead.remove(task)
                for name, amount in task.resources.items():
                    self._left[name] -= amount
                return task
        return None

    def free(self, task: Task) -> None:
        """Give the resources of a task back."""
        for name, amount in task.resources.items():
            self._left[name] += amount

    def again(self, task: Task) -> None:
        """Put a task back, before all others."""
        self.free(task)
        self._ahead.appendleft(task)


class _Worker:
    """A process and the pipe to it."""

    def __init__(self) -> None:
        context = get_context("spawn")
        self.pipe, other = context.Pipe()
        self.task: Task | None = None
        self.process = context.Process(target=_serve, args=(other,), daemon=True)
        self.process.start()
        other.close()  # or its death would not be seen

    def give(self, task: Task, function: Callable[[Any], Any]) -> None:
        self.task = task
        with suppress(BrokenPipeError, ConnectionError):  # it died: `reply` will tell
            self.pipe.send((function, task.argument))

    def reply(self) -> tuple[bool, Any] | None:
        """(True, result), (False, exception), or None if the worker died."""
        try:
            return self.pipe.recv() if self.pipe.poll() else None
        except (EOFError, OSError, pickle.UnpicklingError):
            return None

    def end(self) -> int | None:
        self.pipe.close()
        self.process.kill()
        self.process.join()
        return self.process.exitcode


def _ready(workers: list[_Worker]) -> list[_Worker]:
    """Wait until workers have answered or died; those workers."""
    seen = connection.wait([w.pipe for w in workers] + [w.process.sentinel for w in workers])
    return [w for w in workers if w.pipe in seen or w.process.sentinel in seen]


def _how(code: int | None) -> str:
    """How a process ended, in words."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"with exit code {code}"


def _serve(pipe) -> None:
    """A worker: answer until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    # A progress bar's lock between processes would be left over when this one is killed.
    tqdm.set_lock(threading.RLock())
    while True:
        try:
            function, argument = pipe.recv()
        except (EOFError, OSError):
            return
        except Exception as error:  # it cannot be imported here
            answer = False, MnistattnError(f"a worker cannot load its task: {error}")
        else:
            answer = _answer(function, argument)
        try:
            pipe.send(answer)
        except (BrokenPipeError, ConnectionError):
            return
        except Exception as error:  # it cannot be pickled
            pipe.send((False, MnistattnError(f"a worker's answer cannot be sent: {error}")))


def _answer(function, argument) -> tuple[bool, Any]:
    try:
        return True, function(argument)
    except BaseException as error:
        error.__traceback__ = None
        return False, error


def _end_with_the_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
