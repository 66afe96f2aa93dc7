"""Where independent tasks run: in processes of this machine, or on a Dask cluster.

An engine has one method, `run(tasks, function)`: an iterator of (task, function(task.argument)) in
the order in which tasks finish. For every engine:

- a worker that is free takes the next task, so a task that takes long delays no other;
- tasks are taken from their iterator as they are needed: millions cost no memory;
- a task whose worker died is run again, at most RETRIES times, so a function must be able to
  find what an earlier attempt left behind, and give the same again;
- the first exception of a task ends the run and is raised; the rest is cancelled, as it is by
  Ctrl-C, or when the iterator is closed;
- function and argument are pickled; the function is an importable one.

It knows nothing of data sets or trainings: `run` below is all that the rooms above need.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

from mnistattn.errors import InputError, MnistattnError
from mnistattn.generators.variants import choose

RETRIES = 3  # of a task whose worker died

# A new engine is a row here and a file: "module:class", imported when it is asked for.
ENGINES = {"local": "mnistattn.engines.local:Local", "dask": "mnistattn.engines.dask:Dask"}


class WorkerDied(MnistattnError):
    """A task's worker died as often as may be. task: the task's name; how: the deaths in words."""

    def __init__(self, task: str, how: str):
        super().__init__(f"{task} failed: {how}")
        self.task, self.how = task, how


@dataclass(frozen=True)
class Task:
    """One unit of work: what messages call it, what the function gets, what it occupies while it
    runs (such as {"GPU": 1}), and how far it moves the progress bar."""

    name: str
    argument: Any
    resources: Mapping[str, float] = field(default_factory=dict)
    size: int = 1


class Engine(AbstractContextManager, Protocol):
    """What runs tasks; leaving the context ends its workers."""

    def run(
        self, tasks: Iterable[Task], function: Callable[[Any], Any]
    ) -> Iterator[tuple[Task, Any]]:
        """(task, result) as they finish. Raises what a task raised; WorkerDied if a task's workers
        keep dying, MnistattnError if none can start, InputError for a resource that nobody has."""
        ...


def open_engine(
    name: str = "local", workers: int | None = None, scheduler: str | None = None,
    resources: Mapping[str, float] | None = None,
) -> Engine:  # fmt: skip
    """The engine of a name, to be used as a context.

    workers: processes of this machine (default: one a core; `local` takes 0 as none but this one).
    scheduler: the address of a running Dask scheduler, for `dask` only, which has its own workers.
    resources: what this machine has of each resource, for `local` (`dask worker --resources` says
    it for a cluster). Raises InputError for an unknown name, a missing library, a scheduler that
    does not answer, or what does not go together.
    """
    choose("engine", name, ENGINES)
    if scheduler is not None and name != "dask":
        raise InputError(f"--scheduler {scheduler} is Dask's: give --engine dask with it.")
    module, _, attribute = ENGINES[name].partition(":")
    make = getattr(import_module(module), attribute)
    if name == "dask":
        if resources:
            raise InputError("a Dask worker says itself what it has: dask worker --resources.")
        return make(workers, scheduler)
    return make(workers, resources or {})


def run(
    engine: Engine, tasks: Iterable[Task], function: Callable[[Any], Any],
    on_result: Callable[[Task, Any], None], total: int | None = None, unit: str = "task",
    title: str = "", progress: bool = True,
) -> None:  # fmt: skip
    """Run all tasks, and call on_result(task, result) here as each finishes, under a progress bar
    with rate and time left. total: the sum of the tasks' sizes, if it is known."""
    from tqdm import tqdm

    results = engine.run(tasks, function)
    with tqdm(total=total, unit=unit, desc=title, disable=None if progress else True,
              leave=False, smoothing=0.1) as bar:  # fmt: skip
        try:
            for task, result in results:
                on_result(task, result)
                bar.update(task.size)
        finally:
            results.close()  # type: ignore[attr-defined]  # a generator: cancels what is left
