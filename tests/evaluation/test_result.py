"""A result on disk: what the schema takes and refuses, and whether its numbers follow from it."""

import copy
import hashlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import h5py
import jsonschema
import numpy as np
import pytest

from mnistattn import evaluate
from mnistattn.errors import InputError
from mnistattn.evaluation.result import (
    check_result,
    differences,
    fits_option,
    read_result,
    read_samples,
    schema,
    write_json,
    write_samples,
)
from mnistattn.evaluation.score import summarize


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory) -> SimpleNamespace:
    """A finished run of ctx: its directory, result.json and samples. Never change them."""
    path = tmp_path_factory.mktemp("runs") / "ctx"
    evaluate("ctx", tiny, out=path, epochs=1, batch_size=32, device="cpu", progress=False,
             say=lambda line: None)  # fmt: skip
    raw = json.loads((path / "result.json").read_text())
    return SimpleNamespace(path=path, raw=raw, samples=read_samples(path / "result.json", raw))


@pytest.fixture
def raw(done) -> dict:
    """A copy of its result."""
    return copy.deepcopy(done.raw)


@pytest.fixture
def run(done, tmp_path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(done.path, tmp_path / "run"))


def at(tree, place: str):
    """The dictionary or list that a place, as "cost.threads", lies in, and its last key."""
    *way, last = (int(key) if key.isdigit() else key for key in place.split("."))
    for key in way:
        tree = tree[key]
    return tree, last


def put(tree, place: str, value) -> None:
    inside, key = at(tree, place)
    inside[key] = value


def only_json(text: str):
    """Parse JSON as its standard says: it knows no NaN and no infinity."""

    def refuse(word: str):
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


def sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith("."), text
    return text


# ------------------------------------------------------------------------------- the schema


def test_a_result_fits_the_published_schema(done):
    jsonschema.Draft202012Validator.check_schema(schema())
    assert schema()["$schema"] == jsonschema.Draft202012Validator.META_SCHEMA["$id"]
    json.dumps(schema(), allow_nan=False)
    text = (done.path / "result.json").read_text()
    jsonschema.Draft202012Validator(schema()).validate(only_json(text))
    assert read_result(done.path) == read_result(done.path / "result.json")
    assert read_result(done.path) == (done.path / "result.json", done.raw)


WRONG = [
    ("seed", "3"), ("seed", -1), ("seed", 1 << 32), ("seed", None), ("epochs_trained", 1.5),
    ("best_epoch", -1), ("model", 3), ("model", None), ("kind", "other"), ("options", []),
    ("options.hidden", {"a": 1}), ("options.hidden", [0.5]), ("trained_on.train", "none"),
    ("recipe.batch_size", "16"), ("recipe.glorot", 1), ("recipe", None),
    ("dataset.digests.test", "0" * 63), ("dataset.digests.test", "G" * 64),
    ("scores.accuracy.value", 1.01), ("scores.accuracy.value", -0.01),
    ("scores.accuracy.value", float("nan")), ("scores.accuracy.high", float("inf")),
    ("scores.accuracy.low", None), ("scores.accuracy.hits", True), ("scores.accuracy.hits", -1),
    ("scores.accuracy.n", 40.5), ("scores.masks.correctness.value", 1.5),
    ("scores.masks.correctness.value", "0.5"), ("scores.masks.correctness.se", float("nan")),
    ("scores.masks.correctness.n", None), ("scores.masks.correctness", 0.5),
    ("scores.layers.0.value", float("nan")), ("scores.layers", None), ("scores.scales.0", {}),
    ("scores.scales.0.from", "0.5"), ("cost.train_times_none.median", 0),
    ("cost.train_times_none.rounds", 0), ("cost.inference_times_none", None),
    ("cost.parameters", "many"), ("samples.sha256", "A" * 64), ("samples.sha256", "a" * 65),
    ("samples.file", "../samples.h5"), ("samples.file", "/etc/samples.h5"),
    ("samples.file", "runs\\samples.h5"), ("samples.file", "samples.json"),
    ("samples.file", "samples\0.h5"), ("samples.file", ".h5/"), ("versions.torch", 2),
    ("origin", ["a"]),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value"), WRONG, ids=[f"{p}={str(v)[:9]}" for p, v in WRONG])
def test_a_wrong_value_is_refused(raw, run, place, value):
    """By our reader, and by anyone who has the schema alone."""
    put(raw, place, value)
    refused(raw, run, place)


@pytest.mark.parametrize(
    "place",
    ["seed", "code", "scores", "scores.accuracy", "scores.accuracy.low", "scores.masks.pointing.se",
     "scores.scales.2.to", "cost.train_times_none", "cost.train_times_none.rounds",
     "samples.sha256", "recipe.queries", "dataset.seed"],
)  # fmt: skip
def test_a_missing_field_is_refused(raw, run, place):
    inside, key = at(raw, place)
    del inside[key]
    refused(raw, run, place)


@pytest.mark.parametrize(
    "place",
    ["score", "scores.f1", "scores.accuracy.mean", "scores.layers.1.name", "scores.scales.4.name",
     "cost.watts", "recipe.momentum", "samples.url", "dataset.url"],
)  # fmt: skip
def test_an_unknown_field_is_refused(raw, run, place):
    put(raw, place, 1)
    refused(raw, run, place)


def refused(raw: dict, run: Path, place: str) -> None:
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        jsonschema.Draft202012Validator(schema()).validate(only_json(json.dumps(raw)))
    with pytest.raises(
        ValueError, match=f"^does not fit the schema at '{re.escape(place)}"
    ) as error:
        check_result(raw)
    sentence(error)
    (run / "result.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=re.escape(f"{run / 'result.json'} does not fit")) as error:
        read_result(run)
    sentence(error)
    before = (run / "result.json").read_bytes()
    with pytest.raises(ValueError, match="does not fit"):
        write_json(run / "result.json", raw)
    assert (run / "result.json").read_bytes() == before


@pytest.mark.parametrize(
    ("value", "fits"),
    [(3, True), (0.5, True), (True, True), ("softplus", True), (None, True), ((25, 6), True),
     ([], True), ((0.5, 1.0), False), ({"a": 1}, False), (float("inf"), False),
     (float("nan"), False), (len, False), ([[1]], False)],
    ids=str,
)  # fmt: skip
def test_an_option_fits_if_a_result_with_it_does(raw, value, fits):
    assert fits_option(value) is fits
    put(raw, "options.hidden", list(value) if isinstance(value, tuple) else value)
    if fits:
        check_result(raw)
    else:
        with pytest.raises(ValueError, match="options.hidden"):
            check_result(raw)


def test_a_retest_has_a_schema_of_its_own(done):
    retest = {
        "format": "mnistattn-retest", "retest_version": 1, "of": "a" * 64, "model": "ctx",
        "test_seed": 9, "digest": "b" * 64, "common_images": 0, "scores": done.raw["scores"],
        "drop": -0.01, "p": 0.5, "samples": done.raw["samples"], "versions": {},
    }  # fmt: skip
    assert check_result(retest) is retest
    for place, value in (("common_images", 1), ("p", 1.5), ("of", "a"), ("retest_version", 2)):
        with pytest.raises(ValueError):
            check_result(retest | {place: value})


# ------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is damaged: it is no whole JSON file"),
        ('{"format": "mnistattn-result", "result_ver', "is damaged: it is no whole JSON file"),
        ("\xff\xfe", "is damaged: it is no whole JSON file"),
        ("[]", "is no result of mnistattn's"),
        ("null", "is no result of mnistattn's"),
        ('{"format": "mnistattn", "format_version": 2}', "is no result of mnistattn's"),
        ('{"format": []}', "is no result of mnistattn's"),
        ("{}", "is no result of mnistattn's"),
        ('{"format": "mnistattn-result", "result_version": 1}', r"has an older schema \(1; .* 2\)"),
        ('{"format": "mnistattn-result", "result_version": 3}', r"has another schema \(3; "),
        ('{"format": "mnistattn-result", "result_version": "2"}', r"has another schema \(2; "),
        ('{"format": "mnistattn-result"}', r"has another schema \(None; "),
        ('{"format": "mnistattn-result", "result_version": 2}', "does not fit the schema at"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_result(tmp_path, text, words):
    file = tmp_path / "result.json"
    file.write_bytes(text.encode("latin-1"))
    for path in (file, tmp_path):
        with pytest.raises(InputError, match=f"^{re.escape(str(file))} {words}") as error:
            read_result(path)
        sentence(error)


def test_a_truncated_result(run):
    text = (run / "result.json").read_text()
    (run / "result.json").write_text(text[: len(text) // 2])
    with pytest.raises(InputError, match="is damaged") as error:
        read_result(run)
    sentence(error)


def test_there_is_no_result(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere.json"):
        with pytest.raises(
            InputError, match="does not exist: give a result.json or a run"
        ) as error:
            read_result(path)
        sentence(error)


def test_what_is_written_is_read(raw, tmp_path):
    write_json(tmp_path / "result.json", raw)
    assert read_result(tmp_path) == (tmp_path / "result.json", raw)


# --------------------------------------------------------------------------- per-sample files


def test_samples_come_back_as_they_were(tmp_path):
    rng = np.random.default_rng(0)
    samples = {
        "answer": rng.integers(0, 255, 300).astype(np.uint8), "correct": rng.random(300) < 0.5,
        "correctness": np.append(rng.random(299), np.nan).astype(np.float32),
        "double": rng.random(300), "gallery": rng.integers(0, 255, (16, 9, 7)).astype(np.uint8),
        "none": np.zeros(0, np.float32),
    }  # fmt: skip
    files = [tmp_path / name for name in ("one.h5", "two.h5")]
    for file in files:
        write_samples(file, samples)
    assert files[0].read_bytes() == files[1].read_bytes()  # so that a digest can be compared
    digest = hashlib.sha256(files[0].read_bytes()).hexdigest()
    entry = {"samples": {"file": "one.h5", "sha256": digest}}
    back = read_samples(tmp_path / "result.json", entry)
    assert back.keys() == samples.keys()
    for name, values in samples.items():
        assert (back[name].dtype, back[name].shape) == (values.dtype, values.shape), name
        assert back[name].tobytes() == values.tobytes(), name


def _delete(file: Path) -> None:
    file.unlink()


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _text(file: Path) -> None:
    file.write_text("no HDF5")


def _group(file: Path) -> None:
    with h5py.File(file, "w") as h5:
        h5.create_group("correct")


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("damage", "words"),
    [(_delete, "is missing"), (_truncate, "its SHA-256 differs"), (_flip, "its SHA-256 differs"),
     (_text, "its SHA-256 differs"), (_folder, "is damaged or no HDF5 file")],
)  # fmt: skip
def test_damaged_samples(run, done, damage, words):
    damage(run / "samples.h5")
    with pytest.raises(
        InputError, match=f"^{re.escape(str(run / 'samples.h5'))}.* {words}"
    ) as error:
        read_samples(run / "result.json", done.raw)
    sentence(error)


@pytest.mark.parametrize("damage", [_truncate, _text, _group])
def test_samples_that_are_no_hdf5_though_their_digest_is_right(run, raw, damage):
    damage(run / "samples.h5")
    raw["samples"]["sha256"] = hashlib.sha256((run / "samples.h5").read_bytes()).hexdigest()
    with pytest.raises(InputError, match=r"samples\.h5 is damaged or no HDF5 file") as error:
        read_samples(run / "result.json", raw)
    sentence(error)


# ------------------------------------------------------------------------------ computed again


def test_a_true_result_has_no_differences(done):
    assert differences(done.raw["scores"], done.samples, True) == []
    assert done.raw["scores"]["accuracy"]["n"] == 40


@pytest.mark.parametrize(
    ("place", "change", "shown"),
    [
        ("accuracy.value", 0.001, "scores.accuracy.value"),
        ("accuracy.hits", 1, "scores.accuracy.hits"),
        ("accuracy.n", 1, "scores.accuracy.n"),
        ("accuracy.high", 1e-6, "scores.accuracy.high"),
        ("scales.0.hits", 1, "scores.scales[0].hits"),
        ("scales.0.correctness.value", 1e-6, "scores.scales[0].correctness.value"),
        ("scales.4.to", 0.5, "scores.scales[4].to"),
        ("masks.pointing.value", 0.01, "scores.masks.pointing.value"),
        ("masks.correctness.se", -1e-6, "scores.masks.correctness.se"),
        ("masks.chance.n", -1, "scores.masks.chance.n"),
        ("layers.2.value", 1e-6, "scores.layers[2].value"),
    ],
)  # fmt: skip
def test_an_edited_number_is_named(done, raw, place, change, shown):
    inside, key = at(raw["scores"], place)
    true, inside[key] = inside[key], inside[key] + change
    assert differences(raw["scores"], done.samples, True) == [
        f"{shown} says {inside[key]}, the samples give {true}"
    ]
    inside[key] = true * (1 + 1e-12) if isinstance(true, float) else true  # another sum's order
    assert differences(raw["scores"], done.samples, True) == []


@pytest.mark.parametrize(
    ("place", "value", "shown"),
    [
        ("masks", None, "scores.masks says None"),
        ("layers", [], "scores.layers says []"),
        ("masks.pointing", None, "scores.masks.pointing says None"),
        ("accuracy.value", None, "scores.accuracy.value says None"),
        ("accuracy.hits", True, "scores.accuracy.hits says True"),
        ("masks.extra", {"value": 1}, "scores.masks.extra says {'value': 1}"),
    ],
)
def test_a_number_that_was_left_out_or_put_in_is_named(done, raw, place, value, shown):
    put(raw["scores"], place, value)
    (found,) = differences(raw["scores"], done.samples, True)
    assert found.startswith(f"{shown}, the samples give ")


def test_a_flipped_sample_is_found(done):
    """It changes the sums, and speaks against its own answer."""
    samples = done.samples | {"correct": done.samples["correct"].copy()}
    samples["correct"][7] ^= True
    found = differences(done.raw["scores"], samples, True)
    assert any(text.startswith("scores.accuracy.hits says") for text in found)
    assert found[-1] == "1 samples are marked against their own answer"
    forged = json.loads(json.dumps(summarize(samples)))  # and if the result is made to fit
    assert differences(forged, samples, True) == [found[-1]]
    assert differences(forged, samples, False) == []  # mbg-multi: others may be right, too


def test_two_flips_that_cancel_out_are_found(done):
    correct, scale = done.samples["correct"].copy(), done.samples["scale"]
    right, wrong = (np.flatnonzero((correct == side) & (scale <= 1))[0] for side in (True, False))
    correct[[right, wrong]] = correct[[wrong, right]]
    found = differences(done.raw["scores"], done.samples | {"correct": correct}, True)
    assert found == ["2 samples are marked against their own answer"]


@pytest.mark.parametrize("name", ["prediction", "correctness", "correctness_layer_2", "scale"])
def test_an_edited_column_is_found(done, name):
    values = done.samples[name].copy()
    values[3] = 2.9 if name == "scale" else 1 - values[3] if values.dtype != np.uint8 else 77
    if name == "prediction":  # a right answer becomes a wrong one
        values[np.flatnonzero(done.samples["correct"])[0]] = 77
    assert differences(done.raw["scores"], done.samples | {name: values}, True)


@pytest.mark.parametrize(
    "change",
    [{"correct": None}, {"scale": None}, {"prediction": None}, {"answer": None}, {"pointing": None},
     {"scale": np.full(40, 9.0, np.float32)}, {"scale": np.full(39, 1.0, np.float32)},
     {"correct": np.full(40, 2, np.uint8)}, {"prediction": np.zeros(39, np.uint8)},
     {"correctness": np.zeros(3, np.float32)}, {"scale": np.array(["a"] * 40)}],
    ids=lambda change: str(change)[:40],
)  # fmt: skip
def test_columns_that_do_not_fit_are_a_sentence(done, change):
    samples = {k: v for k, v in (done.samples | change).items() if v is not None}
    found = differences(done.raw["scores"], samples, True)
    assert found
    assert found[0].startswith("the per-sample file cannot be scored: ") or "pointing" in found[0]
