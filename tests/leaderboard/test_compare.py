"""Two models over the same images: the right test, the right winner, and words that fit them."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from mnistattn.errors import InputError
from mnistattn.leaderboard.collect import Submission, read_submission
from mnistattn.leaderboard.compare import Comparison, compare, table
from mnistattn.leaderboard.stats import (
    difference,
    holm,
    mcnemar,
    paired_bootstrap,
    pooled_seed_variance,
)

_spec = importlib.util.spec_from_file_location(
    "fabricate", Path(__file__).with_name("fabricate.py")
)
assert _spec and _spec.loader
f = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(f)

EDGES = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
ROWS = {  # model: (accuracy of each seed, correctness)
    "ctx": ((0.90, 0.91, 0.89), 0.4),
    "san": ((0.70, 0.72, 0.74), 0.3),
    "noctx": ((0.705, 0.73), 0.3),
    "shaky": ((0.60, 0.72, 0.84), 0.3),
    "none": ((0.5,), None),
}


@pytest.fixture(scope="module")
def entries(tmp_path_factory) -> dict[str, list[Submission]]:
    root = tmp_path_factory.mktemp("runs")
    return {
        model: [
            read_submission(f.fabricate(root / f"{model}-{seed}", model, seed, mean, correctness))
            for seed, mean in enumerate(means)
        ]
        for model, (means, correctness) in ROWS.items()
    }


def one(entries, model: str, seed: int = 0) -> list[Submission]:
    return [entries[model][seed]]


def stack(submissions, column: str = "correct") -> np.ndarray:
    return np.stack([s.samples[column].astype(np.float64) for s in submissions])


def winner(comparison: Comparison) -> str | None:
    """The model that the first sentence calls better, if any."""
    if "neither is shown to be better" in comparison.sentence:
        return None
    assert "points more" in comparison.sentence
    return comparison.sentence.split(" is right on")[0]


# ------------------------------------------------------------------------------------ one seed


def test_one_seed_each_is_tested_image_by_image(entries):
    a, b = one(entries, "ctx"), one(entries, "san")
    found = compare(a, b, [entries["shaky"]])  # others' seeds say nothing about two checkpoints
    assert found.tests == ("McNemar's exact test", "paired bootstrap, 10,000 resamples")
    right = [s.samples["correct"] for s in (*a, *b)]
    head = found.accuracy[0]
    assert (head.where, head.n, head.a, head.b) == ("all", 400, 0.9, 0.7)
    assert head.difference.p == mcnemar(*right)
    assert head.difference.value == pytest.approx(0.2)
    shares = [s.samples["correctness"].astype(np.float64) for s in (*a, *b)]
    maps = found.correctness[0].difference
    assert (maps.low, maps.high, maps.p) == paired_bootstrap(shares[0] - shares[1])
    assert maps.value == pytest.approx((shares[0] - shares[1]).mean())
    assert any("One training each" in note for note in found.notes)


def test_bins_are_tested_apart_and_corrected_for_their_number(entries):
    """p of some 0.03 in one bin of five is no finding."""
    a, b = one(entries, "ctx"), one(entries, "san")
    found = compare(a, b)
    scale = a[0].samples["scale"]
    raw = []
    for row, low, high in zip(found.accuracy[1:], EDGES, EDGES[1:], strict=False):
        inside = (scale > low) & (scale <= high)
        ours, theirs = (s.samples["correct"][inside] for s in (*a, *b))
        assert (row.where.strip(), row.n) == (f"{low:g} to {high:g}", inside.sum())
        assert (row.a, row.b) == (pytest.approx(ours.mean()), pytest.approx(theirs.mean()))
        raw.append(mcnemar(ours, theirs))
    assert [row.difference.p for row in found.accuracy[1:]] == holm(raw)
    assert holm(raw) != raw


def test_images_that_no_correctness_is_defined_on_are_dropped(entries, tmp_path):
    pair = []
    for model in ("ctx", "san"):
        run = f.fabricate(tmp_path / model, model, n=40)
        f.forge(run, lambda s: s["correctness"].__setitem__(slice(0, 5), np.nan))
        pair.append([read_submission(run)])
    found = compare(*pair)
    assert (found.accuracy[0].n, found.correctness[0].n) == (40, 35)
    expected = [np.nanmean(p[0].samples["correctness"], dtype=np.float64) for p in pair]
    assert [found.correctness[0].a, found.correctness[0].b] == pytest.approx(expected)


# -------------------------------------------------------------------------------- several seeds


def test_several_seeds_count_both_sources_of_chance(entries):
    a, b = entries["ctx"], entries["san"]
    found = compare(a, b)
    means = [stack(e).mean(1) for e in (a, b)]
    assert found.accuracy[0].difference == difference(
        stack(a), stack(b), pooled_seed_variance(means)
    )
    assert found.tests == ("t-test over images and seeds",) * 2
    assert not found.notes
    # Seeds that shake make the same mean difference unsure, which no test on images alone sees.
    steady, shaky = compare(a, b).accuracy[0], compare(a, entries["shaky"]).accuracy[0]
    assert steady.b == pytest.approx(shaky.b) == pytest.approx(0.72)
    assert steady.difference.p < 1e-4 < 0.05 < shaky.difference.p
    images = difference(stack(a).mean(0)[None], stack(entries["shaky"]).mean(0)[None])
    assert images.p < 1e-4


def test_two_seeds_borrow_the_variance_of_the_board(entries):
    a, b, others = entries["noctx"], entries["ctx"][:1], [entries["shaky"]]
    means = [stack(e).mean(1) for e in (*others, a, b)]
    expected = difference(stack(a), stack(b), pooled_seed_variance(means))
    found = compare(a, b, others).accuracy[0].difference
    assert found == expected
    assert found.p > compare(a, b).accuracy[0].difference.p


# ------------------------------------------------------------------------------------- symmetry


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("pair", [("ctx", "san"), ("san", "shaky"), ("san", "noctx")])
def test_swapping_the_two_says_the_same(entries, pair, seeds):
    a, b = (entries[name][:seeds] for name in pair)
    one_way, other_way = compare(a, b), compare(b, a)
    assert (one_way.a, one_way.b) == (other_way.b, other_way.a) == pair
    for measure in ("accuracy", "correctness"):
        rows = zip(getattr(one_way, measure), getattr(other_way, measure), strict=True)
        for x, y in rows:
            assert (x.where, x.n, x.a, x.b) == (y.where, y.n, y.b, y.a)
            d, e = x.difference, y.difference
            assert d.p == pytest.approx(e.p)
            assert (d.value, d.low, d.high) == pytest.approx((-e.value, -e.high, -e.low))
    assert winner(one_way) == winner(other_way)
    if winner(one_way):  # then the sentence on accuracy is the same, word for word
        end = "(p"
        assert one_way.sentence.split(end)[0] == other_way.sentence.split(end)[0]


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_model_against_itself_is_no_better(entries, seeds):
    a = entries["ctx"][:seeds]
    found = compare(a, a)
    for row in (*found.accuracy, *found.correctness):
        assert row.difference.value == 0 and row.difference.p == 1
    assert winner(found) is None
    assert "In no single scale bin" in found.sentence
    assert "no difference beyond chance" in found.sentence


def test_two_seeds_of_a_model_are_told_apart(entries):
    found = compare(one(entries, "ctx", 0), one(entries, "ctx", 2))
    assert (found.a, found.b) == ("ctx (seed 0)", "ctx (seed 2)")
    more = compare(entries["ctx"][:1], entries["ctx"])
    assert (more.a, more.b) == ("ctx (seed 0)", "ctx (seeds 0, 1, 2)")
    assert "ctx (seed 0) is right on" in found.sentence


# --------------------------------------------------------------------------------- what it says


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_sentence_names_the_better_one_with_interval_and_n(entries, seeds):
    found = compare(entries["san"][:seeds], entries["ctx"][:seeds])
    head = found.accuracy[0]
    d = head.difference
    assert d.value < 0 and winner(found) == "ctx"
    assert found.sentence.startswith(
        f"ctx is right on 90.0 % of 400 images and san on {100 * head.a:.1f} %: "
        f"{-100 * d.value:.1f} points more (95 % interval {-100 * d.high:.1f} to "
        f"{-100 * d.low:.1f}), which chance alone would hardly give (p < 0.0001)."
    )
    m = found.correctness[0]
    assert (
        f"Of its attention, san puts {100 * m.a:.1f} % on the target and ctx {100 * m.b:.1f} %: a "
        "difference beyond chance" in found.sentence
    )


def test_the_sentence_names_the_bins_that_are_ahead(entries):
    found = compare(one(entries, "ctx"), one(entries, "san"))
    sure = [r.where.strip() for r in found.accuracy[1:] if r.difference.p <= 0.05]
    assert 0 < len(sure) < 5
    bins = f"bin{'s' * (len(sure) > 1)} {', '.join(sure)}"
    assert f"By scale, ctx in the scale {bins} (of 5) is ahead" in found.sentence


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_difference_within_chance_shows_no_winner(entries, seeds):
    found = compare(entries["san"][:seeds], entries["noctx"][:seeds])
    d = found.accuracy[0].difference
    assert d.value != 0 and d.p > 0.05
    assert "so neither is shown to be better" in found.sentence
    assert f"95 % interval {100 * d.low:+.1f} to {100 * d.high:+.1f}, p {d.p:.3f}" in found.sentence


def test_other_test_images_are_refused(entries, tmp_path):
    other = read_submission(f.fabricate(tmp_path / "other", "san", data=1))
    fewer = read_submission(f.fabricate(tmp_path / "fewer", "san", n=40))
    for s in (other, fewer):
        for pair in (([s], one(entries, "ctx")), (one(entries, "ctx"), [s])):
            with pytest.raises(InputError, match="are not over the same test images: no paired"):
                compare(*pair)
    with pytest.raises(InputError, match="not over the same test images"):
        compare(entries["ctx"], [*entries["san"], other])


def test_without_attention_only_the_accuracy_is_compared(entries):
    for pair in (("ctx", "none"), ("none", "ctx")):
        found = compare(*(one(entries, name) for name in pair))
        assert found.correctness == ()
        assert winner(found) == "ctx"
        assert "attention" not in found.sentence
        assert "correctness: not both have attention maps" in table(found)


def test_other_recipes_are_noted(entries, tmp_path):
    longer = read_submission(f.fabricate(tmp_path / "a", "san", recipe={"epochs": 9}))
    (note, _) = compare(one(entries, "ctx"), [longer]).notes
    assert "not trained alike" in note
    assert "fast, 2 epochs, queries fresh; and fast, 9 epochs, queries fresh" in note
    alike = compare(one(entries, "ctx"), one(entries, "san")).notes
    assert not any("not trained alike" in note for note in alike)


def test_the_table_has_a_row_a_bin(entries, tmp_path):
    found = compare(one(entries, "ctx"), one(entries, "san"))
    lines = table(found).splitlines()
    starts = [line[:16].strip() for line in lines]
    expected = ["all", *(f"{a:g} to {b:g}" for a, b in zip(EDGES, EDGES[1:], strict=False))]
    at = [i for i, start in enumerate(starts) if start == "all"]
    assert len(at) == 2
    for i in at:
        assert starts[i : i + 6] == expected
    head = lines[at[0]].split()
    assert head[:5] == ["all", "400", "90.00", "70.00", "+20.00"]
    assert head[-2:] == ["<", "0.0001"]
    assert lines[-1] == found.sentence
    assert all(note in lines for note in found.notes)


def test_a_bin_without_images_has_dashes(tmp_path):
    pair = []
    for model in ("ctx", "san"):
        run = f.fabricate(tmp_path / model, model, n=40)
        f.forge(run, lambda s: s.update(scale=np.full(40, 1.2, "f4")))
        pair.append([read_submission(run)])
    found = compare(*pair)
    assert [row.difference is None for row in found.accuracy] == [False, True, False] + [True] * 3
    assert [line.split() for line in table(found).splitlines()[2:3]] == [
        ["0.5", "to", "1", "0", "-", "-"]
    ]
    assert found.accuracy[2].difference.p == found.accuracy[0].difference.p  # one bin: no more
