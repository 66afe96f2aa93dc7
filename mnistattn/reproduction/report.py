"""The paper's tables with ours beside them, in Markdown, from result files alone."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mnistattn.evaluation.metrics import SCALE_EDGES
from mnistattn.evaluation.paper import printed, unconfirmed
from mnistattn.evaluation.recipes import RECIPES
from mnistattn.generators.variants import COUNTS
from mnistattn.leaderboard.board import Entry, Estimate, Group
from mnistattn.leaderboard.build import build, by_name, recipe_words, title
from mnistattn.leaderboard.collect import Submission, companion
from mnistattn.models.registry import MODELS
from mnistattn.reproduction.plan import duration
from mnistattn.reproduction.tables import DATA, Data, Table

ROUNDING = 1e-9  # of a mean that equals a printed number
UNCONFIRMED = "?"  # printed in the paper, but not legible in the sources at hand
CHANGEABLE = {"epochs": "--epochs", "batch_size": "--batch-size", "lr": "--lr",
              "queries": "--queries"}  # fmt: skip
BINS = [f"{low:g}-{high:g}" for low, high in zip(SCALE_EDGES, SCALE_EDGES[1:], strict=False)]


@dataclass(frozen=True)
class Row:
    """One model on one data set with one recipe, over its seeds; group: what it stands beside."""

    model: str
    options: dict
    entry: Entry
    runs: tuple[Submission, ...]
    group: Group

    @property
    def first(self) -> dict:
        """The result of the first seed."""
        return self.runs[0].result


def rows_of(submissions: Iterable[Submission]) -> dict[str, list[Row]]:
    """Rows of the package's models by the data set (of `tables.DATA`) that they are on. Results on
    no such data set, or of weights that were trained on another one, are none."""
    groups: dict[str, list[Submission]] = defaultdict(list)
    for s in submissions:
        groups[s.group].append(s)
    found: dict[str, list[Row]] = {name: [] for name in DATA}
    for members in groups.values():
        name = data_of(members[0].result)
        if name is None:
            continue
        (group,) = build(members).groups
        runs = by_name(members)
        for entry in (e for e in group.entries if e.kind == "model"):
            result = runs[entry.name][0].result
            found[name].append(
                Row(result["model"], result["changed_options"], entry, tuple(runs[entry.name]),
                    group)
            )  # fmt: skip
    return found


def data_of(result: dict) -> str | None:
    """The data set of `tables.DATA` that a result is of."""
    dataset, recipe = result["dataset"], result["recipe"]
    if any(dataset["digests"].get(k) != v for k, v in result["trained_on"].items()):
        return None
    for row in DATA.values():
        reading = (row.queries == "all") == (recipe["queries"] == "all")
        if dataset["variant"] == row.variant and dataset["spec"] == row.spec and reading:
            return row.name
    return None


def report(tables: Sequence[Table], submissions: Sequence[Submission]) -> str:
    """All tables, and how many of the paper's confirmed numbers are reached."""
    rows = rows_of(submissions)
    parts = [tally(tables, rows)]
    for table in tables:
        parts.append(f"## {table.title}")
        for name in table.data:
            parts += section(table, DATA[name], rows[name])
    return "\n\n".join(parts) + "\n"


def section(table: Table, data: Data, rows: Sequence[Row]) -> Iterator[str]:
    """A table's part on one data set: what it is, the models, the scales, the commands."""
    yield f"### {data.name}: {data.words}"
    mine = [
        (name, options, [r for r in rows if (r.model, r.options) == _identity(name, options)])
        for name, options in table.models
    ]
    yield markdown(_models(data, mine))
    if table.by_scale:
        yield "Accuracy by the target's scale, %, ours / paper:"
        yield markdown(_scales(data, mine))
    if data.name == "mbg-multi":
        lines = list(_coverage(mine))
        if len(lines) > 1:
            yield ("Digits that samples of the attention point at (of the deterministic one there "
                   "is one); chance: as many samples at random pixels.")  # fmt: skip
            yield markdown(lines)
    done = [row for _, _, found in mine for row in found]
    if done:
        yield "\n".join(["```", *commands(data, done), "```"])


def beside(data: Data, model: str, options: dict) -> dict:
    """What the paper prints of a model on a data set, see paper.printed."""
    return printed(data.beside, model, MODELS[model].defaults() | options)


def is_papers_kind(result: dict) -> bool:
    """Whether a result's images are of the paper's kind: MNIST, and photos where it has some."""
    sources = result["dataset"]["sources"]
    textures = sources["backgrounds"]["source"] == "textures"
    return sources["digits"]["source"] == "mnist" and not textures


def _identity(model: str, options: dict) -> tuple[str, dict]:
    """A model and its changed options as results name them."""
    defaults = MODELS[model].defaults()
    return model, {k: v for k, v in options.items() if defaults.get(k) != v}


def _models(data: Data, mine) -> list[list[str]]:
    lines = [["model", "data and recipe", "seeds", "accuracy, % (95 % interval)", "paper",
              "difference", "correctness (95 % interval)", "paper", "difference", "train",
              "on"]]  # fmt: skip
    for name, options, found in mine:
        paper = beside(data, name, options)
        accuracy = _paper(paper["accuracy"], data.beside, name, "accuracy", 2)
        correctness = _paper(paper["correctness"], data.beside, name, "correctness", 2)
        if not found:
            lines.append([label(name, options), "not run", "-", "-", accuracy, "-", "-",
                          correctness, "-", "-", "-"])  # fmt: skip
        for row in found:
            e, raw = row.entry, row.first
            same = is_papers_kind(raw)
            lines.append([
                label(name, options), made_of(raw),
                str(len(e.seeds)),
                spread(e.accuracy, 100, 2), accuracy,
                difference(e.accuracy, paper["accuracy"] if same else None, 100, 2),
                spread(e.correctness, 1, 3), correctness,
                difference(e.correctness, paper["correctness"] if same else None, 1, 3),
                duration(e.train_seconds), hardware([s.result for s in row.runs]),
            ])  # fmt: skip
    return lines


def _scales(data: Data, mine) -> list[list[str]]:
    lines = [["model", "data and recipe", "total", *BINS]]
    for name, options, found in mine:
        paper = beside(data, name, options)
        total = _paper(paper["accuracy"], data.beside, name, "accuracy", 2)
        bins = [_paper(number, data.beside, name, "scales", 2)
                for number in paper["scales"] or [None] * len(BINS)]  # fmt: skip
        if not found:
            lines.append([label(name, options), "not run", f"- / {total}",
                          *(f"- / {p}" for p in bins)])  # fmt: skip
        for row in found:
            ours = [b.accuracy for b in row.entry.bins]
            lines.append([
                label(name, options), made_of(row.first),
                f"{100 * row.entry.accuracy.value:.2f} / {total}",
                *(f"{f'{100 * o.value:.2f}' if o else '-'} / {p}"
                  for o, p in zip(ours, bins, strict=True)),
            ])  # fmt: skip
    return lines


def _coverage(mine) -> Iterator[list[str]]:
    yield ["model", "seed", "right digits an image", "samples", "covered", "share of the right",
           "chance", "a sample points at a right digit", "different right answers"]  # fmt: skip
    for name, options, found in mine:
        for run in (run for row in found for run in row.runs):
            content = _companion(run, "coverage")
            if content is None or content["digest"] != run.result["dataset"]["digests"]["test"]:
                continue
            made = content["coverage"]
            error = made["covered"]["se"]
            mean = {key: part["value"] for key, part in made.items() if isinstance(part, dict)}
            yield [
                label(name, options), str(run.result["seed"]), f"{mean['right']:.3f}",
                str(made["samples"]),
                f"{mean['covered']:.3f}" + (f" +- {1.96 * error:.3f}" if error is not None else ""),
                f"{100 * mean['share']:.1f} %", f"{mean['chance']:.3f}",
                f"{100 * mean['pointing']:.1f} %", f"{mean['answers']:.3f}",
            ]  # fmt: skip


def _companion(run: Submission, kind: str) -> Any:
    """A JSON file that lies beside a result; None if it does not, or is none."""
    try:
        return json.loads(companion(run.file, kind).read_bytes())
    except (OSError, ValueError):
        return None


def commands(data: Data, rows: Sequence[Row]) -> Iterator[str]:
    """The lines that make the data sets, and each row anew. Where rows are on several data sets
    (photos and textures, say), their folders' names end in 8 digits of a hash of their digests."""
    sets = {_digests(row): row.first["dataset"] for row in rows}
    homes = {
        key: data.name + (f"-{hashlib.sha256(key.encode()).hexdigest()[:8]}" if len(sets) > 1
                          else "") for key in sets
    }  # fmt: skip
    for key, dataset in sets.items():
        yield f"# test digest {dataset['digests']['test'][:16]}"
        yield generate_line(data, dataset, homes[key])
    together: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        recipe = json.dumps(row.first["recipe"])
        together[_digests(row), row.entry.seeds, recipe].append(row)
    for (key, *_), alike in together.items():
        yield sweep_line(alike, homes[key])


def _digests(row: Row) -> str:
    return json.dumps(row.first["dataset"]["digests"], sort_keys=True)


def generate_line(data: Data, dataset: dict, home: str) -> str:
    """The command that makes a result's data set in data/reproduce/HOME."""
    spec, sources, counts = dataset["spec"], dataset["sources"], dataset["counts"]
    words = ["mnistattn generate --variant", data.variant, "--out", f"data/reproduce/{home}"]
    words += ["--digits", sources["digits"]["source"]]
    if sources["digits"].get("split", "separate") != "separate":
        words += ["--digit-split", sources["digits"]["split"]]
    if spec["variant"].startswith("mbg"):
        source = sources["backgrounds"]["source"]
        words += ["--backgrounds", "PHOTOS" if source == "folder" else source]
    if spec["placement"] != "paper":
        words += ["--placement", spec["placement"]]
    if spec["distractors"] != "patches":
        words += ["--distractors", spec["distractors"]]
    for split, usual in COUNTS.items():
        if counts[split] != usual:
            words += [f"--{split}", str(counts[split])]
    if dataset["seed"]:
        words += ["--seed", str(dataset["seed"])]
    return " ".join(words)


def sweep_line(rows: Sequence[Row], home: str) -> str:
    """The command that makes the runs of some rows, which have one recipe and the same seeds."""
    recipe = rows[0].first["recipe"]
    usual = vars(RECIPES[recipe["name"]]) if recipe["name"] in RECIPES else {}
    models = []
    for row in rows:
        options = ",".join(f"{k}={json.dumps(v)}" for k, v in row.options.items())
        models.append(f"{row.model}[{options}]" if options else row.model)
    words = ["mnistattn sweep --models", shlex.quote(",".join(models)), "--data",
             f"data/reproduce/{home}", "--seeds", ",".join(map(str, rows[0].entry.seeds)),
             "--recipe", recipe["name"]]  # fmt: skip
    for key, option in CHANGEABLE.items():
        if recipe[key] != usual.get(key):
            words += [option, str(recipe[key])]
    return " ".join([*words, f"--out runs/reproduce/{home}"])


def tally(tables: Sequence[Table], rows: dict[str, list[Row]]) -> str:
    """How many of the paper's confirmed numbers the mean of our seeds reaches, on images of its
    kind, by the best of the recipes that were run. The second reading of a data set counts nothing:
    it is there to be compared with the first."""
    found: dict[tuple[str, str], tuple[float, list[float]]] = {}
    for table in tables:
        for data in (DATA[name] for name in table.data):
            for name, options in table.models:
                mine = [r for r in rows[data.name] if is_papers_kind(r.first)
                        and (r.model, r.options) == _identity(name, options)]  # fmt: skip
                for what, number, ours in _numbers(table, beside(data, name, options), mine):
                    key = f"{label(name, options)} on {data.beside}", what
                    found.setdefault(key, (number, []))[1].extend(ours)
    legend = (f"`{UNCONFIRMED}`: printed in the paper, but not legible in the sources at hand. A "
              "difference is ours less the paper's, where the images are of the paper's kind "
              "(MNIST, photos).")  # fmt: skip
    if not found:
        return legend
    run = {key: (number, max(ours)) for key, (number, ours) in found.items() if ours}
    below = [
        f"- {where}, {what}: {_short(best, what)} (paper {number:.2f})"
        for (where, what), (number, best) in run.items()
        if best < number - ROUNDING
    ]
    lines = [
        f"Of {len(found)} confirmed numbers of the paper, **{len(run) - len(below)} are reached or "
        f"passed**, {len(below)} are not, {len(found) - len(run)} were not run (by the mean of our "
        f"seeds, with the best of the recipes below). {legend}"
    ]
    return "\n".join(lines + (["", "Below the paper:", "", *below] if below else []))


def _numbers(table: Table, paper: dict, found: Sequence[Row]) -> Iterator[tuple]:
    """What a table prints of a model: its name, the number, and ours of each recipe. Table 2 has no
    total of its own, Table 1 no correctness."""
    if paper["accuracy"] is not None and table.name not in ("table2", "readings"):
        yield "accuracy %", paper["accuracy"], [100 * r.entry.accuracy.value for r in found]
    if paper["correctness"] is not None and table.name in ("table2", "inverse"):
        masses = [r.entry.correctness.value for r in found if r.entry.correctness]
        yield "correctness", paper["correctness"], masses
    for b, number in enumerate(paper["scales"] or ()):
        if table.by_scale and number is not None:
            bins = [r.entry.bins[b].accuracy for r in found]
            yield f"accuracy % of scale {BINS[b]}", number, [100 * x.value for x in bins if x]


def _short(value: float, what: str) -> str:
    return f"{value:.3f}" if what == "correctness" else f"{value:.2f}"


def label(model: str, options: dict) -> str:
    """A model as the paper calls it, with its options; of BRNN always the block."""
    shown = {k: v for k, v in MODELS[model].defaults().items() if k == "block" and v > 1} | options
    return MODELS[model].paper_name + "".join(f", {k} {v}" for k, v in shown.items())


def made_of(raw: dict) -> str:
    """A result's data and recipe: "MNIST digits on photos; fast, 12 epochs, queries one"."""
    return f"{title(raw).partition(': ')[2]}; {recipe_words(raw['recipe'])}"


def hardware(results: Iterable[dict]) -> str:
    """What results were trained on, and in which precision: "CPU (1 threads), bfloat16"."""
    costs = [r["cost"] for r in results]
    found = [", ".join(filter(None, (c["device"], c.get("precision")))) for c in costs]
    return "; ".join(dict.fromkeys(found))


def _paper(number: float | None, variant: str, model: str, measure: str, digits: int) -> str:
    if number is not None:
        return f"{number:.{digits}f}"
    return UNCONFIRMED if unconfirmed(variant, model, measure) else "-"


def spread(e: Estimate | None, factor: float, digits: int) -> str:
    """A mean, its deviation between seeds if there are some, and its interval."""
    if e is None:
        return "-"
    deviation = "" if e.deviation is None else f" +- {factor * e.deviation:.{digits}f}"
    fewer = digits - (factor == 100)  # a tenth of a percent point is enough
    low, high = (f"{factor * x:.{fewer}f}" for x in (e.low, e.high))
    return f"{factor * e.value:.{digits}f}{deviation} ({low} .. {high})"


def difference(e: Estimate | None, paper: float | None, factor: float, digits: int) -> str:
    """Ours less the paper's, with its sign."""
    if e is None or paper is None:
        return "-"
    return f"{round(factor * e.value - paper, digits) + 0.0:+.{digits}f}"  # never -0.00


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table, aligned so that it can be read in a terminal, too."""
    safe = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*safe, strict=True)]
    lines = [" | ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)) for row in safe]
    lines.insert(1, " | ".join("-" * w for w in widths))
    return "\n".join(f"| {line} |" for line in lines)
