"""Sweeps: their cells, what they give on each engine, what fails, and going on after a kill."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mnistattn import cli as cli_module
from mnistattn import engines, evaluate
from mnistattn.cli.sweep import parse_models, parse_seeds
from mnistattn.errors import InputError, MnistattnError
from mnistattn.evaluation import sweep as module
from mnistattn.evaluation.sweep import Cell, SweepError, data_names, plan, summary, sweep

FEW = {"epochs": 1, "batch_size": 16}
MODELS = ["none", ("ctx", {"hidden": 8})]
NAMES = [f"mref-{model}-fast-seed{seed}" for seed in (0, 1) for model in ("none", "ctx-hidden=8")]
# Written out, as a worker imports it by its path.
BROKEN = """
import torch
from torch import nn


class Gate(nn.Module):
    def __init__(self, channels, query_dim, *, last):
        super().__init__()
        self.score = nn.Conv2d(channels, 1, 1)
        self.query = nn.Linear(query_dim, 1)

    def forward(self, x, query):
        if len(x) == 16 and x.std() > 0:  # what a training sees, and no look before it
            END
        return torch.sigmoid(self.score(x) + self.query(query)[:, :, None, None])
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Weights depend on the number of threads, in their last digits: here it is always one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(small) -> Path:
    """An MREF of 48 x 48 images, 48 / 16 / 20 of them."""
    return small


@pytest.fixture(scope="module")
def direct(data, tmp_path_factory) -> dict[str, Path]:
    """The runs of MODELS with seeds 0 and 1, by evaluate itself."""
    root = tmp_path_factory.mktemp("direct")
    for seed in (0, 1):
        for model, options in (("none", {}), MODELS[1]):
            name = NAMES[2 * seed + (model == "ctx")]
            evaluate(model, data, seed=seed, options=options, out=root / name, device="cpu",
                     progress=False, say=quiet, **FEW)  # fmt: skip
    return {name: root / name for name in NAMES}


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """A function "command line" -> (exit code, standard output, standard error), in tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_module, "COMMANDS", tuple({*cli_module.COMMANDS, "sweep"}))

    def run(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mnistattn", "sweep", *shlex.split(line)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli_module.main()
        out, err = capsys.readouterr()
        return left.value.code, out, err.rpartition("\r")[2]

    return run


def quiet(line: str) -> None:
    pass


def small(models, data, seeds, **options) -> list[dict]:
    options = {"device": "cpu", "progress": False, "say": quiet, "workers": 0} | FEW | options
    return sweep(models, [data], seeds, **options)


def same(run: Path, other: Path) -> None:
    """Two runs have the same scores and the same weights."""
    one, two = (json.loads((path / "result.json").read_text()) for path in (run, other))
    for field in ("model", "options", "dataset", "trained_on", "recipe", "seed", "scores"):
        assert one[field] == two[field], field
    one, two = (load_file(path / "model.safetensors") for path in (run, other))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def tree(root: Path) -> dict[str, int]:
    return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}


# -------------------------------------------------------------------------------- the cells


def test_the_cells(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = plan(MODELS, [data], range(2), **FEW)
    assert [cell.name for cell in cells] == NAMES
    assert [cell.run for cell in cells] == [Path("runs") / name for name in NAMES]
    assert {cell.state for cell in cells} == {"to do"}
    assert plan(MODELS, [data], range(2), **FEW) == cells
    assert not list(tmp_path.iterdir())


def test_two_data_sets_of_one_variant(data, tiny, tmp_path):
    names = [cell.name for cell in plan(["none"], [data, tiny], [0], out=tmp_path)]
    marks = [name.removeprefix("mref-").removesuffix("-none-fast-seed0") for name in names]
    assert len(set(marks)) == 2 and all(len(mark) == 8 for mark in marks)
    other = [cell.name for cell in plan(["none"], [tiny, data], [0], out=tmp_path)]
    assert other == names[::-1]  # by content, not by place
    digests = {"train": "a"}, {"train": "b"}
    assert data_names([("mref", digests[0]), ("mbg", digests[1])]) == ["mref", "mbg"]


@pytest.mark.parametrize(
    ("models", "seeds"),
    [(["none", "none"], [0]), (["none"], [0, 0]), (["ctx", ("ctx", {"hidden": 32})], [0])],
)
def test_twice_the_same(data, tmp_path, models, seeds):
    with pytest.raises(InputError, match="is asked for twice"):
        plan(models, [data], seeds, out=tmp_path)
    with pytest.raises(InputError, match="is asked for twice"):
        plan(["none"], [data, data], [0], out=tmp_path)


def test_models_in_words():
    text = ("none,arnn[hidden=32,block=2]", "my dir/a.py:Mine[sizes=[25,6],sigma=exp]", "b.py")
    assert parse_models(text) == [
        ("none", {}), ("arnn", {"hidden": 32, "block": 2}),
        ("my dir/a.py:Mine", {"sizes": [25, 6], "sigma": "exp"}), ("b.py", {}),
    ]  # fmt: skip


def test_seeds_in_words():
    assert parse_seeds("0-2") == [0, 1, 2]
    assert parse_seeds("0,3,7-8") == [0, 3, 7, 8]
    assert parse_seeds("4294967295") == [4294967295]


WRONG = [
    ("--models ctxx --data {d}", "unknown model 'ctxx'"),
    ("--models ctx,,none --data {d}", "--models '' is no model: give NAME"),
    ("--models ctx[hidden=8 --data {d}", "'ctx[hidden=8' is no model"),
    ("--models ctx[hidden] --data {d}", "--models 'ctx[hidden]': hidden is no NAME=VALUE"),
    ("--models ctx[hiden=8] --data {d}", "no option 'hiden'"),
    ("--models none,arnn[hidden=0] --data {d}", "hidden 0 is impossible"),
    ("--models ctx --data {d} --data nowhere", "nowhere is no data set"),
    ("--models ctx --data {d} --data {b}", "test.h5 is damaged"),
    ("--models ctx --data {d} --recipe fats", "unknown recipe 'fats'"),
    ("--models ctx --data {d} --epochs 0", "epochs 0"),
    ("--models ctx --data {d} --seeds 2-0", "--seeds 2-0 is impossible"),
    ("--models ctx --data {d} --seeds 0;1", "0;1 is no list of seeds"),
    ("--models ctx --data {d} --seeds=-1", "-1 is no list of seeds"),
    ("--models ctx,ctx --data {d}", "is asked for twice"),
    ("--models ctx --data {d} --device tpu", "unknown device 'tpu'"),
    ("--models ctx --data {d} --engine dusk", "Did you mean 'dask'"),
    ("--models ctx --data {d} --scheduler tcp://x:1", "give --engine dask"),
    ("--models ctx --data {d} --scheduler tcp://x:1 --workers 2", "leave --workers out"),
    ("--models ctx --data {d} --workers -1", "-1 workers are impossible"),
    ("--models ctx --data {d} --per-gpu 0", "0 runs a GPU are impossible"),
    ("--models ctx", "--data"),
]


@pytest.fixture(scope="module")
def damaged(data, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("damaged")
    for file in data.iterdir():
        (path / file.name).write_bytes(file.read_bytes()[: 3000 if file.stem == "test" else None])
    return path


@pytest.mark.parametrize(("line", "words"), WRONG)
def test_a_wrong_request_writes_nothing(call, data, damaged, tmp_path, line, words):
    code, out, err = call(shlex.join(line.format(d=data, b=damaged).split(" ")))
    assert (code, out) == (2, "") and words in err, err
    assert err.startswith("mnistattn: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_directory_that_holds_another_run(direct, data):
    root = direct[NAMES[0]].parent
    before = tree(root)
    with pytest.raises(InputError, match="holds a run of another model, data set, recipe"):
        small(MODELS, data, [0], out=root, epochs=2)
    assert tree(root) == before


# ------------------------------------------------------------------------------- what it gives


def test_what_is_there_is_kept(direct, data, monkeypatch):
    """evaluate's own runs are cells that are done."""
    root, said = direct[NAMES[0]].parent, []
    before = tree(root)
    monkeypatch.setattr(module, "run_cell", None)
    found = small(MODELS, data, range(2), out=root, say=said.append)
    assert [result["run"] for result in found] == [str(direct[name]) for name in NAMES]
    assert said == ["4 of 4 runs are there already"]
    assert tree(root) == before
    lines = summary(found).splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["mref", "none", "2"], ["mref", "ctx", "hidden=8"],
    ]  # fmt: skip
    assert lines[1].count(" +- ") == 1 and lines[2].count(" +- ") == 2
    first = [100 * r["scores"]["accuracy"]["value"] for r in found if r["model"] == "none"]
    assert f"{sum(first) / 2:.2f} +- {abs(first[0] - first[1]) / 2**0.5:.2f}" in lines[1]


@pytest.mark.parametrize("damage", ["a flipped bit", "a training state that was to be removed"])
def test_what_is_not_whole_is_not_kept(direct, data, tmp_path, damage):
    """A run whose samples are not those of its result, and one that was killed at its very end."""
    out = Path(shutil.copytree(direct[NAMES[0]].parent, tmp_path / "runs"))
    run = out / NAMES[0]
    if damage == "a flipped bit":
        content = bytearray((run / "samples.h5").read_bytes())
        content[len(content) // 2] ^= 1
        (run / "samples.h5").write_bytes(content)
    else:
        model = run / "model.safetensors"
        shutil.copy(model, run / "training.safetensors")
    cells = plan(["none"], [data], [0, 1], out=out, **FEW)
    assert [cell.state for cell in cells] == ["begun", "done"]


def test_dry_run(call, direct, data, tmp_path):
    line = f"--models none --data {data} --seeds 0-2 --epochs 1 --batch-size 16 --dry-run"
    code, out, err = call(line)
    assert (code, err) == (0, "") and out.endswith("3 runs, 0 of them done\n")
    assert not list(tmp_path.iterdir())
    code, out, _ = call(f"{line} --out {direct[NAMES[0]].parent}")
    assert [row.split()[0] for row in out.splitlines()] == ["done", "done", "to", "3"]


@pytest.mark.parametrize("workers", [1, 2])
def test_as_evaluate_itself(direct, data, tmp_path, workers):
    seeds, said = ([0] if workers == 1 else [1]), []
    found = small(MODELS, data, seeds, out=tmp_path / "a" / "b", workers=workers, say=said.append)
    assert [Path(result["run"]).name for result in found] == NAMES[2 * seeds[0] :][:2]
    for result in found:
        same(Path(result["run"]), direct[Path(result["run"]).name])
        assert result["cost"]["threads"] == 1
    assert len(said) == 2 and all("accuracy" in line for line in said)
    files = {p.name for p in (tmp_path / "a" / "b").iterdir()}
    assert files == {Path(result["run"]).name for result in found}  # no locks are left


def test_on_dask(direct, data, tmp_path):
    pytest.importorskip("distributed", reason="Dask's distributed is not installed")
    (result,) = small(["none"], data, [1], out=tmp_path, engine="dask", workers=1)
    same(Path(result["run"]), direct[NAMES[2]])


def test_the_command_line(call, direct, data, tmp_path):
    """Two runs, one of which is there."""
    line = f"--model none --data {data} --seeds 0 --epochs 1 --batch-size 16 --device cpu"
    code, out, err = call(f"{line} --workers 0")
    assert code == 0, err
    assert out.startswith("data set  model  seeds") and "leaderboard runs" in out
    assert "mref-none-fast-seed0: accuracy " in err
    same(tmp_path / "runs" / NAMES[0], direct[NAMES[0]])
    code, out, err = call(f"{line} --workers 0")
    assert (code, err) == (0, "1 of 1 runs are there already\n")


# --------------------------------------------------------------------------------- what fails


def test_a_failure_stops_no_other(call, direct, data, tmp_path):
    (tmp_path / "bad.py").write_text(BROKEN.replace("END", "raise ValueError('so it is')"))
    code, out, err = call(f"--models bad.py:Gate,none --data {data} --epochs 1 --batch-size 16 "
                          "--device cpu --workers 0")  # fmt: skip
    assert code == 1, err
    assert "\nmnistattn: 1 of 2 runs failed: mref-Gate-fast-seed0: ValueError: so it is.\n" in err
    assert "none" in out and "Gate" not in out
    same(tmp_path / "runs" / NAMES[0], direct[NAMES[0]])


def test_a_run_that_kills_its_workers_stops_no_other(direct, data, tmp_path, monkeypatch):
    monkeypatch.setattr("mnistattn.engines.local.RETRIES", 0)
    (tmp_path / "bad.py").write_text(BROKEN.replace("END", "__import__('os')._exit(3)"))
    with pytest.raises(SweepError) as caught:
        small([f"{tmp_path}/bad.py:Gate", "none"], data, [0], out=tmp_path / "runs", workers=1)
    assert str(caught.value) == (
        "1 of 2 runs failed: mref-Gate-fast-seed0: its worker died 1 times, with exit code 3."
    )
    assert [result and result["model"] for result in caught.value.results] == [None, "none"]
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {NAMES[0]}
    same(tmp_path / "runs" / NAMES[0], direct[NAMES[0]])


def test_ctrl_c_leaves_nothing_half_written(data, tmp_path, monkeypatch):
    def stop(work):
        work.cell.run.mkdir()
        (work.cell.run / ".result.json.partial-1").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_cell", stop)
    with pytest.raises(KeyboardInterrupt):
        small(["none"], data, [0], out=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses SIGKILL")
def test_going_on_after_a_kill(direct, data, tmp_path):
    """What is whole stays as it is, what is not is done, and all is as if nothing had happened."""
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from mnistattn.evaluation.sweep import sweep\n"
        f"sweep(['none', ('ctx', {{'hidden': 8}})], [sys.argv[1]], range(2), out=sys.argv[2],\n"
        f"      device='cpu', workers=1, progress=False, **{FEW})\n"
    )
    runs = tmp_path / "runs"
    child = subprocess.Popen(
        [sys.executable, "-c", script, data, runs], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    with child:
        assert child.stdout.readline().startswith(f"{NAMES[0]}: accuracy")
        child.send_signal(signal.SIGKILL)
    time.sleep(0.5)  # its worker sees that it is alone
    stray = runs / NAMES[3] / ".samples.h5.partial-1"
    stray.parent.mkdir(exist_ok=True)
    stray.touch()
    before = tree(runs / NAMES[0])
    states = [cell.state for cell in plan(MODELS, [data], range(2), out=runs, **FEW)]
    assert states[0] == "done" and states[3] == "to do"
    found = small(MODELS, data, range(2), out=runs)
    assert [Path(result["run"]).name for result in found] == NAMES
    assert tree(runs / NAMES[0]) == before
    assert not stray.exists()
    for name in NAMES:
        same(runs / name, direct[name])


# ------------------------------------------------------------------------- cores and GPUs


class Recorder:
    """An engine that runs nothing and notes what it was asked for."""

    def __init__(self, name, workers, scheduler, resources):
        self.asked = {"name": name, "workers": workers, "resources": resources, "tasks": []}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, tasks, function):
        for task in tasks:
            self.asked["tasks"].append(task)
            yield task, {"failed": "not run", "said": [], "result": None, "seconds": 0}


@pytest.fixture
def recorded(monkeypatch, data, tmp_path):
    """A function that gives what a sweep of four runs asks of its engine on 16 cores."""

    def record(**options) -> dict:
        made = []
        monkeypatch.setattr(
            engines, "open_engine", lambda *given: made.append(Recorder(*given)) or made[-1]
        )
        monkeypatch.setattr(module, "_cores", lambda: 16)
        monkeypatch.setattr(module, "_threads", lambda: 16)
        with pytest.raises(MnistattnError, match="4 of 4 runs failed"):
            small(["none"], data, range(4), out=tmp_path, **options)
        return made[0].asked

    return record


@pytest.mark.parametrize(
    ("workers", "started", "threads"), [(None, 4, 4), (2, 2, 8), (1, 1, 16), (0, 0, None)]
)
def test_workers_share_the_cores(recorded, workers, started, threads):
    asked = recorded(workers=workers)
    assert (asked["workers"], asked["resources"]) == (started, None)
    assert {task.argument.threads for task in asked["tasks"]} == {threads}
    assert all(not task.resources and not task.argument.gpus for task in asked["tasks"])


def test_runs_share_the_gpus(recorded, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    asked = recorded(workers=None, device="auto", per_gpu=3)
    assert (asked["workers"], asked["resources"]) == (4, {"GPU": 2})
    for task in asked["tasks"]:
        assert task.argument.gpus == ("4", "7")
        assert 1 / 4 < task.resources["GPU"] <= 1 / 3
    asked = recorded(workers=None, device="cuda")
    assert (asked["workers"], asked["tasks"][0].resources) == (2, {"GPU": 1})
    # On Dask, workers say what they have.
    asked = recorded(workers=2, device="cuda", engine="dask")
    assert (asked["resources"], asked["tasks"][0].resources) == (None, {"GPU": 1})
    assert asked["tasks"][0].argument.gpus == ()


def test_each_worker_has_its_gpu():
    """Chosen once a process, in turn, before torch is imported."""
    script = (
        "import os, sys\n"
        "import multiprocessing\n"
        "from pathlib import Path\n"
        "from mnistattn.evaluation import sweep\n"
        "assert 'torch' not in sys.modules\n"
        "work = sweep._Work(None, 'cuda', None, ('4', '7'))\n"
        "multiprocessing.current_process().name = 'SpawnProcess-3'\n"
        "sweep._settle(work)\n"
        "multiprocessing.current_process().name = 'SpawnProcess-4'\n"
        "sweep._settle(work)\n"
        "print(os.environ['CUDA_VISIBLE_DEVICES'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("7\n", "")


def test_an_output_folder_that_a_worker_does_not_see(data, tmp_path):
    cell = Cell(
        "x", tmp_path / "gone" / "x", "none", {}, data, 0, {"recipe": "fast"}, "to do", None
    )
    answer = module.run_cell(module._Work(cell, "cpu", None, ()))
    assert "does not see" in answer["failed"] and not os.listdir(tmp_path)
