"""Learning curves: a picture of the histories that there are."""

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mnistattn.leaderboard.collect import add
from mnistattn.reproduction.curves import COLOURS, curves
from mnistattn.reproduction.curves import _points as points
from mnistattn.reproduction.report import rows_of
from mnistattn.reproduction.tables import papers_models

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

_spec = importlib.util.spec_from_file_location("invent", Path(__file__).with_name("invent.py"))
assert _spec and _spec.loader
i = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(i)


def history_of(run: Path, epochs: int = 4, seconds: float = 30.0, attends: bool = True) -> list:
    """A curve.json beside an invented run; each has values of its own, so lines do not coincide."""
    own = 0.03 * int(run.name.removeprefix("run"))
    history = [
        {"epoch": e, "loss": 1 / e, "train_accuracy": 1 - 0.5 / e, "lr": 0.01,
         "val_accuracy": own + 0.1 * e, "seconds": seconds, "images_per_second": 9.0}
        | ({"val_correctness": own + 0.05 * e} if attends else {})
        for e in range(1, epochs + 1)
    ]  # fmt: skip
    (run / "curve.json").write_text(json.dumps(history))
    return history


def drawn(root: Path, data: str = "mref") -> np.ndarray | None:
    """The picture as RGB, from its bytes."""
    png = curves("MREF", rows_of(i.collected(root))[data])
    if png is None:
        return None
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


OF = dict(zip(papers_models(), COLOURS, strict=True))


def shows(picture: np.ndarray, colour: str) -> bool:
    """Whether a line's width of pixels has this colour."""
    rgb = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
    return int((picture == rgb).all(-1).sum()) > 40


def test_a_picture_of_two_models(tmp_path):
    for model in ("arnn", "ctx"):
        for seed in (0, 1):
            history_of(i.invent(tmp_path, "mref", model, seed))
    i.invent(tmp_path, "mref", "san")  # has no history: it is left out
    rows = rows_of(i.collected(tmp_path))["mref"]
    assert curves("MREF", rows) == curves("MREF", rows[::-1])  # the same every time
    picture = drawn(tmp_path)
    assert picture is not None and picture.shape == (640, 1000, 3)
    found = {name: shows(picture, colour) for name, colour in OF.items()}
    assert found == {name: name in ("arnn", "ctx") for name in OF}
    assert (picture == 255).all(-1).mean() > 0.5  # on white


def test_the_picture_shows_the_numbers(tmp_path):
    run = i.invent(tmp_path, "mref", "ctx")
    history = history_of(run)
    pictures = [drawn(tmp_path)]
    for change in ("val_accuracy", "val_correctness", "seconds", "epoch"):
        other = [dict(entry) for entry in history]
        other[1][change] *= 1.5
        (run / "curve.json").write_text(json.dumps(other))
        pictures.append(drawn(tmp_path))
    for k, one in enumerate(pictures):
        assert not any(np.array_equal(one, other) for other in pictures[:k])


def test_without_histories(tmp_path):
    assert curves("MREF", []) is None
    runs = [i.invent(tmp_path, "mref", "ctx", seed) for seed in range(4)]
    assert drawn(tmp_path) is None
    for run, content in zip(runs, ("", "[]", "{}", "[{"), strict=True):
        (run / "curve.json").write_text(content)
    assert drawn(tmp_path) is None
    history_of(runs[3])
    assert drawn(tmp_path) is not None


def test_a_model_without_attention(tmp_path):
    history_of(i.invent(tmp_path, "mbg-up", "none", 0, 0.9, None), attends=False)
    picture = drawn(tmp_path, "mbg-up")
    assert picture is not None and shows(picture, OF["none"])
    lower = picture[310:540]  # of correctness: its panels are empty
    assert not shows(lower, OF["none"])
    history_of(i.invent(tmp_path, "mbg-up", "arnn", 0, 0.9))
    picture = drawn(tmp_path, "mbg-up")
    assert picture is not None
    assert [shows(picture[310:540], OF[name]) for name in ("none", "arnn")] == [False, True]


def test_one_epoch_and_histories_without_correctness(tmp_path):
    """Runs of before there was val_correctness."""
    history_of(i.invent(tmp_path, "mref", "ctx"), epochs=1)
    history_of(i.invent(tmp_path, "mref", "arnn"), epochs=1, attends=False)
    assert drawn(tmp_path) is not None


def test_recipes_of_a_model_differ_in_their_dashes(tmp_path):
    for epochs in (2, 3):
        for model in OF:
            history_of(i.invent(tmp_path, "mref", model, recipe={"epochs": epochs}), epochs)
    picture = drawn(tmp_path)
    assert picture is not None and all(shows(picture, colour) for colour in OF.values())


def test_models_that_are_no_row_of_a_table(tmp_path):
    """`--results` may have a plugged one, or one of the zoo, of which the reports show nothing."""
    history_of(i.invent(tmp_path, "mref", "ctx"))
    before = drawn(tmp_path)
    for model in ("Mine", "soft"):
        history_of(i.invent(tmp_path, "mref", model))
    after = drawn(tmp_path)
    assert before is not None and np.array_equal(before, after)


def test_curves_of_a_board(tmp_path):
    run = i.invent(tmp_path / "runs", "mref", "ctx")
    history_of(run)
    add(run, tmp_path / "board")
    assert np.array_equal(drawn(tmp_path / "board"), drawn(tmp_path / "runs"))


def test_points():
    history = [{"epoch": e, "seconds": 30.0, "val_accuracy": e / 10} for e in (1, 2, 3)]
    history[1]["val_correctness"] = 0.5
    assert points(history, "val_accuracy", "epochs") == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert points(history, "val_accuracy", "minutes") == [(0.5, 0.1), (1.0, 0.2), (1.5, 0.3)]
    assert points(history, "val_correctness", "minutes") == [(1.0, 0.5)]
