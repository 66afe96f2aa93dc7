"""The paper's experiments as cells of a sweep: data sets that are made where they are missing, runs
that are kept where they are there, and how long the rest will take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mnistattn.dataset.read import read_card
from mnistattn.dataset.write import generate
from mnistattn.errors import InputError
from mnistattn.evaluation.coverage import coverage_of_run
from mnistattn.evaluation.feed import Feed
from mnistattn.evaluation.recipes import Recipe, make_recipe
from mnistattn.evaluation.run import choose_device
from mnistattn.evaluation.step import WARM_UPS, make_optimizer, make_steps
from mnistattn.evaluation.sweep import Cell, SweepError, check_engine, plan, run_cells
from mnistattn.generators.backgrounds import SOURCES as BACKGROUNDS
from mnistattn.generators.digits import SOURCES as DIGITS
from mnistattn.generators.variants import COUNTS, VARIANTS, choose, closest
from mnistattn.models.network import build
from mnistattn.models.registry import choose_options, find
from mnistattn.reproduction.tables import DATA, OBJECTS, QUICK, Data, Table

MULTI = "mbg-multi"
TIMED = 3  # steps, after the ones that warm up


@dataclass(frozen=True)
class Request:
    """What is to be reproduced, and from what. data, out: folders in which each data set has one of
    its own. seeds: of the runs. changes: of the recipe. sources: digits, backgrounds, data_root of
    `generate`; data_seed: its seed."""

    tables: Sequence[Table]
    data: Path
    out: Path
    seeds: Sequence[int] = (0, 1, 2)
    recipe: str = "fast"
    changes: dict[str, Any] | None = None
    quick: bool = False
    counts: tuple[int, int, int] = (COUNTS["train"], COUNTS["val"], COUNTS["test"])
    sources: dict[str, Any] | None = None
    data_seed: int = 0

    def home(self, name: str) -> Path:
        """Where the runs on a data set go; those of a quick look have another recipe."""
        return self.out / "quick" / name if self.quick else self.out / name

    def shown(self) -> list[Table]:
        """The tables, of a quick look their part of it."""
        return [replace(t, data=t.quick) if self.quick else t for t in self.tables]

    def experiments(self) -> dict[str, list[tuple[str, dict]]]:
        """Models by data set, each once, in the order of the tables."""
        found: dict[str, list[tuple[str, dict]]] = {}
        for table in self.shown():
            for name in table.data:
                models = found.setdefault(name, [])
                models += [model for model in table.models if model not in models]
        return found

    def rows(self) -> list[Data]:
        """The data sets."""
        return [DATA[name] for name in self.experiments()]

    def training(self, row: Data) -> dict[str, Any]:
        """The recipe and its changes for a data set, as `plan` takes them."""
        chosen = QUICK if self.quick else {"recipe": self.recipe}
        chosen = chosen | {k: v for k, v in (self.changes or {}).items() if v is not None}
        return chosen | ({"queries": row.queries} if row.queries else {})

    def recipe_of(self, row: Data) -> Recipe:
        """The recipe for a data set. InputError if it is impossible."""
        training = self.training(row)
        return make_recipe(training["recipe"], **{k: v for k, v in training.items()
                                                  if k != "recipe"})  # fmt: skip


@dataclass(frozen=True)
class Expected:
    """A model on a data set: how many of its runs are left, and seconds for one of them (if it
    needs all epochs)."""

    data: str
    model: str
    options: dict
    left: int
    seconds: float


def check(request: Request, device: str = "auto", **engine: Any) -> None:
    """InputError for a request that cannot be met, before anything is made."""
    check_engine(device, **engine)
    for name, n in zip(("train", "val", "test"), request.counts, strict=True):
        if n < 2:
            raise InputError(f"{n} images in {name} are too few: give 2 or more.")
    if len(set(request.seeds)) < len(request.seeds) or not request.seeds:
        raise InputError("a seed is asked for twice, or none is: give each once.")
    if not 0 <= request.data_seed < 1 << 63:
        raise InputError(f"data seed {request.data_seed} is out of range: give a whole number from "
                         "0 to 2^63 - 1.")  # fmt: skip
    sources = request.sources or {}
    choose("digit source", sources.get("digits", "auto"), DIGITS)
    under = _under(request)
    if under not in BACKGROUNDS and not Path(under).is_dir():
        raise InputError(f"backgrounds '{sources['backgrounds']}' is neither a folder nor one of "
                         f"{', '.join(BACKGROUNDS)}.{closest(sources['backgrounds'], BACKGROUNDS)}"
        )  # fmt: skip
    for row in request.rows():
        request.recipe_of(row)
        if (request.data / row.name).exists():
            _check(request, row, request.data / row.name)


def make_data(request: Request, say: Callable[[str], None], progress: bool) -> None:
    """Generate the data sets that are missing. InputError if one that is there is another."""
    for name in request.experiments():
        row, path = DATA[name], request.data / name
        if path.exists():
            _check(request, row, path)
            continue
        train, val, test = request.counts
        generate(row.variant, path, train=row.train_images(train), val=val, test=test,
                 seed=request.data_seed, say=say, progress=progress, **row.options,
                 **(request.sources or {}))  # fmt: skip


def _check(request: Request, row: Data, path: Path) -> None:
    card = read_card(path)
    train, val, test = request.counts
    counts = {"train": row.train_images(train), "val": val, "test": test}
    there = {split: card.splits.get(split, {}).get("count", 0) for split in counts}
    if card.spec.as_dict() != row.spec or there != counts:
        raise InputError(
            f"{path} is not the data set '{row.name}' of this request (another variant, option or "
            "number of images): give another --data."
        )
    if card.raw["seed"] != request.data_seed:
        raise InputError(f"{path} was made with seed {card.raw['seed']}, not {request.data_seed}: "
                         f"give --data-seed {card.raw['seed']}, or another --data.")  # fmt: skip
    if card.raw["sources"]["digits"].get("split", "separate") != "separate":
        raise InputError(f"{path} has digits of one pool in all splits: give another --data.")
    wanted = (request.sources or {}).get("digits", "auto")
    if wanted != "auto" and card.raw["sources"]["digits"]["source"] != wanted:
        raise InputError(f"{path} has other digits than '{wanted}': give another --data.")
    there = card.raw["sources"]["backgrounds"]
    if VARIANTS[row.variant].background == "photo" and _under(request) != (
        str(Path(there["path"]).absolute()) if there["source"] == "folder" else there["source"]
    ):
        raise InputError(f"{path} has other backgrounds than '{_under(request)}': give another "
                         "--data, or the --backgrounds that it was made with.")  # fmt: skip


def _under(request: Request) -> str:
    """The backgrounds that are asked for: a name, or a folder from the root on."""
    name = str((request.sources or {}).get("backgrounds", "textures"))
    return name if name in BACKGROUNDS else str(Path(name).absolute())


def cells(request: Request, names: Sequence[str] | None = None) -> list[Cell]:
    """All runs (on the data sets of these names), by seed, so that each model has a result early;
    the data sets must be there."""
    found: list[Cell] = []
    for name, models in request.experiments().items():
        if names is not None and name not in names:
            continue
        _check(request, DATA[name], request.data / name)
        found += [
            replace(cell, name=f"{name}/{cell.name}")
            for cell in plan(models, [request.data / name], request.seeds,
                             out=request.home(name), **request.training(DATA[name]))
        ]  # fmt: skip
    return sorted(found, key=lambda cell: cell.seed)


def expect(request: Request, device: str, todo: Sequence[Cell] | None = None) -> list[Expected]:
    """What is left of each model on each data set, and how long one run takes by steps that are
    timed here and now, on all cores or one GPU. todo: `cells(request)`; without them, all runs on a
    data set that is missing are left."""
    place, found = choose_device(device), []
    times: dict[tuple, float] = {}
    if todo is None:
        there = [name for name in request.experiments() if (request.data / name).exists()]
        todo = cells(request, there)
    for name, models in request.experiments().items():
        row, recipe = DATA[name], request.recipe_of(DATA[name])
        visits = row.train_images(request.counts[0]) * (OBJECTS if recipe.queries == "all" else 1)
        for model, options in models:
            done = sum(
                cell.state == "done" for cell in todo
                if (cell.data.name, cell.model, cell.options) == (name, model, options)
            )  # fmt: skip
            left, size = len(request.seeds) - done, VARIANTS[row.variant].size
            key = (model, str(options), size, recipe.batch_size, recipe.optimizer)
            if left and key not in times:
                times[key] = step_seconds(model, options, size, recipe, place)
            steps = recipe.epochs * math.ceil(visits / recipe.batch_size)
            found.append(Expected(name, model, options, left, steps * times.get(key, 0.0)))
    return found


def step_seconds(
    model: str, options: dict, size: int, recipe: Recipe, device: torch.device
) -> float:
    """Seconds that a training step takes here and now, on images of noise: median of a few."""
    row, n = find(model), recipe.batch_size
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        network = build(row, size, 10, 5, recipe.dropout, **choose_options(row, options))
        network = network.to(device).to(memory_format=torch.channels_last)
        answer = torch.arange(n) % 5
        feed = Feed(
            torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8).to(device),
            torch.zeros(n, 1, dtype=torch.int64), answer[:, None], answer, answer,
            torch.nn.functional.one_hot(answer, 5).bool(), False, device,
        )  # fmt: skip
        warm = WARM_UPS + 1 if device.type == "cuda" else 1
        steps = make_steps(network, make_optimizer(network, recipe), recipe, feed)
        visit = torch.stack((torch.arange(n), answer, answer)).repeat(1, warm + TIMED)
        network.train()
        steps.start(visit, [recipe.lr] * (warm + TIMED))
        seconds = []
        for i in range(warm + TIMED):
            begun = time.perf_counter()
            steps.run(i)
            steps.loss.item()  # waits for a GPU
            seconds.append(time.perf_counter() - begun)
    return sorted(seconds[warm:])[TIMED // 2]


def run(
    todo: Sequence[Cell], *, device: str = "auto",
    say: Callable[[str], None] = print, progress: bool = True, **engine: Any,
) -> list[dict]:  # fmt: skip
    """Do the runs of `cells(request)` on an engine (`sweep`'s options), and count what samples of
    the attention cover on mbg-multi; the results. Raises as `sweep` does, when all else is done;
    what is there is kept."""
    failure = None
    try:
        results = run_cells(todo, device=device, say=say, progress=progress, **engine)
    except SweepError as error:
        failure, results = error, [result for result in error.results if result]
    done = {result["run"] for result in results}
    for cell in todo:
        if cell.data.name == MULTI and str(cell.run) in done:
            coverage_of_run(cell.run, cell.data, device=device, progress=progress)
    if failure:
        raise failure
    return results


def in_words(expected: Iterable[Expected], epochs_at_most: bool) -> str:
    """The estimate as a table for the terminal."""
    rows = [("data set", "model", "runs left", "a run", "all of them")]
    total = 0.0
    for e in expected:
        options = "".join(f" {k}={v}" for k, v in e.options.items())
        total += e.left * e.seconds
        rows.append((e.data, e.model + options, str(e.left), duration(e.seconds),
                     duration(e.left * e.seconds)))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{t:{w}}" for t, w in zip(row, widths, strict=True)).rstrip()
             for row in rows]  # fmt: skip
    most = "at most " if epochs_at_most else "about "
    last = (f"{most}{duration(total)} of training on this machine, by a few steps that were timed "
            "just now; making data and scoring come on top")  # fmt: skip
    return "\n".join([*lines, "", last])


def duration(seconds: float) -> str:
    """1 h 05 min, 12 min, 40 s."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min" if round(seconds) >= 60 else f"{seconds:.0f} s"
