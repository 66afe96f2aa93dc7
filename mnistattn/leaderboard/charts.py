"""The charts of the page: a group's accuracy and correctness by scale, and accuracy against cost.

They are matplotlib's SVG, drawn in colours that stand for a role (ink, grid, series 1, ...), which
become CSS variables, so that they follow the page into the dark.
"""

import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from mnistattn.leaderboard.board import Entry, Estimate, Group
from mnistattn.leaderboard.text import known, mean, number, one_line, scales, span

# A colour of a chart stands for a role: the first becomes var(--ink), and so on. No other colour
# is drawn, so the values only have to differ.
_ROLES = {
    name: f"#0{i:x}0203"
    for i, name in enumerate(
        ("ink", "muted", "grid", "quiet", "panel", *(f"s{k}" for k in range(1, 7)))
    )
}
# Colour, marker and dashes all differ, so that no pair is told apart by colour alone.
_STYLES: tuple[tuple[str, str, Any], ...] = (
    ("s1", "o", "solid"),
    ("s2", "s", (0, (7, 2))),
    ("s3", "^", (0, (2, 1.2))),
    ("s4", "D", (0, (7, 2, 1.5, 2))),
    ("s5", "v", (0, (4, 1.5))),
    ("s6", "P", (0, (7, 1.5, 1.5, 1.5, 1.5, 1.5))),
)
_QUIET = ("quiet", "", "solid")  # the other models, and post-hoc methods
_CONTROL = ("quiet", "x", (0, (3, 3)))
_WIDTH, _HEIGHT = 600.0, 400.0  # of a chart, in its own units, which are about pixels


@dataclass(frozen=True)
class Look:
    """How an entry is drawn in the charts of its group."""

    colour: str  # a role
    marker: str
    dashes: Any

    @property
    def featured(self) -> bool:
        return self.colour not in ("quiet", "muted")


def looks_of(entries: Sequence[Entry]) -> dict[str, Look]:
    """Colour for the six most accurate models; grey for the rest, dashed for controls.

    More than six lines in colour cannot be told apart; the grey ones keep their name at their end.
    """
    looks, styles = {}, iter(_STYLES)
    for entry in entries:
        look = None
        if entry.kind in ("model", "plugged"):
            look = next(styles, None)
        looks[entry.name] = Look(*(look or (_CONTROL if entry.kind == "control" else _QUIET)))
    return looks


def charts(group: Group, looks: dict[str, Look], id: str) -> Iterator[dict[str, Any] | None]:
    """Each chart that there is something to draw in: id, title, svg, caption, and its numbers."""
    yield _scale_chart(group, looks, "accuracy", f"{id}-accuracy")
    yield _scale_chart(group, looks, "correctness", f"{id}-correctness")
    yield _cost_chart(group, looks, f"{id}-cost")


def _scale_chart(
    group: Group, looks: dict[str, Look], measure: str, id: str
) -> dict[str, Any] | None:
    factor, digits = (100, 1) if measure == "accuracy" else (1, 3)
    lines: dict[str, list[Estimate | None]] = {}
    for entry in group.entries:
        points: list[Estimate | None] = [getattr(bin, measure) for bin in entry.bins]
        points = [p if mean(p) is not None else None for p in points]
        if any(points):
            lines[entry.name] = points
    if not lines:
        return None
    bins = max((e.bins for e in group.entries if e.name in lines), key=len)
    kinds = {entry.name: entry.kind for entry in group.entries}
    drawn, twins = _without_twins(lines)
    # A control is the floor or the ceiling: an oracle at 1 must not squeeze all the others.
    tops = [p.high for n, ps in drawn.items() for p in ps if p and kinds[n] != "control"]
    top = max(tops, default=1.0)
    beyond = {
        name: points
        for name, points in drawn.items()
        if kinds[name] == "control" and tops
        and min(p.value for p in points if p) > top + 0.25 * max(top, 0.1)
    }  # fmt: skip
    drawn = {name: points for name, points in drawn.items() if name not in beyond}

    figure, axes = _axes(right=0.76)
    ends: list[tuple[float, float, str, Look]] = []
    for name in sorted(drawn, key=lambda name: (looks[name].featured, -list(drawn).index(name))):
        look, points = looks[name], drawn[name]
        x = [i for i, p in enumerate(points) if p]
        found = [p for p in points if p]
        y = [factor * p.value for p in found]
        colour = _ROLES[look.colour]
        if look.featured:
            axes.fill_between(
                x,
                [factor * p.low for p in found],
                [factor * p.high for p in found],
                color=colour, alpha=0.1, linewidth=0,
            )  # fmt: skip
        axes.plot(
            x, y, color=colour, linestyle=look.dashes, linewidth=2.2 if look.featured else 1.3,
            marker=look.marker or "None", markersize=7 if look.marker != "x" else 5,
            markeredgecolor=_ROLES["panel"] if look.featured else colour, markeredgewidth=1,
        )  # fmt: skip
        ends.append((x[-1], y[-1], name, look))
    axes.set_xticks(
        range(len(bins)), [f"{scales(bin)}\n{bin.n:,}" for bin in bins], parse_math=False
    )
    axes.set_xlim(-0.2, len(bins) - 0.8)
    axes.set_xlabel("scale of the target (1 is 28 pixels); below it, how many test images")
    unit = "accuracy, %" if measure == "accuracy" else "correctness"
    _title(axes, f"{unit}, by the target's scale")
    low, high = axes.get_ylim()
    axes.set_ylim(max(0.0, low), min(1.0 * factor, high) if high > factor else high)
    if beyond:
        text = ", ".join(f"{name} {_range(points)}" for name, points in beyond.items())
        axes.text(0.01, 0.985, f"above this axis: {text}", transform=axes.transAxes, va="top",
                  fontsize=11, color=_ROLES["muted"], parse_math=False)  # fmt: skip
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.07 * (high - low))
    _label_ends(axes, ends)
    words = [f"The band is the 95 % interval. {_grey(looks, lines)}".strip(), *_twin_words(twins)]
    return {
        "id": id,
        "title": f"{measure.capitalize()} by the target's scale",
        "svg": _svg(figure, id, f"{measure.capitalize()} by scale: {group.title}",
                    _in_words(lines, bins, factor, digits)),  # fmt: skip
        "caption": " ".join(words),
        "heads": [(scales(bin), f"n {bin.n:,}") for bin in bins],
        "rows": [
            (name, [(number(mean(p), digits, factor), span(p, digits, factor) if p else "")
                    for p in points])
            for name, points in lines.items()
        ],
    }  # fmt: skip


def _cost_chart(group: Group, looks: dict[str, Look], id: str) -> dict[str, Any] | None:
    entries = [
        entry
        for entry in group.entries
        if known(entry.accuracy.value) is not None and (known(entry.train_cost) or 0) > 0
    ]
    if not entries:
        return None
    places = {e.name: ((round(e.train_cost, 3), e.accuracy)) for e in entries}
    drawn, twins = _without_twins(places)
    if len(drawn) < 2:
        return None  # nothing to compare
    figure, axes = _axes(right=0.97)
    costs = [cost for cost, _ in drawn.values()]
    if max(costs) / min(costs) > 4:
        axes.set_xscale("log")
        ticks = [t for t in (0.25, 0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500)
                 if min(costs) / 1.3 <= t <= max(costs) * 1.5]  # fmt: skip
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
    for name in sorted(drawn, key=lambda name: looks[name].featured):
        (cost, estimate), look = drawn[name], looks[name]
        value = 100 * estimate.value
        spread = [[value - 100 * estimate.low], [100 * estimate.high - value]]
        colour = _ROLES[look.colour]
        axes.errorbar(
            [cost], [value], yerr=np.maximum(spread, 0), color=colour, ecolor=colour,
            elinewidth=1.3, capsize=3, capthick=1.3, marker=look.marker or "o",
            markersize=9 if look.featured else 6,
            markeredgecolor=_ROLES["panel"] if look.featured else colour, markeredgewidth=1,
        )  # fmt: skip
    axes.set_xlabel("time of a training, times that of none")
    _title(axes, "accuracy, %, against the cost of training")
    axes.margins(x=0.12, y=0.1)
    low, high = axes.get_ylim()
    axes.set_ylim(max(-2.0, low), min(103.0, high))
    _label_points(axes, [(cost, 100 * e.value, n, looks[n]) for n, (cost, e) in drawn.items()])
    lines = [
        f"{name}: {number(cost, 2)} x none, {number(e.value, 1, 100)} %"
        for name, (cost, e) in places.items()
    ]
    words = ["Bars are 95 % intervals; up and to the left is better.", *_twin_words(twins)]
    return {
        "id": id,
        "title": "Accuracy against the cost of training",
        "svg": _svg(figure, id, f"Accuracy and cost of training: {group.title}", "; ".join(lines)),
        "caption": " ".join(words),
        "heads": [("train cost", "× none"), ("accuracy, %", "95 % interval")],
        "rows": [
            (name, [(number(cost, 2), ""), (number(e.value, 2, 100), span(e, 1, 100))])
            for name, (cost, e) in places.items()
        ],
    }


def _without_twins(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The first of all that lie on the same place, and by its name the others: a method that only
    explains a network has the network's accuracy, and would hide it."""
    first: dict[Any, str] = {}
    twins: dict[str, list[str]] = {}
    for name, value in values.items():
        key = tuple(value) if isinstance(value, list) else value
        if key in first:
            twins.setdefault(first[key], []).append(name)
        else:
            first[key] = name
    return {name: values[name] for name in first.values()}, twins


def _twin_words(twins: dict[str, list[str]]) -> list[str]:
    return [
        f"{_list(names)}: the same place as {name}, not drawn twice."
        for name, names in twins.items()
    ]


def _grey(looks: dict[str, Look], names: Iterable[str]) -> str:
    models = [n for n in names if not looks[n].featured]
    return "Grey: all but the six most accurate models; dashed grey: controls." if models else ""


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _range(points: Sequence[Estimate | None]) -> str:
    values = [p.value for p in points if p]
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _in_words(lines: dict, bins: Sequence, factor: float, digits: int) -> str:
    ends = f"From scale {scales(bins[0])} to scale {scales(bins[-1])}: "
    return ends + "; ".join(
        f"{name} " + ", ".join(number(mean(p), digits, factor) for p in points)
        for name, points in lines.items()
    )


def _axes(right: float):
    """An empty chart. Settings of the user's own matplotlib play no part."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72))
        axes = figure.add_axes((0.075, 0.14, right - 0.075, 0.76))
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_ROLES["muted"])
    axes.grid(axis="y", color=_ROLES["grid"], linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_ROLES["muted"], labelsize=12, length=0, pad=6)
    axes.tick_params(axis="x", length=4, color=_ROLES["muted"])
    axes.xaxis.label.set(color=_ROLES["muted"], size=12)
    return figure, axes


def _title(axes, text: str) -> None:
    axes.set_title(text, loc="left", x=-0.06, size=14, weight="bold", color=_ROLES["ink"], pad=10)


def _label_ends(axes, ends: list[tuple[float, float, str, Look]]) -> None:
    """Each line's name right of its end, moved apart where they would touch."""
    low, high = axes.get_ylim()
    height = _HEIGHT * 0.76
    step = 14.5
    wanted = sorted(((y - low) / (high - low) * height, x, y, n, look) for x, y, n, look in ends)
    spots = _apart([w[0] for w in wanted], step, -8.0, height + 4)
    last = axes.get_xlim()[1]
    for spot, (_, x, y, name, look) in zip(spots, wanted, strict=True):
        colour = _ROLES[look.colour if look.featured else "muted"]
        place = low + spot / height * (high - low)
        # From the point to its name, so that a moved name still belongs to its line.
        axes.plot([x + 0.06, last + 0.10, last + 0.2], [y, place, place], color=colour,
                  linewidth=0.7, alpha=0.8, clip_on=False)  # fmt: skip
        axes.text(last + 0.24, place, _cut(name, 18), va="center", ha="left", fontsize=12,
                  color=colour, parse_math=False,
                  weight="bold" if look.featured else "normal")  # fmt: skip


def _apart(wanted: Sequence[float], step: float, low: float, high: float) -> list[float]:
    """Ascending places at least `step` apart, close to those wanted and, if they fit, in range."""
    step = min(step, (high - low) / max(1, len(wanted) - 1))
    clusters: list[tuple[float, int]] = []  # middle, how many
    for place in wanted:
        clusters.append((place, 1))
        while len(clusters) > 1:
            (a, m), (b, n) = clusters[-2], clusters[-1]
            if b - a >= step * (m + n) / 2:
                break
            clusters[-2:] = [((a * m + b * n) / (m + n), m + n)]
    spots = [c + step * (k - (n - 1) / 2) for c, n in clusters for k in range(n)]
    for i, spot in enumerate(spots):
        spots[i] = max(spot, low + i * step)
    for i in reversed(range(len(spots))):
        spots[i] = min(spots[i], high - (len(spots) - 1 - i) * step)
    return spots


def _label_points(axes, points: list[tuple[float, float, str, Look]]) -> None:
    """Each point's name beside it, where it hides no other point or name; far ones get a line."""
    width, height = _WIDTH * axes.get_position().width, _HEIGHT * axes.get_position().height
    places = [axes.transAxes.inverted().transform(axes.transData.transform((x, y)))
              for x, y, _, _ in points]  # fmt: skip
    dots = [(width * x, height * y) for x, y in places]
    taken = [(x - 6, y - 12, x + 6, y + 12) for x, y in dots]
    order = sorted(range(len(points)), key=lambda i: not points[i][3].featured)
    for i in order:
        (x, y), (_, _, name, look) = dots[i], points[i]
        text = _cut(name, 22)
        long = 7.4 * len(text)
        best, least = None, math.inf
        for far in (0, 14, 28, 42):
            for side, (dx, dy) in enumerate(
                ((1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1))
            ):
                left = x + 10 + 0.6 * far if dx > 0 else x - 10 - 0.6 * far - long if dx < 0 \
                    else x - long / 2  # fmt: skip
                middle = y + dy * ((7 if dx else 20) + far) if dy else y
                if dx and not dy and far:
                    continue
                box = (left, middle - 7, left + long, middle + 7)
                cost = sum(_overlap(box, other) for k, other in enumerate(taken) if k != i)
                cost += 1000 * (box[0] < 0 or box[2] > width + 12 or box[1] < 0 or box[3] > height)
                cost += far + side / 10
                if cost < least:
                    best, least = (box, far, dx), cost
        assert best is not None
        box, far, dx = best
        taken.append(box)
        colour = _ROLES[look.colour if look.featured else "muted"]
        middle = (box[1] + box[3]) / 2
        if far:
            near = min(max(x, box[0] - 2), box[2] + 2)
            axes.plot([x / width, near / width], [y / height, middle / height], color=colour,
                      linewidth=0.7, transform=axes.transAxes, clip_on=False)  # fmt: skip
        # The edge that is next to the point is exact, however wide the letters are.
        align, edge = {1: ("left", box[0]), -1: ("right", box[2])}.get(dx, ("center", x))
        axes.text(edge / width, middle / height, text, transform=axes.transAxes, va="center",
                  ha=align, fontsize=12, color=colour, parse_math=False,
                  weight="bold" if look.featured else "normal")  # fmt: skip


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    return wide * high if wide > 0 and high > 0 else 0.0


def _cut(text: str, length: int) -> str:
    """Shortened in the middle: names that begin alike, as paths do, differ at their end."""
    text = one_line(text)
    start = length // 3
    return text if len(text) <= length else f"{text[:start]}…{text[start + 1 - length :]}"


def _svg(figure, id: str, title: str, description: str) -> Markup:
    """The figure as an SVG element for HTML: roles as CSS variables, ids that occur once a page."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": id})
        warnings.simplefilter("ignore")  # a name may have letters that the font does not
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"\s*<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"<svg[^>]*>", "", text, count=1)
    # In tags only: a model may have a name that looks like an attribute.
    text = re.sub(r"<[^>]*>", lambda match: _for_page(match[0], id), text)
    head = (
        f'<svg role="img" aria-labelledby="{id}-title {id}-desc" '
        f'viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}">'
        f'<title id="{id}-title">{escape(title)}</title>'
        f'<desc id="{id}-desc">{escape(description)}</desc>'
    )
    return Markup(head + text)  # matplotlib escapes what it writes


def _for_page(tag: str, id: str) -> str:
    tag = tag.replace("xlink:href", "href")
    tag = re.sub(r'\bid="', f'id="{id}-', tag)
    tag = re.sub(r'(href="|url\()#', rf"\1#{id}-", tag)
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag)
    tag = re.sub(r"(font: (?:bold |[0-9]+ )?[0-9.]+px) [^;\"]*", r"\1 var(--font)", tag)
    for name, colour in _ROLES.items():
        tag = tag.replace(colour, f"var(--{name})")
    return tag


def swatch(look: Look) -> Markup:
    """The line and the marker of an entry, for the list of names."""
    dashes = "" if look.dashes == "solid" else " ".join(f"{2 * d:g}" for d in look.dashes[1])
    line = (
        f'<line x1="1" y1="8" x2="43" y2="8" stroke="var(--{look.colour})" '
        f'stroke-width="{2.4 if look.featured else 1.4}" stroke-dasharray="{dashes}"/>'
    )
    shapes = {
        "o": '<circle cx="22" cy="8" r="5"/>',
        "s": '<rect x="17.5" y="3.5" width="9" height="9"/>',
        "^": '<path d="M22 2.5 27.5 13H16.5z"/>',
        "v": '<path d="M22 13.5 27.5 3H16.5z"/>',
        "D": '<path d="M22 2 28 8 22 14 16 8z"/>',
        "P": '<path d="M20 2.5h4V6h3.5v4H24v3.5h-4V10h-3.5V6H20z"/>',
        "x": '<path d="M18.5 4.5 25.5 11.5M25.5 4.5 18.5 11.5" stroke-width="1.4"/>',
    }
    edge = look.colour if look.marker == "x" else "panel"
    shape = shapes.get(look.marker, "")
    return Markup(  # of constants only
        f'<svg class="swatch" viewBox="0 0 44 16" aria-hidden="true">{line}'
        f'<g fill="var(--{look.colour})" stroke="var(--{edge})">{shape}</g></svg>'
    )
