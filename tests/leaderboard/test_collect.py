"""Which results may stand on a board: each rule broken alone leaves out just that file."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mnistattn.errors import InputError, MnistattnError
from mnistattn.leaderboard.build import build
from mnistattn.leaderboard.collect import add, collect, read_submission

_spec = importlib.util.spec_from_file_location(
    "fabricate", Path(__file__).with_name("fabricate.py")
)
assert _spec and _spec.loader
f = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(f)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Three results of one group, each with its data set's card. Copy it, never change it."""
    root = tmp_path_factory.mktemp("made")
    for name, model, seed in (("a", "ctx", 0), ("b", "ctx", 1), ("c", "san", 0)):
        f.write_card(f.fabricate(root / name, model, seed, n=60))
    return root


@pytest.fixture
def board(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "board"))


def names(submissions) -> list[str]:
    return [s.file.parent.name for s in submissions]


def replace(run: Path, **options) -> None:
    shutil.rmtree(run)
    f.fabricate(run, n=60, **options)


# ------------------------------------------------------------------------------- what may stand


@pytest.mark.parametrize("public", [False, True])
def test_good_results_are_all_collected(board, public):
    found, problems = collect([board], public)
    assert (names(found), problems) == (["a", "b", "c"], [])
    assert [s.name for s in found] == ["ctx", "ctx", "san"]
    assert len({s.group for s in found}) == 1
    for s in found:
        kept = f.samples_of(s.file.parent)
        assert set(s.samples) == set(kept)
        assert all(np.array_equal(s.samples[k], kept[k]) for k in kept)


def test_a_folder_a_run_and_a_file_give_the_same(board):
    for place in (board / "a", board / "a" / "result.json"):
        (found,), problems = collect([place])
        assert (found.file, problems) == (board / "a" / "result.json", [])


def test_options_that_are_not_the_defaults_are_in_the_name(tmp_path):
    f.fabricate(tmp_path / "a", "arnn", changed_options={"hidden": 8, "sigma": "exp"}, n=60)
    assert read_submission(tmp_path / "a").name == "arnn hidden=8 sigma=exp"


def test_other_json_files_are_no_results_and_no_problem(board):
    for file in ("curve.json", "dataset.json", "notes.json", ".result.json.partial", ".x.json"):
        (board / "a" / file).write_text('[{"epoch": 1}]')
    (board / "curve.json").write_text("[{")
    assert collect([board])[1] == []
    assert names(collect([board])[0]) == ["a", "b", "c"]


@pytest.mark.parametrize(("name", "words"), [("x", "holds no results"), ("y", "does not exist")])
def test_an_empty_or_missing_folder_is_a_sentence(board, tmp_path, name, words):
    (tmp_path / "x").mkdir()
    found, problems = collect([tmp_path / name, board])
    assert names(found) == ["a", "b", "c"]
    assert problems == [f"{tmp_path / name} {words}: 'mnistattn evaluate' makes some."]


def test_the_same_result_in_two_folders_counts_once(board, tmp_path):
    f.fabricate_retest(board / "b", 0.5)
    shutil.copytree(board, tmp_path / "copy")
    found, problems = collect([board, tmp_path / "copy", board / "a"])
    assert (names(found), problems) == (["a", "b", "c"], [])
    assert [len(s.retests) for s in found] == [0, 1, 0]


# --------------------------------------------------------------------------- what may not stand


def set_accuracy(raw: dict) -> None:
    raw["scores"]["accuracy"]["value"] += 0.01


def set_bin(raw: dict) -> None:
    raw["scores"]["scales"][2]["correctness"]["value"] += 1e-6


def drop_masks(raw: dict) -> None:
    raw["scores"]["masks"], raw["scores"]["layers"] = None, []


def more_right(samples: dict) -> None:
    samples["correct"][np.flatnonzero(~samples["correct"])[:3]] = True


def other_truth(samples: dict) -> None:
    samples["query"][7] = (samples["query"][7] + 1) % 10


def other_scale(samples: dict) -> None:
    samples["scale"][7] += 1e-6


def shorter(samples: dict) -> None:
    samples["prediction"] = samples["prediction"][:-1]


def beyond_one(samples: dict) -> None:
    samples["correctness"][:2] = (-1.0, 1.5)


def sixth_colour(samples: dict) -> None:
    wrong = np.flatnonzero(~samples["correct"])[0]
    samples["prediction"][wrong] = 7


def as_numbers(samples: dict) -> None:
    samples["correct"] = samples["correct"].astype(np.float32)


def flip(file: Path, at: int = -100) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-30])


RESULT, SAMPLES = "b/result.json", "b/samples.h5"
BROKEN = {
    "truncated": (lambda b: cut(b / "result.json"), RESULT, "no whole JSON file"),
    "empty": (lambda b: (b / "result.json").write_text(""), RESULT, "no whole JSON file"),
    "older": (lambda b: f.edit(b, lambda r: r.update(result_version=1)), RESULT,
              "has an older schema (1; this mnistattn reads 2)"),
    "newer": (lambda b: f.edit(b, lambda r: r.update(result_version=99)), RESULT, "another schema"),
    "extra": (lambda b: f.edit(b, lambda r: r["cost"].update(price=1)), RESULT, "'cost.price'"),
    "missing": (lambda b: f.edit(b, lambda r: r.pop("seed")), RESULT, "schema at 'seed'"),
    "text": (lambda b: f.edit(b, lambda r: r.update(seed="0")), RESULT, "schema at 'seed'"),
    "NaN": (lambda b: f.edit(b, lambda r: r["scores"]["accuracy"].update(value=float("nan"))),
            RESULT, "'scores.accuracy.value'"),
    "elsewhere": (lambda b: f.edit(b, lambda r: r["samples"].update(file="../a/samples.h5")),
                  RESULT, "'samples.file'"),
    "no samples": (lambda b: (b / "samples.h5").unlink(), SAMPLES, "is missing"),
    "flipped": (lambda b: flip(b / "samples.h5"), SAMPLES, "its SHA-256 differs"),
    "short": (lambda b: cut(b / "samples.h5"), SAMPLES, "its SHA-256 differs"),
    "no HDF5": (lambda b: ((b / "samples.h5").write_text("text"), f.edit(b, lambda r: r[
        "samples"].update(sha256=f.sha("text")))), SAMPLES, "damaged or no HDF5 file"),
    "accuracy": (lambda b: f.edit(b, set_accuracy), RESULT, "scores.accuracy.value says"),
    "bin": (lambda b: f.edit(b, set_bin), RESULT, "scores.scales[2].correctness.value says"),
    "no masks": (lambda b: f.edit(b, drop_masks), RESULT, "scores.layers says []"),
    "correct": (lambda b: f.forge(b, more_right), RESULT, "3 samples are marked against their own"),
    "old scores": (lambda b: f.forge(b, more_right, scores=False), RESULT, "scores.accuracy.high"),
    "no answers": (lambda b: f.forge(b, lambda s: s.pop("prediction")), RESULT, "lacks prediction"),
    "no queries": (lambda b: f.forge(b, lambda s: s.pop("query")), RESULT, "lacks query"),
    "short column": (lambda b: f.forge(b, shorter), RESULT, "not one value an image"),
    "numbers": (lambda b: f.forge(b, as_numbers), RESULT, "not one value an image"),
    "beyond": (lambda b: f.forge(b, beyond_one), RESULT, "correctness outside 0 .. 1"),
    "answer 7": (lambda b: f.forge(b, sixth_colour), RESULT, "answers beyond the 5"),
    "variant": (lambda b: f.edit(b, lambda r: r["dataset"].update(variant="coco")), RESULT,
                "does not say what the data set is made of"),
    "sources": (lambda b: f.edit(b, lambda r: r["dataset"]["sources"].clear()), RESULT,
                "does not say what the data set is made of"),
    "truth": (lambda b: f.forge(b, other_truth), RESULT, "other queries"),
    "scale": (lambda b: f.forge(b, other_scale), RESULT, "other queries, answers or scales"),
    "truth of other data": (lambda b: replace(b, seed=1, truth=9), RESULT, "other queries"),
    "other count": (lambda b: replace(b, seed=1, digests=f.result_of(b.parent / "a")["dataset"][
        "digests"], data=0, truth=1), RESULT, "other queries"),
    "twice": (lambda b: replace(b, accuracy=0.7), RESULT, "and seed of", "a/result.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_leaves_out_that_file_alone(board, name):
    damage, file, *words = BROKEN[name]
    damage(board / "b")
    found, problems = collect([board])
    assert names(found) == ["a", "c"]
    (problem,) = problems
    assert problem.startswith(f"{board / file}")
    assert problem.endswith(".") and "\n" not in problem
    for word in words:
        assert word in problem
    assert len(build(found, problems).groups) == 1
    if name not in ("truth", "scale", "truth of other data", "other count", "twice"):
        with pytest.raises(InputError) as caught:
            read_submission(board / "b")
        assert str(caught.value) == problem


@pytest.mark.parametrize(("first", "second"), [("plugged", "plugged"), ("plugged", "model"),
                                               ("model", "plugged")])  # fmt: skip
def test_one_plugged_name_with_two_codes_is_refused(board, first, second):
    """Whichever comes first: "Mine" and Mine would otherwise be seeds of one entry."""
    for name, kind, seed in (("d", first, 0), ("e", second, 1)):
        f.fabricate(board / name, "Mine", seed, kind=kind, code=f.sha(name), n=60)
    found, problems = collect([board])
    assert names(found) == ["a", "b", "c", "d"]
    (problem,) = problems
    assert str(board / "e") in problem and "both named Mine, of different code" in problem


def test_seeds_of_one_code_and_new_code_of_the_package_are_fine(board):
    for name, model, seed, code in (("d", "Mine", 0, "1"), ("e", "Mine", 1, "1"),
                                    ("f", "ctx", 2, "2")):  # fmt: skip
        f.fabricate(board / name, model, seed, code=f.sha(code), n=60)
    found, problems = collect([board])
    assert (names(found), problems) == (list("abcdef"), [])


def test_several_right_answers_are_not_held_against_one(tmp_path):
    """In mbg-multi an image may be right though another colour is the answer that was drawn."""
    for variant in ("mbg", "mbg-multi"):
        f.forge(f.fabricate(tmp_path / variant, variant=variant, n=60), more_right)
    found, problems = collect([tmp_path])
    assert names(found) == ["mbg-multi"]
    assert len(problems) == 1 and "against their own answer" in problems[0]


# ------------------------------------------------------------------------------ a public board


def test_photos_stay_off_a_public_board(board):
    shutil.rmtree(board / "b")
    photos = {"backgrounds": {"source": "folder", "path": "/home/me/photos"}}
    f.write_card(f.fabricate(board / "b", variant="mbg", sources=photos, n=60))
    assert names(collect([board])[0]) == ["a", "b", "c"]
    found, problems = collect([board], public=True)
    assert names(found) == ["a", "c"]
    assert problems == [
        f"{board / RESULT} is on photos of one's own, which nobody else can remake: not for a "
        "public board."
    ]


@pytest.mark.parametrize("card", [None, "{", "[]", '{"digests": {"test": "0"}}'])
def test_data_without_a_card_stay_off_a_public_board(board, card):
    (board / "b" / "dataset.json").unlink()
    if card:
        (board / "b" / "dataset.json").write_text(card)
    found, problems = collect([board], public=True)
    assert names(found) == ["a", "c"]
    digest = f.result_of(board / "b")["dataset"]["digests"]["test"]
    assert problems == [
        f"{board / RESULT} is on a data set of an unknown digest ({digest[:16]}): no dataset.json "
        "beside it has it."
    ]
    assert names(collect([board])[0]) == ["a", "b", "c"]


# ---------------------------------------------------------------------------------- its retests


def test_a_retest_goes_with_its_result(board):
    f.fabricate_retest(board / "b", 0.7)
    f.fabricate_retest(board / "b", 0.6, test_seed=7)
    for found, problems in (collect([board]), ([read_submission(board / "b")], [])):
        (b,) = (s for s in found if s.file.parent.name == "b")
        assert sorted(raw["test_seed"] for raw, _ in b.retests) == [7, 1001]
        assert all(len(samples["correct"]) == 60 for _, samples in b.retests)
        assert not problems


def test_a_retest_of_no_result_is_named(board):
    f.fabricate_retest(board / "b", 0.7)
    (board / "b" / "result.json").unlink()
    found, problems = collect([board])
    assert names(found) == ["a", "c"]
    assert problems == [f"{board}/b/result.retest-1001.json is the retest of no result here."]


def test_a_retest_is_no_result(board):
    with pytest.raises(InputError, match="is a retest: give the result that it is of"):
        read_submission(f.fabricate_retest(board / "b", 0.7))


@pytest.mark.parametrize("how", ["score", "correct", "images", "second"])
def test_a_broken_retest_is_left_out_and_its_result_stays(board, tmp_path, how):
    file = f.fabricate_retest(board / "b", 0.7, n=50 if how == "images" else None)
    raw = json.loads(file.read_text())
    if how == "score":
        raw["scores"]["accuracy"]["hits"] += 1
        word = "scores.accuracy.hits says 43"
    elif how == "correct":
        samples = f.make_samples("x", 0.7, 0.3, 60, "mref", 1001)
        more_right(samples)
        f.write_samples(file.with_suffix(".h5"), samples)
        raw["samples"]["sha256"] = f.sha(file.with_suffix(".h5"))
        raw["scores"] = f.summarize(samples)
        word = "3 samples are marked against their own answer"
    elif how == "images":
        word = "has 50 images"
    else:
        shutil.copytree(board / "b", board / "d")
        file = f.fabricate_retest(board / "d", 0.9, salt="other")
        raw = json.loads(file.read_text())
        word = "is a second retest of"
    file.write_text(json.dumps(raw))
    found, problems = collect([board])
    assert names(found) == ["a", "b", "c"]
    assert len(problems) == 1 and word in problems[0]
    assert problems[0].startswith(str(file))
    assert [len(s.retests) for s in found] == [0, how == "second", 0]


# ----------------------------------------------------------------------------- put on the board


def test_added_results_stand_on_a_public_board(board, tmp_path):
    target = tmp_path / "published"
    f.fabricate_retest(board / "b", 0.7)
    f.fabricate(board / "d", "arnn", 3, n=60, changed_options={"hidden": 8, "sigma": "exp"})
    files = [add(board / name, target) for name in "abcd"]
    (home,) = {file.parent for file in files}
    assert home.parent == target and home.name.startswith("mref-")
    group = read_submission(board / "a").group
    stems = [f"ctx-{group}-seed0", f"ctx-{group}-seed1", f"san-{group}-seed0",
             f"arnn-hidden=8-sigma=exp-{group}-seed3"]  # fmt: skip
    assert [file.stem for file in files] == stems
    stems.append(f"{stems[1]}.retest-1001")
    expected = {f"{stem}{end}" for stem in stems for end in (".json", ".h5")}
    assert {p.name for p in home.iterdir()} == expected | {"gallery.h5", "dataset.json"}

    found, problems = collect([target], public=True)
    assert not problems
    assert sorted((s.name, s.result["seed"], len(s.retests)) for s in found) == [
        ("arnn hidden=8 sigma=exp", 3, 0), ("ctx", 0, 0), ("ctx", 1, 1), ("san", 0, 0),
    ]  # fmt: skip
    assert build(found).groups[0].images is not None
    # Beside the runs that they were copied from they count once.
    both, problems = collect([target, board])
    assert (len(both), problems) == (4, [])
    assert build(both).groups[0].entries[0].name == build(found).groups[0].entries[0].name


def test_adding_twice_is_fine_and_brings_what_is_new(board, tmp_path):
    first = add(board / "b", tmp_path / "published")
    before = {p.name: p.read_bytes() for p in first.parent.iterdir()}
    assert add(board / "b", tmp_path / "published") == first
    assert {p.name: p.read_bytes() for p in first.parent.iterdir()} == before
    f.fabricate_retest(board / "b", 0.7)
    add(board / "b", tmp_path / "published")
    assert {p.name for p in first.parent.iterdir()} - set(before) == {
        f"{first.stem}.retest-1001.json", f"{first.stem}.retest-1001.h5",
    }  # fmt: skip


def test_another_result_is_not_overwritten(board, tmp_path):
    target = add(board / "b", tmp_path / "published")
    before = {p.name: p.read_bytes() for p in target.parent.iterdir()}
    replace(board / "b", seed=1, accuracy=0.9)
    with pytest.raises(InputError, match=r"is there already, of another run: remove it first\.$"):
        add(board / "b", tmp_path / "published")
    assert {p.name: p.read_bytes() for p in target.parent.iterdir()} == before


def test_data_sets_with_one_test_split_each_have_their_card(tmp_path):
    """A smaller training split changes its digest alone: both results must pass the check."""
    for i, letter in enumerate("ab"):
        digests = {"test": "1" * 64, "train": letter * 64}
        add(f.fabricate(tmp_path / letter, seed=i, digests=digests, n=60), tmp_path / "published")
    found, problems = collect([tmp_path / "published"], public=True)
    assert not problems
    assert len({s.group for s in found}) == 2


def test_photos_are_added_on_demand_alone(tmp_path):
    run = f.fabricate(tmp_path / "a", variant="mbg", backgrounds="folder", n=60)
    with pytest.raises(InputError, match="photos of one's own.*--photos"):
        add(run, tmp_path / "published")
    assert not (tmp_path / "published").exists()
    add(run, tmp_path / "published", photos=True)
    assert len(collect([tmp_path / "published"])[0]) == 1
    assert not collect([tmp_path / "published"], public=True)[0]


def test_a_board_does_not_say_where_photos_lie(tmp_path):
    under = {"backgrounds": {"source": "folder", "path": "/home/somebody/photos", "splits": {}}}
    run = f.fabricate(tmp_path / "a", variant="mbg", sources=under, n=60)
    for _ in range(2):  # again is no other run
        file = add(run, tmp_path / "published", photos=True)
    for name in (file, file.with_name("dataset.json")):
        text = name.read_text()
        assert "somebody" not in text and '"path": "photos"' in text
    assert len(collect([tmp_path / "published"])[0]) == 1


def test_a_broken_result_is_not_added(board, tmp_path):
    f.edit(board / "b", set_accuracy)
    with pytest.raises(InputError, match="does not follow from its samples"):
        add(board / "b", tmp_path / "published")
    assert not (tmp_path / "published").exists()


def test_a_board_that_cannot_be_written_is_one_sentence(board, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MnistattnError, match=r"^cannot write .*Not a directory\.$"):
        add(board / "b", tmp_path / "file")


def test_a_forged_truth_that_comes_first_does_not_put_out_the_others(tmp_path):
    for name in ("b", "c"):
        f.fabricate(tmp_path / name, seed=ord(name))
    f.forge(f.fabricate(tmp_path / "a", seed=1), other_truth)
    kept, problems = collect([tmp_path])
    assert [s.file.parent.name for s in kept] == ["b", "c"]
    assert len(problems) == 1 and "a/result.json has other queries" in problems[0]
