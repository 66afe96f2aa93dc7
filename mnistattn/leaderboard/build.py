"""Make a board of results: groups of what may be compared, entries over seeds, ranks with ties."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from mnistattn.evaluation.metrics import SCALE_EDGES, scale_bin
from mnistattn.evaluation.paper import printed
from mnistattn.evaluation.recipes import RECIPES
from mnistattn.evaluation.score import same_mean
from mnistattn.generators.variants import COLORS, DIGITS, VARIANTS, Spec
from mnistattn.leaderboard.board import Bin, Board, Entry, Estimate, Group, Retest
from mnistattn.leaderboard.collect import Submission, is_public
from mnistattn.leaderboard.stats import (
    Pooled,
    estimate,
    holm,
    pooled_seed_variance,
    ranks,
)

LEVEL = 0.05
ENOUGH_SEEDS = 3
MEASURES = {"accuracy": "correct", "correctness": "correctness"}
# Controls are told the answer or look at nothing, and a post-hoc map's answers are those of none:
# they are a scale to read others by, and take nobody's place.
RANKED = {"accuracy": ("model", "plugged"), "correctness": ("model", "plugged", "post-hoc")}


def build(submissions: Iterable[Submission], problems: Sequence[str] = ()) -> Board:
    """The board of all submissions (see collect.collect)."""
    groups: dict[str, list[Submission]] = defaultdict(list)
    for s in submissions:
        groups[s.group].append(s)
    ordered = sorted(groups.items(), key=lambda item: _order(item[1][0].result))
    source = hashlib.sha256()
    for _, members in ordered:
        for s in sorted(members, key=lambda s: (s.name, s.result["seed"])):
            source.update(json.dumps(s.result, sort_keys=True).encode())
            for raw, _ in s.retests:
                source.update(json.dumps(raw, sort_keys=True).encode())
    return Board(
        tuple(_group(key, members) for key, members in ordered),
        tuple(problems),
        source.hexdigest(),
    )


def by_name(submissions: Iterable[Submission]) -> dict[str, list[Submission]]:
    """Submissions of one group by entry, by seed."""
    entries: dict[str, list[Submission]] = defaultdict(list)
    for s in sorted(submissions, key=lambda s: (s.name, s.result["seed"])):
        entries[s.name].append(s)
    return entries


def scores(entry: Sequence[Submission], measure: str) -> np.ndarray | None:
    """(seeds, images) float64 of "accuracy" (0 / 1) or "correctness"; None without attention."""
    column = MEASURES[measure]
    if any(column not in s.samples for s in entry):
        return None
    return np.stack([s.samples[column].astype(np.float64) for s in entry])


def is_ranked(entry: Sequence[Submission], measure: str) -> bool:
    """Whether an entry has a rank, see RANKED."""
    return entry[0].result["kind"] in RANKED[measure]


def pooled(entries: Iterable[Sequence[Submission]], measure: str) -> Pooled | None:
    """The variance between seeds of a group's ranked entries, as stats.pooled_seed_variance has it.
    Controls, which hardly vary, would make it look smaller than it is for what learns."""
    rows = (scores(entry, measure) for entry in entries if is_ranked(entry, measure))
    return pooled_seed_variance([np.nanmean(r, axis=1) for r in rows if r is not None])


def recipe_words(recipe: dict) -> str:
    """A recipe by its name and all that differs from it; epochs and queries always: "fast, 12
    epochs, queries one"."""
    usual = vars(RECIPES[recipe["name"]]) if recipe["name"] in RECIPES else {}
    epochs = f"{recipe['epochs']} epoch{'s' * (recipe['epochs'] > 1)}"
    words = [recipe["name"], epochs, f"queries {recipe['queries']}"]
    for key, value in recipe.items():
        if key not in ("name", "epochs", "queries") and usual.get(key) != value:
            text = f"{value:g}" if isinstance(value, float) else str(value)
            words.append(f"{key.replace('_', ' ')} {text}")
    return ", ".join(words)


def title(result: dict) -> str:
    """A data set in words: "MBG: MNIST digits on textures"."""
    dataset = result["dataset"]
    sources, spec = dataset["sources"], dataset["spec"]
    digits = {"mnist": "MNIST digits", "strokes": "drawn digits"}.get(
        sources["digits"]["source"], "digits"
    )
    under = {
        "black": "on black",
        "patches": "among crops of digits",
        "gaussian": "in noise",
        "textures": "on textures",
    }.get(sources["backgrounds"]["source"], "on photos")
    words = f"{dataset['paper_name']}: {digits} {under}"
    if spec["placement"] != "paper":
        words += f", {spec['placement']} scales"
    digests = dataset["digests"]
    if any(digests.get(k) != v for k, v in result["trained_on"].items()):
        words += ", trained on other data"
    return words


def _order(result: dict) -> tuple:
    dataset = result["dataset"]
    variant = dataset["variant"]
    place = list(VARIANTS).index(variant) if variant in VARIANTS else len(VARIANTS)
    return (not is_public(dataset), place, dataset["digests"]["test"],
            json.dumps(result["recipe"], sort_keys=True), str(result["trained_on"]))  # fmt: skip


def _group(key: str, members: Sequence[Submission]) -> Group:
    members = sorted(members, key=lambda s: (s.name, s.result["seed"]))
    entries = by_name(members)
    first = members[0].result
    place: dict[str, dict[str, int]] = {name: {} for name in entries}
    shared: dict[str, Pooled | None] = {}
    for measure in MEASURES:
        rows = {name: scores(entry, measure) for name, entry in entries.items()}
        rows = {name: r for name, r in rows.items()
                if r is not None and is_ranked(entries[name], measure)}  # fmt: skip
        shared[measure] = pooled(entries.values(), measure)
        found = ranks([r for r in rows.values() if r is not None], shared[measure], LEVEL)
        for name, rank in zip(rows, found, strict=True):
            place[name][measure] = rank
    retests = _retests(entries)
    mixed = len({s.result["cost"].get("precision") for s in members}) > 1
    made = [_entry(name, entry, place[name], shared, retests.get(name), mixed)
            for name, entry in entries.items()]  # fmt: skip
    made.sort(key=lambda e: (-e.accuracy.value, e.name))
    gallery = next((g for g in (s.gallery() for s in members) if g is not None), None)
    queries, answers = _names(first)
    samples = members[0].samples
    shown = len(gallery[0]) if gallery else 0
    return Group(
        key=f"{first['dataset']['variant']}-{key}", title=title(first),
        recipe=recipe_words(first["recipe"]), dataset=first["dataset"],
        public=is_public(first["dataset"]), n=len(samples["correct"]), entries=tuple(made),
        images=gallery[0] if gallery else None, masks=gallery[1] if gallery else None,
        captions=tuple(f"{queries[samples['query'][i]]} -> {answers[samples['answer'][i]]}"
                       for i in range(shown)),
    )  # fmt: skip


def _names(result: dict) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What queries and answers are called, by index."""
    asks_color = VARIANTS[result["dataset"]["variant"]].asks == "color"
    return (COLORS, DIGITS) if asks_color else (DIGITS, COLORS)


def _entry(
    name: str, entry: Sequence[Submission], rank: dict[str, int],
    shared: dict[str, Pooled | None], retest: Retest | None, mixed: bool,
) -> Entry:  # fmt: skip
    raw, samples = entry[0].result, entry[0].samples
    correctness = scores(entry, "correctness")
    costs = [s.result["cost"] for s in entry]
    gallery = samples.get("gallery")
    shown = len(gallery) if gallery is not None else 0
    answers = _names(raw)[1]
    masks = raw["scores"]["masks"]
    return Entry(
        name=name, model=raw["model"], paper_name=raw["paper_name"], kind=raw["kind"],
        summary=raw["summary"], seeds=tuple(s.result["seed"] for s in entry),
        epochs=raw["recipe"]["epochs"], rank=rank,
        accuracy=_estimate(entry, "accuracy", shared),
        correctness=_estimate(entry, "correctness", shared) if correctness is not None else None,
        chance=masks["chance"]["value"] if masks else None,
        bins=tuple(_bins(entry, shared)),
        parameters=costs[0]["parameters"], flops=costs[0]["flops_per_image"],
        train_cost=float(np.median([c["train_times_none"]["median"] for c in costs])),
        inference_cost=float(np.median([c["inference_times_none"]["median"] for c in costs])),
        train_seconds=float(np.median([c["train_seconds"] for c in costs])),
        paper=_paper(raw), code=raw["code"], marks=tuple(_marks(entry, mixed)), retest=retest,
        maps=gallery, correct=samples["correct"][:shown] if shown else None,
        answers=tuple(answers[p] for p in samples["prediction"][:shown]),
    )  # fmt: skip


def _estimate(entry, measure: str, shared, where=slice(None)) -> Estimate:
    """What has no rank, as a control, does not borrow the variance between seeds of what learns."""
    rows = scores(entry, measure)
    assert rows is not None
    return estimate(rows[:, where], shared[measure] if is_ranked(entry, measure) else None)


def _bins(entry: Sequence[Submission], shared) -> Iterable[Bin]:
    """The ranges of scale. The variance between seeds is taken from the bin itself where there are
    three seeds; else the group's, of whole test sets, stands in for it."""
    of = scale_bin(torch.from_numpy(entry[0].samples["scale"])).numpy()
    attends = scores(entry, "correctness") is not None
    for b in range(len(SCALE_EDGES) - 1):
        where = of == b
        n = int(where.sum())
        yield Bin(
            SCALE_EDGES[b], SCALE_EDGES[b + 1], n,
            _estimate(entry, "accuracy", shared, where) if n else None,
            _estimate(entry, "correctness", shared, where) if n and attends else None,
        )  # fmt: skip


def _paper(raw: dict) -> dict[str, float | None]:
    """What the paper prints of this model, where this is the paper's kind of data."""
    sources, spec = raw["dataset"]["sources"], Spec(raw["dataset"]["variant"])
    textures = spec.background == "photo" and sources["backgrounds"]["source"] == "textures"
    same = (
        sources["digits"]["source"] == "mnist"
        and not textures
        and raw["dataset"]["spec"] == spec.as_dict()
    )
    found = printed(raw["dataset"]["variant"], raw["model"], raw["options"]) if same else {}
    return {k: found.get(k) for k in ("accuracy", "correctness")}


def _marks(entry: Sequence[Submission], mixed: bool) -> Iterable[str]:
    """mixed: whether the group's results were computed in several precisions."""
    k = len(entry)
    if k < ENOUGH_SEEDS:
        borrows = is_ranked(entry, "accuracy")
        how = "borrowed from the other models, or unknown" if borrows else "not in the interval"
        yield (f"{k} seed{'s' * (k > 1)} only, of {ENOUGH_SEEDS} that a result wants: the variance "
               f"between trainings is {how}.")  # fmt: skip
    if len({s.result["code"] for s in entry}) > 1:
        yield "Its seeds were run with different versions of the code."
    if mixed:
        used = sorted({s.result["cost"].get("precision") or "" for s in entry})
        words = [p or "a precision that the result does not record" for p in used]
        rest = "" if "" in used else ", which is not known of all rows here"
        yield f"Computed in {' and '.join(words)}{rest}."


def _retests(entries: dict[str, list[Submission]]) -> dict[str, Retest]:
    """Of each entry, the retest that most seeds have; flags corrected over the group (Holm)."""
    found: dict[str, Retest] = {}
    for name, entry in entries.items():
        seeds = [raw["test_seed"] for s in entry for raw, _ in s.retests]
        if not seeds:
            continue
        chosen = max(sorted(set(seeds)), key=seeds.count)
        pairs = [(s, raw, samples) for s in entry for raw, samples in s.retests
                 if raw["test_seed"] == chosen]  # fmt: skip
        here = np.stack([s.samples["correct"] for s, _, _ in pairs]).astype(np.float64)
        there = np.stack([samples["correct"] for _, _, samples in pairs]).astype(np.float64)
        drop = float(there.mean() - here.mean())
        # Two independent test sets, the same checkpoints: images are the only chance here.
        p = same_mean(there.mean(0), here.mean(0))
        maps = [samples["correctness"] for *_, samples in pairs if "correctness" in samples]
        found[name] = Retest(
            accuracy=estimate(there),
            correctness=estimate(np.stack(maps).astype(np.float64))
            if len(maps) == len(pairs) else None,
            test_seed=chosen, n=there.shape[1], drop=drop,
            p=p, flagged=False,
        )  # fmt: skip
    adjusted = holm([r.p for r in found.values()])
    return {
        name: Retest(**{**vars(r), "flagged": bool(p <= LEVEL and r.drop < 0)})
        for (name, r), p in zip(found.items(), adjusted, strict=True)
    }
