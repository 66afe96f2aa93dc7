"""A few kills of `evaluate` and `sweep` at fixed seeds, and whether the checks themselves can fail;
benchmarks/chaos.py does many."""

import argparse
import importlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mnistattn import evaluate
from mnistattn.evaluation.checkpoint import load_tensors, save_tensors
from mnistattn.evaluation.train import PREVIOUS, STATE

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")


@linux
def test_nothing_is_lost_and_nothing_false_accepted(tmp_path):
    """With this seed evaluate is killed twice, early, and one worker of a sweep, which gets over
    it."""
    file = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "chaos.py", "--out", tmp_path, "--json", file, "--subjects",
         "evaluate,sweep", "--engines", "local", "--kills", "3", "--flips", "0", "--images", "64",
         "--epochs", "6", "--seeds", "0", "--seed", "440"],
        stdout=subprocess.PIPE, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    kills = json.loads(file.read_text())["kills"]
    assert [(k["subject"], k["kills"]) for k in kills] == [("evaluate", 2), ("sweep", 1)]
    for killed in kills:
        assert killed["equal"] and killed["false"] == killed["left"] == killed["said"] == []


# ------------------------------------------------------------------- whether a fault is found


@pytest.fixture(scope="module")
def bench():
    """A function that imports a file of the benchmarks."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(BENCHMARKS)
        yield importlib.import_module


@pytest.fixture(scope="module")
def direct(tiny, tmp_path_factory) -> Path:
    """A run of one epoch."""
    out = tmp_path_factory.mktemp("direct") / "run"
    evaluate("none", tiny, epochs=1, batch_size=16, device="cpu", out=out, progress=False,
             say=lambda line: None)  # fmt: skip
    return out


@pytest.fixture
def run(direct, tmp_path) -> Path:
    return Path(shutil.copytree(direct, tmp_path / "run"))


@pytest.fixture
def right(bench, direct, run):
    """What a run is to hold; its training state after the first epoch is, here, its weights."""
    module = bench("chaos_runs")
    return module.Right(direct, {1: module.content(direct / "model.safetensors")})


def edit(file: Path, change) -> None:
    """Change the content of a file, which stays sound in itself."""
    if file.suffix == ".safetensors":
        tensors, note = load_tensors(file)
        change(tensors, note)
        save_tensors(file, tensors, note)
    else:
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))


def flip(tensors, note) -> None:
    name = sorted(name for name in tensors if tensors[name].dtype == torch.float32)[0]
    tensors[name].reshape(-1).view(torch.uint8)[0] ^= 1


def lose_an_epoch(tensors, note) -> None:
    note["history"].clear()


def other_seed(tensors, note) -> None:
    note["identity"]["seed"] += 1


def other_seconds(tensors, note) -> None:
    note["history"][0]["seconds"] += 1


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


@pytest.mark.parametrize("name", ["model.safetensors", STATE, PREVIOUS])
@pytest.mark.parametrize("change", [flip, lose_an_epoch, other_seed])
def test_false_weights_are_found(direct, run, right, name, change):
    shutil.copy(direct / "model.safetensors", run / name)
    assert right.false_files(run) == []
    edit(run / name, change)
    assert right.false_files(run) == [name]


@pytest.mark.parametrize("name", ["model.safetensors", "result.json", "samples.h5", "gallery.h5",
                                  "curve.json", "picture.png"])  # fmt: skip
def test_a_file_that_is_cut_short_or_missing_is_found(run, right, name):
    assert right.false_files(run) == []
    cut(run / name)
    assert right.false_files(run) == [name]
    (run / name).unlink()
    expected = [] if name == "result.json" else [f"{name}, missing"]
    assert right.false_files(run) == expected


def test_other_scores_are_found(run, right):
    edit(run / "result.json", lambda result: result["scores"]["accuracy"].update(hits=1))
    edit(run / "curve.json", lambda curve: curve[0].update(loss=0.0))
    (run / "more.h5").touch()
    assert right.false_files(run) == ["curve.json", "more.h5", "result.json"]


def test_times_and_half_files_are_no_fault(run, right):
    edit(run / "model.safetensors", other_seconds)
    edit(run / "curve.json", lambda curve: curve[0].update(seconds=0.0))
    edit(run / "result.json", lambda result: result["cost"].update(train_seconds=0.0))
    (run / ".samples.h5.partial-1").touch()
    assert right.false_files(run) == []


def test_a_finished_run_that_is_made_again_is_found(bench, direct, right, tmp_path):
    sweep = bench("chaos_runs").Sweep(argparse.Namespace(), direct, tmp_path, "local")
    sweep.right = {"runs/a": right}
    run = Path(shutil.copytree(direct, sweep.root / "runs" / "a"))
    assert sweep.false_files() == sweep.false_files() == [] and sweep.kept == 1
    again = (run / "result.json").read_bytes()
    (run / "result.json").unlink()
    (run / "result.json").write_bytes(again)
    assert sweep.false_files() == ["runs/a, finished, was not kept"] and sweep.kept == 1


IN_PLACE = """
import sys, time
with open(sys.argv[1] + "/file", "w") as file:
    for _ in range(20):
        file.write("line")
        file.flush()
        time.sleep(0.02)
"""
UNTIDY = """
import os, sys, time
half = f"{sys.argv[1]}/.file.partial-{os.getpid()}"
with open(half, "w") as file:
    time.sleep(0.5)
    file.write("line")
os.replace(half, sys.argv[1] + "/file")
"""


@linux
@pytest.mark.parametrize("script", [IN_PLACE, UNTIDY])
def test_a_command_that_writes_badly_is_found(bench, tmp_path, script):
    killing = bench("killing")

    class Bad(killing.Subject):
        name = "bad"

        def command(self, folder):
            return [sys.executable, "-c", script, folder]

        def look(self):
            pass

        def learn(self):
            self.right = (self.whole / "file").read_text()

        def made(self):
            return (self.root / "file").exists()

        def false_files(self):
            whole = not self.made() or (self.root / "file").read_text() == self.right
            return [] if whole else ["file"]

    found = killing.chaos(Bad(tmp_path), 2, random.Random(0))
    assert found["kills"] == 2 and found["equal"] and not found["said"]
    assert bool(found["false"]) == (script == IN_PLACE)
    assert bool(found["left"]) == bool(found["torn"]) == (script == UNTIDY)
