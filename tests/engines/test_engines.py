"""Engines: results as they come, dying workers, failures, resources, and who is refused.

What a worker runs has to be importable there, so tasks are expressions for `eval`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mnistattn import engines
from mnistattn.engines import Task, open_engine
from mnistattn.engines.local import Local
from mnistattn.errors import InputError, MnistattnError

KINDS = ("here", "local", "dask")


@pytest.fixture(scope="module")
def cluster():
    """A Dask engine of two processes, for all tests of it."""
    pytest.importorskip("distributed", reason="Dask's distributed is not installed")
    with open_engine("dask", 2) as engine:
        yield engine


@pytest.fixture(scope="module")
def pool():
    """A local engine of two processes."""
    with Local(2) as engine:
        yield engine


@pytest.fixture(params=KINDS)
def engine(request):
    """Each engine, and the one that starts no process."""
    if request.param == "here":
        return Local(0)
    return request.getfixturevalue("cluster" if request.param == "dask" else "pool")


@pytest.fixture(params=KINDS[1:])
def processes(request):
    """Each engine of two processes."""
    return request.getfixturevalue("cluster" if request.param == "dask" else "pool")


def results(engine, expressions) -> list[tuple[str, object]]:
    tasks = (Task(f"task-{k}", text) for k, text in enumerate(expressions))
    return [(task.name, value) for task, value in engine.run(tasks, eval)]


def test_every_task_has_its_result(engine):
    expected = [(f"task-{k}", k * k) for k in range(100)]
    found = results(engine, [f"{k} * {k}" for k in range(100)])
    assert sorted(found) == sorted(expected)
    assert results(engine, []) == []
    assert results(engine, ["1"]) == [("task-0", 1)]  # and it can run again


def test_a_slow_task_delays_no_other(processes, tmp_path):
    """The first task waits for a file that the last one makes."""
    go = tmp_path / "go"
    wait = f"[None for _ in iter(lambda: __import__('pathlib').Path({str(go)!r}).exists(), True)]"
    found = results(processes, [wait, "1", "2", "3", f"open({str(go)!r}, 'w').close()"])
    assert {name for name, _ in found[:3]} == {"task-1", "task-2", "task-3"} and len(found) == 5


def test_tasks_are_taken_as_they_are_needed(engine):
    taken = []

    def tasks():
        for k in range(10_000):
            taken.append(k)
            yield Task(str(k), str(k))

    run = engine.run(tasks(), eval)
    next(run)
    assert len(taken) <= 100
    run.close()


@pytest.mark.parametrize("kind", ["InputError", "MnistattnError", "OSError"])
def test_a_failure_is_raised_as_it_was(engine, kind):
    module = "builtins" if kind == "OSError" else "mnistattn.errors"
    throw = f"(_ for _ in ()).throw(__import__('{module}', fromlist='x').{kind}('so it is'))"
    with pytest.raises(Exception, match="^so it is$") as caught:
        results(engine, ["1", throw, "2"])
    assert type(caught.value).__name__ == kind
    assert results(engine, ["3"]) == [("task-0", 3)]


def test_a_task_whose_worker_died_is_run_again(processes, tmp_path):
    mark = str(tmp_path / "mark")
    die = f"__import__('os').kill(__import__('os').getpid(), {signal.SIGKILL:d})"
    once = f"7 if __import__('os').path.exists({mark!r}) else (open({mark!r}, 'w').close(), {die})"
    found = results(processes, [once, *(str(k) for k in range(20))])
    assert dict(found) == {"task-0": 7} | {f"task-{k + 1}": k for k in range(20)}


def test_a_task_that_kills_its_workers_fails():
    with Local(2) as engine, pytest.raises(MnistattnError) as caught:
        results(engine, ["1", "__import__('os')._exit(3)"])
    assert str(caught.value) == (
        f"task-1 failed: its worker died {engines.RETRIES + 1} times, with exit code 3."
    )


def test_a_task_that_kills_its_workers_fails_on_dask(cluster, monkeypatch):
    distributed = pytest.importorskip("distributed")

    def killed(future):
        raise distributed.KilledWorker("task-0", None, 3)

    monkeypatch.setattr(distributed.Future, "result", killed)
    with pytest.raises(MnistattnError, match=r"^task-0 failed: its worker died 4 times"):
        results(cluster, ["1"])


def test_resources_are_shared_out(tmp_path):
    """Two tasks that ask for the same thing never run at a time, and stop no other."""
    alone = str(tmp_path / "alone")
    hold = (f"(__import__('os').mkdir({alone!r}), __import__('time').sleep(0.05), "
            f"__import__('os').rmdir({alone!r}))")  # fmt: skip
    tasks = [Task(f"gpu-{k}", hold, {"GPU": 1}) for k in range(4)]
    tasks += [Task(f"cpu-{k}", "1") for k in range(4)]
    with Local(2, {"GPU": 1}) as engine:
        order = [task.name for task, _ in engine.run(tasks, eval)]
        assert sorted(order) == sorted(task.name for task in tasks)
        assert order.index("gpu-3") > order.index("cpu-0")  # which was behind it
        with pytest.raises(InputError, match="many asks for 2 GPU, and there is 1 here"):
            list(engine.run([Task("many", "1", {"GPU": 2})], eval))


def test_a_resource_that_no_dask_worker_has(cluster):
    with pytest.raises(InputError, match=r"gpu asks for 1 GPU, and no worker .* --resources"):
        list(cluster.run([Task("gpu", "1", {"GPU": 1})], eval))


def test_leaving_ends_the_workers():
    with Local(2) as engine:
        run = engine.run((Task(str(k), "__import__('os').getpid()") for k in range(1000)), eval)
        pids = {next(run)[1] for _ in range(20)}
        assert pids <= set(engine.pids)
        run.close()
        assert engine.pids == []
    for pid in pids:
        assert_gone(pid)


def assert_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} is still there")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses SIGKILL and /proc")
def test_workers_end_with_a_caller_that_is_killed():
    code = (
        "from mnistattn.engines import Task\n"
        "from mnistattn.engines.local import Local\n"
        "if __name__ == '__main__':\n"
        "    engine = Local(2)\n"
        "    run = engine.run([Task('a', '1'), Task('b', '__import__(\"time\").sleep(60)'),\n"
        "                      Task('c', '__import__(\"time\").sleep(60)')], eval)\n"
        "    next(run)\n"
        "    print(*engine.pids, flush=True)\n"
        "    next(run)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child:
        pids = [int(word) for word in child.stdout.readline().split()]
        child.kill()
    assert len(pids) == 2
    for pid in pids:
        assert_gone(pid)


def test_progress(pool, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    tasks = [Task(str(k), str(k), size=5) for k in range(3)]
    engines.run(pool, tasks, eval, lambda task, value: seen.append(value), 15, "image", "title")
    assert sorted(seen) == [0, 1, 2]
    assert "title" in capsys.readouterr().err
    engines.run(pool, tasks, eval, lambda task, value: None, 15, progress=False)
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- who is refused


def test_unknown_engines():
    with pytest.raises(InputError, match="Did you mean 'dask'"):
        open_engine("dusk")
    with pytest.raises(InputError, match="give --engine dask"):
        open_engine("local", scheduler="tcp://127.0.0.1:8786")


def test_without_dask(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match=r"pip install 'mnistattn\[dask\]'"):
        open_engine("dask", 1)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:{}", "nonsense://x:{}", "no-such-host:{}"])
def test_a_scheduler_that_does_not_answer(monkeypatch, address):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr("mnistattn.engines.dask.CONNECT_SECONDS", 0.5)
    address = address.format(free_port())
    made, begin = [], distributed.Client.__init__

    def init(self, *args, **kwargs):
        made.append(self)
        begin(self, *args, **kwargs)

    monkeypatch.setattr(distributed.Client, "__init__", init)
    before = time.monotonic()
    with pytest.raises(InputError, match=f"no Dask scheduler answers at {address}"):
        open_engine("dask", scheduler=address)
    assert time.monotonic() - before < 60  # Dask itself would try for 30 s, and again and again
    # Left open, a client waits for ever if it is collected while another one starts.
    assert [client.status for client in made] == ["closed"]


@contextmanager
def lone_scheduler(folder: Path) -> Iterator[str]:
    """The address of a `dask scheduler` without workers, in a process of its own, as users have
    it."""
    pytest.importorskip("distributed")
    file = folder / "scheduler.json"
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1",
               "--port", "0", "--no-dashboard", "--scheduler-file", file]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as child:
        try:
            deadline = time.monotonic() + 60
            while not file.exists() or not file.read_text().endswith("}"):
                assert child.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            yield json.loads(file.read_text())["address"]
        finally:
            child.kill()


def test_a_scheduler_without_workers(monkeypatch, tmp_path):
    monkeypatch.setattr("mnistattn.engines.dask.WORKER_SECONDS", 0.5)
    with lone_scheduler(tmp_path) as address, pytest.raises(InputError) as caught:
        open_engine("dask", scheduler=address)
    assert f"{address} has no workers: " in str(caught.value)
    assert f"'dask worker {address}'" in str(caught.value)


def test_a_running_scheduler_and_workers_of_another_version(cluster, monkeypatch):
    address = cluster._cluster.scheduler_address
    with open_engine("dask", scheduler=address) as engine:
        assert results(engine, ["6 * 7"]) == [("task-0", 42)]
    monkeypatch.setattr(
        "mnistattn.engines.version.code_version",
        lambda: {"mnistattn": "9.9", "generators": "0" * 12},
    )
    with pytest.raises(InputError, match=r"the Dask worker tcp://\S+ has mnistattn .* 9\.9 "):
        open_engine("dask", scheduler=address)
