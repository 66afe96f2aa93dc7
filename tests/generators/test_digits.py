"""The sources of digits: MNIST as it lies on disk, what happens without it, the splits' pools."""

import gzip
import hashlib
import socket
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from mnistattn.errors import InputError
from mnistattn.generators import digits
from mnistattn.generators.digits import mnist, open_digits
from mnistattn.generators.digits.pool import DigitPool
from mnistattn.generators.digits.strokes import stroke_glyphs
from mnistattn.generators.variants import SPLITS

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
needs_mnist = pytest.mark.skipif(
    not (DATA / "MNIST" / "raw").is_dir(), reason="needs MNIST in ../shared/data"
)


def idx(values: np.ndarray) -> bytes:
    magic = {1: 2049, 3: 2051}[values.ndim]
    return np.array([magic, *values.shape], ">u4").tobytes() + values.tobytes()


def fake_parts() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """MNIST's shapes; each image says which it is in its first pixels, its label is n % 10."""
    parts = {}
    for part, n in (("train", 60_000), ("t10k", 10_000)):
        images = np.zeros((n, 28, 28), np.uint8)
        images[:, 0, 0], images[:, 0, 1] = np.arange(n) & 255, np.arange(n) >> 8
        images[:, 0, 2] = part == "t10k"
        parts[part] = images, (np.arange(n) % 10).astype(np.uint8)
    return parts


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, (images, labels) in fake_parts().items():
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return root


@pytest.fixture
def no_network(monkeypatch):
    def refuse(data_root):
        raise InputError(f"MNIST is not in {data_root} and could not be downloaded (URLError).")

    monkeypatch.setattr(digits, "download_mnist", refuse)
    monkeypatch.setattr(digits, "STROKES_COUNT", {"train": 100, "val": 50, "test": 40})


@pytest.fixture
def linked(fake, tmp_path):
    """A data root whose files may be replaced, one by one."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (fake / "MNIST" / "raw").iterdir():
        (raw / file.name).symlink_to(file)
    return tmp_path


def put(root: Path, name: str, data: bytes) -> None:
    file = root / "MNIST" / "raw" / name
    (root / "MNIST" / "raw" / name.removesuffix(".gz")).unlink(missing_ok=True)
    file.write_bytes(data)


def test_idx_files(fake):
    parts, checksum = mnist.read_mnist(fake)
    for part, (images, labels) in fake_parts().items():
        assert np.array_equal(parts[part][0], images) and np.array_equal(parts[part][1], labels)
    expected = hashlib.sha256()
    for images, labels in fake_parts().values():
        expected.update(images.tobytes() + labels.tobytes())
    assert checksum == expected.hexdigest()


def test_gz_files_are_the_same(linked):
    before = mnist.read_mnist(linked)[1]
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        data = (linked / "MNIST" / "raw" / name).read_bytes()
        put(linked, name + ".gz", gzip.compress(data, 1))
    assert mnist.read_mnist(linked)[1] == before


@pytest.mark.parametrize("damage", ["cut", "longer", "magic", "count", "empty"])
def test_a_damaged_file_is_named(linked, damage):
    name = "t10k-images-idx3-ubyte"
    data = (linked / "MNIST" / "raw" / name).read_bytes()
    data = {
        "cut": data[:-1], "longer": data + b"\0", "magic": b"\0\0\x08\x01" + data[4:],
        "count": data[:7] + b"\x11" + data[8:], "empty": b"",
    }[damage]  # fmt: skip
    put(linked, name, data)
    with pytest.raises(InputError, match=f"{name} is damaged or not MNIST's"):
        mnist.read_mnist(linked)
    with pytest.raises(InputError, match=name):
        open_digits("mnist", linked, "separate", 0, pytest.fail)


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty"])
def test_a_damaged_gz_file_is_named(linked, damage):
    name = "t10k-labels-idx1-ubyte"
    data = gzip.compress((linked / "MNIST" / "raw" / name).read_bytes())
    middle = len(data) // 2
    data = {
        "cut": data[:middle], "text": b"<html>no such file</html>", "empty": b"",
        "flipped": data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :],
    }[damage]  # fmt: skip
    put(linked, name + ".gz", data)
    with pytest.raises(InputError, match=f"{name}.* is damaged or not MNIST's"):
        mnist.read_mnist(linked)


def test_labels_above_nine_are_not_mnist(linked):
    labels = np.full(10_000, 10, np.uint8)
    put(linked, "t10k-labels-idx1-ubyte", idx(labels))
    with pytest.raises(InputError, match="t10k-labels-idx1-ubyte is not MNIST's"):
        mnist.read_mnist(linked)


def numbers(pool: DigitPool) -> set[tuple[int, int]]:
    """(test set?, position) of each glyph of a pool of the fake MNIST."""
    first = pool.images[:, 0, :3].astype(int)
    return set(zip(first[:, 2].tolist(), (first[:, 0] + 256 * first[:, 1]).tolist(), strict=True))


def test_separate_and_pooled(fake):
    said = []
    pools, card = open_digits("mnist", fake, "separate", 0, said.append)
    assert said == []
    assert card["source"] == "mnist" and card["split"] == "separate"
    assert card["sha256"] == mnist.read_mnist(fake)[1]
    assert numbers(pools("train")) == {(0, n) for n in range(50_000)}
    assert numbers(pools("val")) == {(0, n) for n in range(50_000, 60_000)}
    assert numbers(pools("test")) == {(1, n) for n in range(10_000)}
    pools, card = open_digits("auto", fake, "pooled", 0, said.append)
    assert card["split"] == "pooled" and len(said) == 1 and "MNIST" in said[0]
    everything = {(0, n) for n in range(60_000)} | {(1, n) for n in range(10_000)}
    assert all(numbers(pools(split)) == everything for split in SPLITS)


def test_without_mnist(no_network, tmp_path):
    said = []
    with pytest.raises(InputError, match="could not be downloaded"):
        open_digits("mnist", tmp_path, "separate", 0, said.append)
    said.clear()
    pools, card = open_digits("auto", tmp_path, "separate", 5, said.append)
    assert card == {
        "source": "strokes", "split": "separate", "seed": 5,
        "count": {"train": 100, "val": 50, "test": 40},
    }  # fmt: skip
    told = [line for line in said if "strokes" in line]
    assert len(told) == 1 and "\n" not in told[0] and str(tmp_path) in told[0]
    assert np.array_equal(pools("val").images, stroke_glyphs(5, "val", 50)[0])


def test_a_download_that_works_is_used(fake, tmp_path, monkeypatch):
    def download(data_root):
        (data_root / "MNIST").symlink_to(fake / "MNIST")

    monkeypatch.setattr(digits, "download_mnist", download)
    said = []
    _, card = open_digits("mnist", tmp_path, "separate", 0, said.append)
    assert card["source"] == "mnist"
    assert len(said) == 1 and "download" in said[0]


def test_any_failure_of_the_download_is_one_sentence(tmp_path, monkeypatch):
    def fail(*args, **options):
        assert socket.getdefaulttimeout() == mnist.DOWNLOAD_TIMEOUT
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nmany\nlines")

    # Stands in for torchvision, which takes seconds to import.
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", SimpleNamespace(MNIST=fail))
    before = socket.getdefaulttimeout()
    with pytest.raises(InputError, match="could not be downloaded") as caught:
        mnist.download_mnist(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert socket.getdefaulttimeout() == before


def test_strokes(no_network, tmp_path):
    pools, card = open_digits("strokes", tmp_path, "separate", 0, pytest.fail)
    assert card["source"] == "strokes"
    images = {split: {glyph.tobytes() for glyph in pools(split).images} for split in SPLITS}
    assert [len(images[split]) for split in SPLITS] == [100, 50, 40]
    assert len(set().union(*images.values())) == 190
    pooled, card = open_digits("strokes", tmp_path, "pooled", 0, pytest.fail)
    assert card["split"] == "pooled"
    assert all(np.array_equal(pooled(s).images, pools("train").images) for s in SPLITS)
    other, _ = open_digits("strokes", tmp_path, "separate", 1, pytest.fail)
    assert not np.array_equal(other("train").images, pools("train").images)


def test_unknown_names(tmp_path):
    with pytest.raises(InputError, match="Did you mean 'mnist'"):
        open_digits("minst", tmp_path, "separate", 0)
    with pytest.raises(InputError, match="Did you mean 'pooled'"):
        open_digits("strokes", tmp_path, "pool", 0)


def test_a_pool_finds_each_class():
    labels = np.random.default_rng(0).permutation(np.arange(50) % 10).astype(np.uint8)
    images = np.zeros((50, 28, 28), np.uint8)
    images[:, 0, 0] = np.arange(50)
    pool = DigitPool.from_labels(images, labels)
    assert pool.start.tolist() == list(range(0, 51, 5))
    for d in range(10):
        found = pool.images[pool.order[pool.start[d] : pool.start[d + 1]], 0, 0]
        assert found.tolist() == np.flatnonzero(labels == d).tolist()


@needs_mnist
def test_real_mnist_is_read_and_shared_out_without_overlap():
    said = []
    pools, card = open_digits("auto", DATA, "separate", 0, said.append)
    assert card["source"] == "mnist" and len(said) == 1
    images = {}
    for split, n in (("train", 50_000), ("val", 10_000), ("test", 10_000)):
        pool = pools(split)
        assert len(pool.images) == n and (np.diff(pool.start) > 800).all()
        assert 30 < pool.images.mean() < 37  # MNIST's is 33.3 of 255
        images[split] = {glyph.tobytes() for glyph in pool.images}
        assert len(images[split]) == n
    assert not images["train"] & images["val"]
    assert not images["train"] & images["test"] and not images["val"] & images["test"]
    ones = pools("test")
    assert int(np.diff(ones.start)[1]) == 1135  # the test set's ones


def test_a_damaged_mnist_is_never_replaced_silently(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(b"not MNIST")
    with pytest.raises(InputError, match="train-images-idx3-ubyte is damaged"):
        open_digits("auto", tmp_path, "separate", 0, lambda line: None)
