"""verify and repair: every damaged byte is found at its place, and only that is made anew."""

import json
import random
import re
import shutil
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from mnistattn.dataset import repair as repairing
from mnistattn.dataset import seal
from mnistattn.dataset import shards as sharding
from mnistattn.dataset.format import layout
from mnistattn.dataset.lock import only_writer
from mnistattn.dataset.paint import Painter
from mnistattn.dataset.read import open_split, read_card, read_split
from mnistattn.dataset.repair import repair
from mnistattn.dataset.seal import STRUCTURE, BlockSums, flip_back, is_sealed, sealed
from mnistattn.dataset.verify import verify
from mnistattn.dataset.write import generate
from mnistattn.errors import InputError, MnistattnError
from mnistattn.generators import digits
from mnistattn.generators.variants import Spec

BLOCK = 4
SECOND = "train-00001-of-00003"


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A data set with and without shards, in blocks of 4 images; read only."""
    root = tmp_path_factory.mktemp("sets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "STROKES_COUNT", {"train": 200, "val": 100, "test": 100})
        patch.setattr(seal, "BLOCK", BLOCK)
        sharding._painters.clear()
        yield {
            shards: generate(
                "mref", root / str(shards), train=30, val=0, test=5, digits="strokes", workers=1,
                shards=shards, size=64, max_scale=1.5, progress=False, say=lambda line: None,
            )
            for shards in (None, 3)
        }  # fmt: skip
    sharding._painters.clear()


@pytest.fixture(params=[None, 3], ids=["one file", "shards"])
def copy(request, sets, tmp_path) -> Path:
    """A data set to be damaged, of one file a split, or of shards."""
    return Path(shutil.copytree(sets[request.param], tmp_path / "set"))


@pytest.fixture
def shards(sets, tmp_path) -> Path:
    """A data set of shards to be damaged."""
    return Path(shutil.copytree(sets[3], tmp_path / "set"))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def flip(file: Path, byte: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[byte] ^= 1 << bit
    file.write_bytes(data)


def found(path: Path) -> list[tuple[str, str, int, int]]:
    return [(d.file.name, d.array, d.first, d.last) for d in verify(path, 0).damage]


def repaired(path: Path, before: dict[str, bytes]) -> list[str]:
    """Repair; what was said. Afterwards every byte is as it was."""
    said: list[str] = []
    assert repair(path, 0, say=said.append).problems == []
    assert contents(path) == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return [line for line in said if line.startswith("repaired")]


# ---------------------------------------------------------------- flipped bits


def places(file: Path) -> list[tuple[str, int]]:
    """(array or STRUCTURE, byte): the ends of every run of bytes of a file."""
    with h5py.File(file, "r") as h5:
        arrays = sorted((h5[n].id.get_offset(), h5[n].id.get_storage_size(), n) for n in h5)
    runs, at = [], 0
    for offset, size, name in arrays:
        runs += [(STRUCTURE, at, offset), (name, offset, offset + size)]
        at = offset + size
    runs.append((STRUCTURE, at, file.stat().st_size))
    return [(name, byte) for name, a, b in runs for byte in {a, (a + b) // 2, b - 1} if a < b]


def test_a_flip_anywhere_is_found_in_its_place(copy):
    """The first, middle and last byte of every array, of HDF5's own bytes and of the padding."""
    file = copy / (f"{SECOND}.h5" if (copy / f"{SECOND}.h5").exists() else "train.h5")
    first = 10 if file.stem == SECOND else 0
    n = 10 if first else 30
    whole, seen = file.read_bytes(), set()
    for array, byte in places(file):
        flip(file, byte, byte % 8)
        ((name, what, a, b),) = found(copy)
        assert (name, what) == (file.name, array), byte
        if array != STRUCTURE:
            assert a % BLOCK == first % BLOCK and b == min(a + BLOCK, first + n) - 1
            with h5py.File(file, "r") as h5:
                row = h5[array].id.get_storage_size() // n
                assert a <= first + (byte - h5[array].id.get_offset()) // row <= b
        seen.add(array)
        file.write_bytes(whole)
    assert seen == {STRUCTURE, *layout(read_card(copy).spec)}
    assert found(copy) == []


def test_random_flips_are_found_and_repaired(copy):
    """In every file, each of them by itself, byte for byte."""
    before, rng = contents(copy), random.Random(5)
    for name in sorted(before):
        for _ in range(2):
            flip(copy / name, rng.randrange(len(before[name])), rng.randrange(8))
            if name == "dataset.json":
                with pytest.raises(InputError) if not readable(copy) else no_error():
                    ((damaged, *_),) = found(copy)
                    assert damaged == name
            else:
                ((damaged, *_),) = found(copy)
                assert damaged == name
            repaired(copy, before)


class no_error:
    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


def readable(path: Path) -> bool:
    try:
        read_card(path)
    except InputError:
        return False
    return True


def test_the_words(shards):
    with h5py.File(shards / f"{SECOND}.h5") as h5:
        image = h5["image"].id.get_offset()
    flip(shards / f"{SECOND}.h5", image + 9 * 64 * 64 * 3)
    verdict = verify(shards, 0)
    assert verdict.problems == [f"{SECOND}.h5 is damaged: 'image' of images 18 to 19."]
    flip(shards / f"{SECOND}.h5", 3)
    flip(shards / f"{SECOND}.json", 30)
    (shards / "test-00000-of-00001.h5").unlink()
    (shards / "train-00000-of-00003.json").unlink()
    problems = verify(shards, 0).problems
    assert problems == [
        "train-00000-of-00003.json is missing.",
        f"{SECOND}.json is damaged, or of another data set.",
        "test-00000-of-00001.h5 is missing.",
    ]
    lines = [line.split()[1] for line in repair_lines(shards)]
    assert lines == ["train-00000-of-00003.json", *[f"{SECOND}.json"], *2 * [f"{SECOND}.h5"],
                     "test-00000-of-00001.h5"]  # fmt: skip
    assert verify(shards, 0).problems == []


def repair_lines(path: Path) -> list[str]:
    said: list[str] = []
    repair(path, 0, say=said.append)
    return [line for line in said if line.startswith("repaired")]


def test_neighbouring_blocks_are_one_range_and_much_damage_is_cut_short(copy):
    file = sorted(copy.glob("train*.h5"))[0]
    before, data = contents(copy), bytearray(file.read_bytes())
    with h5py.File(file) as h5:
        offset = h5["instances"].id.get_offset()
    for byte in range(offset, offset + 8 * 64 * 64):
        data[byte] ^= 255
    file.write_bytes(data)
    assert found(copy) == [(file.name, "instances", 0, 7)]
    repaired(copy, before)
    for path in copy.glob("*.h5"):
        path.write_bytes(path.read_bytes()[:2048] + bytes(path.stat().st_size - 2048))
    verdict = verify(copy, 0)
    assert len(verdict.damage) >= 18 and len(verdict.problems) <= 21
    repaired(copy, before)


# ---------------------------------------------------------------- files that are gone or another's


@pytest.mark.parametrize("what", ["missing", "cut", "longer", "empty", "text"])
def test_a_file_that_is_not_what_it_was(copy, what):
    before, file = contents(copy), sorted(copy.glob("test*.h5"))[0]
    if what == "missing":
        file.unlink()
    else:
        data = file.read_bytes()
        file.write_bytes({"cut": data[:-1], "longer": data + b"x", "empty": b"",
                          "text": b"no HDF5"}[what])  # fmt: skip
    (problem,) = verify(copy, 0).problems
    assert problem.startswith(f"{file.name} {'is missing' if what == 'missing' else 'has '}")
    assert len(repaired(copy, before)) == 1


def test_a_shard_of_another_data_set_is_refused_by_name(sets, shards, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "STROKES_COUNT", {"train": 200, "val": 100, "test": 100})
        other = generate(
            "mref", tmp_path / "other", train=30, val=0, test=5, seed=1, digits="strokes",
            workers=1, shards=3, size=64, max_scale=1.5, progress=False, say=lambda line: None,
        )  # fmt: skip
        sharding._painters.clear()
    before = contents(shards)
    shutil.copy(other / f"{SECOND}.h5", shards)
    card = read_card(shards)
    for action in (
        lambda: read_split(card, "train"),
        lambda: open_split(card, "train")["image"][12],
    ):
        with pytest.raises(InputError, match=rf"{SECOND}\.h5 is not of this data set"):
            action()
    assert len(open_split(card, "train")["image"][:10]) == 10  # the first shard is ours
    (problem,) = verify(shards, 0).problems
    assert problem.startswith(f"{SECOND}.h5 is of another data set")
    shutil.copy(other / f"{SECOND}.json", shards)
    (problem,) = verify(shards, 0).problems
    assert problem == f"{SECOND}.json is damaged, or of another data set."
    shutil.rmtree(other)
    assert len(repaired(shards, before)) == 1


def test_two_shards_exchanged(shards):
    a, b = (shards / f"train-0000{k}-of-00003.h5" for k in (0, 1))
    before = contents(shards)
    a.write_bytes(before[b.name])
    b.write_bytes(before[a.name])
    assert [(name, array) for name, array, *_ in found(shards)] == [(a.name, ""), (b.name, "")]
    with pytest.raises(InputError, match="not the shard its name says"):
        read_split(read_card(shards), "train")
    repaired(shards, before)


# ---------------------------------------------------------------- cards


def test_a_card_that_was_edited(copy):
    file = copy / "dataset.json"
    text = file.read_text()
    for changed in (
        text.replace('"seed": 0', '"seed": 8'), text.replace("\n", "\n\n", 1), text + "\n",
        json.dumps(json.loads(text)), text.replace('"seal"', '"sael"'),
    ):  # fmt: skip
        assert changed != text
        file.write_text(changed)
        verdict = verify(copy, 0)
        assert verdict.problems == ["dataset.json is not as it was written (its seal is broken)."]
        assert verdict.notes and not verdict.checked
    with pytest.raises(MnistattnError, match="beyond one flipped bit"):
        repair(copy, 0)


def test_seals():
    data = sealed({"a": 1, "b": [1, 2]})
    assert json.loads(data)["a"] == 1 and is_sealed(data) is True
    assert sealed(json.loads(data)) == data  # sealing again gives the same
    assert is_sealed(b"{}\n") is None
    for byte in range(len(data)):
        for bit in range(8):
            flipped = data[:byte] + bytes([data[byte] ^ 1 << bit]) + data[byte + 1 :]
            assert not is_sealed(flipped)
            assert flip_back(flipped) == data
    assert flip_back(data.replace(b"1", b"4")) is None


def test_the_sums_of_blocks(monkeypatch):
    """Fed in any pieces, they are zlib's CRC-32 of each block's bytes."""
    monkeypatch.setattr(seal, "BLOCK", 256)
    spec, rng = Spec("mref", size=28, max_scale=1), np.random.default_rng(0)
    arrays = {
        name: rng.integers(0, 2, (600, *shape)).astype(dtype)
        for name, (shape, dtype) in layout(spec).items()
    }
    for cuts in ([0, 600], [0, 1, 256, 257, 600], list(range(0, 601, 100))):
        sums = BlockSums(spec, 600)
        assert sums.block == 256
        for a, b in zip(cuts, cuts[1:], strict=False):
            sums.update_all({name: values[a:b] for name, values in arrays.items()})
        for name, values in arrays.items():
            expected = [zlib.crc32(values[k : k + 256].tobytes()) for k in (0, 256, 512)]
            assert re.findall("." * 8, sums.hex()[name]) == [f"{c:08x}" for c in expected]
    assert seal.block_images(256 * 512) == 256 and seal.block_images(256 * 512 + 1) == 512
    assert 256 < 10**12 // seal.block_images(10**12) <= 512


# ---------------------------------------------------------------- older data sets


def test_a_data_set_from_before_files_were_sealed(sets, tmp_path):
    copy = Path(shutil.copytree(sets[None], tmp_path / "set"))
    card = json.loads((copy / "dataset.json").read_text())
    del card["seal"]
    for entry in card["splits"].values():
        del entry["file"]
    (copy / "dataset.json").write_text(json.dumps(card, indent=2) + "\n")
    verdict = verify(copy, 0)
    assert verdict.problems == [] and len(verdict.checked) == len(verdict.notes) == 2
    assert "its arrays alone were checked" in verdict.notes[0]
    read_split(read_card(copy), "train", check=True)
    with h5py.File(copy / "test.h5") as h5:
        offset = h5["color"].id.get_offset()
    flip(copy / "test.h5", offset)
    assert verify(copy, 0).problems == [
        "test.h5 does not have its digest: color differ from the card."
    ]
    assert repair(copy, 0).problems  # it does not know which images


# ---------------------------------------------------------------- repairs that cannot be


def test_without_the_sources_nothing_is_touched(copy, monkeypatch):
    file = sorted(copy.glob("test*.h5"))[0]
    with h5py.File(file) as h5:
        offset = h5["image"].id.get_offset()
    flip(file, offset)
    before = contents(copy)
    monkeypatch.setattr(digits, "STROKES_COUNT", {"train": 5, "val": 5, "test": 5})
    with pytest.raises(InputError) as caught:
        repair(copy, 0)
    assert str(caught.value) == (
        f"{copy} cannot be repaired: the digits at hand are not those of the card (SHA-256)."
    )
    assert contents(copy) == before
    flip(file, offset)
    flip(file, 0)
    repair(copy, 0)  # HDF5's own bytes need no source
    assert found(copy) == []


@pytest.mark.parametrize("whole", [False, True])
def test_what_is_drawn_otherwise_is_not_written(copy, monkeypatch, whole):
    well, file = Painter.paint, sorted(copy.glob("test*.h5"))[0]
    if whole:
        file.unlink()
    else:
        with h5py.File(file) as h5:
            offset = h5["query"].id.get_offset()
        flip(file, offset)
    before = contents(copy)

    def paint(painter, indices):
        arrays, effort = well(painter, indices)
        arrays["query"] ^= 1
        return arrays, effort

    monkeypatch.setattr(Painter, "paint", paint)
    with pytest.raises(MnistattnError, match=r"it was made with mnistattn \S+, h5py \S+, or other"):
        repair(copy, 0)
    assert contents(copy) == before


def test_another_process_is_at_it(copy):
    with only_writer(copy), pytest.raises(InputError, match="is being written by process"):
        repair(copy, 0)


def test_a_repair_of_what_is_whole_touches_nothing(copy, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in copy.iterdir()}
    monkeypatch.setattr(repairing, "open_sources", None)
    assert repair(copy, 0).problems == []
    assert {p: p.stat().st_mtime_ns for p in copy.iterdir()} == before


def test_images_are_drawn_anew(copy):
    verdict = verify(copy, 40)
    assert [line.partition(":")[0] for line in verdict.checked] == ["train"] * 2 + ["test"] * 2
    assert verdict.notes == []


def test_a_sum_that_is_not_that_of_its_parts(shards):
    """Each shard is whole, and the card, sealed, names another digest for all of them."""
    card = json.loads((shards / "dataset.json").read_text())
    card["splits"]["train"]["digest"] = "0" * 64
    (shards / "dataset.json").write_bytes(sealed(card))
    assert verify(shards, 0).problems == ["train does not have the digest of its card."]
