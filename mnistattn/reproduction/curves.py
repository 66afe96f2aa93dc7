"""Learning curves: accuracy and correctness on the validation split, against epochs and seconds.

Of the histories that runs keep beside their results; seconds are those of the machine they ran on.
Needs matplotlib (`pip install 'mnistattn[board]'`).
"""

import io
import json
from collections.abc import Sequence
from typing import Any

from mnistattn.leaderboard.collect import companion
from mnistattn.reproduction.report import Row, hardware, label, made_of
from mnistattn.reproduction.tables import papers_models

MEASURES = {"val_accuracy": ("accuracy, %", 100), "val_correctness": ("correctness", 1)}
# Of Okabe and Ito (2008): told apart by colour-blind people, too; dashes differ where colours end.
COLOURS = ("#8c6d31", "#e69f00", "#56b4e9", "#0072b2", "#d55e00", "#cc79a7", "#009e73", "#882255",
           "#332288", "#0b1f14")  # fmt: skip
DASHES: tuple[Any, ...] = ("solid", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))


def curves(title: str, rows: Sequence[Row]) -> bytes | None:
    """A PNG of four panels, a line a run of the paper's models, a colour a model, dashes a recipe;
    None if no run has a history."""
    trained = papers_models()
    found = [(row, history) for row in rows if row.model in trained for history in _histories(row)]
    if not found:
        return None
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(10, 6.4), dpi=100, layout="constrained")
        axes = figure.subplots(2, 2, squeeze=False)
        found.sort(key=lambda pair: trained.index(pair[0].model))
        names: dict[str, dict[str, Any]] = {}
        count = dict.fromkeys(trained, 0)
        for row, _ in found:  # a model has its colour in all charts, each of its recipes its dashes
            if _name(row) not in names:
                k = trained.index(row.model)
                dashes = DASHES[count[row.model] % len(DASHES)]
                names[_name(row)] = {"color": COLOURS[k % len(COLOURS)], "linestyle": dashes}
                count[row.model] += 1
        for panels, (measure, (words, factor)) in zip(axes, MEASURES.items(), strict=True):
            for panel, against in zip(panels, ("epochs", "minutes"), strict=True):
                for row, history in found:
                    points = _points(history, measure, against)
                    panel.plot(
                        [x for x, _ in points], [factor * y for _, y in points],
                        linewidth=1.6, marker="o", markersize=3, **names[_name(row)],
                    )  # fmt: skip
                panel.set_xlabel(f"{against} of training")
                panel.set_ylabel(words)
                panel.grid(color="#dddddd", linewidth=0.8)
                panel.spines[["top", "right"]].set_visible(False)
                panel.set_xlim(left=0)
                if against == "epochs":
                    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        lines = [Line2D([], [], linewidth=2, **look) for look in names.values()]
        figure.legend(lines, list(names), loc="outside lower center", ncols=1, frameon=False)
        figure.suptitle(f"{title}: the validation split", x=0.01, ha="left", weight="bold")
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _name(row: Row) -> str:
    where = hardware(s.result for s in row.runs)  # minutes are of no use without it
    return f"{label(row.model, row.options)} ({made_of(row.first)}; {where})"


def _histories(row: Row) -> list[list[dict[str, Any]]]:
    found = []
    for run in row.runs:
        try:
            history = json.loads(companion(run.file, "curve").read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(history, list) and history:
            found.append(history)
    return found


def _points(history: Sequence[dict], measure: str, against: str) -> list[tuple[float, float]]:
    """(x, y) of each epoch; none of a measure that the run does not have."""
    points, seconds = [], 0.0
    for entry in history:
        seconds += entry["seconds"]
        if measure in entry:
            points.append((entry["epoch"] if against == "epochs" else seconds / 60, entry[measure]))
    return points
