"""Invented results on the data sets of the paper's tables, and a reader of reports."""

import importlib.util
import itertools
from pathlib import Path

from mnistattn.leaderboard.collect import Submission, collect
from mnistattn.reproduction.tables import DATA

_spec = importlib.util.spec_from_file_location(
    "fabricate", Path(__file__).parents[1] / "leaderboard" / "fabricate.py"
)
assert _spec and _spec.loader
f = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(f)

Rows = list[list[str]]
GAUSSIAN = {"backgrounds": "gaussian"}
RECIPE = {"name": "fast", "epochs": 12, "queries": "one"}
_number = itertools.count()


def invent(
    root: Path, on: str, model: str, seed: int = 0, accuracy: float = 0.5,
    correctness: float | None = 0.3, n: int = 100, recipe: dict | None = None, **more,
) -> Path:  # fmt: skip
    """A run on a data set of `tables.DATA`: MNIST, on photos of SUN where it has photos. recipe:
    what differs from 12 epochs of the fast one. Everything else is fabricate's."""
    row = DATA[on]
    under = {"backgrounds": "sun397"} if on.startswith("mbg") else {}
    under = GAUSSIAN if on == "mdist-gaussian" else under
    asked = RECIPE | ({"queries": row.queries} if row.queries else {}) | (recipe or {})
    given = {"variant": row.variant, "digits": "mnist", "spec": row.options} | under | more
    return f.fabricate(root / f"run{next(_number)}", model, seed, accuracy, correctness, n,
                       recipe=asked, **given)  # fmt: skip


def collected(root: Path) -> list[Submission]:
    """The results below a folder, all of which may be shown."""
    found, problems = collect([root])
    assert not problems, problems
    return found


def parts(text: str) -> dict[tuple[str, str], list[Rows]]:
    """(title, data set) -> its Markdown tables, as rows of cells, without the lines under heads."""
    found: dict[tuple[str, str], list[Rows]] = {}
    title, before = "", ""
    here: list[Rows] = []
    for line in text.splitlines():
        if line.startswith("## "):
            title = line.removeprefix("## ")
        elif line.startswith("### "):
            here = found.setdefault((title, line.removeprefix("### ").partition(":")[0]), [])
        elif line.startswith("|"):
            if not before.startswith("|"):
                here.append([])
            if not set(line) <= set("|- ") or len(here[-1]) != 1:
                here[-1].append([cell.strip() for cell in line.strip("|").split(" | ")])
        before = line
    return found


def commands(text: str) -> dict[str, list[str]]:
    """Data set -> the lines of its code block."""
    found: dict[str, list[str]] = {}
    name, inside = "", False
    for line in text.splitlines():
        if line.startswith("### "):
            name = line.removeprefix("### ").partition(":")[0]
        elif line == "```":
            inside = not inside
        elif inside:
            found.setdefault(name, []).append(line)
    return found
