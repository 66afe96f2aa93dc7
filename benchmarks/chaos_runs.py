"""`mnistattn evaluate` and `mnistattn sweep`, killed: subjects of chaos.py.

After a kill, every file of a run directory that passes for whole has to say what the undisturbed
run's does, but for how long things took: weights and training states bit for bit, with their
histories; scores; per-sample files and pictures byte for byte. Of an epoch's training state the
undisturbed run's is caught while it is there. And a run that a sweep had finished has to stay.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from killing import Subject, files

from mnistattn import generate
from mnistattn.errors import MnistattnError
from mnistattn.evaluation.checkpoint import load_tensors
from mnistattn.evaluation.result import read_result
from mnistattn.evaluation.train import PREVIOUS, STATE

DATA = {"val": 64, "test": 64, "seed": 1, "digits": "strokes", "size": 48, "max_scale": 1.5,
        "min_objects": 2, "max_objects": 3}  # fmt: skip
WEIGHTS, RESULT = "model.safetensors", "result.json"
TIMES = {"seconds", "images_per_second", "train_seconds", "train_times_none",
         "inference_times_none"}  # fmt: skip


def make_data(folder: Path, images: int) -> Path:
    """A small data set to train on."""
    return generate("mref", folder, train=images, progress=False, say=lambda line: None, **DATA)


def content(file: Path) -> Any:
    """What a file of a run says, without how long things took. Raises if it is damaged."""
    if file.suffix == ".safetensors":
        tensors, note = load_tensors(file)
        return {
            "tensors": {name: exactly(tensor) for name, tensor in tensors.items()},
            "identity": note["identity"],
            "history": [untimed(epoch) for epoch in note["history"]],
        }
    if file.name == RESULT:
        _, result = read_result(file)
        return result | {"cost": untimed(result["cost"])}
    if file.name == "curve.json":
        return [untimed(epoch) for epoch in json.loads(file.read_bytes())]
    return file.read_bytes()


def exactly(tensor: torch.Tensor) -> tuple:
    """A tensor's type, shape and bits."""
    bits = tensor.reshape(-1).view(torch.uint8)
    return str(tensor.dtype), tuple(tensor.shape), bits.numpy().tobytes()


def untimed(entry: dict) -> dict:
    return {name: value for name, value in entry.items() if name not in TIMES}


class Right:
    """What a run directory is to hold. states: by the number of epochs, a training state's content,
    of those that were seen while `run` was made."""

    def __init__(self, run: Path, states: dict[int, Any]):
        self.files = {file.name: content(file) for file in run.iterdir()}
        self.states = states

    def false_files(self, run: Path) -> list[str]:
        """Files of a run that pass for whole, but are not right; all files do, but hidden ones."""
        names = sorted(file.name for file in run.glob("[!.]*"))
        wrong = [name for name in names if not self._is_right(run / name)]
        if RESULT in names:  # it is the last, and vouches for the others
            wrong += [f"{name}, missing" for name in self.files if name not in names]
        return wrong

    def _is_right(self, file: Path) -> bool:
        try:
            found = content(file)
        except (MnistattnError, ValueError, KeyError):
            return False
        if file.name in (STATE, PREVIOUS):
            return found == self.states.get(len(found["history"]))
        return file.name in self.files and found == self.files[file.name]


class Runs(Subject):
    """A command that makes run directories, one or more, of the same data set."""

    # Sums of floats, and so weights, depend on the number of threads.
    environment = {"OMP_NUM_THREADS": "1"}

    def __init__(self, args, data: Path, home: Path, engine: str):
        super().__init__(home, engine)
        self.args, self.data = args, data
        self._seen: dict[Path, set] = {}
        self._states: dict[str, dict[int, Any]] = {}

    def line(self, name: str) -> list:
        """What the command lines of both have in common."""
        return [
            sys.executable, "-m", "mnistattn", name, "--data", self.data, "--epochs",
            self.args.epochs, "--batch-size", 16, "--device", "cpu", "--out",
        ]  # fmt: skip

    def look(self) -> None:
        for file, stamp in files(self.whole).items():
            seen = self._seen.setdefault(file, set())
            if file.name in (STATE, PREVIOUS) and stamp not in seen:
                try:
                    state = content(file)
                except MnistattnError:
                    continue  # it was renamed meanwhile
                seen.add(stamp)
                states = self._states.setdefault(str(file.parent.relative_to(self.whole)), {})
                states[len(state["history"])] = state

    def learn(self) -> None:
        self.right = {}
        for result in self.whole.rglob(RESULT):
            name = str(result.parent.relative_to(self.whole))
            states = self._states.get(name, {})
            if len(states) < self.args.epochs:
                raise SystemExit(f"error: not all training states of {name} were seen: the machine "
                                 "is too busy.")  # fmt: skip
            self.right[name] = Right(result.parent, states)

    def made(self) -> bool:
        return all((self.root / name / RESULT).exists() for name in self.right)

    def false_files(self) -> list[str]:
        for name in self.right:
            names = {file.name for file in files(self.root / name)}
            self.resumed += WEIGHTS not in names and not names.isdisjoint((STATE, PREVIOUS))
        return [
            f"{name}/{file}"
            for name, right in self.right.items()
            for file in right.false_files(self.root / name)
        ]


class Evaluate(Runs):
    """One run. Without workers, so it is the command itself that is killed."""

    name = "evaluate"

    def command(self, folder: Path) -> list:
        return [*self.line("evaluate"), folder / "run", "--model", "ctx", "--seed", 0]


class Sweep(Runs):
    """Runs of two models by two workers."""

    name = "sweep"
    _finished: dict[str, dict] = {}  # runs, and their files

    def command(self, folder: Path) -> list:
        return [*self.line("sweep"), folder / "runs", "--models", "ctx,none", "--seeds",
                self.args.seeds, "--workers", 2, "--engine", self.engine]  # fmt: skip

    def false_files(self) -> list[str]:
        """And whether the runs that were finished the last time are as they were."""
        runs = {name: {file.name: stamp for file, stamp in files(self.root / name).items()}
                for name in self.right}  # fmt: skip
        now = {name: run for name, run in runs.items() if RESULT in run and STATE not in run}
        lost = [name for name, before in self._finished.items() if now.get(name) != before]
        self.kept += len(self._finished) - len(lost)
        self._finished = now
        return super().false_files() + [f"{name}, finished, was not kept" for name in lost]

    def clear(self) -> None:
        super().clear()
        self._finished = {}
