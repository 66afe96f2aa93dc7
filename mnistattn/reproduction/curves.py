"""Learning curves: accuracy and correctness on the validation split, against epochs and seconds.

Of the histories that runs keep beside their results; seconds are those of the machine they ran on.
Needs matplotlib (`pip install 'mnistattn[board]'`).
"""

import io
import json
from collections.abc import Sequence
from typing import Any

from mnistattn.leaderboard.build import recipe_words
from mnistattn.leaderboard.collect import companion
from mnistattn.models.registry import MODELS
from mnistattn.reproduction.report import Row, label

MEASURES = {"val_accuracy": ("accuracy, %", 100), "val_correctness": ("correctness", 1)}
# Of Okabe and Ito (2008): told apart by colour-blind people, too; dashes differ where colours end.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
DASHES: tuple[Any, ...] = ("solid", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))


def curves(title: str, rows: Sequence[Row]) -> bytes | None:
    """A PNG of four panels, a line a run, a colour a model and recipe; None if no run has a
    history."""
    found = [(row, history) for row in rows for history in _histories(row)]
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
        found.sort(key=lambda pair: list(MODELS).index(pair[0].model))
        names = list(dict.fromkeys(_name(row) for row, _ in found))
        for panels, (measure, (words, factor)) in zip(axes, MEASURES.items(), strict=True):
            for panel, against in zip(panels, ("epochs", "minutes"), strict=True):
                for row, history in found:
                    k = names.index(_name(row))
                    points = _points(history, measure, against)
                    panel.plot(
                        [x for x, _ in points], [factor * y for _, y in points],
                        color=COLOURS[k % len(COLOURS)], linewidth=1.6, marker="o", markersize=3,
                        linestyle=DASHES[k // len(COLOURS) % len(DASHES)],
                    )  # fmt: skip
                panel.set_xlabel(f"{against} of training")
                panel.set_ylabel(words)
                panel.grid(color="#dddddd", linewidth=0.8)
                panel.spines[["top", "right"]].set_visible(False)
                panel.set_xlim(left=0)
                if against == "epochs":
                    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        lines = [
            Line2D([], [], color=COLOURS[k % len(COLOURS)], linewidth=2,
                                    linestyle=DASHES[k // len(COLOURS) % len(DASHES)])
            for k in range(len(names))
        ]  # fmt: skip
        figure.legend(lines, names, loc="outside lower center", ncols=2, frameon=False)
        figure.suptitle(f"{title}: the validation split", x=0.01, ha="left", weight="bold")
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _name(row: Row) -> str:
    return f"{label(row.model, row.options)} ({recipe_words(row.first['recipe'])})"


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
