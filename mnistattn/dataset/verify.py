"""Verify a data set: its content against the digests, images drawn anew against those stored."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mnistattn.dataset.paint import Sources
from mnistattn.dataset.read import Card, damaged_arrays, read_card, read_split
from mnistattn.errors import InputError

REDRAWN = 32  # images a split


@dataclass
class Verdict:
    """What `verify` found. problems is empty if all is well; notes say what was not checked."""

    checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(
    path: str | Path, redraw: int = REDRAWN, data_root: str | Path = "data",
    backgrounds: str | None = None, say: Callable[[str], None] = lambda line: None,
) -> Verdict:  # fmt: skip
    """Check every split's digest, and `redraw` random images of each against the seed.

    data_root and backgrounds say where the sources are now (default: where the card says). If they
    are not to be had, or are not the same, images cannot be drawn anew: a note says so.
    """
    card = read_card(path)
    verdict = Verdict()
    sources = _sources(card, data_root, backgrounds, verdict) if redraw else None
    for split, entry in card.splits.items():
        say(f"{split}: {entry['count']} images")
        try:
            arrays = read_split(card, split)
        except InputError as error:
            verdict.problems.append(str(error))
            continue
        damaged = damaged_arrays(card, split, arrays)
        if damaged:
            verdict.problems.append(
                f"{split}.h5 does not have its digest: {', '.join(damaged)} differ from the card."
            )
        else:
            verdict.checked.append(f"{split}: digest {entry['digest'][:16]}... of all arrays")
        if sources:
            _redraw(card, split, arrays, sources, redraw, verdict)
    return verdict


def _sources(card: Card, data_root, backgrounds, verdict: Verdict) -> Sources | None:
    """The card's sources, opened again; None, with a note, if they are not what they were."""
    noted = card.raw["sources"]
    place = backgrounds or noted["backgrounds"].get("path") or noted["backgrounds"]["source"]
    digits = noted["digits"]
    try:
        sources = Sources(card.spec, card.raw["seed"], digits["source"], digits["split"], place,
                          Path(data_root), lambda line: None)  # fmt: skip
    except InputError as error:
        verdict.notes.append(f"no image was drawn anew: {error}")
        return None
    if sources.card["digits"] != digits:
        verdict.notes.append(
            "no image was drawn anew: the digits at hand are not those of the card (SHA-256)."
        )
        return None
    return sources


def _redraw(card: Card, split: str, arrays, sources: Sources, redraw: int, verdict: Verdict):
    try:
        painter = sources.painter(split)
    except InputError as error:
        verdict.notes.append(f"{split}: no image was drawn anew: {error}")
        return
    noted = card.raw["sources"]["backgrounds"].get("splits", {}).get(split)
    if sources.card["backgrounds"].get("splits", {}).get(split) != noted:
        verdict.notes.append(
            f"{split}: no image was drawn anew: the photos at hand are not those of the card."
        )
        return
    n = card.splits[split]["count"]
    picked = np.sort(np.random.default_rng().choice(n, min(n, redraw), replace=False))
    drawn, _ = painter.paint(picked.astype(np.int64))
    differ = sorted(
        {int(i) for name in drawn for i, a, b in zip(picked, drawn[name], arrays[name][picked],
                                                     strict=True) if not np.array_equal(a, b)}
    )  # fmt: skip
    if differ:
        verdict.problems.append(
            f"{split}.h5: image {differ[0]} (of {len(differ)} of {len(picked)} drawn anew) is not "
            "what the seed gives."
        )
    else:
        verdict.checked.append(f"{split}: {len(picked)} random images drawn anew, byte for byte")
