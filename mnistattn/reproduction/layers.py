"""Figure 6b: the maps of all layers of a table's models side by side, of what was run.

Needs run directories with their weights; results without them, as a leaderboard's, are left out.
"""

import hashlib
import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from mnistattn.evaluation.layers import layers_of_runs
from mnistattn.reproduction.report import Row, label, made_of
from mnistattn.reproduction.tables import papers_models

NEEDED = ("model.safetensors", "gallery.h5")


def layers(name: str, rows: Sequence[Row], device: str = "auto") -> dict[str, bytes]:
    """PNGs by file name, one for each test split: of each model with attention (and each recipe)
    the first seed whose weights are there. Where there are several test splits, names end in 8
    digits of a hash, as data sets' do in a report's commands. MnistattnError if a run is damaged.
    """
    known = papers_models()
    found: dict[str, list[tuple[Row, Path]]] = defaultdict(list)
    rows = [row for row in rows if row.model in known]
    for row in sorted(rows, key=lambda row: known.index(row.model)):
        runs = [run for run in row.runs if run.result["scores"]["layers"]
                and all(run.file.with_name(file).exists() for file in NEEDED)]  # fmt: skip
        if runs:
            found[row.first["dataset"]["digests"]["test"]].append((row, runs[0].file))
    made = {}
    for digest, shown in found.items():
        labels = [label(row.model, row.options) for row, _ in shown]
        # Recipes are told apart only where a model was trained by several.
        names = [f"{words} ({made_of(row.first).partition('; ')[2]})"
                 if labels.count(words) > 1 else words
                 for words, (row, _) in zip(labels, shown, strict=True)]  # fmt: skip
        picture = layers_of_runs([file for _, file in shown], names=names, device=device)
        mark = f"-{hashlib.sha256(digest.encode()).hexdigest()[:8]}" if len(found) > 1 else ""
        file = io.BytesIO()
        picture.save(file, "PNG")
        made[f"layers-{name}{mark}.png"] = file.getvalue()
    return made
