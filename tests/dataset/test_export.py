"""Exports, read back with the libraries that they are for: every array of every split; the same
bytes each time; nothing half-done under a final name, and nothing of others touched."""

import errno
import hashlib
import inspect
import io
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mnistattn import cli as cli_module
from mnistattn.cli.export import command
from mnistattn.dataset import export as package
from mnistattn.dataset.export import FORMATS, LIST, export
from mnistattn.dataset.format import ContentDigest, layout
from mnistattn.dataset.read import read_card, read_split
from mnistattn.dataset.write import generate
from mnistattn.errors import InputError, MnistattnError
from mnistattn.generators import digits

VARIANTS = ("mref", "mbg-inv", "mbg-multi")
READERS = {"webdataset": "webdataset", "coco": "pycocotools", "croissant": "mlcroissant",
           "parquet": "datasets"}  # fmt: skip
ENCODER = {to: "parquet" if to == "croissant" else to for to in FORMATS}  # whose `png` is called

# Of the libraries, about what they will have to change in their own code.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("DeprecationWarning", "FutureWarning", "PendingDeprecationWarning")
]
every_format = pytest.mark.parametrize("to", FORMATS)


@pytest.fixture(autouse=True)
def libraries(request, monkeypatch, tmp_path_factory):
    """Skips where the format's library is missing; Hugging Face stays offline and out of home."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "datasets" not in sys.modules:  # it looks once
        monkeypatch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
    to = getattr(request.node, "callspec", None) and request.node.callspec.params.get("to")
    if to:
        pytest.importorskip(FORMATS[to].library)


@pytest.fixture(scope="module")
def sets(tiny, tmp_path_factory) -> dict[str, Path]:
    """A small data set of each kind; read only."""
    root = tmp_path_factory.mktemp("sets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "STROKES_COUNT", {"train": 200, "val": 100, "test": 100})
        return {"mref": tiny} | {
            variant: generate(
                variant, root / variant, train=8, val=4, test=6, seed=3, digits="strokes",
                workers=1, progress=False, say=lambda line: None,
            )
            for variant in VARIANTS[1:]
        }  # fmt: skip


@pytest.fixture
def copy(sets, tmp_path) -> Path:
    """A data set to be damaged, the only thing in its folder."""
    return Path(shutil.copytree(sets["mbg-multi"], tmp_path / "root" / "set"))


def run(data: Path, to: str, out: Path | None = None, **options) -> Path:
    return export(data, to, out, **{"progress": False, "say": lambda line: None} | options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def tree(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def complaint(action, *parts: str, kind=InputError) -> None:
    """The action fails with one sentence that has these parts."""
    with pytest.raises(kind) as caught:
        action()
    text = str(caught.value)
    assert all(str(part) in text for part in parts), text
    assert "\n" not in text and text.endswith((".", "'?"))


def check_list(out: Path) -> None:
    """LIST has every file of the export, with its SHA-256."""
    lines = (out / LIST).read_text().splitlines()
    assert all(line.startswith("# ") for line in lines[:2])
    listed = {name: digest for digest, name in (line.split("  ") for line in lines[2:])}
    files = {k: v for k, v in contents(out).items() if k != LIST}
    assert listed == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


# ---------------------------------------------------------------- reading back


def pixels(png: bytes, mode: str) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        assert (image.format, image.mode) == ("PNG", mode)
        return np.array(image)


def from_webdataset(out: Path, split: str, tmp: Path) -> list[dict]:
    webdataset = pytest.importorskip("webdataset")
    tars = sorted(map(str, out.glob(f"{split}-*.tar")))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    found = []
    for i, sample in enumerate(samples):
        assert sample["__key__"] == f"{split}-{i:08d}"
        row = json.loads(sample["json"])
        assert row.pop("split") == split
        row["image"] = pixels(sample["png"], "RGB")
        row["instances"] = pixels(sample["instances.png"], "L")
        found.append(row)
    return found


def from_coco(out: Path, split: str, tmp: Path) -> list[dict]:
    coco = pytest.importorskip("pycocotools.coco").COCO(out / f"{split}.json")
    assert coco.getAnnIds() == list(range(1, len(coco.anns) + 1))
    found = []
    for i in coco.getImgIds():
        image = coco.loadImgs(i)[0]
        objects = coco.loadAnns(coco.getAnnIds(i))
        row = image | {"index": image["id"], "instances": np.zeros((100, 100), int)}
        row["image"] = pixels((out / split / image["file_name"]).read_bytes(), "RGB")
        assert row["image"].shape == (image["height"], image["width"], 3)
        for entry in objects:
            mask = coco.annToMask(entry)
            ys, xs = np.nonzero(mask)
            x, y, w, h = entry["bbox"]
            assert (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1) == (x, y, w, h)
            assert entry["area"] == mask.sum() and not row["instances"][mask > 0].any()
            row["instances"] += mask * (entry["object"] + 1)
        objects = sorted(objects + image.get("hidden", []), key=lambda entry: entry["object"])
        assert [entry["object"] for entry in objects] == list(range(len(objects)))
        for entry in objects:
            assert coco.loadCats(entry["category_id"])[0]["name"] == str(entry["digit"])
            assert entry["is_target"] == (entry["object"] == image["target"])
        for name in ("digit", "color", "color_name", "scale", "box", "is_answer"):
            row[name] = [entry[name] for entry in objects]
        found.append(row)
    return found


def from_croissant(out: Path, split: str, tmp: Path) -> list[dict]:
    mlcroissant = pytest.importorskip("mlcroissant")
    data = mlcroissant.Dataset(jsonld=str(out / "croissant.json"))
    assert not data.metadata.ctx.issues.errors
    found = []
    for record in data.records(split):
        row = {name.removeprefix(f"{split}/"): value for name, value in record.items()}
        assert row["image"].mode == "RGB" and row["instances"].mode == "L"
        found.append(row | {name: np.array(row[name]) for name in ("image", "instances")})
    return found


def from_parquet(out: Path, split: str, tmp: Path) -> list[dict]:
    datasets = pytest.importorskip("datasets")
    files = sorted(map(str, out.glob(f"{split}-*.parquet")))
    data = datasets.Dataset.from_parquet(files, cache_dir=str(tmp / "cache"))
    found = []
    for row in data:
        assert row["image"].mode == "RGB" and row["instances"].mode == "L"
        found.append(row | {name: np.array(row[name]) for name in ("image", "instances")})
    return found


def read_back(to: str, out: Path, split: str, data: Path, tmp: Path) -> list[dict]:
    """What the format's library reads, compared with every array of the split."""
    samples = globals()[f"from_{to}"](out, split, tmp)
    card = read_card(data)
    arrays, shapes = read_split(card, split), layout(card.spec)
    assert [sample["index"] for sample in samples] == list(range(len(arrays["query"])))
    for name, expected in arrays.items():
        if name in ("digit", "color", "scale", "box"):
            found = np.full(expected.shape, -1.0)
            for i, sample in enumerate(samples):
                found[i, : len(sample[name])] = sample[name]
            assert [len(s[name]) for s in samples] == (arrays["digit"] >= 0).sum(1).tolist()
        elif name == "answers":
            found = np.zeros(expected.shape, bool)
            for i, sample in enumerate(samples):
                found[i, sample[name]] = True
        else:
            found = np.array([sample[name] for sample in samples])
        assert found.shape == (len(samples), *shapes[name][0])
        assert np.array_equal(found, expected), name
    return samples


@every_format
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_array_comes_back(sets, variant, to, tmp_path):
    data = sets[variant]
    out = run(data, to, tmp_path / "out")
    card = read_card(data)
    colors, digit_names = ("red", "green", "blue", "yellow", "white"), tuple("0123456789")
    for split in card.splits:
        for sample in read_back(to, out, split, data, tmp_path):
            if "query_name" in sample:
                queries, answers = digit_names, colors
                if variant == "mbg-inv":
                    queries, answers = colors, digit_names
                assert sample["query_name"] == queries[sample["query"]]
                assert sample["answer_name"] == answers[sample["answer"]]
                assert sample["color_name"] == [colors[k] for k in sample["color"]]
                assert ("answers" in sample) == (variant == "mbg-multi")
                if "answers" in sample:
                    assert sample["answers_name"] == [colors[k] for k in sample["answers"]]
            if "is_answer" in sample:
                asked = sample["color" if variant == "mbg-inv" else "digit"]
                assert sample["is_answer"] == [value == sample["query"] for value in asked]
                assert (sum(sample["is_answer"]) > 1) == (variant == "mbg-multi")
    check_list(out)


@every_format
def test_the_same_bytes_twice(sets, to, tmp_path, monkeypatch):
    first = contents(run(sets["mbg-multi"], to, tmp_path / "first", shard_images=3))
    if ENCODER[to] != "parquet":  # there a piece is a row group
        monkeypatch.setattr(package, "PIECE_BYTES", 1)
    monkeypatch.setattr("time.time", lambda: 1e9)
    second = contents(run(sets["mbg-multi"], to, tmp_path / "second", shard_images=3))
    assert first == second and len(first) > 3


@pytest.mark.parametrize("to", ["webdataset", "croissant", "parquet"])
@pytest.mark.parametrize("shard, counts", [(10, [10] * 6 + [4]), (32, [32, 32]), (64, [64])])
def test_shards(sets, to, shard, counts, tmp_path, monkeypatch):
    monkeypatch.setattr(package, "PIECE_BYTES", 15 * 100 * 100 * 4)
    out = run(sets["mref"], to, tmp_path / "out", splits=["train"], shard_images=shard)
    if to == "webdataset":
        names = [f"train-{k:06d}.tar" for k in range(len(counts))]
    else:
        names = [f"train-{k:05d}-of-{len(counts):05d}.parquet" for k in range(len(counts))]
    extra = ["croissant.json"] if to == "croissant" else []
    assert tree(out) == sorted([*names, *extra, LIST])
    if to != "webdataset":
        from pyarrow.parquet import ParquetFile

        assert [ParquetFile(out / name).metadata.num_rows for name in names] == counts
    read_back(to, out, "train", sets["mref"], tmp_path)


def test_pieces_do_not_grow_with_the_data_set(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(package, "PIECE_BYTES", 10 * 100 * 100 * 4)
    sizes = []

    def write(job):
        sizes.extend((first, len(a["image"])) for first, a in job.pieces("train"))

    monkeypatch.setattr(package, "_writer", lambda to: write)
    run(sets["mref"], "coco", tmp_path / "out", splits="train", shard_images=25)
    assert sizes[:4] == [(0, 10), (10, 10), (20, 5), (25, 5)]
    assert sum(n for _, n in sizes) == 64


# ---------------------------------------------------------------- each library's own ways


def test_webdataset_decodes_by_itself(sets, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    out = run(sets["mbg-inv"], "webdataset", tmp_path / "out")
    arrays = read_split(read_card(sets["mbg-inv"]), "test")
    data = webdataset.WebDataset(str(out / "test-000000.tar"), shardshuffle=False).decode("rgb8")
    items = list(data.to_tuple("png", "instances.png", "json"))
    assert len(items) == 6
    for i, (image, mask, row) in enumerate(items):
        assert np.array_equal(image, arrays["image"][i])
        assert (mask == arrays["instances"][i][:, :, None]).all() and mask.shape == (100, 100, 3)
        assert row["answer"] == arrays["answer"][i]


def test_coco_evaluates(sets, tmp_path, capsys):
    """The annotations as detections of themselves are all right, each object found."""
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    out = run(sets["mref"], "coco", tmp_path / "out", splits=["val"])
    truth = coco.COCO(out / "val.json")
    found = truth.loadRes([entry | {"score": 1.0} for entry in truth.loadAnns(truth.getAnnIds())])
    for kind in ("segm", "bbox"):
        score = COCOeval(truth, found, kind)
        score.evaluate()
        score.accumulate()
        score.summarize()
        assert score.stats[0] == 1 and score.stats[8] == 1
    assert truth.getCatIds() == list(range(1, 11)) and truth.dataset["info"]["digest"]
    assert truth.dataset["licenses"][0]["name"].startswith("MIT")


def test_coco_keeps_an_object_of_which_nothing_is_seen(copy, tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    with h5py.File(copy / "test.h5", "r+") as h5:
        instances = h5["instances"][()]
        instances[1][instances[1] == 3] = 0
        instances[2] = 0
        h5["instances"][...] = instances
    raw = json.loads((copy / "dataset.json").read_text())
    card = read_card(copy)
    digest = ContentDigest(card.spec, 6)
    digest.update_all(read_split(card, "test"))
    raw["splits"]["test"] |= {"digest": digest.hexdigest(), "arrays": digest.arrays()}
    (copy / "dataset.json").write_text(json.dumps(raw))
    out = run(copy, "coco", tmp_path / "out")
    data = coco.COCO(out / "test.json")
    assert all(entry["area"] and min(entry["bbox"][2:]) > 0 for entry in data.anns.values())
    assert [entry["object"] for entry in data.imgs[1]["hidden"]] == [2]
    assert not data.getAnnIds(2) and "hidden" not in data.imgs[0]
    read_back("coco", out, "test", copy, tmp_path)


def test_coco_without_any_annotation(copy, tmp_path, monkeypatch):
    coco = pytest.importorskip("pycocotools.coco")
    monkeypatch.setattr("mnistattn.dataset.export.coco._objects", lambda *arguments: iter(()))
    data = coco.COCO(run(copy, "coco", tmp_path / "out") / "val.json")
    assert len(data.imgs) == 4 and data.dataset["annotations"] == []


def test_torchvision_reads_coco(sets, tmp_path):
    pytest.importorskip("pycocotools")
    from torchvision.datasets import CocoDetection

    out = run(sets["mref"], "coco", tmp_path / "out", splits=["val"])
    data = CocoDetection(out / "val", out / "val.json")
    image, objects = data[3]
    expected = read_split(read_card(sets["mref"]), "val")
    assert len(data) == 24 and np.array_equal(np.array(image), expected["image"][3])
    assert [entry["digit"] for entry in objects] == [d for d in expected["digit"][3] if d >= 0]


def test_datasets_finds_splits_and_features(sets, tmp_path):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("pyarrow")
    out = run(sets["mbg-multi"], "parquet", tmp_path / "out", shard_images=3)
    data = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    assert {k: len(v) for k, v in data.items()} == {"train": 8, "validation": 4, "test": 6}
    features = data["test"].features
    assert isinstance(features["image"], datasets.Image)
    assert isinstance(features["instances"], datasets.Image)
    row = data["test"][0]
    assert features["query"].int2str(row["query"]) == str(row["query"])
    assert features["answer"].names == ["red", "green", "blue", "yellow", "white"]
    assert features["answers"].feature.int2str(row["answers"]) == [
        features["answer"].names[k] for k in row["answers"]
    ]
    assert features["scale"].feature.dtype == "float32"
    assert len(list(datasets.load_dataset(str(out), streaming=True, split="test"))) == 6


def test_parquet_is_plain_for_others(sets, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    out = run(sets["mref"], "parquet", tmp_path / "out", splits=["val"])
    table = parquet.read_table(out / "val-00000-of-00001.parquet")
    arrays = read_split(read_card(sets["mref"]), "val")
    assert table["query"].to_pylist() == arrays["query"].tolist()
    first = table["image"][0].as_py()
    assert first["path"] == "val-00000000.png"
    assert np.array_equal(pixels(first["bytes"], "RGB"), arrays["image"][0])


def test_mlcroissant_compares_the_sha256(sets, tmp_path):
    mlcroissant = pytest.importorskip("mlcroissant")
    pytest.importorskip("pyarrow")
    out = run(sets["mbg-inv"], "croissant", tmp_path / "out")
    names = mlcroissant.Dataset(jsonld=str(out / "croissant.json")).records("colors")
    assert [r["colors/name"] for r in names] == ["red", "green", "blue", "yellow", "white"]
    file = out / "test-00000-of-00001.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    records = mlcroissant.Dataset(jsonld=str(out / "croissant.json")).records("test")
    with pytest.raises(Exception) as caught:
        list(records)
    assert "not identical" in str(caught.value.__cause__)


def test_the_croissant_card(copy, tmp_path):
    pytest.importorskip("pyarrow")
    raw = json.loads((copy / "dataset.json").read_text())
    raw["sources"]["digits"]["source"] = "mnist"
    raw["sources"]["backgrounds"] = {"source": "sun397", "path": "/home/me/photos"}
    (copy / "dataset.json").write_text(json.dumps(raw))
    told: list[str] = []
    out = run(copy, "croissant", tmp_path / "out", say=told.append)
    card = json.loads((out / "croissant.json").read_text())
    assert len(told) == 1 and "MNIST" in told[0] and "SUN" in told[0]
    assert any("by-sa/3.0" in licence for licence in card["license"])
    assert any("SUN" in licence for licence in card["license"])
    assert "MNIST by Y. LeCun" in card["description"] and "CC BY-SA 3.0" in card["description"]
    assert "/home/me" not in (out / "croissant.json").read_text() + (out / LIST).read_text()
    assert read_card(copy).digest("test") in card["description"]
    assert "AttentionRNN" in card["citeAs"] and card["version"] == "1.0.0"


def test_a_card_that_says_little(copy, tmp_path):
    pytest.importorskip("pyarrow")
    raw = json.loads((copy / "dataset.json").read_text())
    raw = {k: raw[k] for k in ("format", "format_version", "spec", "seed", "splits")}
    (copy / "dataset.json").write_text(json.dumps(raw | {"sources": {"digits": "mine"}}))
    out = run(copy, "croissant", tmp_path / "out")
    assert "digits: ?" in json.loads((out / "croissant.json").read_text())["description"]


# ---------------------------------------------------------------- damage and failures


@every_format
def test_a_flipped_bit(copy, to):
    file = copy / "val.h5"
    with h5py.File(file, "r") as h5:
        offset = h5["image"].id.get_offset()
    data = bytearray(file.read_bytes())
    data[offset + 12345] ^= 1
    file.write_bytes(data)
    before = tree(copy.parent)
    complaint(lambda: run(copy, to), file, "(image differ)", "generate")
    assert tree(copy.parent) == before
    assert (run(copy, to, splits=["test"]) / LIST).exists()  # which is undamaged


@every_format
@pytest.mark.parametrize(
    "name, value",
    [("query", 200), ("answer", 99), ("target", 77), ("digit", -1), ("digit", 100), ("color", 90),
     ("color", -90), ("scale", np.nan), ("box", -9), ("instances", 255), ("answers", False)],
)  # fmt: skip
def test_impossible_values(copy, to, name, value):
    with h5py.File(copy / "test.h5", "r+") as h5:
        values = h5[name][()]
        values[2] = value
        h5[name][...] = values
    complaint(lambda: run(copy, to, splits=["test"]), copy / "test.h5", f"({name} differ)")
    assert tree(copy.parent) == ["set", *(f"set/{p}" for p in tree(copy))]


def test_other_damage(copy):
    raw = json.loads((copy / "dataset.json").read_text())
    raw["splits"]["val"]["digest"] = "0" * 64
    (copy / "dataset.json").write_text(json.dumps(raw))
    (copy / "train.h5").write_bytes(b"no HDF5")
    (copy / "test.h5").unlink()
    pytest.importorskip("pycocotools")
    for split, word in (("train", "damaged"), ("val", "the card differ"), ("test", "missing")):
        complaint(lambda split=split: run(copy, "coco", splits=[split]), f"{split}.h5", word)
    assert tree(copy.parent) == ["set", "set/dataset.json", "set/train.h5", "set/val.h5"]


@every_format
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_a_failure_midway_leaves_nothing(copy, to, error, monkeypatch, tmp_path):
    module = f"mnistattn.dataset.export.{ENCODER[to]}"
    run(copy, to, tmp_path / "old", splits=["val"])
    before = contents(tmp_path)
    png = package.import_module(module).png
    calls = []

    def failing(image):
        calls.append(1)
        if len(calls) > 13:  # in the second file
            raise error
        return png(image)

    monkeypatch.setattr(f"{module}.png", failing)
    kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else MnistattnError
    for out, overwrite in ((tmp_path / "a" / "new", False), (tmp_path / "old", True)):
        calls.clear()
        with pytest.raises(kind) as caught:
            run(copy, to, out, overwrite=overwrite, shard_images=3)
        assert kind is KeyboardInterrupt or "No space left" in str(caught.value)
        assert contents(tmp_path) == before and not (tmp_path / "a").exists()


@pytest.mark.parametrize("empty", [False, True])
def test_an_exchange_that_stops_midway_can_be_repeated(copy, tmp_path, monkeypatch, empty):
    pytest.importorskip("webdataset")
    out = tmp_path / "out"
    out.mkdir()
    if not empty:
        run(copy, "webdataset", out, shard_images=2)
    replace, moved = os.replace, []

    def stopping(source, target):
        moved.append(target)
        if len(moved) == 3:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(package.os, "replace", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(copy, "webdataset", out, shard_images=5, overwrite=True)
    monkeypatch.undo()
    listed = (out / LIST).read_text()
    assert listed.count("  train-000000.tar") == 2 - empty
    assert ("  train-000003.tar" in listed) == (not empty)
    complaint(lambda: run(copy, "webdataset", out), "exists")
    assert not [name for name in tree(out) if name.startswith(".")]
    run(copy, "webdataset", out, shard_images=5, overwrite=True)
    assert contents(out) == contents(run(copy, "webdataset", tmp_path / "new", shard_images=5))


# ---------------------------------------------------------------- what is there already


@every_format
def test_what_is_there_is_refused_and_left(copy, to, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert run(copy, to, out, splits=["val"]) == out  # an empty one is taken
    before = contents(tmp_path)
    complaint(lambda: run(copy, to, out), out, "exists", "--overwrite")
    (tmp_path / "file").write_text("x")
    complaint(lambda: run(copy, to, tmp_path / "file", overwrite=True), "no directory")
    complaint(lambda: run(copy, to, copy, overwrite=True), copy, "is a data set")
    other = next(name for name in FORMATS if name != to)
    complaint(lambda: run(copy, other, out, overwrite=True), f"an export to {to}")
    complaint(lambda: run(copy, to, tmp_path / "file" / "out"), "cannot write", "irectory")
    assert contents(tmp_path) == before | {"file": b"x"}


@every_format
def test_overwrite_touches_nothing_of_others(copy, to, tmp_path):
    out = run(copy, to, tmp_path / "out", shard_images=2)
    mine = {"notes.txt": b"mine", "test/notes.txt": b"mine too", "train-000099.tar": b"mine"}
    for name, data in mine.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(data)
    run(copy, to, out, splits=["val"], shard_images=3, overwrite=True)
    fresh = contents(run(copy, to, tmp_path / "fresh", splits=["val"], shard_images=3))
    assert contents(out) == fresh | mine
    assert not [name for name in tree(out) if name.startswith((".", "train/"))]
    shutil.rmtree(out / "test")
    for name in mine.keys() - {"test/notes.txt"}:
        (out / name).unlink()
    check_list(out)


def test_overwrite_leaves_an_old_file_that_was_changed(copy, tmp_path):
    pytest.importorskip("webdataset")
    out = run(copy, "webdataset", tmp_path / "out")
    (out / "train-000000.tar").write_bytes(b"mine by now")
    run(copy, "webdataset", out, splits=["val"], overwrite=True)
    assert tree(out) == [LIST, "train-000000.tar", "val-000000.tar"]


def test_a_list_cannot_name_files_outside(copy, tmp_path):
    pytest.importorskip("webdataset")
    out = run(copy, "webdataset", tmp_path / "out")
    (tmp_path / "victim").write_bytes(b"x")
    digest = hashlib.sha256(b"x").hexdigest()
    with open(out / LIST, "a") as file:
        file.write(f"{digest}  ../victim\n{digest}  {tmp_path / 'victim'}\n")
    run(copy, "webdataset", out, overwrite=True)
    assert (tmp_path / "victim").exists()


def test_a_directory_in_the_way(copy, tmp_path):
    pytest.importorskip("pycocotools")
    for name, folder in (("train.json", True), ("train", False)):
        out = tmp_path / name / "out"
        run(copy, "coco", out, splits=["val"])
        if folder:
            (out / name / "deep").mkdir(parents=True)
        else:
            (out / name).write_text("a file")
        before, files = tree(out), contents(out)
        complaint(lambda out=out: run(copy, "coco", out, overwrite=True), out, "move it")
        assert tree(out) == before and contents(out) == files


def test_a_link_to_a_directory(copy, tmp_path):
    pytest.importorskip("webdataset")
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far")
    run(copy, "webdataset", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "far") == contents(run(copy, "webdataset", tmp_path / "plain"))


def test_where_it_goes_by_default(copy, monkeypatch):
    pytest.importorskip("webdataset")
    assert run(copy, "webdataset") == copy.parent / "set-webdataset"
    shutil.rmtree(copy.parent / "set-webdataset")
    monkeypatch.chdir(copy)
    assert run(Path("."), "webdataset").resolve() == copy.parent / "set-webdataset"


# ---------------------------------------------------------------- requests


def test_requests_that_cannot_be_met(copy, tmp_path, monkeypatch):
    complaint(lambda: run(copy, "coc"), "unknown format 'coc'", "Did you mean 'coco'?")
    complaint(lambda: run(tmp_path / "no", "coco"), "is no data set")
    complaint(lambda: run(copy, "coco", splits=["tets"]), "Did you mean 'test'?")
    complaint(lambda: run(copy, "coco", splits=[]), "no split")
    complaint(lambda: run(copy, "coco", shard_images=0), "0 images in a shard")
    for to, form in FORMATS.items():
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, form.library, None)
            complaint(lambda to=to: run(copy, to), f"export to {to} needs {form.library}",
                      "pip install 'mnistattn[export]'")  # fmt: skip
    assert tree(copy.parent) == ["set", *(f"set/{p}" for p in tree(copy))]


@pytest.fixture
def call(monkeypatch, capsys):
    """A function "command line" -> (exit code, standard output, standard error)."""
    monkeypatch.setattr(cli_module, "COMMANDS", (*{*cli_module.COMMANDS, "export"},))

    def run(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mnistattn", "export", *shlex.split(line)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli_module.main()
        out, err = capsys.readouterr()
        return left.value.code, out, err.rpartition("\r")[2]

    return run


@every_format
def test_the_command_line(copy, to, call, tmp_path):
    code, out, err = call(f"{copy} --to {to} --split val --split test --shard-images 4")
    assert code == 0 and out.count("\n") == 1 and f"{copy}-{to}: done." in out
    assert err == "" and not [p for p in tree(Path(f"{copy}-{to}")) if "train" in p]
    # The line that it prints does read the export.
    line = out.partition("Read it with: ")[2].strip()
    pytest.importorskip(READERS[to])
    if to != "parquet":  # which would fill the cache in the home directory
        module = line.partition("(")[0].rpartition(".")[0]
        package.import_module(module)
        library = module.partition(".")[0]
        found = eval(line, {library: sys.modules[library]})
        assert len(found.imgs if to == "coco" else list(found)) == 4


def test_errors_on_the_command_line(copy, call, tmp_path, monkeypatch):
    pytest.importorskip("pycocotools")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    for line, word in (
        (f"{copy} --to cocoa", "Did you mean 'coco'"),
        (f"{copy} --to coco --split vla", "Did you mean 'val'"),
        (f"{tmp_path} --to coco", "is no data set"),
        (f"{copy} --to coco --out {tmp_path / 'full'}", "--overwrite"),
        (f"{copy} --to coco --out {tmp_path / 'full' / 'x' / 'y'}", "cannot write"),
        (f"{copy} --to coco --shard-images -1", "-1 images"),
        (f"{copy}", "--to"),
    ):
        code, out, err = call(line)
        assert (code, out) == (2, "") and word in err and err.count("\n") == 1, line
    module = "mnistattn.dataset.export.coco.png"
    for error, expected, word in (
        (KeyboardInterrupt(), 130, "interrupted"), (OSError(28, "No space left"), 1, "No space"),
    ):  # fmt: skip

        def failing(image, error=error):
            raise error

        monkeypatch.setattr(module, failing)
        code, out, err = call(f"{copy} --to coco")
        assert (code, out) == (expected, "") and word in err and "Traceback" not in err
    assert tree(copy.parent) == ["set", *(f"set/{p}" for p in tree(copy))]


def test_help_fits_the_table():
    result = CliRunner().invoke(command, ["--help"])
    assert result.exit_code == 0 and "|".join(FORMATS) in result.output
    default = inspect.signature(export).parameters["shard_images"].default
    assert f"[default: {default}]" in " ".join(result.output.split())
    assert result.output.strip().splitlines()[-1].strip().startswith("Example: mnistattn export")
