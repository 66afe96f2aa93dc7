"""A board as one HTML page that needs nothing else: styles, script, charts and pictures inline.

Nothing depends on the time or on chance: the same board gives the same bytes on the same machine.
"""

import re
from typing import Any

import jinja2

from mnistattn.errors import InputError
from mnistattn.generators.variants import COUNTS, VARIANTS
from mnistattn.leaderboard.board import Board, Entry, Estimate, Group, Retest
from mnistattn.leaderboard.charts import charts, looks_of, swatch
from mnistattn.leaderboard.gallery import gallery_of, unmapped
from mnistattn.leaderboard.text import (
    EMPTY,
    LEGEND,
    MISSING,
    NOT_PUBLIC,
    digest,
    footnotes,
    known,
    mean,
    number,
    one_line,
    short,
    span,
)


def page(board: Board, title: str = "mnistattn leaderboard") -> str:
    """The page's HTML. Raises InputError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("the page needs matplotlib: pip install 'mnistattn[board]'.") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mnistattn", "leaderboard"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    views = [_view(group) for group in board.groups]
    return environment.get_template("page.html.jinja").render(
        board=board, title=title, groups=views, legend=LEGEND, empty=EMPTY
    )


# ---- a group -------------------------------------------------------------------------------------


def _view(group: Group) -> dict[str, Any]:
    """All that the template shows of a group."""
    id = re.sub(r"[^A-Za-z0-9_-]", "-", group.key)  # a link to it lasts while groups come and go
    looks = looks_of(group.entries)
    notes = footnotes(group.entries)
    gallery = gallery_of(group)
    return {
        "id": id,
        "group": group,
        "digest": digest(group)[:16],
        "not_public": NOT_PUBLIC,
        "facts": _facts(group),
        "command": remake_command(group),
        "rows": [_row(entry, notes) for entry in group.entries],
        "notes": list(notes),
        "key_rows": [
            {"entry": entry, "swatch": swatch(looks[entry.name])} for entry in group.entries
        ],
        "charts": [chart for chart in charts(group, looks, id) if chart],
        "gallery": gallery,
        "unmapped": unmapped(group, gallery),
    }


def remake_command(group: Group) -> str:
    """The command that makes a group's data set; PHOTOS stands for a folder of one's own.

    The sizes of train and validation set are known only if the section has `counts`.
    """
    data = group.dataset
    spec, sources = data.get("spec", {}), data.get("sources", {})
    digits, grounds = sources.get("digits", {}), sources.get("backgrounds", {})
    words = ["mnistattn generate", f"--variant {data.get('variant')}"]
    words.append(f"--digits {digits.get('source')}")
    if digits.get("split", "separate") != "separate":
        words.append(f"--digit-split {digits['split']}")
    row = VARIANTS.get(str(data.get("variant")))
    if grounds.get("source") == "sun397":
        words.append("--backgrounds sun397")
    elif grounds.get("source") == "folder":
        words.append("--backgrounds PHOTOS")
    if row and row.background == "distractors" and spec.get("distractors") != "patches":
        words.append(f"--distractors {spec.get('distractors')}")
    if spec.get("placement", "paper") != "paper":
        words.append(f"--placement {spec['placement']}")
    counts = {"test": group.n} | data.get("counts", {})
    words += [f"--{s} {counts[s]}" for s in COUNTS if s in counts and counts[s] != COUNTS[s]]
    return one_line(" ".join([*words, f"--seed {data.get('seed')}"]))


def _facts(group: Group) -> list[tuple[str, str, bool]]:
    """(term, description, is it code) of the data set's card."""
    data = group.dataset
    spec, sources = data.get("spec", {}), data.get("sources", {})
    row = VARIANTS.get(str(data.get("variant")))
    variant = f"{data.get('variant')}" + (f": {row.summary}" if row else "")
    facts = [("variant", variant, False)]
    facts.append(("spec", ", ".join(f"{k} {v}" for k, v in spec.items() if k != "variant"), False))
    facts.append(("seed", str(data.get("seed")), False))
    facts += [(name, _source(source), False) for name, source in sources.items()]
    facts.append(("test images", f"{group.n:,}", False))
    facts += [
        (f"digest of {split}", str(value), True) for split, value in data.get("digests", {}).items()
    ]
    facts.append(("public", "yes: anyone can remake its bytes" if group.public else
                  f"no: {NOT_PUBLIC}", False))  # fmt: skip
    return facts


def _source(source: dict) -> str:
    """{"source": "folder", "splits": {"train": {"count": 9, ...}}} as "folder; train: count 9"."""
    flat = [f"{k} {v}" if k != "source" else str(v) for k, v in source.items()
            if not isinstance(v, dict)]  # fmt: skip
    nested = [v for v in source.values() if isinstance(v, dict)]
    for inner in nested:
        for name, value in inner.items():
            about = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(
                value, dict) else value  # fmt: skip
            flat.append(f"{name}: {about}")
    return "; ".join(flat)


# ---- the table -----------------------------------------------------------------------------------


def _row(entry: Entry, notes: dict[str, int]) -> dict[str, Any]:
    """An entry's cells: (column, sorting value or None, main text, small text, bar or None)."""
    retest = entry.retest
    cells: list[dict[str, Any]] = [
        _cell("rank", entry.rank.get("accuracy")),
        _estimate_cell("accuracy", entry.accuracy, 2, 1, 100),
        _cell(
            "retest",
            retest.accuracy.value if retest else None,
            number(retest.accuracy.value, 2, 100) if retest else MISSING,
            _drop(retest) if retest else "",
        ),
        _cell("paper", known(entry.paper.get("accuracy")), number(entry.paper.get("accuracy"), 2)),
        _cell("rank-c", entry.rank.get("correctness")),
        _estimate_cell("correctness", entry.correctness, 3, 3, 1),
        _cell("chance", known(entry.chance), number(entry.chance, 3)),
        _cell(
            "paper-c",
            known(entry.paper.get("correctness")),
            number(entry.paper.get("correctness"), 2),
        ),
        _cell("parameters", entry.parameters, short(entry.parameters), f"{entry.parameters:,}"),
        _cell("flops", known(entry.flops), number(entry.flops, 0, 1e-6)),
        _cell("train", known(entry.train_cost), number(entry.train_cost, 2)),
        _cell("inference", known(entry.inference_cost), number(entry.inference_cost, 2)),
        _cell("seeds", len(entry.seeds)),
    ]
    if retest and retest.flagged:
        cells[2]["tag"] = "drop"
    return {"entry": entry, "notes": sorted({notes[m] for m in entry.marks}), "cells": cells}


def _drop(retest: Retest) -> str:
    p = "< 0.001" if retest.p < 0.001 else number(retest.p, 3 if retest.p < 0.1 else 2)
    change = f"{100 * retest.drop:+.2f}".replace("-", "\u2212")
    return f"{change}, p {p}"


def _cell(key: str, value: float | None, main: str | None = None, small: str = "") -> dict:
    if main is None:
        main = MISSING if value is None else str(value)
    if small == main:
        small = ""
    return {"key": key, "value": value, "main": main, "small": small, "bar": None, "tag": ""}


def _estimate_cell(
    key: str, estimate: Estimate | None, digits: int, finer: int, factor: float
) -> dict[str, Any]:
    value = mean(estimate)
    if estimate is None or value is None:
        return _cell(key, None)
    main = number(value, digits, factor)
    if known(estimate.deviation) is not None:
        main += f" ± {number(estimate.deviation, digits, factor)}"
    cell = _cell(key, value, main, span(estimate, finer, factor))
    cell["bar"] = f"{100 * min(1.0, max(0.0, value)):.1f}"
    return cell
