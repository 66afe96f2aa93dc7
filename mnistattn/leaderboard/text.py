"""A board as text: for the terminal, as Markdown, as CSV and as JSON.

Accuracy is in percent in the tables for people, and a share (0 to 1) in CSV and JSON, which hold
every number in full; what a paper prints as accuracy is in percent everywhere, as it is printed.
"""

import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence

from mnistattn.generators.variants import choose
from mnistattn.leaderboard.board import Bin, Board, Entry, Estimate, Group

FORMATS = ("text", "markdown", "csv", "json")
LEGEND = (
    "1 + the number of models that are significantly better, Holm-corrected at 5 %; "
    "ties share a rank. Controls have none."
)
EMPTY = "The board has no results yet."
NOT_PUBLIC = "photos of one's own: not remakeable"
MISSING = "-"

# What each sort looks at, and whether the largest comes first.
_SORTS: dict[str, tuple[Callable[[Entry], float | None], bool]] = {
    "accuracy": (lambda entry: entry.accuracy.value, True),
    "correctness": (lambda entry: mean(entry.correctness), True),
    "parameters": (lambda entry: entry.parameters, False),
    "flops": (lambda entry: entry.flops, False),
    "train-cost": (lambda entry: entry.train_cost, False),
    "inference-cost": (lambda entry: entry.inference_cost, False),
}
SORTS = (*_SORTS, "name")


def render(board: Board, format: str = "text", sort: str = "accuracy") -> str:
    """The board in one of FORMATS, each group's entries in the order of one of SORTS.

    Entries without a value come last. The rank that is shown is that of correctness where it is
    sorted by, else that of accuracy. Raises InputError for another format or sort.
    """
    choose("format", format, FORMATS)
    choose("sort", sort, SORTS)
    writer = {"text": _text, "markdown": _markdown, "csv": _csv, "json": _json}[format]
    return writer(board, sort)


# ---- what all formats and the page share ---------------------------------------------------------


def arrange(entries: Sequence[Entry], sort: str) -> list[Entry]:
    """The entries, sorted; ties keep the board's order, and those without a value come last."""
    if sort == "name":
        return sorted(entries, key=lambda entry: (entry.name.casefold(), entry.name))
    value, largest_first = _SORTS[sort]

    def key(entry: Entry) -> tuple[bool, float]:
        number = known(value(entry))
        if number is None:
            return True, 0.0
        return False, -number if largest_first else number

    return sorted(entries, key=key)


def footnotes(entries: Iterable[Entry]) -> dict[str, int]:
    """Each mark once, numbered from 1 as a reader meets it."""
    numbers: dict[str, int] = {}
    for entry in entries:
        for mark in entry.marks:
            numbers.setdefault(mark, len(numbers) + 1)
    return numbers


def known(value: float | None) -> float | None:
    """The value, or None where there is none: NaN and infinity count as none."""
    return value if value is not None and math.isfinite(value) else None


def mean(estimate: Estimate | None) -> float | None:
    """The estimate's value; None where there is none."""
    return None if estimate is None else known(estimate.value)


def number(value: float | None, digits: int, factor: float = 1.0) -> str:
    """The value with so many decimals; "-" where there is none."""
    value = known(value)
    return MISSING if value is None else f"{factor * value:.{digits}f}"


def short(count: float | None) -> str:
    """A count in at most five characters: 950, 12.3k, 1.23M."""
    count = known(count)
    if count is None:
        return MISSING
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def digest(group: Group) -> str:
    """The test split's digest in full, which says what a group's entries were scored on."""
    return str(group.dataset.get("digests", {}).get("test", "unknown"))


def scales(bin: Bin) -> str:
    """A bin's range in words."""
    return f"{bin.low:g} to {bin.high:g}"


def span(estimate: Estimate, digits: int, factor: float) -> str:
    """An estimate's interval, as "89.1 to 90.4"."""
    return f"{number(estimate.low, digits, factor)} to {number(estimate.high, digits, factor)}"


def one_line(text: str) -> str:
    """The text without line breaks, tabs and other control characters, which would break a row."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"\s+", " ", printable).strip()


def _interval(
    estimate: Estimate | None, digits: int, factor: float = 1.0, until: str = " to "
) -> str:
    if estimate is None or known(estimate.low) is None or known(estimate.high) is None:
        return ""
    return number(estimate.low, digits, factor) + until + number(estimate.high, digits, factor)


def _accuracy(estimate: Estimate | None) -> str:
    if estimate is None or known(estimate.value) is None:
        return MISSING
    spread = known(estimate.deviation)
    between = "" if spread is None else f" +- {number(spread, 2, 100)}"
    return f"{number(estimate.value, 2, 100)}{between} ({_interval(estimate, 1, 100)})"


def _correctness(estimate: Estimate | None) -> str:
    if estimate is None or known(estimate.value) is None:
        return MISSING
    return f"{number(estimate.value, 3)} ({_interval(estimate, 3)})"


def _ranked_by(sort: str) -> str:
    return "correctness" if sort == "correctness" else "accuracy"


def _rank(entry: Entry, measure: str) -> str:
    return str(entry.rank.get(measure, MISSING))


def _retest(entry: Entry) -> str:
    if entry.retest is None:
        return MISSING
    # With the change of those seeds, as the mean beside it may be over more.
    return f"{number(entry.retest.accuracy.value, 2, 100)} ({_change(entry)})"


def _change(entry: Entry) -> str:
    """The points that a fresh test set changes the accuracy by, marked where it is flagged."""
    if entry.retest is None:
        return MISSING
    return f"{100 * entry.retest.drop:+.2f}" + "!" * entry.retest.flagged


def _retest_note(entries: Sequence[Entry]) -> list[str]:
    if not any(entry.retest and entry.retest.flagged for entry in entries):
        return []
    return ["!: the accuracy on a fresh test set is lower by more than chance explains."]


# ---- the terminal --------------------------------------------------------------------------------


def _text(board: Board, sort: str) -> str:
    blocks = [_text_group(group, sort) for group in board.groups] or [EMPTY]
    if board.groups:
        blocks.append(
            f"# is the rank: {LEGEND.replace(' Controls', chr(10) + 'Controls')}\n"
            "Intervals are of 95 %. Costs: times those of the model none.\n"
            "Fresh test: by how many points the accuracy changes on another test set."
        )
    if board.problems:
        blocks.append("\n".join(["left out:", *(f"  {one_line(p)}" for p in board.problems)]))
    return "\n\n".join(blocks) + "\n"


def _text_group(group: Group, sort: str) -> str:
    entries = arrange(group.entries, sort)
    notes = footnotes(entries)
    # Where the masks are the same for all, so is chance: a column of it would only cost width.
    chances = {number(entry.chance, 3) for entry in entries if known(entry.chance) is not None}
    about = [f"{group.n:,} test images, digest {digest(group)[:16]}"]
    if len(chances) == 1:
        about.append(f"chance correctness {min(chances)}")
    if not group.public:
        about.append(NOT_PUBLIC)
    title = one_line(group.title)
    lines = [title, "=" * len(title), f"recipe: {one_line(group.recipe)}", "; ".join(about), ""]
    lines += _table(_text_columns(entries, notes, _ranked_by(sort), len(chances) > 1))
    lines += [f"[{i}] {one_line(mark)}" for mark, i in notes.items()]
    return "\n".join(lines + _retest_note(entries))


def _text_columns(
    entries: Sequence[Entry], notes: dict[str, int], measure: str, with_chance: bool
) -> list[tuple[str, str, list[str]]]:
    """(two header lines joined by a line break, alignment, cells) of each column worth its width.

    Short forms, so that a row fits the terminal: the mean's interval follows it without brackets.
    """

    def name(entry: Entry) -> str:
        marks = "".join(f" [{i}]" for i in sorted({notes[mark] for mark in entry.marks}))
        return one_line(entry.name) + marks

    def accuracy(entry: Entry) -> str:
        e, spread = entry.accuracy, ""
        if known(e.deviation) is not None:
            spread = f"+-{number(e.deviation, 2, 100)}"
        return f"{number(e.value, 2, 100):>5} {spread:6} {_interval(e, 1, 100, '..')}"

    def correctness(entry: Entry) -> str:
        if entry.correctness is None:
            return MISSING
        return f"{number(entry.correctness.value, 3)} {_interval(entry.correctness, 3, 1, '..')}"

    columns = [
        ("\n#", ">", [_rank(e, measure) for e in entries]),
        ("\nmodel", "<", [name(e) for e in entries]),
        ("\nkind", "<", [one_line(e.kind) for e in entries]),
        ("\nseeds", ">", [str(len(e.seeds)) for e in entries]),
        ("accuracy, %\nmean +- dev., interval", "<", [accuracy(e) for e in entries]),
    ]
    if any(e.correctness for e in entries):
        columns.append(("correctness\nmean, interval", "<", [correctness(e) for e in entries]))
    if with_chance:
        columns.append(("\nchance", ">", [number(e.chance, 3) for e in entries]))
    if any(e.retest for e in entries):
        columns.append(("fresh\ntest", ">", [_change(e) for e in entries]))
    columns += [
        ("para-\nmeters", ">", [short(e.parameters) for e in entries]),
        ("\nMFLOP", ">", [number(e.flops, 0, 1e-6) for e in entries]),
        ("train\ncost", ">", [number(e.train_cost, 2) for e in entries]),
        ("infer\ncost", ">", [number(e.inference_cost, 2) for e in entries]),
    ]
    papers = [
        f"{number(e.paper.get('accuracy'), 2):>5} {number(e.paper.get('correctness'), 2):>4}"
        for e in entries
    ]
    if any(re.search(r"\d", cell) for cell in papers):
        columns.append(("paper's\nacc.  corr.", ">", papers))
    return columns


def _table(columns: list[tuple[str, str, list[str]]]) -> list[str]:
    lines: list[list[str]] = [[] for _ in range(3 + len(columns[0][2]))]
    for head, align, cells in columns:
        width = max(len(cell) for cell in [*head.split("\n"), *cells])
        for line, cell in zip(lines, [*head.split("\n"), "-" * width, *cells], strict=True):
            line.append(f"{cell:{align}{width}}")
    return [" ".join(line).rstrip() for line in lines]


# ---- Markdown ------------------------------------------------------------------------------------


def _markdown(board: Board, sort: str) -> str:
    blocks = ["# Leaderboard"]
    for group in board.groups:
        blocks += _markdown_group(group, sort)
    blocks.append(_escaped(f"Rank: {LEGEND}") if board.groups else EMPTY)
    if board.problems:
        blocks += ["## Left out", "\n".join(f"- {_escaped(p)}" for p in board.problems)]
    return "\n\n".join(blocks) + "\n"


def _markdown_group(group: Group, sort: str) -> list[str]:
    entries = arrange(group.entries, sort)
    notes = footnotes(entries)
    measure = _ranked_by(sort)
    about = [
        f"Recipe: {_escaped(group.recipe)}.",
        f"Test digest: `{digest(group)[:16]}`.",
        f"{group.n:,} test images.",
    ]
    if not group.public:
        about.append(f"**{NOT_PUBLIC}**.")
    heads = [
        "rank", "model", "kind", "seeds", "accuracy % +- deviation (95 % interval)",
        "correctness (95 % interval)", "chance", "retest accuracy %", "parameters", "MFLOP",
        "train cost x none", "inference cost x none", "paper's accuracy %", "paper's correctness",
    ]  # fmt: skip
    rows = []
    for entry in entries:
        marks = "".join(f" [{i}]" for i in sorted({notes[mark] for mark in entry.marks}))
        rows.append([
            _rank(entry, measure), _escaped(entry.name + marks), _escaped(entry.kind),
            str(len(entry.seeds)), _accuracy(entry.accuracy), _correctness(entry.correctness),
            number(entry.chance, 3), _retest(entry), f"{entry.parameters:,}",
            number(entry.flops, 1, 1e-6), number(entry.train_cost, 2),
            number(entry.inference_cost, 2), number(entry.paper.get("accuracy"), 2),
            number(entry.paper.get("correctness"), 2),
        ])  # fmt: skip
    blocks = [f"## {_escaped(group.title)}", " ".join(about), _markdown_table(heads, rows, {1, 2})]
    foot = [f"{_escaped(f'[{i}]')} {_escaped(mark)}" for mark, i in notes.items()]
    foot += _retest_note(entries)
    if foot:
        blocks.append("\\\n".join(foot))  # a backslash breaks the line
    if any(entry.bins for entry in entries):
        blocks += ["By the target's scale: accuracy %, correctness.", _markdown_bins(entries)]
    return blocks


def _markdown_bins(entries: Sequence[Entry]) -> str:
    shown = [entry for entry in entries if entry.bins]
    columns = max((entry.bins for entry in shown), key=len)
    heads = ["model", *(f"{scales(bin)} (n = {bin.n:,})" for bin in columns)]
    rows = []
    for entry in shown:
        cells = [
            f"{number(mean(bin.accuracy), 2, 100)}, {number(mean(bin.correctness), 3)}"
            for bin in entry.bins
        ]
        rows.append([_escaped(entry.name), *cells, *[MISSING] * (len(columns) - len(cells))])
    return _markdown_table(heads, rows, {0})


def _markdown_table(heads: list[str], rows: list[list[str]], words: set[int]) -> str:
    """words: the columns that are not numbers, and stand on the left."""
    rule = [":---" if i in words else "---:" for i in range(len(heads))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, rule, *rows])


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is. HTML is written as entities, which also hold in cells."""
    text = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", text)


# ---- for programs --------------------------------------------------------------------------------


def _csv(board: Board, sort: str) -> str:
    most = max((len(e.bins) for group in board.groups for e in group.entries), default=5)
    rows = [
        _flat(group, entry, most)
        for group in board.groups
        for entry in arrange(group.entries, sort)
    ]
    head = list(rows[0]) if rows else ["group", "dataset", "model"]
    out = io.StringIO()
    writer = csv.DictWriter(out, head, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _flat(group: Group, entry: Entry, bins: int) -> dict[str, object]:
    retest = entry.retest
    row: dict[str, object] = {
        "group": group.key, "dataset": group.title, "variant": group.dataset.get("variant", ""),
        "digest": digest(group), "public": _word(group.public), "n": group.n,
        "recipe": group.recipe, "name": entry.name, "model": entry.model, "kind": entry.kind,
        "paper_name": entry.paper_name, "rank_accuracy": entry.rank.get("accuracy", ""),
        "rank_correctness": entry.rank.get("correctness", ""), "seeds": len(entry.seeds),
        "seed_list": " ".join(map(str, entry.seeds)), "epochs": entry.epochs,
        **_numbers("accuracy", entry.accuracy), **_numbers("correctness", entry.correctness),
        "chance": _plain(entry.chance),
        **_numbers("retest_accuracy", retest.accuracy if retest else None),
        **_numbers("retest_correctness", retest.correctness if retest else None),
        "retest_seed": retest.test_seed if retest else "", "retest_n": retest.n if retest else "",
        "retest_drop": _plain(retest.drop if retest else None),
        "retest_p": _plain(retest.p if retest else None),
        "retest_flagged": _word(retest.flagged) if retest else "",
        "parameters": entry.parameters, "flops": entry.flops,
        "train_cost": _plain(entry.train_cost), "inference_cost": _plain(entry.inference_cost),
        "train_seconds": _plain(entry.train_seconds),
        "paper_accuracy_percent": _plain(entry.paper.get("accuracy")),
        "paper_correctness": _plain(entry.paper.get("correctness")),
        "code": entry.code, "marks": " | ".join(entry.marks),
    }  # fmt: skip
    for i in range(bins):
        bin = entry.bins[i] if i < len(entry.bins) else None
        start = f"bin{i + 1}"
        row |= {f"{start}_low": bin.low if bin else "", f"{start}_high": bin.high if bin else ""}
        row[f"{start}_n"] = bin.n if bin else ""
        row |= _numbers(f"{start}_accuracy", bin.accuracy if bin else None)
        row |= _numbers(f"{start}_correctness", bin.correctness if bin else None)
    return row


def _numbers(name: str, estimate: Estimate | None) -> dict[str, object]:
    return {
        name if part == "value" else f"{name}_{part}": _plain(
            getattr(estimate, part) if estimate else None
        )
        for part in ("value", "low", "high", "deviation")
    }


def _plain(value: float | None) -> object:
    value = known(value)
    return "" if value is None else float(value)


def _word(flag: bool) -> str:
    return "yes" if flag else "no"


def _json(board: Board, sort: str) -> str:
    groups = [
        _as_dict(group, without=("entries", "images", "masks"))
        | {"entries": [_as_dict(e, without=("maps",)) for e in arrange(group.entries, sort)]}
        for group in board.groups
    ]
    whole = {"source": board.source, "groups": groups, "problems": list(board.problems)}
    return json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _as_dict(thing: Group | Entry, without: tuple[str, ...]) -> dict:
    names = (field.name for field in dataclasses.fields(thing) if field.name not in without)
    return {name: _json_value(getattr(thing, name)) for name in names}


def _json_value(value):
    """Dataclasses as dicts, numpy's numbers and small arrays as plain ones, NaN as null."""
    if dataclasses.is_dataclass(value):
        return {f.name: _json_value(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    if hasattr(value, "tolist"):
        return _json_value(value.tolist())
    return known(value) if isinstance(value, float) else value
