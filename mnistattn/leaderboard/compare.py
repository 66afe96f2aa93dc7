"""Two models on the same test images: how far apart, where, and a sentence of what it means."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mnistattn.errors import InputError
from mnistattn.evaluation.metrics import SCALE_EDGES, scale_bin
from mnistattn.leaderboard.build import LEVEL, pooled, recipe_words, scores
from mnistattn.leaderboard.collect import TRUTH, Submission
from mnistattn.leaderboard.stats import Difference, Pooled, difference, holm, paired_bootstrap


@dataclass(frozen=True)
class Row:
    """One line: a range of scales (or all), n images, both means, a's less b's with 95 % interval,
    and p (of the bins: Holm-corrected over the bins). None where there is nothing to compare."""

    where: str
    n: int
    a: float | None
    b: float | None
    difference: Difference | None


@dataclass(frozen=True)
class Comparison:
    """Both measures, all images first and then the bins; test: what the p are of; notes: what a
    reader must know; sentence: what it means."""

    a: str
    b: str
    accuracy: tuple[Row, ...]
    correctness: tuple[Row, ...]
    tests: tuple[str, str]
    notes: tuple[str, ...]
    sentence: str


def compare(
    a: Sequence[Submission], b: Sequence[Submission], group: Sequence[Sequence[Submission]] = ()
) -> Comparison:
    """Compare two models, a list of seeds each. group: the other entries of the board, from whom
    the variance between seeds is borrowed where a model has fewer than three.

    One seed each: McNemar's exact test and a paired bootstrap, about these two trainings. More:
    both sources of chance, images and seeds (stats.py). InputError if the test images differ.
    """
    first, second = a[0], b[0]
    for s in [*a, *b]:
        if any(not np.array_equal(s.samples[k], first.samples[k]) for k in TRUTH):
            raise InputError(
                f"{s.file} and {first.file} are not over the same test images: no paired test."
            )
    single = len(a) == len(b) == 1
    borrowed = {m: None if single else pooled([*group, a, b], m)
                for m in ("accuracy", "correctness")}  # fmt: skip
    names = (first.name, second.name)
    if names[0] == names[1]:
        names = (f"{names[0]} ({_seeds(a)})", f"{names[1]} ({_seeds(b)})")
    accuracy = _rows(a, b, "accuracy", borrowed["accuracy"], single)
    correctness = _rows(a, b, "correctness", borrowed["correctness"], single)
    notes = []
    if first.group != second.group:
        notes.append(
            f"They were not trained alike ({recipe_words(first.result['recipe'])}; and "
            f"{recipe_words(second.result['recipe'])}): this compares more than the models."
        )
    if single:
        notes.append("One training each: this is about these two trainings. Whether the models "
                     "differ, three seeds or more would say.")  # fmt: skip
    tests = (
        ("McNemar's exact test", "paired bootstrap, 10,000 resamples")
        if single
        else ("t-test over images and seeds",) * 2
    )
    sentence = " ".join(_sentence(names, accuracy, correctness, single))
    return Comparison(names[0], names[1], accuracy, correctness, tests, tuple(notes), sentence)


def table(comparison: Comparison) -> str:
    """The comparison as text for the terminal."""
    c = comparison
    wide = max(len(c.a), len(c.b), 9) + 2
    lines = []
    for rows, test, what, factor, digits in (
        (c.accuracy, c.tests[0], "accuracy, %", 100, 2),
        (c.correctness, c.tests[1], "correctness", 1, 4),
    ):
        if not rows:
            lines += [f"{what}: not both have attention maps", ""]
            continue
        lines.append(f"{what:16}{'n':>7}{c.a:>{wide}}{c.b:>{wide}}{'difference':>12}   "
                     f"{'95 % interval':20}p ({test})")  # fmt: skip
        for r in rows:
            if r.difference is None or r.a is None or r.b is None:
                lines.append(f"{r.where:16}{r.n:>7}{'-':>{wide}}{'-':>{wide}}")
                continue
            d = r.difference
            span = f"{factor * d.low:+.{digits}f} .. {factor * d.high:+.{digits}f}"
            lines.append(
                f"{r.where:16}{r.n:>7}"
                f"{factor * r.a:>{wide}.{digits}f}{factor * r.b:>{wide}.{digits}f}"
                f"{factor * d.value:>+12.{digits}f}   {span:20}{_p(d.p)}"
            )
        lines.append("")
    lines.append("p of the scale bins: corrected for their number (Holm).")
    return "\n".join([*lines, *c.notes, "", c.sentence])


def _seeds(entry: Sequence[Submission]) -> str:
    numbers = ", ".join(str(s.result["seed"]) for s in entry)
    return f"seed{'s' * (len(entry) > 1)} {numbers}"


def _rows(a, b, measure: str, borrowed: Pooled | None, single: bool) -> tuple[Row, ...]:
    ours, theirs = scores(a, measure), scores(b, measure)
    if ours is None or theirs is None:
        return ()
    of = scale_bin(torch.from_numpy(a[0].samples["scale"])).numpy()
    rows = [_row("all", ours, theirs, borrowed, single)]
    bins = [_row(f"  {SCALE_EDGES[k]:g} to {SCALE_EDGES[k + 1]:g}", ours[:, of == k],
                 theirs[:, of == k], borrowed, single)
            for k in range(len(SCALE_EDGES) - 1)]  # fmt: skip
    tested = [r for r in bins if r.difference is not None]
    adjusted = iter(holm([r.difference.p for r in tested if r.difference]))
    for r in bins:
        if r.difference is not None:
            d = r.difference
            corrected = Difference(d.value, d.low, d.high, next(adjusted))
            r = Row(r.where, r.n, r.a, r.b, corrected)
        rows.append(r)
    return tuple(rows)


def _row(where: str, a: np.ndarray, b: np.ndarray, borrowed: Pooled | None, single: bool) -> Row:
    kept = ~np.isnan(a[0] + b[0])
    a, b, n = a[:, kept], b[:, kept], int(kept.sum())
    if n == 0:
        return Row(where, 0, None, None, None)
    d = difference(a, b, borrowed)
    binary = bool(np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all())
    if single and not binary:
        low, high, p = paired_bootstrap(a[0] - b[0])
        d = Difference(d.value, low, high, p)
    return Row(where, n, float(a.mean()), float(b.mean()), d)


def _sentence(names, accuracy, correctness, single: bool):
    head = accuracy[0]
    d = head.difference
    a, b = names if d.value >= 0 else names[::-1]
    better, worse = (head.a, head.b) if d.value >= 0 else (head.b, head.a)
    low, high = sorted((abs(100 * d.low), abs(100 * d.high)))
    if d.p <= LEVEL:
        yield (
            f"{a} is right on {100 * better:.1f} % of {head.n:,} images and {b} on "
            f"{100 * worse:.1f} %: {100 * abs(d.value):.1f} points more (95 % interval "
            f"{low:.1f} to {high:.1f}), which chance alone would hardly give (p {_p(d.p)})."
        )
    else:
        yield (
            f"{names[0]} is right on {100 * head.a:.1f} % of {head.n:,} images and {names[1]} "
            f"on {100 * head.b:.1f} %: no more apart than chance allows (difference "
            f"{100 * d.value:+.1f} points, 95 % interval {100 * d.low:+.1f} to "
            f"{100 * d.high:+.1f}, p {_p(d.p)}), so neither is shown to be better."
        )
    sure = [r for r in accuracy[1:] if r.difference and r.difference.p <= LEVEL]
    for_a = [r.where.strip() for r in sure if r.difference.value > 0]
    for_b = [r.where.strip() for r in sure if r.difference.value < 0]
    tested = sum(r.difference is not None for r in accuracy[1:])
    parts = [f"{name} in the scale bins {', '.join(where)}" if len(where) > 1 else
             f"{name} in the scale bin {where[0]}"
             for name, where in ((names[0], for_a), (names[1], for_b)) if where]  # fmt: skip
    if parts:
        yield f"By scale, {' and '.join(parts)} (of {tested}) is ahead by more than chance."
    else:
        yield "In no single scale bin is one of them ahead by more than chance."
    if correctness and correctness[0].difference:
        m = correctness[0]
        e = m.difference
        verdict = "a difference beyond chance" if e.p <= LEVEL else "no difference beyond chance"
        yield (f"Of its attention, {names[0]} puts {100 * m.a:.1f} % on the target and {names[1]} "
               f"{100 * m.b:.1f} %: {verdict} (95 % interval {100 * e.low:+.2f} to "
               f"{100 * e.high:+.2f} points, p {_p(e.p)}).")  # fmt: skip


def _p(p: float) -> str:
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}" if p < 0.01 else f"{p:.3f}"
