"""A trained checkpoint on a test split of another seed: what is written, and all it refuses."""

import hashlib
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from mnistattn import evaluate, generate
from mnistattn.dataset.read import read_card
from mnistattn.errors import InputError, MnistattnError
from mnistattn.evaluation import retest as module
from mnistattn.evaluation import score
from mnistattn.evaluation.result import check_result
from mnistattn.evaluation.retest import common_images, retest
from mnistattn.evaluation.score import same_mean
from mnistattn.leaderboard.collect import collect

PLUGGED = """
from torch import nn


class Mine(nn.Module):
    def __init__(self, channels, query_dim, *, last):
        super().__init__()
        self.last, self.score = last, nn.Conv2d(channels, 1, 1)

    def forward(self, x, query):
        score = self.score(x)
        if self.last:
            return score.flatten(2).softmax(2).view_as(score)
        return score.sigmoid()
"""


def quiet(result, test_seed=7, **options) -> dict:
    options = {"progress": False, "say": lambda line: None, "device": "cpu", "workers": 1} | options
    return retest(result, test_seed, **options)


def trained(model: str, data: Path, out: Path) -> Path:
    evaluate(model, data, epochs=1, batch_size=16, seed=3, device="cpu", out=out, progress=False,
             say=lambda line: None)  # fmt: skip
    return out


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory) -> Path:
    """A finished run of ctx. Copy it, never change it."""
    return trained("ctx", tiny, tmp_path_factory.mktemp("runs") / "ctx")


@pytest.fixture
def ctx(done, tmp_path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "ctx"))


def files(folder: Path) -> dict[str, bytes]:
    """All files under a folder, hidden ones and those in folders too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def edit(run: Path, change) -> None:
    raw = json.loads((run / "result.json").read_text())
    change(raw)
    (run / "result.json").write_text(json.dumps(raw))


# --------------------------------------------------------------------------------- what is there


@pytest.fixture(scope="module")
def again(done, tmp_path_factory) -> tuple[Path, dict, list[str]]:
    """The run with its retest on seed 7, what retest() returned, and what it said."""
    said: list[str] = []
    run = Path(shutil.copytree(done, tmp_path_factory.mktemp("again") / "ctx"))
    return run, quiet(run, say=said.append), said


def test_two_files_are_added_and_no_other_is_touched(done, again):
    run, content, said = again
    after, before = files(run), files(done)
    new = {"result.retest-7.json", "result.retest-7.h5"}
    assert set(after) - set(before) == new
    assert all(after[name] == data for name, data in before.items())
    kept = json.loads(after["result.retest-7.json"])
    assert kept == {k: v for k, v in content.items() if k != "file"}
    assert content["file"] == str(run / "result.retest-7.json")
    assert check_result(kept)["format"] == "mnistattn-retest"
    digest = hashlib.sha256(after["result.retest-7.h5"]).hexdigest()
    assert kept["samples"] == {"file": "result.retest-7.h5", "sha256": digest}
    assert kept["of"] == hashlib.sha256(before["samples.h5"]).hexdigest()
    assert (kept["model"], kept["test_seed"], kept["common_images"]) == ("ctx", 7, 0)
    assert said == ["a fresh test set: 40 images of seed 7, none of them in that of seed 1"]


def test_the_scores_follow_from_the_samples(again):
    run, content, _ = again
    columns = {}
    for name in ("samples.h5", "result.retest-7.h5"):
        with h5py.File(run / name) as h5:
            columns[name] = {k: h5[k][()] for k in h5}
    own, fresh = columns.values()
    assert score.summarize(fresh) == content["scores"]
    assert {len(values) for values in fresh.values()} == {40}
    assert not np.array_equal(own["scale"], fresh["scale"])
    drop = fresh["correct"].mean() - own["correct"].mean()
    assert content["drop"] == pytest.approx(drop)
    assert content["p"] == same_mean(own["correct"].astype(float), fresh["correct"].astype(float))


def test_the_test_set_is_that_of_generate(again, tiny, tmp_path):
    """Anyone can make it and score the checkpoint on it: the numbers are the same."""
    run, content, _ = again
    out = tmp_path / "set"
    counts = {"train": 0, "val": 0, "test": 40}
    generate("mref", out, seed=7, digits="strokes", progress=False, **counts)
    card = read_card(out)
    assert content["digest"] == card.digest("test")
    assert content["digest"] != read_card(tiny).digest("test")
    assert common_images(read_card(tiny), card) == 0
    result = evaluate("ctx", out, checkpoint=run / "model.safetensors", out=tmp_path / "run",
                      device="cpu", progress=False, say=lambda line: None)  # fmt: skip
    assert result["scores"] == content["scores"]


def test_the_board_takes_it(again):
    (found,), problems = collect([again[0]])
    assert not problems
    assert [raw["test_seed"] for raw, _ in found.retests] == [7]


def test_the_same_test_seed_gives_the_same_numbers(again, ctx):
    run, content, _ = again
    once_more = quiet(ctx / "result.json")  # the file serves as well as its folder
    assert {k: v for k, v in once_more.items() if k != "file"} == {
        k: v for k, v in content.items() if k != "file"
    }
    assert files(ctx) == files(run)


def test_images_in_common_are_counted(tiny, tmp_path):
    card = read_card(tiny)
    assert common_images(card, card) == 40
    generate("mref", tmp_path / "set", seed=1, train=0, val=0, test=7, digits="strokes",
             progress=False)  # fmt: skip
    assert common_images(read_card(tmp_path / "set"), card) == 7


@pytest.mark.filterwarnings("error")
def test_the_same_mean_no_drop():
    right, wrong, half = np.ones(50), np.zeros(50), np.arange(50) % 2.0
    assert same_mean(right, right) == 1.0
    assert same_mean(right, wrong) == 0.0
    assert same_mean(half, half) == 1.0
    assert 0 < same_mean(right, half) < 1e-6


# ------------------------------------------------------------------------------- what is refused


def sources_that_differ(run: Path) -> None:
    edit(run, lambda raw: raw["dataset"]["digests"].update(test="0" * 64))


REFUSED = {
    "own seed": (lambda run: None, {"test_seed": 1}, "test seed 1 is the data set's own"),
    "no checkpoint": (lambda run: (run / "model.safetensors").unlink(), {},
                      "model.safetensors is missing: give a run directory with its weights"),
    "another checkpoint": (lambda run: (run / "model.safetensors").write_text("text"), {},
                           "is damaged"),
    "other sources": (sources_that_differ, {}, "do not give the test split of"),
    "unknown model": (lambda run: edit(run, lambda raw: raw.update(model="ctxx")), {},
                      "unknown model 'ctxx'"),
    "another model": (lambda run: None, {"model": "noctx"}, "is of model ctx, not noctx"),
    "damaged samples": (lambda run: (run / "samples.h5").write_text("x"), {}, "SHA-256 differs"),
    "old result": (lambda run: edit(run, lambda raw: raw.update(result_version=1)), {},
                   "has an older schema"),
    "no device": (lambda run: None, {"device": "tpu"}, "unknown device 'tpu'"),
    "no such seed": (lambda run: None, {"test_seed": -1}, "seed -1 is out of range"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_retested_is_one_sentence_and_nothing_written(ctx, name):
    damage, options, words = REFUSED[name]
    damage(ctx)
    before, folders = files(ctx), sorted(ctx.iterdir())
    with pytest.raises(InputError, match=words) as caught:
        quiet(ctx, **options)
    assert "\n" not in str(caught.value) and str(caught.value)[-1] in ".?"
    assert files(ctx) == before and sorted(ctx.iterdir()) == folders


def test_a_retest_itself_is_refused(again):
    with pytest.raises(InputError, match="is a retest: give the run that it is of"):
        quiet(again[0] / "result.retest-7.json", test_seed=8)


def test_fresh_images_that_are_not_fresh_are_refused(ctx, monkeypatch):
    monkeypatch.setattr(module, "common_images", lambda first, second: 2)
    before = files(ctx)
    with pytest.raises(MnistattnError, match="2 images of the fresh test set occur in the old one"):
        quiet(ctx)
    assert files(ctx) == before


def test_plugged_code_is_tested_as_it_was_trained(tiny, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(PLUGGED)
    model = f"{file}:Mine"
    run = trained(model, tiny, tmp_path / "run")
    with pytest.raises(InputError, match="unknown model 'Mine'"):  # its name does not say where
        quiet(run)
    assert quiet(run, model=model)["model"] == "Mine"
    before = files(run)
    file.write_text(PLUGGED + "\n# changed\n")
    with pytest.raises(InputError, match=r"the code of Mine is not what .* was made with"):
        quiet(run, 8, model=model)
    assert files(run) == before


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("generate", OSError(28, "No space left on device")),
        ("score_samples", KeyboardInterrupt()),
        ("write_samples", OSError(28, "No space left on device")),
        ("write_json", KeyboardInterrupt()),
    ],
)
def test_an_interruption_leaves_nothing_half_done(ctx, monkeypatch, place, error):
    """No partial file and no data set; the samples may be there already, whole."""

    def stop(*arguments, **options):
        raise error

    before = files(ctx)
    with monkeypatch.context() as patched:
        patched.setattr(module, place, stop)
        with pytest.raises((KeyboardInterrupt, MnistattnError)) as caught:
            quiet(ctx)
    if isinstance(error, OSError):
        assert "cannot write" in str(caught.value) and "No space left" in str(caught.value)
    left = files(ctx)
    whole = {"result.retest-7.h5"} if place == "write_json" else set()
    assert set(left) - set(before) <= whole
    assert all(left[name] == data for name, data in before.items())
    assert not [p for p in ctx.iterdir() if p.name.startswith(".")]
    assert collect([ctx])[1] == []  # the board does not stumble over it
