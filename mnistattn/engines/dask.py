"""Engine `dask`: Dask distributed, a cluster of this machine or one that runs already.

A task is sent when a thread of a worker is free, and no earlier: Dask gives tasks that wait to a
worker right away, where they would stand behind one that takes long. A round trip between two tasks
is the price, milliseconds; and the number of tasks costs no memory. A task whose worker died is run
elsewhere by Dask itself; after RETRIES deaths it fails. Needs `pip install 'mnistattn[dask]'` here
and on every worker, with the same version of mnistattn.
"""

import logging
import os
import queue
import time
import types
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from mnistattn.engines import RETRIES, Task, WorkerDied
from mnistattn.errors import InputError, MnistattnError

CONNECT_SECONDS = 8  # for the scheduler to answer
WORKER_SECONDS = 30  # for a scheduler's first worker
ALONE_SECONDS = 300  # without any worker later: they may be restarted, or wait in a queue
_RECOUNT = 2.0  # seconds between looks for workers that have come or gone
_AHEAD = 64  # tasks sent that ask for a resource: those wait at the scheduler, and block no other


class Dask:
    """The cluster at `scheduler` (such as tcp://host:8786), or one of `workers` processes here.

    Raises InputError if Dask is not installed, the scheduler does not answer or has no workers, or
    a worker has another mnistattn than this process or none; the message names the worker.
    """

    def __init__(self, workers: int | None = None, scheduler: str | None = None):
        self._cluster: Any = None
        self._client: Any = None
        self._counted, self._known = -_RECOUNT, 0  # threads of all workers, and when we looked
        try:
            import distributed
        except ImportError as error:
            raise InputError(
                "engine dask needs Dask's distributed: pip install 'mnistattn[dask]'."
            ) from error
        try:
            if scheduler is None:
                self._start(distributed, workers or os.cpu_count() or 1)
            else:
                self._connect(distributed, scheduler)
            self._where = scheduler or "this machine"
            self._compare_versions()
        except BaseException:
            self._close()
            raise

    def _start(self, distributed, workers: int) -> None:
        import dask

        # A worker that was killed says so at length; what matters is raised.
        for name in ("distributed", "distributed.nanny", "distributed.scheduler"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with dask.config.set({"distributed.scheduler.allowed-failures": RETRIES}):
            self._cluster = distributed.LocalCluster(
                n_workers=workers, threads_per_worker=1, processes=True,
                dashboard_address="127.0.0.1:0", silence_logs=logging.CRITICAL,
            )  # fmt: skip
            self._client = distributed.Client(self._cluster)

    def _connect(self, distributed, scheduler: str) -> None:
        logging.getLogger("distributed").setLevel(logging.CRITICAL)
        # Known before it connects, so that it is closed if it cannot. The garbage collector would
        # close it as well, but waits for a lock then that is held while another event loop starts;
        # where it runs in the thread of that loop, both wait for ever.
        self._client = distributed.Client.__new__(distributed.Client)
        try:
            self._client.__init__(scheduler, timeout=CONNECT_SECONDS)
        except (OSError, ValueError, TypeError) as error:  # TimeoutError is an OSError
            raise InputError(
                f"no Dask scheduler answers at {scheduler}: start one with 'dask scheduler', or "
                "correct --scheduler."
            ) from error
        try:
            self._client.wait_for_workers(1, timeout=WORKER_SECONDS)
        except TimeoutError as error:
            raise InputError(
                f"the Dask scheduler at {scheduler} has no workers: start some with "
                f"'dask worker {scheduler}'."
            ) from error

    def _compare_versions(self) -> None:
        """Refuse workers that would load another mnistattn, before any task fails on them."""
        from mnistattn.engines.version import code_version

        # Sent by value: a worker that lacks mnistattn could not even load a function of it.
        probe = types.FunctionType(_probe.__code__, {"__name__": "__main__"}, "probe")
        here = code_version()
        for address, found in sorted(self._client.run(probe).items()):
            if found != here:
                raise InputError(
                    f"the Dask worker {address} has {_said(found)}, and this process "
                    f"{_said(here)}: install the same on both."
                )

    def __enter__(self) -> "Dask":
        return self

    def __exit__(self, *_) -> None:
        self._close()

    @property
    def pids(self) -> list[int]:
        """The workers' process ids."""
        return list(self._client.run(os.getpid).values())

    def run(
        self, tasks: Iterable[Task], function: Callable[[Any], Any]
    ) -> Iterator[tuple[Task, Any]]:
        """See `mnistattn.engines.Engine`."""
        tasks, done = iter(tasks), queue.SimpleQueue[Any]()
        sent: dict[str, tuple[Task, Any]] = {}  # by key: the task and its future
        run, number, more = uuid.uuid4().hex[:8], 0, True
        known: set[tuple[str, float]] = set()
        try:
            while True:
                while more and self._has_room([task for task, _ in sent.values()]):
                    task = next(tasks, None)
                    if task is None:
                        more = False
                        break
                    self._check_resources(task, known)
                    future = self._client.submit(
                        function, task.argument, key=f"{task.name}-{run}-{number}", pure=False,
                        resources=dict(task.resources) or None,
                    )  # fmt: skip
                    sent[future.key], number = (task, future), number + 1
                    future.add_done_callback(done.put)
                if not sent:
                    return
                future = self._next(done, more)
                if future is not None:
                    task, _ = sent.pop(future.key)
                    yield task, self._result(task, future)
        finally:  # also on a failure, Ctrl-C, or when the caller wants no more
            with suppress(Exception):
                self._client.cancel([future for _, future in sent.values()], force=True)

    def _has_room(self, sent: list[Task]) -> bool:
        """True if another task may be sent."""
        plain = sum(not task.resources for task in sent)
        return plain < max(1, self._threads()) and len(sent) - plain < _AHEAD

    def _threads(self) -> int:
        now = time.monotonic()
        if now - self._counted > _RECOUNT:
            self._counted, self._known = now, sum(self._client.nthreads().values())
        return self._known

    def _check_resources(self, task: Task, known: set[tuple[str, float]]) -> None:
        """InputError if no worker has what a task asks for: it would wait for ever."""
        for name, amount in task.resources.items():
            if (name, amount) in known:
                continue
            workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
            if not any(w.get("resources", {}).get(name, 0) >= amount for w in workers):
                raise InputError(
                    f"{task.name} asks for {amount:g} {name}, and no worker of {self._where} has "
                    f"it: start one with 'dask worker --resources \"{name}={amount:g}\"'."
                )
            known.add((name, amount))

    def _next(self, done: queue.SimpleQueue, more: bool) -> Any:
        """The next future that is done, or None if there may be room for more tasks meanwhile;
        MnistattnError if there is nobody left to finish one."""
        alone_since: float | None = None
        while True:
            try:
                return done.get(timeout=1)
            except queue.Empty:
                pass
            if self._client.status not in ("running", "connecting"):
                raise MnistattnError(
                    f"the connection to the Dask scheduler of {self._where} broke."
                )
            try:
                alone = self._client.status == "connecting" or not self._client.nthreads()
            except Exception:  # whatever it is: nobody answered, and ALONE_SECONDS limit that
                alone = True
            if not alone and more:
                return None
            now = time.monotonic()
            alone_since = (alone_since or now) if alone else None
            if alone_since is not None and now - alone_since > ALONE_SECONDS:
                raise MnistattnError(
                    f"the Dask cluster of {self._where} has had no worker for "
                    f"{ALONE_SECONDS} seconds."
                )

    def _result(self, task: Task, future) -> Any:
        import distributed

        try:
            return future.result()
        except distributed.KilledWorker as error:
            how = f"its worker died {RETRIES + 1} times (out of memory?)."
            raise WorkerDied(task.name, how) from error
        except (distributed.CancelledError, distributed.client.FutureCancelledError) as error:
            raise MnistattnError(
                f"{task.name} was cancelled: the connection to the Dask scheduler of "
                f"{self._where} broke."
            ) from error

    def _close(self) -> None:
        for part in (self._client, self._cluster):
            if part is not None:
                with suppress(Exception):
                    part.close(timeout=5)


def _probe() -> Any:
    """What `code_version` says on a worker; None if there is no mnistattn, or an older one."""
    try:
        from mnistattn.engines.version import code_version
    except ImportError:
        return None
    return code_version()


def _said(found: Mapping[str, str] | None) -> str:
    if found is None:
        return "no mnistattn (or one without engines)"
    return f"mnistattn {found['mnistattn']} (generators {found['generators']})"
