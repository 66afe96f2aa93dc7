"""A data set in words: its card, counts, and histograms of digits, colours, scales."""

from pathlib import Path

import numpy as np

from mnistattn.dataset.read import Card, batches, read_card
from mnistattn.generators.variants import COLORS, DIGITS

_BAR = 40
_BINS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
_ROWS = 1 << 16  # images counted at a time


def describe(path: str | Path) -> str:
    """The text that `mnistattn info` prints."""
    card = read_card(path)
    raw, spec = card.raw, card.spec
    counts = ", ".join(
        f"{split} {entry['count']:,}" + _shards(entry) for split, entry in card.splits.items()
    )
    asks = "colour -> digit" if spec.row.asks == "color" else "digit -> colour"
    lines = [
        f"{raw['paper_name']} ({raw['variant']}) in {card.path}: {counts} images of "
        f"{spec.size} x {spec.size}, {asks}",
        f"seed {raw['seed']}, placement {spec.placement}, scales {spec.min_scale:g} to "
        f"{spec.max_scale:g}, {spec.min_objects} to {spec.max_objects} objects",
        f"digits: {_source(raw['sources']['digits'])}",
        f"backgrounds: {_source(raw['sources']['backgrounds'])}",
        "made with " + ", ".join(f"{name} {v}" for name, v in raw["versions"].items()),
    ]
    lines += [f"digest of {split}: {entry['digest']}" for split, entry in card.splits.items()]
    lines += _placement(card)
    digits, colors = np.zeros(10, np.int64), np.zeros(len(COLORS), np.int64)
    scales, targets = _Scales(), _Scales()
    for split in card.splits:
        for _, rows in batches(card, split, _ROWS, ("digit", "color", "scale", "target")):
            there = rows["digit"] >= 0
            digits += np.bincount(rows["digit"][there], minlength=10)
            colors += np.bincount(rows["color"][there], minlength=len(COLORS))
            scales.add(rows["scale"][there])
            targets.add(rows["scale"][np.arange(len(there)), rows["target"]])
    lines += ["", "digits, over all objects", *_bars(DIGITS, digits)]
    lines += ["", "colours, over all objects", *_bars(COLORS, colors)]
    lines += ["", "scales, over all objects", *scales.bars()]
    lines += ["", "scales, of the digit that is asked for", *targets.bars()]
    return "\n".join(lines)


def _shards(entry: dict) -> str:
    if "shards" not in entry:
        return ""
    n = len(entry["shards"])
    return f" ({n} shards)" if n > 1 else " (1 shard)"


def _source(entry: dict) -> str:
    return ", ".join(f"{k} {str(v)[:16]}" for k, v in entry.items() if not isinstance(v, dict))


def _placement(card: Card) -> list[str]:
    effort = [entry["placement"] for entry in card.splits.values() if "placement" in entry]
    images = sum(entry["count"] for entry in card.splits.values())
    if not effort:
        return []
    tries, restarts = (sum(e[k] for e in effort) for k in ("tries", "restarts"))
    return [f"placement: {tries / images:.1f} tries an image, {restarts} scenes started again"]


class _Scales:
    """A histogram of scales, fed in pieces."""

    def __init__(self) -> None:
        # Upper ends belong to a bin: (0, 1], (1, 1.5], ...; scales beyond have a bin of their own.
        self._counts, self._most = np.zeros(len(_BINS), np.int64), 0.0

    def add(self, scale: np.ndarray) -> None:
        """Count some."""
        bins = np.searchsorted(np.array(_BINS[1:], np.float32), scale, side="left")
        self._counts += np.bincount(bins, minlength=len(_BINS))
        self._most = max(self._most, float(scale.max(initial=0.0)))

    def bars(self) -> list[str]:
        """The histogram, a line a bin."""
        edges = [*_BINS[1:], *([self._most] if self._most > _BINS[-1] else [])]
        names = [f"to {edges[0]:g}"]
        names += [f"{a:g} to {b:g}" for a, b in zip(edges, edges[1:], strict=False)]
        return _bars(names, self._counts[: len(names)])


def _bars(names, counts) -> list[str]:
    total, most = max(1, int(np.sum(counts))), max(1, int(np.max(counts)))
    return [
        f"  {name:>10} {int(n):>9,} {100 * n / total:5.1f}% {'#' * round(_BAR * n / most)}"
        for name, n in zip(names, counts, strict=True)
    ]
