"""From results to a board: what is grouped, averaged, ranked, marked and flagged."""

import dataclasses
import importlib.util
import random
from pathlib import Path

import h5py
import numpy as np
import pytest

from mnistattn.generators.variants import COLORS, DIGITS
from mnistattn.leaderboard.board import Board, Entry
from mnistattn.leaderboard.build import build
from mnistattn.leaderboard.collect import collect
from mnistattn.leaderboard.stats import estimate, pooled_seed_variance

_spec = importlib.util.spec_from_file_location(
    "fabricate", Path(__file__).with_name("fabricate.py")
)
assert _spec and _spec.loader
f = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(f)


def collected(root: Path) -> list:
    found, problems = collect([root])
    assert not problems
    return found


def entries_of(root: Path) -> dict[str, Entry]:
    (group,) = build(collected(root)).groups
    return {entry.name: entry for entry in group.entries}


def plain(value):
    """A board as values that == compares."""
    if dataclasses.is_dataclass(value):
        return {k: plain(v) for k, v in vars(value).items()}
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Results that differ in one or more of test set, training data, recipe, model, and seed."""
    root = tmp_path_factory.mktemp("mixed")
    i = 0
    for variant, data in (("mref", 0), ("mref", 1), ("mbg-inv", 0)):
        for recipe in ({}, {"epochs": 1, "lr": 0.01}):
            for trained in (None, {"train": "7" * 64, "val": "8" * 64}):
                for seed in range(1 + i % 2):
                    f.fabricate(root / f"{i}-{seed}", f"m{i}", seed, 0.5 + 0.4 * (i % 7) / 7,
                                n=40, variant=variant, data=data, recipe=recipe,
                                trained_on=trained)  # fmt: skip
                i += 1
                if i % 3 == 0:  # a second model in the group
                    f.fabricate(root / f"{i}-x", f"x{i}", n=40, variant=variant, data=data,
                                recipe=recipe, trained_on=trained)  # fmt: skip
    return root


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    """One group: good and twins with three seeds, few with two, lone (no attention) with one."""
    root = tmp_path_factory.mktemp("three")
    rows = {"ctx": (0.95, 0.96, 0.955), "san": (0.70, 0.72, 0.71), "noctx": (0.705, 0.72, 0.71),
            "arnn": (0.90, 0.88)}  # fmt: skip
    for model, means in rows.items():
        for seed, mean in enumerate(means):
            f.fabricate(root / f"{model}-{seed}", model, seed, mean, 0.2 + mean / 4, digits="mnist")
    f.fabricate(root / "none", "none", 5, 0.4, None, digits="mnist")
    return root


# ------------------------------------------------------------------------------------- groups


def test_a_group_shares_test_set_training_data_and_recipe(mixed):
    submissions = collected(mixed)
    raws = {s.name: s.result for s in submissions}
    board = build(submissions)
    what = {}
    for group in board.groups:
        members = [raws[entry.name] for entry in group.entries]
        shared = {(raw["dataset"]["digests"]["test"], str(raw["trained_on"]), str(raw["recipe"]))
                  for raw in members}  # fmt: skip
        assert len(shared) == 1
        assert group.dataset["digests"]["test"] == next(iter(shared))[0]
        what[next(iter(shared))] = group
    # One group each, nobody lost, and keys that an HTML id may be made of.
    assert len(what) == len(board.groups) == 3 * 2 * 2
    assert sum(len(e.seeds) for g in board.groups for e in g.entries) == len(submissions)
    assert len({group.key for group in board.groups}) == len(board.groups)


def test_groups_say_what_they_are(mixed):
    board = build(collected(mixed))
    heads = {(group.title, group.recipe) for group in board.groups}
    assert ("MREF: drawn digits on black", "fast, 2 epochs, queries fresh") in heads
    assert ("MBG^inv: drawn digits on textures, trained on other data",
            "fast, 1 epoch, queries fresh, lr 0.01") in heads  # fmt: skip
    order = [group.dataset["variant"] for group in board.groups]
    assert order == sorted(order, key=["mref", "mbg-inv"].index)
    assert {group.n for group in board.groups} == {40}


def test_the_order_of_submissions_does_not_matter(mixed, three, tmp_path):
    # A digest may be had from another folder of photos: then the group's own section may differ.
    for i, path in enumerate(("here", "there")):
        photos = {"backgrounds": {"source": "folder", "path": path}}
        f.fabricate(tmp_path / str(i), "ctx", 1 - i, n=40, variant="mbg", sources=photos,
                    digests={s: f.sha(s) for s in ("train", "val", "test")})  # fmt: skip
    submissions = collected(mixed) + collected(three) + collected(tmp_path)
    expected = plain(build(submissions))
    submissions.reverse()
    assert plain(build(submissions)) == expected
    random.Random(0).shuffle(submissions)
    assert plain(build(submissions)) == expected


def test_the_source_changes_with_any_result(tmp_path):
    run = f.fabricate(tmp_path / "a", n=40)
    f.fabricate(tmp_path / "b", "san", n=40)
    sources = [build(collected(tmp_path)).source]
    assert build(collected(tmp_path)).source == sources[0]
    f.edit(run, lambda raw: raw["cost"].update(train_seconds=61.0))
    sources.append(build(collected(tmp_path)).source)
    f.fabricate_retest(run, 0.7)
    sources.append(build(collected(tmp_path)).source)
    f.fabricate(tmp_path / "c", "ctx", 1, n=40)
    sources.append(build(collected(tmp_path)).source)
    assert len(set(sources)) == 4


def test_a_board_of_nothing_is_empty():
    board = build([], ["x is damaged."])
    assert (board.groups, board.problems) == ((), ("x is damaged.",))
    assert isinstance(board, Board)


# ------------------------------------------------------------------------------------- entries


def test_entries_are_means_over_seeds(three):
    submissions, entries = collected(three), entries_of(three)
    for name, entry in entries.items():
        rows = sorted((s for s in submissions if s.name == name), key=lambda s: s.result["seed"])
        assert entry.seeds == tuple(s.result["seed"] for s in rows)
        for measure, column in (("accuracy", "correct"), ("correctness", "correctness")):
            found = getattr(entry, measure)
            if column not in rows[0].samples:
                assert found is None and measure not in entry.rank
                continue
            means = [s.samples[column].astype(np.float64).mean() for s in rows]
            assert found.value == pytest.approx(np.mean(means), abs=1e-12)
            if len(means) == 1:
                assert found.deviation is None
            else:
                assert found.deviation == pytest.approx(np.std(means, ddof=1), abs=1e-12)
            assert found.low < found.value < found.high
    assert entries["none"].chance is None
    area = np.mean(submissions[0].samples["chance"], dtype=np.float64)
    assert entries["ctx"].chance == pytest.approx(area)


def test_fewer_than_three_seeds_borrow_the_variance_of_the_others(three):
    submissions, entry = collected(three), entries_of(three)["none"]
    means: dict[str, list[float]] = {}
    for s in submissions:
        means.setdefault(s.name, []).append(s.samples["correct"].mean())
    pooled = pooled_seed_variance([np.array(m) for m in means.values()])
    (none,) = (s.samples["correct"] for s in submissions if s.name == "none")
    assert entry.accuracy == estimate(none[None].astype(float), pooled)
    alone = estimate(none[None].astype(float))
    assert entry.accuracy.high - entry.accuracy.low > alone.high - alone.low


def test_bins_are_means_of_their_own_images(three):
    submissions, entry = collected(three), entries_of(three)["ctx"]
    rows = [s.samples for s in submissions if s.name == "ctx"]
    scale = rows[0]["scale"]
    assert [(b.low, b.high) for b in entry.bins] == [
        (0.5, 1.0), (1.0, 1.5), (1.5, 2.0), (2.0, 2.5), (2.5, 3.0),
    ]  # fmt: skip
    for b in entry.bins:
        inside = (scale > b.low) & (scale <= b.high)
        assert b.n == inside.sum() > 0
        for found, column in ((b.accuracy, "correct"), (b.correctness, "correctness")):
            expected = np.mean([row[column][inside].astype(np.float64).mean() for row in rows])
            assert found.value == pytest.approx(expected, abs=1e-12)
    assert all(b.correctness is None for b in entries_of(three)["none"].bins)


def test_a_range_of_scales_without_images_has_no_estimate(tmp_path):
    f.forge(f.fabricate(tmp_path / "a", n=40), lambda s: s.update(scale=np.full(40, 1.2, "f4")))
    bins = entries_of(tmp_path)["ctx"].bins
    assert [b.n for b in bins] == [0, 40, 0, 0, 0]
    assert [b.accuracy is None for b in bins] == [True, False, True, True, True]


def test_the_clearly_better_model_is_first_and_equals_share(three):
    entries = entries_of(three)
    assert list(entries) == ["ctx", "arnn", "noctx", "san", "none"]  # by mean
    ranks = {name: entry.rank["accuracy"] for name, entry in entries.items()}
    assert ranks == {"ctx": 1, "arnn": 2, "noctx": 3, "san": 3, "none": 5}
    attention = {n: e.rank["correctness"] for n, e in entries.items() if "correctness" in e.rank}
    assert attention["ctx"] == 1 and attention["noctx"] == attention["san"] > 1
    assert "none" not in attention


def test_controls_take_nobodys_place(tmp_path):
    """Nor do post-hoc maps, but among attentions, as their answers are those of `none`."""
    rows = {"oracle": (1.0, 1.0), "ctx": (0.8, 0.4), "gradcam": (0.4, 0.7), "none": (0.4, None)}
    for model, (mean, correctness) in rows.items():
        f.fabricate(tmp_path / model, model, 0, mean, correctness)
    entries = entries_of(tmp_path)
    assert list(entries)[:2] == ["oracle", "ctx"]
    assert entries["oracle"].rank == {}
    assert entries["ctx"].rank == {"accuracy": 1, "correctness": 2}
    assert entries["gradcam"].rank == {"correctness": 1}
    assert entries["none"].rank == {"accuracy": 2}


def test_steady_controls_do_not_make_trainings_look_steady(three, tmp_path):
    expected = entries_of(three)["none"].accuracy
    for seed in range(3):
        f.fabricate(tmp_path / str(seed), "oracle", seed, 1.0, 1.0, digits="mnist")
    (group,) = build(collected(three) + collected(tmp_path)).groups
    assert {e.name: e for e in group.entries}["none"].accuracy == expected


def test_few_seeds_are_marked(three):
    entries = entries_of(three)
    assert entries["ctx"].marks == entries["san"].marks == ()
    (two,), (one,) = entries["arnn"].marks, entries["none"].marks
    assert two.startswith("2 seeds only, of 3") and one.startswith("1 seed only, of 3")


def test_other_code_between_seeds_is_marked(tmp_path):
    for seed in range(3):
        f.fabricate(tmp_path / f"a{seed}", "ctx", seed, n=40, code=f.sha(str(seed // 2)))
        f.fabricate(tmp_path / f"b{seed}", "san", seed, n=40)
    entries = entries_of(tmp_path)
    assert entries["ctx"].marks == ("Its seeds were run with different versions of the code.",)
    assert entries["san"].marks == ()


def test_a_mix_of_precisions_is_marked(tmp_path):
    for seed in range(3):
        narrow = {"precision": "float32" if seed == 2 else "bfloat16"}
        f.fabricate(tmp_path / f"a{seed}", "ctx", seed, n=40, cost={"precision": "bfloat16"})
        f.fabricate(tmp_path / f"b{seed}", "san", seed, n=40, cost=narrow)
        f.fabricate(tmp_path / f"c{seed}", "noctx", seed, n=40)
        f.fabricate(tmp_path / f"d{seed}", "ctx", seed, variant="mdist", n=40)  # one: no mark
    mixed, other = sorted(build(collected(tmp_path)).groups, key=lambda group: -len(group.entries))
    assert [e.marks for e in other.entries] == [()]
    assert {e.name: e.marks for e in mixed.entries} == {
        "ctx": ("Computed in bfloat16, which is not known of all rows here.",),
        "san": ("Computed in bfloat16 and float32, which is not known of all rows here.",),
        "noctx": ("Computed in a precision that the result does not record.",),
    }


def test_options_make_another_entry(tmp_path):
    f.fabricate(tmp_path / "a", "arnn", n=40)
    f.fabricate(tmp_path / "b", "arnn", n=40, changed_options={"hidden": 8})
    assert set(entries_of(tmp_path)) == {"arnn", "arnn hidden=8"}


def test_costs_are_medians_over_seeds(tmp_path):
    for seed, times in enumerate((1.0, 9.0, 2.0)):
        ratio = {"median": times, "min": 0.5, "max": 10.0, "rounds": 7}
        more = {"median": 10 * times, "min": 0.5, "max": 99.0, "rounds": 7}
        f.fabricate(tmp_path / str(seed), "ctx", seed, n=40,
                    cost={"train_times_none": more, "inference_times_none": ratio,
                          "train_seconds": 100 * times})  # fmt: skip
    entry = entries_of(tmp_path)["ctx"]
    assert (entry.train_cost, entry.inference_cost, entry.train_seconds) == (20, 2, 200)
    assert (entry.parameters, entry.flops) == (1000, 2_000_000)


@pytest.mark.parametrize("variant", ["mref", "mbg-inv"])
def test_the_gallery_is_shown_with_questions_and_answers(tmp_path, variant):
    runs = [f.fabricate(tmp_path / str(i), "ctx", i, 0.5, n=40, variant=variant) for i in (0, 1)]
    (runs[0] / "gallery.h5").unlink()  # another result of the group has it, too
    f.fabricate(tmp_path / "none", "none", 0, 0.5, None, n=40, variant=variant)
    (group,) = build(collected(tmp_path)).groups
    with h5py.File(runs[1] / "gallery.h5") as h5:
        assert np.array_equal(group.images, h5["image"][()])
        assert np.array_equal(group.masks, h5["mask"][()]) and group.masks.dtype == bool
    asked, said = (DIGITS, COLORS) if variant == "mref" else (COLORS, DIGITS)
    samples, shown = f.samples_of(runs[0]), range(f.GALLERY)
    assert group.captions == tuple(
        f"{asked[samples['query'][i]]} -> {said[samples['answer'][i]]}" for i in shown
    )
    entry, none = (next(e for e in group.entries if e.name == n) for n in ("ctx", "none"))
    assert np.array_equal(entry.maps, samples["gallery"])
    assert np.array_equal(entry.correct, samples["correct"][: f.GALLERY])
    assert entry.answers == tuple(said[samples["prediction"][i]] for i in shown)
    for i in shown:
        assert entry.correct[i] == (group.captions[i].endswith(f"-> {entry.answers[i]}"))
    assert none.maps is None and none.answers == ()


@pytest.mark.parametrize(
    ("request_", "accuracy"),
    [
        ({"model": "san", "digits": "mnist"}, 83.42),
        ({"model": "san", "digits": "strokes"}, None),
        ({"model": "ctx", "digits": "mnist"}, None),  # nothing is printed
        ({"model": "noctx", "variant": "mdist", "digits": "mnist"}, 89.92),
        ({"model": "noctx", "variant": "mdist", "digits": "mnist", "backgrounds": "gaussian",
          "spec": {"distractors": "gaussian"}}, None),
        ({"model": "ctx", "variant": "mbg", "digits": "mnist"}, None),  # on textures
        ({"model": "ctx", "variant": "mbg", "digits": "mnist", "backgrounds": "sun397"}, 79.0),
        ({"model": "ctx", "variant": "mbg", "digits": "mnist", "backgrounds": "folder"}, 79.0),
        ({"model": "ctx", "variant": "mbg", "digits": "mnist", "backgrounds": "folder",
          "spec": {"placement": "balanced"}}, None),
    ],
    ids=str,
)  # fmt: skip
def test_the_papers_numbers_stand_on_the_papers_kind_of_data(tmp_path, request_, accuracy):
    f.fabricate(tmp_path / "a", n=40, **request_)
    (entry,) = entries_of(tmp_path).values()
    assert entry.paper["accuracy"] == accuracy
    assert entry.paper["correctness"] == (0.31 if accuracy == 79.0 else None)


# ------------------------------------------------------------------------------------- retests


def test_a_true_drop_is_flagged_and_chance_is_not(tmp_path):
    rows = {"ctx": (0.8, 0.6), "san": (0.8, 0.79), "noctx": (0.6, 0.8), "arnn": (0.8, None)}
    for model, (here, there) in rows.items():
        run = f.fabricate(tmp_path / model, model, 0, here)
        if there is not None:
            f.fabricate_retest(run, there)
    entries = entries_of(tmp_path)
    assert entries["arnn"].retest is None
    for model, (here, there) in rows.items():
        if there is None:
            continue
        again = entries[model].retest
        assert again.accuracy.value == pytest.approx(there)
        assert again.drop == pytest.approx(there - here)
        assert (again.test_seed, again.n) == (1001, 400)
        assert again.flagged == (model == "ctx")
    assert entries["noctx"].retest.p < 0.001  # a gain is beyond chance too, but no fault
    assert entries["san"].retest.p > 0.5
    assert entries["ctx"].retest.correctness.value == pytest.approx(0.3, abs=0.02)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("there", "p"), [(1.0, 1.0), (0.0, 0.0)])
def test_a_model_that_is_always_right_is_no_special_case(tmp_path, there, p):
    f.fabricate_retest(f.fabricate(tmp_path / "a", "oracle", 0, 1.0, n=40), there)
    again = entries_of(tmp_path)["oracle"].retest
    assert (again.p, again.flagged) == (p, there == 0.0)


def test_flags_are_corrected_for_their_number(tmp_path):
    """p is some 0.03: a drop beyond chance where it is alone, but not among four."""
    run = f.fabricate(tmp_path / "one" / "ctx", "ctx", 0, 0.8)
    f.fabricate_retest(run, 0.735)
    alone = entries_of(tmp_path / "one")["ctx"].retest
    assert 0.0125 < alone.p < 0.05 and alone.flagged
    for model in ("san", "noctx", "arnn"):
        f.fabricate_retest(f.fabricate(tmp_path / "one" / model, model, 0, 0.8), 0.8)
    among = entries_of(tmp_path / "one")["ctx"].retest
    assert among.p == alone.p and not among.flagged


def test_a_retest_is_a_mean_over_the_seeds_that_have_it(tmp_path):
    for seed, there in enumerate((0.7, 0.76, None)):
        run = f.fabricate(tmp_path / str(seed), "ctx", seed, 0.8 + 0.02 * seed)
        if there:
            f.fabricate_retest(run, there)
        else:
            f.fabricate_retest(run, 0.1, test_seed=5)  # of another test set: not among them
    again = entries_of(tmp_path)["ctx"].retest
    assert again.test_seed == 1001
    assert again.accuracy.value == pytest.approx(0.73)
    assert again.accuracy.deviation == pytest.approx(np.std([0.7, 0.76], ddof=1))
    assert again.drop == pytest.approx(0.73 - 0.81)


def test_a_retest_of_a_model_without_attention_has_accuracy_alone(tmp_path):
    f.fabricate_retest(f.fabricate(tmp_path / "a", "none", 0, 0.5, None, n=40), 0.4)
    again = entries_of(tmp_path)["none"].retest
    assert again.correctness is None and again.accuracy.value == pytest.approx(0.4)
