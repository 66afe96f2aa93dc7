"""A data set in words: its card, counts, and histograms of digits, colours, scales."""

from pathlib import Path

import numpy as np

from mnistattn.dataset.read import Card, read_card, read_split
from mnistattn.generators.variants import COLORS, DIGITS

_BAR = 40
_BINS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)


def describe(path: str | Path) -> str:
    """The text that `mnistattn info` prints."""
    card = read_card(path)
    raw, spec = card.raw, card.spec
    counts = ", ".join(f"{split} {entry['count']:,}" for split, entry in card.splits.items())
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
    every = [read_split(card, s, ("digit", "color", "scale", "target")) for s in card.splits]
    rows = {name: np.concatenate([a[name] for a in every]) for name in every[0]}
    there = rows["digit"] >= 0
    lines += ["", "digits, over all objects"]
    lines += _bars(DIGITS, np.bincount(rows["digit"][there], minlength=10))
    lines += ["", "colours, over all objects"]
    lines += _bars(COLORS, np.bincount(rows["color"][there], minlength=5))
    lines += ["", "scales, over all objects"] + _scale_bars(rows["scale"][there])
    target = rows["scale"][np.arange(len(there)), rows["target"]]
    lines += ["", "scales, of the digit that is asked for"] + _scale_bars(target)
    return "\n".join(lines)


def _source(entry: dict) -> str:
    return ", ".join(f"{k} {str(v)[:16]}" for k, v in entry.items() if not isinstance(v, dict))


def _placement(card: Card) -> list[str]:
    effort = [entry["placement"] for entry in card.splits.values() if "placement" in entry]
    images = sum(entry["count"] for entry in card.splits.values())
    if not effort:
        return []
    tries, restarts = (sum(e[k] for e in effort) for k in ("tries", "restarts"))
    return [f"placement: {tries / images:.1f} tries an image, {restarts} scenes started again"]


def _scale_bars(scale: np.ndarray) -> list[str]:
    # Upper ends belong to a bin: (0.5, 1], (1, 1.5], ...; scales beyond have bins of their own.
    edges = sorted({0.0, *_BINS[1:], *([float(scale.max())] if scale.max() > _BINS[-1] else [])})
    counts = [int(((scale > a) & (scale <= b)).sum()) for a, b in zip(edges, edges[1:])]  # noqa: B905
    first = [f"to {edges[1]:g}"]
    return _bars(first + [f"{a:g} to {b:g}" for a, b in zip(edges[1:], edges[2:])], counts)  # noqa: B905


def _bars(names, counts) -> list[str]:
    total, most = max(1, int(np.sum(counts))), max(1, int(np.max(counts)))
    return [
        f"  {name:>10} {int(n):>9,} {100 * n / total:5.1f}% {'#' * round(_BAR * n / most)}"
        for name, n in zip(names, counts, strict=True)
    ]
