"""Many runs at once: each model on each data set with each seed, on an engine (mnistattn.engines).

A cell is one run directory of `evaluate`, and no more than that: a cell done by a sweep is one done
by `mnistattn evaluate --out`, and the other way round. So what is there is kept, what was
interrupted goes on after its last whole epoch, and nothing else has to be remembered.

Sums of floats depend on the number of threads, and so, in their last digits, do weights. It follows
from the request alone, not from how much of it is left: a sweep that is resumed gives the same.

No torch up here: a worker imports this file, and its threads and its GPU count only before torch.
"""

import hashlib
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mnistattn import engines
from mnistattn.dataset.lock import only_writer
from mnistattn.errors import InputError, MnistattnError
from mnistattn.generators.variants import choose

SPLITS = ("train", "val", "test")

# One cell at a time in a process: torch's random numbers are the process's, and a Dask worker may
# have several threads.
_ALONE = threading.Lock()
_gpu_chosen = False  # in this worker


@dataclass(frozen=True)
class Cell:
    """One run: what `evaluate` is asked for, where to, and the result if it is there already.

    state: "done", "begun" (it goes on after its last whole epoch) or "to do".
    """

    name: str
    run: Path
    model: str
    options: dict[str, Any]
    data: Path
    seed: int
    recipe: dict[str, Any]  # its name, and what is changed of it
    state: str
    result: dict | None


@dataclass(frozen=True)
class _Work:
    """A cell for a worker. threads: of a process of this machine (None: left as they are);
    gpus: CUDA_VISIBLE_DEVICES of the workers, taken in turn (empty: left as it is)."""

    cell: Cell
    device: str
    threads: int | None
    gpus: tuple[str, ...]


class SweepError(MnistattnError):
    """Some runs failed, all others are done. results: as `sweep` returns them, None if failed."""

    def __init__(self, message: str, results: list[dict | None]):
        super().__init__(message)
        self.results = results


def plan(
    models: Iterable[str | tuple[str, dict]], data: Iterable[str | Path], seeds: Iterable[int], *,
    recipe: str = "fast", epochs: int | None = None, batch_size: int | None = None,
    lr: float | None = None, queries: str | None = None, out: str | Path = "runs",
) -> list[Cell]:  # fmt: skip
    """The cells of a sweep, all of them checked, nothing written; see `sweep` for the arguments.

    By seed, then data set, then model, so that each model has a result early. A cell is called
    VARIANT-MODEL-OPTIONS-RECIPE-seedS, as `evaluate` calls its runs; where two data sets of the
    sweep are of one variant, VARIANT is followed by 8 digits of the SHA-256 over their digests.
    Raises InputError for what `evaluate` would refuse, for a cell that is asked for twice, and for
    a run directory that holds something else; MnistattnError for a plugged model that fails.
    """
    import torch

    from mnistattn.dataset.read import open_split, read_card
    from mnistattn.evaluation.recipes import make_recipe
    from mnistattn.models.registry import choose_options, find

    seeds = list(seeds)
    for seed in seeds:
        if not 0 <= seed < 1 << 32:
            raise InputError(f"seed {seed} is out of range: give 0 to 2^32 - 1.")
    changes = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "queries": queries}
    chosen = make_recipe(recipe, **changes)
    rows = []
    for model in models:
        reference, options = (model, {}) if isinstance(model, str) else model
        row = find(reference)
        if ".py:" in reference or reference.endswith(".py"):
            reference = os.path.abspath(reference)  # a worker may stand elsewhere
        rows.append((row, reference, dict(options), choose_options(row, options)))
    cards = [read_card(path) for path in data]
    for card in cards:
        for split in SPLITS:
            card.digest(split)
            open_split(card, split).close()  # its arrays are there, and of the right shape
    if not (rows and cards and seeds):
        raise InputError("a sweep needs a model, a data set and a seed at least.")

    with torch.random.fork_rng([]):
        codes = {(r, c): _try(row, options, card, chosen)
                 for r, (row, _, _, options) in enumerate(rows)
                 for c, card in enumerate(cards)}  # fmt: skip
    names = data_names([(card.raw["variant"], _digests(card)) for card in cards])
    cells: dict[str, Cell] = {}
    seen: set[str] = set()
    for seed in seeds:
        for c, card in enumerate(cards):
            for r, (row, reference, given, options) in enumerate(rows):
                choices = "".join(f"-{option}={value}" for option, value in sorted(given.items()))
                name = f"{names[c]}-{row.name}{choices}-{recipe}-seed{seed}"
                same = json.dumps([row.name, options, names[c], seed], sort_keys=True)
                if same in seen or name in cells:  # two names of one thing, or one name of two
                    raise InputError(
                        f"the run {name} is asked for twice: give a model, a data set or a seed "
                        "once, and two plugged models two names."
                    )
                seen.add(same)
                run = Path(out) / name
                state, result = _found(run, row, options, card, chosen, seed, codes[r, c])
                cells[name] = Cell(
                    name, run, reference, given, card.path.absolute(), seed,
                    {"recipe": recipe} | changes, state, result,
                )  # fmt: skip
    return list(cells.values())


def sweep(
    models: Iterable[str | tuple[str, dict]], data: Iterable[str | Path], seeds: Iterable[int], *,
    recipe: str = "fast", epochs: int | None = None, batch_size: int | None = None,
    lr: float | None = None, queries: str | None = None, device: str = "auto",
    engine: str = "local", workers: int | None = None, scheduler: str | None = None,
    per_gpu: int = 1, out: str | Path = "runs", say: Callable[[str], None] = print,
    progress: bool = True,
) -> list[dict]:  # fmt: skip
    """Train and score each model on each data set with each seed; the results, as `plan` orders
    them, each with "run", its directory below `out`.

    models: names or FILE.py:CLASS, alone or with options: ("arnn", {"hidden": 32}). One made known
    by @register is known to no worker: give its file, or workers=0. data: directories.
    engine, scheduler: see mnistattn.engines. workers: processes, default one a core, which share
    the cores (0: none but this one, its threads left alone); a worker holds its cell's data set in
    memory. per_gpu: runs that share a GPU, where GPUs are used.

    Raises InputError before any run starts if one cannot be met; SweepError if some failed, when
    all others are done. Ctrl-C ends the workers; the same call goes on with what is left.
    """
    check_engine(device, engine, workers, scheduler, per_gpu)
    cells = plan(models, data, seeds, recipe=recipe, epochs=epochs, batch_size=batch_size, lr=lr,
                 queries=queries, out=out)  # fmt: skip
    return run_cells(cells, device=device, engine=engine, workers=workers, scheduler=scheduler,
                     per_gpu=per_gpu, say=say, progress=progress)  # fmt: skip


def run_cells(
    cells: Sequence[Cell], *, device: str = "auto", engine: str = "local",
    workers: int | None = None, scheduler: str | None = None, per_gpu: int = 1,
    say: Callable[[str], None] = print, progress: bool = True,
) -> list[dict]:  # fmt: skip
    """Do what is left of some plans' cells, in their order; the results, and errors, of `sweep`.
    Names must differ."""
    gpus = check_engine(device, engine, workers, scheduler, per_gpu)
    cores = _cores()
    todo = [cell for cell in cells if cell.result is None]
    results = {cell.name: cell.result for cell in cells}
    if len(todo) < len(cells):
        say(f"{len(cells) - len(todo)} of {len(cells)} runs are there already")

    count = cores if workers is None else workers
    together = max(1, min(count, len(cells), len(gpus) * per_gpu or count))
    threads = None if scheduler or count == 0 else max(1, min(cores // together, _threads()))
    # Rounded down, so that per_gpu shares never are a hair more than the whole.
    share = int(1e6 / per_gpu) / 1e6
    asks = count > 0 and (gpus or (engine != "local" and device == "cuda"))
    tasks = {
        cell.name: engines.Task(
            cell.name, _Work(_absolute(cell), device, threads, gpus if count else ()),
            {"GPU": share} if asks else {},
        )
        for cell in todo
    }  # fmt: skip
    failed: dict[str, str] = {}

    def note(task: engines.Task, answer: dict) -> None:
        from tqdm import tqdm

        name = task.name
        del tasks[name]
        if answer["failed"]:
            failed[name] = answer["failed"]
        else:
            results[name] = answer["result"]
        with tqdm.external_write_mode():
            for line in answer["said"]:
                say(f"{name}: {line}")
            say(_line(name, answer))

    while tasks:
        try:
            with engines.open_engine(
                engine, None if scheduler else count and together, scheduler,
                {"GPU": len(gpus)} if gpus and asks else None,
            ) as opened:  # fmt: skip
                for folder in {cell.run.parent for cell in cells}:
                    _make(folder)
                engines.run(
                    opened, list(tasks.values()), run_cell, note, len(tasks), "run", "sweep",
                    progress,
                )  # fmt: skip
        except engines.WorkerDied as error:  # ends the engine's run, but not the sweep
            _tidy(tasks, engine)
            note(tasks[error.task], {"failed": error.how, "said": []})
        except BaseException:
            _tidy(tasks, engine)
            raise

    runs = {cell.name: str(cell.run) for cell in cells}
    found = [result and result | {"run": runs[name]} for name, result in results.items()]
    if failed:
        sentences = "; ".join(f"{n}: {failed[n].rstrip('.')}" for n in results if n in failed)
        raise SweepError(f"{len(failed)} of {len(cells)} runs failed: {sentences}.", found)
    return [result for result in found if result]


def run_cell(work: _Work) -> dict:
    """A worker's task: {"result", "failed": the sentence or "", "said": lines, "seconds"}.

    Whatever a cell raises is its own affair: a sweep of days does not end by one plugged model."""
    started, cell, said = time.perf_counter(), work.cell, list[str]()
    answer: dict[str, Any] = {"result": None, "failed": "", "said": said}
    with _ALONE:
        try:
            _settle(work)
            from mnistattn.evaluation.run import evaluate

            if not cell.run.parent.is_dir():
                raise MnistattnError(
                    f"a worker does not see {cell.run.parent}: --out and --data have to lie where "
                    "all workers see them."
                )
            answer["result"] = evaluate(
                cell.model, cell.data, options=cell.options, seed=cell.seed, out=cell.run,
                device=work.device, progress=False, say=said.append, **cell.recipe,
            )  # fmt: skip
        except MnistattnError as error:
            answer["failed"] = str(error)
        except Exception as error:
            answer["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        finally:
            torch = sys.modules.get("torch")
            if torch and torch.cuda.is_initialized():  # for those that share the GPU
                torch.cuda.empty_cache()
    return answer | {"seconds": time.perf_counter() - started}


def data_names(sets: Sequence[tuple[str, dict[str, str]]]) -> list[str]:
    """Names of data sets, given (variant, digests by split): the variant, and if another one is
    of the same, 8 digits of the SHA-256 over all digests."""
    variants = [variant for variant, _ in sets]
    names = []
    for variant, digests in sets:
        text = json.dumps(digests, sort_keys=True)
        mark = f"-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        names.append(variant + (mark if variants.count(variant) > 1 else ""))
    return names


def summary(results: Iterable[dict]) -> str:
    """A text table, a row a model and data set: mean and sample deviation over the seeds."""
    from mnistattn.evaluation.report import changed_options

    groups: dict[str, list[dict]] = {}
    for result in results:
        key = (result["dataset"]["variant"], result["dataset"]["digests"], result["model"],
               result["options"])  # fmt: skip
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(result)
    sets = {json.dumps(found[0]["dataset"]["digests"], sort_keys=True): found[0]["dataset"]
            for found in groups.values()}  # fmt: skip
    names = data_names([(one["variant"], one["digests"]) for one in sets.values()])
    named = dict(zip(sets, names, strict=True))
    rows = [("data set", "model", "seeds", "accuracy, %", "correctness")]
    for found in groups.values():
        scores = [result["scores"] for result in found]
        masks = [s["masks"]["correctness"]["value"] for s in scores if s["masks"]]
        rows.append((
            named[json.dumps(found[0]["dataset"]["digests"], sort_keys=True)],
            " ".join([found[0]["model"], *changed_options(found[0])]), str(len(found)),
            _spread([100 * s["accuracy"]["value"] for s in scores], 2),
            _spread([m for m in masks if m is not None], 4),
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{text:{width}}" for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def check_engine(
    device: str = "auto", engine: str = "local", workers: int | None = None,
    scheduler: str | None = None, per_gpu: int = 1,
) -> tuple[str, ...]:  # fmt: skip
    """The GPUs to be used; InputError for a request that no engine can meet."""
    choose("engine", engine, engines.ENGINES)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a sweep starts its processes itself: call it without torchrun.")
    if workers is not None and scheduler:
        raise InputError(f"the cluster at {scheduler} has its own workers: leave --workers out.")
    if scheduler is not None and engine != "dask":
        raise InputError(f"--scheduler {scheduler} is Dask's: give --engine dask with it.")
    if workers is not None and workers < (0 if engine == "local" else 1):
        raise InputError(f"{workers} workers are impossible: give 1 or more.")
    if per_gpu < 1:
        raise InputError(f"{per_gpu} runs a GPU are impossible: give 1 or more.")
    return _gpus(device, engine)


def _try(row, options: dict, card, recipe) -> str:
    """Build a model for a data set, as `evaluate` will; returns its code's SHA-256."""
    from mnistattn.evaluation.result import fits_option
    from mnistattn.evaluation.run import make_network
    from mnistattn.models.cost import flops_per_image
    from mnistattn.models.plugin import code_hash

    for option, value in options.items():
        if not fits_option(value):
            raise InputError(f"option '{option}' of {row.name} is {value!r}, which no result can "
                             "hold.")  # fmt: skip
    network = make_network(row, options, card, recipe, seed=0)
    flops_per_image(network, card.spec.size)  # tries the options on its maps, too
    return code_hash(row.load() if row.attention else type(network))


def _found(run: Path, row, options: dict, card, recipe, seed: int, code: str):
    """(state, result or None) of a run directory; InputError if it holds something else."""
    from mnistattn.evaluation.result import read_result, read_samples
    from mnistattn.evaluation.run import claim, identity_of
    from mnistattn.evaluation.train import PREVIOUS, STATE

    claim(run, identity_of(row, options, recipe, seed, card, code), row.name)
    whole = all(
        (run / file).is_file() for file in ("result.json", "model.safetensors", "samples.h5")
    )
    # A run ends with the removal of its training state.
    if whole and not any((run / file).exists() for file in (STATE, PREVIOUS)):
        # The weights are of this request; the result is, if it is whole and of this test split.
        with suppress(InputError):
            file, result = read_result(run)
            read_samples(file, result)  # every byte of them
            if result["dataset"]["digests"] == _digests(card):
                return "done", result
    begun = any((run / file).exists() for file in (STATE, PREVIOUS, "model.safetensors"))
    return ("begun" if begun else "to do"), None


def _digests(card) -> dict[str, str]:
    return {split: entry["digest"] for split, entry in card.splits.items()}


def _settle(work: _Work) -> None:
    """Take this worker's share of the cores, and its GPU: both count most before torch is imported,
    which in a fresh worker has not happened yet."""
    global _gpu_chosen
    if work.gpus and not _gpu_chosen:
        # Once a process, as CUDA reads it once. Workers are numbered in turn, and no more of them
        # are started than may run at a time: so each GPU gets per_gpu of them. That is not
        # guaranteed once a worker died, as its successor has the next number, nor beside others
        # that use the GPUs: nobody looks which one is idle.
        import multiprocessing

        number = int(multiprocessing.current_process().name.rpartition("-")[2])
        os.environ["CUDA_VISIBLE_DEVICES"] = work.gpus[number % len(work.gpus)]
        _gpu_chosen = True
    if work.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(work.threads)
        import torch

        torch.set_num_threads(work.threads)  # a Dask worker may have set the variable to 1


def _gpus(device: str, engine: str) -> tuple[str, ...]:
    """The GPUs of this machine, as CUDA_VISIBLE_DEVICES names them, if the cells are to use them.
    A Dask worker has what its environment says. InputError for a device that is not there."""
    import torch

    from mnistattn.evaluation.run import choose_device

    if engine != "local" and device == "cuda":
        return ()  # they may be on other machines only
    if choose_device(device).type != "cuda" or engine != "local":
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name for name in visible.split(",") if name]
    return tuple(names or map(str, range(torch.cuda.device_count())))[: torch.cuda.device_count()]


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # no Linux
        return os.cpu_count() or 1


def _threads() -> int:
    """What the user allows a process: OMP_NUM_THREADS, if it is set."""
    import torch

    return torch.get_num_threads()


def _absolute(cell: Cell) -> Cell:
    return replace(cell, run=cell.run.absolute())


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MnistattnError(f"cannot write {out}: {error.strerror or error}.") from error


def _tidy(tasks: dict[str, engines.Task], engine: str) -> None:
    """After workers of this machine were ended: leave nothing half-written. Workers of a cluster
    may still write; the next sweep tidies up after them."""
    if engine != "local":
        return
    for task in tasks.values():
        run = task.argument.cell.run
        with suppress(MnistattnError, OSError), only_writer(run, lambda line: None):
            run.rmdir()  # if it is empty


def _line(name: str, answer: dict) -> str:
    """What is said of a cell that has finished."""
    if answer["failed"]:
        return f"{name} failed: {answer['failed']}"
    scores = answer["result"]["scores"]
    masks = scores["masks"] and scores["masks"]["correctness"]["value"]
    correctness = "" if masks is None else f", correctness {masks:.4f}"
    accuracy = 100 * scores["accuracy"]["value"]
    return f"{name}: accuracy {accuracy:.2f} %{correctness}, {answer['seconds']:.0f} s"


def _spread(values: list[float], digits: int) -> str:
    """Mean and sample deviation, which one value does not have."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
