"""A data set of many files: `make_shard` is the unit of work, any engine may run it anywhere.

A shard is a pure function of the request (spec, seed, counts, sources, number of shards), the split
and its place in it; it needs nothing of the other shards. A worker draws it under a temporary name,
syncs it, renames it, and then does the same with its manifest (seal.py), so that a shard with a
manifest is whole. Shards gather in a work folder beside the data set, `.NAME.partial-shards`, which
outlives whatever kills the process. The same request finds it there: each worker first looks
whether its shard is there and every byte is what the manifest says, and keeps it. When all shards
are there, the card is written and the folder renamed to the data set's name.

The content digest is that of the unsharded data set: one SHA-256 an array, over all rows in order,
which cannot be put together of parts. So this process reads the shards once more, in order, while
others are still being made (a read from the page cache, if the disk is this machine's), and
compares them with their manifests on the way: what the card vouches for was read back from disk.

Every split has shards of at most as many images as those of the largest, and at least one shard.
"""

import hashlib
import json
import os
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mnistattn import engines
from mnistattn.dataset import write
from mnistattn.dataset.format import CARD, ContentDigest, shard_mark, shard_stem
from mnistattn.dataset.lock import work_folder
from mnistattn.dataset.paint import Painter, Sources
from mnistattn.dataset.seal import damage_of, is_sealed, sealed
from mnistattn.engines.version import code_version
from mnistattn.errors import InputError, MnistattnError
from mnistattn.generators.digits.mnist import read_mnist
from mnistattn.generators.variants import Spec
from mnistattn.process import keep_freed_memory

REQUEST = "request.json"  # in the work folder
MANIFEST = "mnistattn-shard"


@dataclass(frozen=True)
class Shard:
    """Images first .. first + count - 1 of a split, the number-th of its `shards` files."""

    split: str
    number: int
    shards: int
    first: int
    count: int

    @property
    def stem(self) -> str:
        """The name of its files, without the ending."""
        return shard_stem(self.split, self.number, self.shards)


@dataclass(frozen=True)
class Plan:
    """What a worker has to know to make any shard of a data set, beside which one."""

    folder: str
    request: dict
    of: str
    data_root: str
    backgrounds: str


def plan_shards(counts: dict[str, int], shards: int) -> list[Shard]:
    """The shards of all splits, in order. shards: those of the largest split."""
    planned = []
    for split, n in counts.items():
        own = -(-n * shards // max(counts.values()))
        edges = [n * k // own for k in range(own + 1)]
        planned += [
            Shard(split, k, own, a, b - a)
            for k, (a, b) in enumerate(zip(edges, edges[1:], strict=False))
        ]
    return planned


def identity(request: dict) -> str:
    """SHA-256 of all of a request that its bytes depend on: which data set a shard is of."""
    content = {name: value for name, value in request.items() if name != "code"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def request_of(raw: dict) -> dict:
    """The request of the sharded data set whose card is `raw`."""
    return {
        "spec": raw["spec"], "seed": raw["seed"], "sources": raw["sources"],
        "counts": {split: entry["count"] for split, entry in raw["splits"].items()},
        "shards": raw["request"]["shards"], "code": raw["request"]["code"],
    }  # fmt: skip


# ---------------------------------------------------------------- one shard, on any worker


def make_shard(job: tuple[Plan, Shard]) -> dict:
    """Make a shard in the plan's folder, or find it whole there; the same bytes either way.

    Returns what the card needs: count, digest, the manifest's SHA-256, placement; and `kept`.
    Raises InputError, naming this worker, if it cannot make what the plan asks for.
    """
    plan, shard = job
    folder = Path(plan.folder)
    _check_folder(plan, folder)
    found = read_manifest(folder, plan.of, shard)
    spec = Spec(**plan.request["spec"])
    if found is None or damage_of(folder / f"{shard.stem}.h5", facts(found[0]), spec, shard.count):
        keep_freed_memory()
        found, kept = write_shard(plan, shard, folder, painter_of(plan, shard.split)), False
    else:
        kept = True
    manifest, digest = found
    return {
        "count": shard.count, "digest": manifest["digest"], "manifest": digest,
        "placement": manifest["placement"], "kept": kept,
    }  # fmt: skip


def write_shard(plan: Plan, shard: Shard, folder: Path, painter: Painter) -> tuple[dict, str]:
    """Draw a shard and put it and its manifest in place; returns the manifest and its SHA-256."""
    spec = Spec(**plan.request["spec"])
    with _temporary(folder, f"{shard.stem}.h5") as file:
        entry = write.write_file(
            file, spec, painter, shard.first, shard.count, 1, lambda n: None,
            shard_mark(plan.of, shard.split, shard.first),
        )  # fmt: skip
        write.sync(file)
    manifest = {
        "format": MANIFEST, "of": plan.of, "split": shard.split, "file": f"{shard.stem}.h5",
        "first": shard.first, "count": shard.count,
    } | {name if name != "file" else "hdf5": value for name, value in entry.items()}  # fmt: skip
    content = sealed(manifest)
    with _temporary(folder, f"{shard.stem}.json") as file:
        write.write_durably(file, content)
    write.sync_folder(folder)
    return manifest, hashlib.sha256(content).hexdigest()


class _temporary:
    """A file under a name of nobody else's, that gets its own when the block ends well."""

    def __init__(self, folder: Path, name: str):
        host = "".join(c if c.isalnum() else "-" for c in socket.gethostname())
        self._final = folder / name
        self._file = folder / f".{name}.tmp-{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}"

    def __enter__(self) -> Path:
        return self._file

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            os.replace(self._file, self._final)
        else:
            with suppress(OSError):
                self._file.unlink()


def read_manifest(folder: Path, of: str, shard: Shard) -> tuple[dict, str] | None:
    """A shard's manifest and its SHA-256; None if it is missing, damaged, or another's."""
    try:
        content = (folder / f"{shard.stem}.json").read_bytes()
        if not is_sealed(content):
            return None
        manifest = json.loads(content)
    except (OSError, ValueError):
        return None
    place = (of, shard.split, shard.first, shard.count)
    if tuple(manifest.get(name) for name in ("of", "split", "first", "count")) != place:
        return None
    return manifest, hashlib.sha256(content).hexdigest()


def facts(manifest: dict) -> dict:
    """What seal.py compares a shard's file with."""
    return manifest["hdf5"] | {"arrays": manifest["arrays"]}


_painters: dict[tuple, Painter] = {}
_painters_lock = threading.Lock()  # a Dask worker may run several tasks at a time


def painter_of(plan: Plan, split: str) -> Painter:
    """This process's painter of a split; InputError, naming the process, if its mnistattn or its
    sources are not those of the plan."""
    key = (plan.of, plan.data_root, plan.backgrounds, split)
    with _painters_lock:
        if key not in _painters:
            _painters.clear()  # one split of one data set at a time: a pool takes some 40 MB
            _painters[key] = _open_painter(plan, split)
        return _painters[key]


def _open_painter(plan: Plan, split: str) -> Painter:
    request, here = plan.request, code_version()
    noted = request["sources"]
    if here != request["code"]:
        raise InputError(
            f"worker {_name()} has mnistattn {_version(here)}, and {_version(request['code'])} is "
            "asked for: install the same everywhere."
        )
    try:
        if noted["digits"]["source"] == "mnist":
            read_mnist(Path(plan.data_root))  # a worker does not download it
        sources = Sources(
            Spec(**request["spec"]), request["seed"], noted["digits"]["source"],
            noted["digits"]["split"], plan.backgrounds, Path(plan.data_root), lambda line: None,
        )  # fmt: skip
        painter = sources.painter(split)
    except FileNotFoundError as error:
        raise InputError(
            f"worker {_name()} has no MNIST in {plan.data_root}: put it where all workers see it."
        ) from error
    except InputError as error:
        raise InputError(f"worker {_name()} cannot open its sources: {error}") from error
    for what, own, asked in (
        ("digits", sources.card["digits"], noted["digits"]),
        ("backgrounds", _photos(sources.card, split), _photos(noted, split)),
    ):
        if own != asked:
            raise InputError(f"worker {_name()} has other {what} than are asked for (SHA-256).")
    return painter


def _photos(sources: dict, split: str) -> dict | None:
    return sources["backgrounds"].get("splits", {}).get(split)


def _check_folder(plan: Plan, folder: Path) -> None:
    """InputError if this worker does not see the folder that the plan was made for."""
    request = _read_request(folder)
    if request is None or identity(request) != plan.of:
        raise InputError(
            f"worker {_name()} does not see {folder}: --out has to lie where all workers can write."
        )


def _read_request(folder: Path) -> dict | None:
    try:
        return json.loads((folder / REQUEST).read_text())
    except (OSError, ValueError):
        return None


def _version(code: dict) -> str:
    return f"{code['mnistattn']} (generators {code['generators']})"


def _name() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


# ---------------------------------------------------------------- all shards


def generate_shards(
    out: Path, spec: Spec, seed: int, counts: dict[str, int], sources: Sources, shards: int,
    engine: str, scheduler: str | None, workers: int | None, data_root: Path, backgrounds: str,
    overwrite: bool, progress: bool, say: Callable[[str], None],
) -> None:  # fmt: skip
    """Make a sharded data set in `out`, of which the caller is the only writer; see write.generate
    for the rest. Raises as that does; then the shards that are whole are kept."""
    for split in counts:
        sources.note(split)
    request = json.loads(json.dumps({
        "spec": spec.as_dict(), "seed": seed, "sources": sources.card, "counts": counts,
        "shards": shards, "code": code_version(),
    }))  # fmt: skip
    if out.exists() and not overwrite and _is_there(out, request, say):
        return
    work = work_folder(out)
    _open_work(work, request, overwrite)
    place = os.path.abspath(backgrounds) if Path(backgrounds).is_dir() else backgrounds
    plan = Plan(
        os.path.abspath(work), request, identity(request), os.path.abspath(data_root), place
    )
    planned = plan_shards(counts, shards)
    there = len(_finished(work))
    if there:
        say(f"{out}: {there} of {len(planned)} shards are there; they are checked and kept")
    try:
        splits = _make_all(plan, planned, spec, engine, scheduler, workers, progress)
        card = write.make_card(
            spec, seed, request["sources"], splits,
            request={"of": plan.of, "shards": shards, "code": request["code"]},
        )  # fmt: skip
        write.write_durably(work / CARD, sealed(card))
        (work / REQUEST).unlink()
        _remove_temporary(work)
        write.put_in_place(work, out)
    except BaseException as error:
        _explain(error, out, work, len(planned), say)
        raise


def _is_there(out: Path, request: dict, say: Callable[[str], None]) -> bool:
    """True if the data set that is asked for is in `out` already; InputError if another is."""
    try:
        raw = json.loads((out / CARD).read_text())
        found = request_of(raw)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        if out.is_dir() and not any(out.iterdir()):
            return False
        raise InputError(
            f"{out} exists: give another --out, or --overwrite to replace it."
        ) from None
    difference = _difference(found | {"code": 0}, request | {"code": 0})
    if difference:
        raise InputError(
            f"{out} exists, and is another data set ({difference}): give another --out, or "
            "--overwrite to replace it."
        )
    say(f"{out} is there already; 'mnistattn verify' checks it")
    return True


def _open_work(work: Path, request: dict, overwrite: bool) -> None:
    """Make the work folder, or take over one of the same request. InputError for another's."""
    found = _read_request(work)
    if found is not None and (difference := _difference(found, request)):
        if not overwrite:
            raise InputError(
                f"{work} holds an unfinished data set of another request ({difference}): ask for "
                "the same to continue it, give another --out, or --overwrite to start anew."
            )
        shutil.rmtree(work)
        found = None
    work.mkdir(exist_ok=True)
    if found is None:  # also if a process died before it was written; each shard is checked anyway
        temporary = work / f".{REQUEST}.tmp"
        write.write_durably(temporary, json.dumps(request, indent=2).encode())
        os.replace(temporary, work / REQUEST)
        write.sync_folder(work)
    _remove_temporary(work)


def _difference(there: Any, here: Any, name: str = "") -> str:
    """The first thing in which two requests differ, in words; "" if they are equal."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*here, *(k for k in there if k not in here)]:
            found = _difference(there.get(key), here.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return ""
    if there == here:
        return ""
    return f"{name.removeprefix('spec.')} is {_short(there)} there and {_short(here)} here"


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 16 else f"{text[:12]}..."


def _remove_temporary(work: Path) -> None:
    for file in work.glob(".*.tmp*"):
        with suppress(OSError):
            file.unlink()


def _finished(work: Path) -> list[Path]:
    """The manifests in a work folder."""
    return sorted(work.glob("*-of-*.json"))


def _explain(error: BaseException, out: Path, work: Path, total: int, say) -> None:
    """Say what is kept after a failure; if there is nothing, remove the work folder."""
    _remove_temporary(work)
    kept = len(_finished(work))
    if not kept:
        shutil.rmtree(work, ignore_errors=True)
    elif not isinstance(error, InputError):
        say(f"{out}: {kept} of {total} shards are kept; the same command continues")


def _make_all(plan: Plan, planned, spec, engine, scheduler, workers, progress) -> dict:
    """Make every shard and fold the digests; returns the card's entries of the splits."""
    place = {(shard.split, shard.number): k for k, shard in enumerate(planned)}
    entries: list[dict | None] = [None] * len(planned)
    if engine == "local" and (workers or os.cpu_count() or 1) == 1:
        workers = 0  # one at a time: here, with no process more
    with engines.open_engine(engine, workers, scheduler) as opened, _Fold(plan, spec) as fold:

        def note(task: engines.Task, entry: dict) -> None:
            shard = task.argument[1]
            entries[place[shard.split, shard.number]] = entry
            while fold.next < len(planned) and (ready := entries[fold.next]) is not None:
                fold.add(planned[fold.next], ready)

        engines.run(
            opened, _tasks(plan, planned), make_shard, note, sum(s.count for s in planned),
            "image", f"generate {spec.variant}", progress,
        )  # fmt: skip
        digests = fold.finish()
    splits: dict[str, dict] = {}
    for shard, entry in zip(planned, entries, strict=True):
        assert entry is not None
        split = splits.setdefault(shard.split, {
            "count": 0, "digest": digests[shard.split].hexdigest(),
            "arrays": digests[shard.split].arrays(),
            "placement": {"tries": 0, "most_tries_of_a_scene": 0, "restarts": 0}, "shards": [],
        })  # fmt: skip
        split["count"] += shard.count
        effort, own = split["placement"], entry["placement"]
        for name, join in (("tries", int.__add__), ("restarts", int.__add__),
                           ("most_tries_of_a_scene", max)):  # fmt: skip
            effort[name] = join(effort[name], own[name])
        split["shards"].append({
            "file": f"{shard.stem}.h5", "count": shard.count, "digest": entry["digest"],
            "manifest": entry["manifest"],
        })  # fmt: skip
    return splits


def _tasks(plan: Plan, planned: list[Shard]) -> Iterator[engines.Task]:
    for shard in planned:
        yield engines.Task(shard.stem, (plan, shard), size=shard.count)


class _Fold:
    """The splits' content digests, of shards that are read back in order, beside all else."""

    def __init__(self, plan: Plan, spec: Spec):
        self.next = 0  # the place of the shard that is to be added
        self._plan, self._spec, self._folder = plan, spec, Path(plan.folder)
        self._digests = {
            split: ContentDigest(spec, n) for split, n in plan.request["counts"].items()
        }
        self._pool = ThreadPoolExecutor(1)
        self._failed: list[BaseException] = []

    def __enter__(self) -> "_Fold":
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def add(self, shard: Shard, entry: dict) -> None:
        """Add the next shard. Raises what went wrong with an earlier one."""
        self.next += 1
        self._raise()
        self._pool.submit(self._add, shard, entry).add_done_callback(self._note)

    def finish(self) -> dict[str, ContentDigest]:
        """The digests by split, when all shards have been read."""
        self._pool.shutdown(wait=True)
        self._raise()
        return self._digests

    def _note(self, future: Future) -> None:
        if not future.cancelled() and (error := future.exception()):
            self._failed.append(error)

    def _raise(self) -> None:
        if self._failed:
            raise self._failed[0]

    def _add(self, shard: Shard, entry: dict) -> None:
        if self._failed:
            return
        digest = self._digests[shard.split]
        found = read_manifest(self._folder, self._plan.of, shard)
        bad: list = []
        if found is not None and found[1] == entry["manifest"]:
            bad = damage_of(
                self._folder / f"{shard.stem}.h5", facts(found[0]), self._spec, shard.count,
                shard.first, lambda name, piece: digest.update(name, np.frombuffer(piece, "u1")),
                quick=True,
            )  # fmt: skip
        else:
            bad = [f"{shard.stem}.json is not what was written."]
        if bad:
            raise MnistattnError(
                f"{bad[0]} It changed on disk after it was written: the same command makes it anew."
            )
