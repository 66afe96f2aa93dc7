"""Shards: the same images and digests as without, continued after anything, one writer at a time.

Shards are made in this process (workers=1) but where processes matter.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mnistattn.dataset import shards as sharding
from mnistattn.dataset import write
from mnistattn.dataset.describe import describe
from mnistattn.dataset.lock import only_writer, work_folder
from mnistattn.dataset.paint import Painter
from mnistattn.dataset.read import batches, open_split, read_card, read_split
from mnistattn.dataset.shards import Shard, plan_shards
from mnistattn.dataset.sheet import sheet_of
from mnistattn.dataset.write import generate
from mnistattn.errors import InputError, MnistattnError
from mnistattn.generators import digits

COUNTS = {"train": 23, "val": 9, "test": 2}
NAMES = [f"train-{k:05d}-of-00005" for k in range(5)] + ["val-00000-of-00002", "val-00001-of-00002",
         "test-00000-of-00001"]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def few_strokes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "STROKES_COUNT", {"train": 200, "val": 100, "test": 100})
        sharding._painters.clear()
        yield
    sharding._painters.clear()


def make(out: Path, variant="mref", said=None, **options) -> Path:
    options = {**COUNTS, "digits": "strokes", "progress": False, "workers": 1, "shards": 5,
               **options}  # fmt: skip
    say = (lambda line: None) if said is None else said.append
    return generate(variant, out, say=say, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The unsharded data set; read only."""
    return make(tmp_path_factory.mktemp("whole") / "set", shards=None)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """The same in shards; read only."""
    return make(tmp_path_factory.mktemp("sharded") / "set")


def digests(path: Path) -> dict[str, str]:
    return {split: entry["digest"] for split, entry in read_card(path).splits.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# ---------------------------------------------------------------- one data set, in many files


def test_files_and_digests(whole, sharded):
    assert digests(sharded) == digests(whole)
    assert {p.name for p in sharded.iterdir()} == {"dataset.json"} | {
        name + end for name in NAMES for end in (".h5", ".json")
    }  # fmt: skip
    one, many = read_card(whole), read_card(sharded)
    for split in COUNTS:
        for name in ("count", "digest", "arrays", "placement"):
            assert one.splits[split][name] == many.splits[split][name], name
    assert [p.name for p in sharded.parent.iterdir()] == ["set"]


@pytest.mark.parametrize("shards", [1, 2, 23])
def test_the_number_of_shards_does_not_matter(tmp_path, whole, shards):
    assert digests(make(tmp_path / "set", shards=shards)) == digests(whole)


def test_plans():
    for counts, shards in ((COUNTS, 5), ({"val": 10}, 10), ({"train": 10**12, "test": 7}, 999)):
        planned = plan_shards(counts, shards)
        most = max(counts.values())
        for split, n in counts.items():
            own = [shard for shard in planned if shard.split == split]
            assert [s.number for s in own] == list(range(own[0].shards)) and len(own) >= 1
            assert [s.first for s in own] == [sum(t.count for t in own[:k])
                                              for k in range(len(own))]  # fmt: skip
            assert sum(s.count for s in own) == n and all(s.count > 0 for s in own)
            assert max(s.count for s in own) <= -(-most // shards)
            assert len(own) == shards or n < most


def test_what_reads_reads_it_as_one(whole, sharded):
    one, many = read_card(whole), read_card(sharded)
    for split, n in COUNTS.items():
        expected, found = read_split(one, split, check=True), read_split(many, split, check=True)
        for name, values in expected.items():
            assert found[name].dtype == values.dtype and np.array_equal(found[name], values), name
        for rows in (1, 4, 7, 100):
            pieces = list(batches(many, split, rows))
            assert [first for first, _ in pieces] == list(range(0, n, rows))
            for name, values in expected.items():
                assert np.array_equal(np.concatenate([p[name] for _, p in pieces]), values)
        assert list(read_split(many, split, ("query",))) == ["query"]
    assert np.array_equal(sheet_of(sharded, "train", 9), sheet_of(whole, "train", 9))
    text = describe(sharded).replace(" (5 shards)", "").replace(" (2 shards)", "")
    assert text.replace(" (1 shard)", "").replace(str(sharded), "") == describe(whole).replace(
        str(whole), ""
    )


def test_rows_as_of_an_array(sharded):
    card = read_card(sharded)
    expected = read_split(card, "train")
    with open_split(card, "train") as files:
        for name, values in expected.items():
            column = files[name]
            assert column.shape == values.shape and column.dtype == values.dtype
            assert len(column) == 23
            for rows in (0, 22, -1, -23, np.int64(5), slice(3, 9), slice(None), slice(20, 99),
                         slice(9, 3), slice(0, 23, 4), slice(None, None, -1), ()):  # fmt: skip
                assert np.array_equal(column[rows], values[rows]), (name, rows)
        for row in (23, -24):
            with pytest.raises(IndexError):
                files["query"][row]


def test_few_files_are_open_at_a_time(sharded, monkeypatch):
    monkeypatch.setattr("mnistattn.dataset.read.OPEN_SHARDS", 2)
    card = read_card(sharded)
    query = read_split(card, "train", ["query"])["query"]
    with open_split(card, "train") as files:
        for k in np.random.default_rng(0).integers(0, 23, 50):
            assert files["query"][k] == query[k]
            assert len(files._open) <= 2


def test_torch_and_export(whole, sharded, tmp_path):
    torch = pytest.importorskip("torch")
    import mnistattn

    ours, theirs = (mnistattn.load(p, target_types=("query", "mask")) for p in (sharded, whole))
    batch = next(iter(torch.utils.data.DataLoader(ours, batch_size=23, num_workers=1)))
    for k in range(23):
        image, (query, mask) = theirs[k]
        assert torch.equal(batch[0][k], image) and batch[1][0][k] == query
        assert torch.equal(batch[1][1][k], mask)
    pytest.importorskip("pycocotools")
    for path, name in ((sharded, "a"), (whole, "b")):
        mnistattn.export(path, "coco", tmp_path / name, progress=False, say=lambda line: None)
    ours, theirs = ({p.relative_to(tmp_path / n): p.read_bytes() for p in
                     (tmp_path / n).rglob("*") if p.is_file()} for n in "ab")  # fmt: skip
    assert ours == theirs and len(ours) > 30


def test_processes_make_the_same(tmp_path, monkeypatch):
    """Of full stroke pools, for a process does not know of this file's small ones."""
    monkeypatch.undo()
    monkeypatch.setattr(digits, "STROKES_COUNT", {"train": 50_000, "val": 10_000, "test": 10_000})
    options = {"train": 40, "val": 0, "test": 0}
    expected = digests(make(tmp_path / "one", shards=None, **options))
    assert digests(make(tmp_path / "local", workers=2, shards=4, **options)) == expected
    pytest.importorskip("distributed", reason="Dask's distributed is not installed")
    made = make(tmp_path / "dask", workers=2, shards=4, engine="dask", **options)
    assert digests(made) == expected
    assert contents(made) == contents(tmp_path / "local")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shards": 0}, "^0 shards of 23 images are impossible: give 1 to 23.$"),
        ({"shards": 24}, "^24 shards of 23 images are impossible"),
        ({"shards": -1}, "^-1 shards"),
        ({"train": 200_000, "shards": 100_000}, "give 1 to 99999"),
        ({"shards": None, "engine": "dask"}, "give --shards"),
        ({"shards": None, "scheduler": "tcp://x:1"}, "give --shards"),
        ({"engine": "dsk"}, "Did you mean 'dask'"),
        ({"scheduler": "tcp://x:1", "engine": "local", "workers": None}, "give --engine dask"),
        ({"scheduler": "tcp://x:1"}, "has its own workers: leave --workers out"),
    ],
)
def test_impossible_requests(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        make(tmp_path / "set", **options)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- continued


class Stop(Exception):
    pass


def interrupted(monkeypatch, out: Path, at: int, error: BaseException | None = None, **options):
    """Make a data set that fails at train's image `at`; returns what was said."""
    well, said = Painter.paint, []

    def paint(painter, indices):
        if at in indices:
            raise error or Stop
        return well(painter, indices)

    with monkeypatch.context() as patch:
        patch.setattr(Painter, "paint", paint)
        with pytest.raises((Stop, MnistattnError, KeyboardInterrupt)) as caught:
            make(out, said=said, **options)
    return said, caught.value


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), OSError(errno.ENOSPC, "No space")])
def test_what_was_stopped_is_continued(tmp_path, sharded, monkeypatch, error):
    out = tmp_path / "set"
    said, caught = interrupted(monkeypatch, out, 12, error)
    assert said[-1] == f"{out}: 2 of 8 shards are kept; the same command continues"
    if isinstance(error, OSError):
        assert str(caught) == f"cannot write {out}: No space."
    work = work_folder(out)
    assert not out.exists() and [p.name for p in tmp_path.iterdir()] == [work.name]
    kept = {p.name: p.stat().st_ino for p in work.glob("*.h5")}
    assert sorted(kept) == [f"{name}.h5" for name in NAMES[:2]]
    assert not list(work.glob(".*"))

    said = []
    make(out, said=said)
    assert f"{out}: 2 of 8 shards are there; they are checked and kept" in said
    assert contents(out) == contents(sharded)
    assert all((out / name).stat().st_ino == inode for name, inode in kept.items())
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_nothing_is_left_of_a_start_that_failed(tmp_path, monkeypatch):
    interrupted(monkeypatch, tmp_path / "set", 0)
    assert list(tmp_path.iterdir()) == []


DAMAGE = {
    "a flipped bit": lambda w: flip(w / f"{NAMES[0]}.h5", 5000),
    "a flipped bit of the manifest": lambda w: flip(w / f"{NAMES[0]}.json", 99),
    "no manifest": lambda w: (w / f"{NAMES[0]}.json").unlink(),
    "no file": lambda w: (w / f"{NAMES[0]}.h5").unlink(),
    "cut off": lambda w: os.truncate(w / f"{NAMES[0]}.h5", 10_000),
    "another shard": lambda w: swap(w, ".h5"),
    "another shard and manifest": lambda w: (swap(w, ".h5"), swap(w, ".json")),
    "no request": lambda w: (w / "request.json").unlink(),
    "a damaged request": lambda w: (w / "request.json").write_text("{"),
    "a file of a dead worker": lambda w: (w / ".train-00003.h5.tmp-host-1-ab").write_text("x"),
}


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


def swap(folder: Path, end: str) -> None:
    a, b = (folder / f"{name}{end}" for name in NAMES[:2])
    a_bytes = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(a_bytes)


@pytest.mark.parametrize("damage", DAMAGE)
def test_only_what_is_whole_is_kept(tmp_path, sharded, monkeypatch, damage):
    out = tmp_path / "set"
    interrupted(monkeypatch, out, 12)
    DAMAGE[damage](work_folder(out))
    make(out)
    assert contents(out) == contents(sharded)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_shard_of_another_seed_is_not_kept(tmp_path, sharded, monkeypatch):
    out, other = tmp_path / "set", make(tmp_path / "other", seed=1)
    interrupted(monkeypatch, out, 12)
    for end in (".h5", ".json"):
        shutil.copy(other / f"{NAMES[0]}{end}", work_folder(out))
    make(out)
    assert contents(out) == contents(sharded)


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"seed": 3}, "seed is 0 there and 3 here"),
        ({"shards": 6}, "shards is 5 there and 6 here"),
        ({"train": 24}, "counts.train is 23 there and 24 here"),
        ({"val": 0}, "counts.val is 9 there and absent here"),
        ({"min_scale": 0.75}, "min_scale is 0.5 there and 0.75 here"),
        ({"digit_split": "pooled"}, "sources.digits.split is separate there and pooled here"),
    ],
)
def test_another_request_is_refused(tmp_path, monkeypatch, options, difference):
    out = tmp_path / "set"
    interrupted(monkeypatch, out, 12)
    before = contents(work_folder(out))
    with pytest.raises(InputError) as caught:
        make(out, **options)
    assert difference in str(caught.value) and "--overwrite" in str(caught.value)
    assert contents(work_folder(out)) == before
    make(out, overwrite=True, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_another_mnistattn_is_refused(tmp_path, monkeypatch):
    out = tmp_path / "set"
    interrupted(monkeypatch, out, 12)
    new = {"mnistattn": "9.9", "generators": "0" * 12}
    monkeypatch.setattr(sharding, "code_version", lambda: new)
    with pytest.raises(InputError, match=r"code.mnistattn is \S+ there and 9.9 here"):
        make(out)


def test_an_unsharded_request_does_not_forget_the_shards(tmp_path, monkeypatch):
    out = tmp_path / "set"
    interrupted(monkeypatch, out, 12)
    with pytest.raises(InputError, match="unfinished data set of shards: --shards as before"):
        make(out, shards=None)
    assert len(list(work_folder(out).glob("*.h5"))) == 2
    make(out, shards=None, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_data_set_that_is_there(tmp_path, sharded, whole):
    out = Path(shutil.copytree(sharded, tmp_path / "set"))
    said: list[str] = []
    make(out, said=said)
    assert said == [f"{out} is there already; 'mnistattn verify' checks it"]
    with pytest.raises(InputError, match=r"another data set \(seed is 0 there and 4 here\)"):
        make(out, seed=4)
    with pytest.raises(InputError, match="exists: give another --out"):
        make(out, shards=None)
    assert contents(out) == contents(sharded)
    make(out, seed=4, overwrite=True)
    assert read_card(out).raw["seed"] == 4
    plain = Path(shutil.copytree(whole, tmp_path / "plain"))
    with pytest.raises(InputError, match="exists: give another --out"):
        make(plain)


def test_overwriting_continues_and_the_old_one_stays_till_then(tmp_path, sharded, monkeypatch):
    out = make(tmp_path / "set", seed=9)
    old = contents(out)
    interrupted(monkeypatch, out, 12, overwrite=True)
    assert contents(out) == old
    kept = (work_folder(out) / f"{NAMES[0]}.h5").stat().st_ino
    make(out, overwrite=True)
    assert contents(out) == contents(sharded)
    assert (out / f"{NAMES[0]}.h5").stat().st_ino == kept


def test_what_dead_writers_left_is_put_away(tmp_path, sharded):
    (tmp_path / ".set.partial-123").mkdir()
    (tmp_path / ".set.partial-123" / "train.h5").write_text("x")
    (tmp_path / ".set.lock").write_text("process 1 on a host\n")
    shutil.copytree(sharded, tmp_path / ".set.old-99")  # died between its two renames
    (tmp_path / ".other.partial-1").mkdir()
    said: list[str] = []
    out = make(tmp_path / "set", said=said)
    assert "is there already" in said[-1] and contents(out) == contents(sharded)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.partial-1", "set"]


def test_what_changes_on_disk_after_it_was_written_is_found(tmp_path, monkeypatch):
    well, out = sharding.write_shard, tmp_path / "set"

    def written(plan, shard, folder, painter):
        result = well(plan, shard, folder, painter)
        if shard.stem == NAMES[1]:
            flip(folder / f"{shard.stem}.h5", 100_000)
        return result

    monkeypatch.setattr(sharding, "write_shard", written)
    with pytest.raises(MnistattnError, match=r"train-00001-of-00005\.h5 is damaged: .* It changed"):
        make(out)
    assert not out.exists()


# ---------------------------------------------------------------- workers that cannot


def refused(job) -> str:
    with pytest.raises(InputError) as caught:
        sharding.make_shard(job)
    text = str(caught.value)
    assert f"worker {os.uname().nodename}:{os.getpid()} " in text and "\n" not in text
    return text


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A unit of work that can be done: (plan, shard)."""
    jobs = []
    with monkeypatch.context() as patch:
        patch.setattr(sharding, "make_shard", jobs.append)
        patch.setattr(sharding, "_explain", lambda *_: None)
        with pytest.raises(AssertionError):
            make(tmp_path / "set")
    sharding._painters.clear()
    return jobs[0]


def test_workers_that_are_not_like_this_one(job, monkeypatch, tmp_path):
    plan, shard = job
    assert isinstance(shard, Shard)
    for change, words in (
        ({"code": {"mnistattn": "9.9", "generators": "0" * 12}}, "9.9 (generators 000000000000)"),
        ({"sources": plan.request["sources"] | {"digits": {"source": "mnist", "split": "separate",
          "sha256": "0"}}}, f"has no MNIST in {plan.data_root}"),
        ({"sources": plan.request["sources"] | {"digits": plan.request["sources"]["digits"] | {
          "count": {"train": 1}}}}, "has other digits than are asked for"),
    ):  # fmt: skip
        request = plan.request | change
        other = sharding.Plan(plan.folder, request, sharding.identity(request), plan.data_root,
                              plan.backgrounds)  # fmt: skip
        (Path(plan.folder) / "request.json").write_text(json.dumps(request))
        assert words in refused((other, shard))
    elsewhere = sharding.Plan(str(tmp_path / "no"), plan.request, plan.of, plan.data_root,
                              plan.backgrounds)  # fmt: skip
    assert f"does not see {tmp_path / 'no'}" in refused((elsewhere, shard))


# ---------------------------------------------------------------- one writer


def test_a_second_writer_is_refused(tmp_path):
    """The lock is another process's, and ends with it."""
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from mnistattn.dataset.lock import only_writer\n"
        "with only_writer(Path(sys.argv[1])):\n"
        "    print('locked', flush=True)\n    time.sleep(99)\n"
    )
    out = tmp_path / "set"
    with subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline()
        for shards in (5, None):
            with pytest.raises(InputError) as caught:
                make(out, shards=shards)
            assert f"{out} is being written by process {child.pid} on " in str(caught.value)
        child.kill()
    assert (tmp_path / ".set.lock").exists()
    make(out)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def none(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    said: list[str] = []
    with only_writer(tmp_path / "set", said.append):
        pass
    assert "without locks" in said[0] and list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- processes


def run(*arguments, **options) -> subprocess.Popen:
    # Started from the background, as tests may be, a process ignores Ctrl-C.
    return subprocess.Popen(
        [sys.executable, "-m", "mnistattn", *map(str, arguments)], stderr=subprocess.PIPE,
        text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options,
    )  # fmt: skip


@pytest.mark.parametrize("engine", ["local", "dask"])
def test_ctrl_c(tmp_path, engine):
    if engine == "dask":
        pytest.importorskip("distributed", reason="Dask's distributed is not installed")
    out = tmp_path / "set"
    child = run(
        "generate", "--variant", "mref", "--digits", "strokes", "--out", out, "--shards", 4000,
        "--train", 400_000, "--val", 0, "--test", 0, "--workers", 2, "--engine", engine,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not list(work_folder(out).glob("train-*.json")):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130
    lines = [line for line in err.rpartition("\r")[2].splitlines() if line]
    assert lines[-1] == "mnistattn: interrupted." and "Traceback" not in err, err
    assert "of 4000 shards are kept; the same command continues" in lines[-2]
    assert [p.name for p in tmp_path.iterdir()] == [work_folder(out).name]
    assert not list(work_folder(out).glob(".*"))


def test_a_full_disk(tmp_path):
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    out = tmp_path / "set"
    try:
        with pytest.raises(MnistattnError) as caught:
            make(out, train=300, val=0, test=0, shards=10)
        said = str(caught.value)
        left = sorted(p.name for p in work_folder(out).iterdir())
        assert not out.exists()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert said == f"cannot write {out}: No space left on device."
    assert left == ["request.json"] + [
        f"train-{k:05d}-of-00010{end}" for k in range(5) for end in (".h5", ".json")
    ]  # fmt: skip


def test_memory_does_not_grow_with_the_data_set(tmp_path):
    """Five times the images, at most 10 % more memory at the peak, of a process of its own."""
    pytest.importorskip("resource")
    code = (
        "import resource, sys\n"
        "from mnistattn.dataset.write import generate\n"
        "from mnistattn.dataset.verify import verify\n"
        "from mnistattn.generators import digits\n"
        "digits.STROKES_COUNT = {'train': 200, 'val': 100, 'test': 100}\n"
        "n = int(sys.argv[2])\n"
        "path = generate('mref', sys.argv[1], train=n, val=0, test=0, digits='strokes',\n"
        "                workers=1, shards=n // 500, progress=False)\n"
        "assert not verify(path, 0).problems\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    peak = []
    for n in (1000, 5000):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / str(n)), str(n)],
                              stdout=subprocess.PIPE, text=True, check=True)  # fmt: skip
        peak.append(int(done.stdout))
    assert peak[1] < 1.1 * peak[0], peak


def test_a_read_only_place(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root can write everywhere")
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(MnistattnError, match="cannot write .*Permission denied"):
        make(tmp_path / "closed" / "set")


def test_sync_before_rename(tmp_path, monkeypatch):
    """Every file is on the disk before it gets its name."""
    events = []
    for module, name in ((os, "replace"), (os, "fsync")):
        well = getattr(module, name)

        def watched(*arguments, well=well, name=name):
            events.append((name, Path(arguments[0]).name if name == "replace" else ""))
            return well(*arguments)

        monkeypatch.setattr(module, name, watched)
    make(tmp_path / "set", train=2, val=0, test=0, shards=1)
    renamed = [k for k, (name, _) in enumerate(events) if name == "replace"]
    assert len(renamed) == 3  # the request, the shard, its manifest
    assert all(events[k - 1][0] == "fsync" for k in renamed)
    assert write.MOST_SHARDS == 99_999
