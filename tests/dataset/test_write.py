"""Writing a data set: the same bytes however made, the layout, failures that leave nothing."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from mnistattn.dataset import paint as painting
from mnistattn.dataset import write
from mnistattn.dataset.format import layout
from mnistattn.dataset.read import read_card, read_split
from mnistattn.dataset.write import generate
from mnistattn.errors import InputError, MnistattnError
from mnistattn.generators import digits
from mnistattn.generators.variants import Spec

SPLITS = {"train": 30, "val": 10, "test": 10}


@pytest.fixture(autouse=True)
def few_strokes(monkeypatch):
    monkeypatch.setattr(digits, "STROKES_COUNT", {"train": 200, "val": 100, "test": 100})
    # Five images a batch, so that there are several batches to be put in order.
    monkeypatch.setattr(write, "BATCH_BYTES", 5 * 100 * 100 * 4)


def make(out: Path, variant="mref", **options) -> Path:
    options = {**SPLITS, "digits": "strokes", "progress": False, "workers": 1, **options}
    return generate(variant, out, say=lambda line: None, **options)


def digests(path: Path) -> dict[str, str]:
    return {split: entry["digest"] for split, entry in read_card(path).splits.items()}


@pytest.fixture
def old(tmp_path) -> Path:
    """A data set that is already there."""
    return make(tmp_path / "set", train=4, val=0, test=2, seed=77)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---------------------------------------------------------------- the same bytes


@pytest.mark.parametrize("variant", ["mref", "mdist"])
def test_workers_do_not_matter(tmp_path, variant):
    expected = digests(make(tmp_path / "1", variant, workers=1))
    for workers in (2, 3):
        assert digests(make(tmp_path / str(workers), variant, workers=workers)) == expected
    assert len(set(expected.values())) == 3


def test_batches_do_not_matter(tmp_path, monkeypatch):
    expected = digests(make(tmp_path / "small"))
    monkeypatch.setattr(write, "BATCH_BYTES", 1)
    assert digests(make(tmp_path / "single")) == expected
    monkeypatch.setattr(write, "BATCH_BYTES", 8 << 20)
    assert digests(make(tmp_path / "large")) == expected


def test_the_seed_decides(tmp_path):
    first, again = digests(make(tmp_path / "a")), digests(make(tmp_path / "b"))
    other = digests(make(tmp_path / "c", seed=1))
    assert first == again
    assert all(first[split] != other[split] for split in SPLITS)


def test_counts_share_a_prefix(tmp_path):
    long, short = make(tmp_path / "long"), make(tmp_path / "short", train=7, val=0, test=1)
    assert set(digests(short)) == {"train", "test"}
    assert not (short / "val.h5").exists()
    for split, n in (("train", 7), ("test", 1)):
        whole = read_split(read_card(long), split)
        part = read_split(read_card(short), split, check=True)
        for name in whole:
            assert len(part[name]) == n
            assert np.array_equal(part[name], whole[name][:n]), name


def test_chunks_and_compression_do_not_matter(tmp_path):
    path = make(tmp_path / "set")
    arrays = read_split(read_card(path), "train")
    with h5py.File(path / "train.h5", "w") as h5:
        for name, values in reversed(arrays.items()):
            h5.create_dataset(name, data=values, chunks=True, compression="gzip", shuffle=True)
    again = read_split(read_card(path), "train", check=True)
    assert all(np.array_equal(again[name], arrays[name]) for name in arrays)


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("variant", ["mref", "mbg-inv", "mbg-multi"])
def test_layout(tmp_path, variant):
    options = {"size": 60, "max_scale": 1.5, "max_objects": 7}
    path = make(tmp_path / "set", variant, train=3, val=0, test=0, **options)
    assert sorted(p.name for p in path.iterdir()) == ["dataset.json", "train.h5"]
    expected = {
        "image": ((3, 60, 60, 3), "uint8"), "instances": ((3, 60, 60), "uint8"),
        "digit": ((3, 7), "int8"), "color": ((3, 7), "int8"), "scale": ((3, 7), "float32"),
        "box": ((3, 7, 4), "int16"), "query": ((3,), "uint8"), "answer": ((3,), "uint8"),
        "target": ((3,), "uint8"),
    }  # fmt: skip
    if variant == "mbg-multi":
        expected["answers"] = ((3, 5), "bool")
    with h5py.File(path / "train.h5", "r") as h5:
        assert {name: (h5[name].shape, h5[name].dtype.name) for name in h5} == expected
        for name in h5:
            assert h5[name].chunks is None and h5[name].compression is None
            assert h5[name].id.get_offset() is not None  # contiguous, at a place in the file
    assert list(layout(Spec(variant, **options))) == list(expected)


def test_card(tmp_path):
    path = make(tmp_path / "set", "mbg-multi", train=6, val=2, test=0, seed=5, placement="balanced")
    raw = json.loads((path / "dataset.json").read_text())
    assert raw["format"] == "mnistattn" and raw["format_version"] == 1
    assert raw["variant"] == "mbg-multi" and raw["paper_name"] == "MBG^multi" and raw["seed"] == 5
    assert raw["spec"] == {
        "variant": "mbg-multi", "distractors": "patches", "placement": "balanced", "size": 100,
        "min_scale": 0.5, "max_scale": 3.0, "min_objects": 5, "max_objects": 9,
    }  # fmt: skip
    assert raw["colors"] == ["red", "green", "blue", "yellow", "white"]
    assert raw["palette"][0] == [0x92, 0x10, 0x10] and raw["digits"] == list("0123456789")
    assert raw["sources"]["digits"]["source"] == "strokes"
    assert raw["sources"]["backgrounds"] == {"source": "textures"}
    assert {split: entry["count"] for split, entry in raw["splits"].items()} == {
        "train": 6, "val": 2
    }  # fmt: skip
    entry = raw["splits"]["train"]
    assert set(entry["arrays"]) == set(layout(Spec("mbg-multi")))
    assert entry["placement"]["tries"] >= 30 >= entry["placement"]["restarts"]
    assert set(raw["versions"]) >= {"mnistattn", "numpy", "numba", "h5py", "pillow", "python"}
    assert str(tmp_path) not in json.dumps(raw)
    read_split(read_card(path), "train", check=True)


def test_photos_are_in_the_card(tmp_path):
    from PIL import Image

    for n in range(30):
        folder = tmp_path / "photos" / "all"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (n, 5 * n, 99)).save(folder / f"{n}.png")
    options = {"train": 2, "val": 2, "test": 0, "backgrounds": str(tmp_path / "photos")}
    path = make(tmp_path / "set", "mbg", **options)
    card = read_card(path).raw["sources"]["backgrounds"]
    assert card["source"] == "folder" and set(card["splits"]) == {"train", "val"}
    assert card["splits"]["train"]["sha256"] != card["splits"]["val"]["sha256"]
    assert card["splits"]["train"]["count"] > card["splits"]["val"]["count"] >= 1


def test_default_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = make(None, train=1, val=0, test=0)
    assert path == Path("data/mref") and (tmp_path / "data" / "mref" / "train.h5").is_file()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": -1}, "-1 images in train"),
        ({"train": 0, "val": 0, "test": 0}, "no images were asked for"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 1 << 63}, "seed 9223372036854775808"),
        ({"workers": -2}, "-2 workers"),
        ({"digits": "stroke"}, "Did you mean 'strokes'"),
        ({"digit_split": "both"}, "unknown digit split"),
        ({"variant": "mbg", "backgrounds": "nowhere/at/all"}, "nowhere/at/all"),
        ({"variant": "mgb"}, "Did you mean 'mbg'"),
        ({"size": 10}, "size 10"),
    ],
)
def test_impossible_requests(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        make(tmp_path / "set", **options)
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_not_touched(tmp_path, old):
    before = contents(tmp_path)
    with pytest.raises(InputError, match="exists: give another --out, or --overwrite"):
        make(old)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine too")
    for path in (foreign, tmp_path / "file"):
        with pytest.raises(InputError, match="exists: give another"):
            make(path)
        with pytest.raises(InputError, match="is no data set, so it is not overwritten"):
            make(path, overwrite=True)
    assert contents(tmp_path) == {
        **before, "foreign/thesis.tex": b"mine", "file": b"mine too"
    }  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "foreign", "set"]


def test_an_empty_directory_is_used(tmp_path):
    (tmp_path / "set").mkdir()
    path = make(tmp_path / "set", train=1, val=0, test=0)
    assert (path / "train.h5").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_overwrite_replaces_the_whole(tmp_path, old):
    assert (old / "test.h5").exists()
    make(old, train=3, val=1, test=0, overwrite=True)
    assert sorted(p.name for p in old.iterdir()) == ["dataset.json", "train.h5", "val.h5"]
    assert read_card(old).raw["seed"] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


# ---------------------------------------------------------------- failures


class Failing:
    """A painter that fails at the fourth batch."""

    def __init__(self, error):
        self.error, self.paint_well = error, painting.Painter.paint

    def install(self, monkeypatch):
        def paint(painter, indices):
            if indices[0] >= 15:
                raise self.error
            return self.paint_well(painter, indices)

        monkeypatch.setattr(painting.Painter, "paint", paint)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), MnistattnError),
        (MnistattnError("scene 15 could not be placed."), MnistattnError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["disk", "scene", "interrupt"],
)
def test_a_failure_leaves_nothing_and_the_old_set(
    tmp_path, old, monkeypatch, error, expected, workers
):
    before = contents(tmp_path)
    Failing(error).install(monkeypatch)
    with pytest.raises(expected) as caught:
        make(old, overwrite=True, workers=workers)
    assert not isinstance(caught.value, InputError)
    if isinstance(error, OSError):
        assert str(caught.value) == f"cannot write {old}: No space left on device."
    assert contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    read_split(read_card(old), "train", check=True)
    with pytest.raises(expected):
        make(tmp_path / "new", workers=workers)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_an_interrupt_of_the_main_thread(tmp_path, monkeypatch):
    def interrupted(digest, name, values):
        raise KeyboardInterrupt

    monkeypatch.setattr(write.ContentDigest, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "set", workers=2)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_grow(tmp_path, old):
    """A real failure in HDF5's own write: the system lets no file grow beyond 200 kB."""
    pytest.importorskip("resource")
    before = contents(tmp_path)
    code = (
        "import resource, sys\n"
        "from mnistattn.dataset.write import generate\n"
        "from mnistattn.errors import MnistattnError\n"
        "from mnistattn.generators import digits\n"
        "digits.STROKES_COUNT = {'train': 200, 'val': 100, 'test': 100}\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "try:\n"
        "    generate('mref', sys.argv[1], train=30, val=0, test=0, digits='strokes',\n"
        "             overwrite=True, progress=False)\n"
        "except MnistattnError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code, str(old)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"cannot write {old}: ") and done.stdout.count("\n") == 1
    assert contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("step", ["card", "sync", "rename"])
def test_a_failure_at_the_end(tmp_path, old, monkeypatch, step):
    before = contents(tmp_path)
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*args):
        raise full

    if step == "rename":
        rename = Path.rename

        def second(path, target):
            return fail() if ".partial-" in path.name else rename(path, target)

        monkeypatch.setattr(Path, "rename", second)
    else:
        monkeypatch.setattr(write, {"card": "write_durably", "sync": "sync"}[step], fail)
    with pytest.raises(MnistattnError, match="No space left on device"):
        make(old, overwrite=True)
    assert contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MnistattnError, match="cannot write .*file/set"):
        make(tmp_path / "file" / "set", train=1)
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(MnistattnError, match="cannot write .*Permission denied"):
            make(tmp_path / "closed" / "set", train=1)
