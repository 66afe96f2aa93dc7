"""Generate a data set: drawn by threads, written in order, renamed when whole.

With `shards`, see shards.py: the same images in many files, made by the processes of an engine.
"""

import json
import math
import os
import platform
import shutil
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from mnistattn.dataset.format import CARD, FORMAT_VERSION, ContentDigest, layout, split_file
from mnistattn.dataset.lock import only_writer, work_folder
from mnistattn.dataset.paint import Sources
from mnistattn.dataset.seal import BlockSums, describe_file, sealed
from mnistattn.errors import InputError, MnistattnError
from mnistattn.generators.variants import COLORS, COUNTS, DIGITS, PALETTE, SPLITS, Spec
from mnistattn.process import keep_freed_memory

BATCH_BYTES = 8 << 20  # of images that a worker draws at a time
MOST_SHARDS = 99_999  # five digits in a name
LIBRARIES = ("mnistattn", "numpy", "numba", "h5py", "pillow")


def generate(
    variant: str = "mbg", out: str | Path | None = None, *, seed: int = 0,
    train: int = COUNTS["train"], val: int = COUNTS["val"], test: int = COUNTS["test"],
    digits: str = "auto", backgrounds: str = "textures", data_root: str | Path = "data",
    distractors: str = "patches", placement: str = "paper", digit_split: str = "separate",
    workers: int | None = None, overwrite: bool = False, progress: bool = True,
    shards: int | None = None, engine: str | None = None, scheduler: str | None = None,
    say: Callable[[str], None] = print, **spec_options,
) -> Path:  # fmt: skip
    """Make the data set of a variant and return its directory (default: data/VARIANT).

    train, val, test: images in each split, 0 for none. workers: threads, or with shards processes,
    default one a core; the bytes do not depend on them. spec_options: size, min_scale, max_scale,
    min_objects, max_objects (see Spec). progress shows a bar, `say` is told which sources were
    used. Raises InputError for a request that cannot be met, MnistattnError where the disk fails;
    then nothing is left behind.

    shards: files of the largest split, 1 to its images; the others get as many as keep theirs no
    larger. engine, scheduler: where shards are made, see mnistattn.engines. What was stopped, by
    whatever, is continued by the same call: shards that are whole are kept. Such a call returns at
    once if the data set is there already.
    """
    if scheduler and engine is None:
        engine = "dask"
    spec = Spec(variant, distractors=distractors, placement=placement, **spec_options)
    counts = {"train": train, "val": val, "test": test}
    _check_request(counts, seed, workers, shards, engine, scheduler)
    out = Path(out if out is not None else Path("data") / variant)
    _check_target(out, overwrite, shards is not None)

    parent_is_new = not out.parent.exists()
    try:
        if parent_is_new:
            out.parent.mkdir(parents=True, exist_ok=True)
        with only_writer(out, say):
            _check_target(out, overwrite, shards is not None)  # nobody changes it from here on
            sources = Sources(spec, seed, digits, digit_split, backgrounds, Path(data_root), say)
            counts = {split: counts[split] for split in SPLITS if counts[split]}
            if shards is None:
                _check_work(out, overwrite)
                _generate_files(out, spec, seed, counts, sources, workers, progress)
            else:
                from mnistattn.dataset.shards import generate_shards

                generate_shards(
                    out, spec, seed, counts, sources, shards, engine or "local", scheduler,
                    workers, Path(data_root), backgrounds, overwrite, progress, say,
                )  # fmt: skip
    except OSError as error:
        raise MnistattnError(f"cannot write {out}: {error.strerror or error}.") from error
    finally:
        if parent_is_new:
            with suppress(OSError):  # it holds the data set, unless that failed
                out.parent.rmdir()
    return out


def _check_request(counts, seed, workers, shards, engine, scheduler) -> None:
    """InputError for numbers that are impossible, or do not go together."""
    for split, n in counts.items():
        if not 0 <= n <= 1 << 40:
            raise InputError(f"{n} images in {split} is impossible: give 0 or more.")
    most = max(counts.values())
    if not most:
        raise InputError("no images were asked for: give at least one split a count above 0.")
    if not 0 <= seed < 1 << 63:
        raise InputError(f"seed {seed} is out of range: give a whole number from 0 to 2^63 - 1.")
    if workers is not None and workers < 1:
        raise InputError(f"{workers} workers are impossible: give 1 or more.")
    if shards is None and (engine or scheduler):
        raise InputError("an engine makes shards: give --shards, such as --shards 64, with it.")
    if workers is not None and scheduler:
        raise InputError(f"the cluster at {scheduler} has its own workers: leave --workers out.")
    if shards is not None and not 1 <= shards <= min(most, MOST_SHARDS):
        raise InputError(
            f"{shards} shards of {most} images are impossible: give 1 to {min(most, MOST_SHARDS)}."
        )


def _generate_files(out, spec, seed, counts, sources, workers, progress) -> None:
    """The data set with one file a split, in place when it is whole."""
    keep_freed_memory()
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        partial.mkdir()
        splits, synced = {}, []
        with tqdm(total=sum(counts.values()), unit="image", desc=f"generate {spec.variant}",
                  disable=None if progress else True, leave=False) as bar, \
             ThreadPoolExecutor(1) as syncer:  # fmt: skip
            for split, n in counts.items():
                file = split_file(partial, split)
                splits[split] = write_file(
                    file, spec, sources.painter(split), 0, n, workers, bar.update
                )
                synced.append(syncer.submit(sync, file))  # while the next one is drawn
        for done in synced:
            done.result()
        write_durably(partial / CARD, sealed(make_card(spec, seed, sources.card, splits)))
        put_in_place(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def make_card(spec: Spec, seed: int, sources: dict, splits: dict, **more) -> dict:
    """The content of the card, but for its seal."""
    return {
        "format": "mnistattn", "format_version": FORMAT_VERSION, "variant": spec.variant,
        "paper_name": spec.row.paper_name, "spec": spec.as_dict(), "seed": seed,
        "palette": PALETTE, "colors": COLORS, "digits": DIGITS, "sources": sources,
        "versions": versions(), **more, "splits": splits,
    }  # fmt: skip


def _check_target(out: Path, overwrite: bool, sharded: bool = False) -> None:
    """Refuse to touch what is already there, unless it is a data set and may be replaced; one of
    shards may be what is asked for."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        if sharded and _has_shards(out):
            return
        raise InputError(f"{out} exists: give another --out, or --overwrite to replace it.")
    if not (out / CARD).is_file():
        raise InputError(f"{out} exists and is no data set, so it is not overwritten: move it.")


def _has_shards(out: Path) -> bool:
    try:
        return "request" in json.loads((out / CARD).read_text())
    except (OSError, ValueError, TypeError):
        return False


def _check_work(out: Path, overwrite: bool) -> None:
    """Keep the shards of an unfinished data set from being forgotten beside a new one."""
    if work_folder(out).exists():
        if not overwrite:
            raise InputError(
                f"{work_folder(out)} holds an unfinished data set of shards: --shards as before "
                "continues it, --overwrite gives it up."
            )
        shutil.rmtree(work_folder(out))


def write_file(
    file: Path, spec: Spec, painter, first: int, n: int, workers: int | None,
    done: Callable[[int], object], mark: bytes | None = None,
) -> dict:  # fmt: skip
    """Write images first .. first + n - 1 of a split into one file; returns its entry: count,
    digest, arrays, placement, and `file` as seal.py has it. done: told how many were written.
    mark: a shard's, see format.shard_mark."""
    workers = workers or os.cpu_count() or 1
    digest, sums = ContentDigest(spec, n), BlockSums(spec, n)
    step = max(1, BATCH_BYTES // (spec.size * spec.size * 4))
    tries = restarts = most = 0
    # The space is claimed before HDF5 writes: a disk that fills under an open HDF5 file cannot be
    # closed cleanly (closing may even crash the process).
    _reserve(file, sum(n * math.prod(shape) * d.itemsize for shape, d in layout(spec).values()))
    write_skeleton(file, spec, n, mark)
    _reserve(file, file.stat().st_size)

    with (
        h5py.File(file, "r+", libver="v110") as h5,
        ThreadPoolExecutor(workers) as pool,
        ThreadPoolExecutor(2) as hasher,  # beside the writer, in the same order
    ):
        starts = iter(range(first, first + n, step))
        pending: deque = deque()

        def submit():
            start = next(starts, None)
            if start is not None:
                indices = np.arange(start, min(start + step, first + n), dtype=np.int64)
                pending.append((start - first, pool.submit(painter.paint, indices)))

        try:
            for _ in range(workers + 2):  # drawn ahead of the writer, and no further
                submit()
            while pending:
                row, future = pending.popleft()
                arrays, effort = future.result()
                submit()
                hashed = [hasher.submit(h.update_all, arrays) for h in (digest, sums)]
                for name, values in arrays.items():
                    h5[name][row : row + len(values)] = values
                for one in hashed:
                    one.result()
                tries, restarts = (
                    tries + int(effort[:, 0].sum()),
                    restarts + int(effort[:, 1].sum()),
                )
                most = max(most, int(effort[:, 0].max()))
                done(len(effort))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return {
        "count": n, "digest": digest.hexdigest(), "arrays": digest.arrays(),
        "placement": {"tries": tries, "most_tries_of_a_scene": most, "restarts": restarts},
        "file": describe_file(file, spec, n, sums),
    }  # fmt: skip


def write_skeleton(file: Path, spec: Spec, n: int, mark: bytes | None) -> None:
    """Write HDF5's own bytes of a file of n images, as they stay: the arrays are only allocated."""
    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with h5py.File(file, "w", libver="v110") as h5:
        if mark is not None:
            h5.attrs["mnistattn"] = np.bytes_(mark)
        for name, (shape, dtype) in layout(spec).items():
            h5.create_dataset(name, (n, *shape), dtype, dcpl=early)


def _reserve(file: Path, size: int) -> None:
    """Claim disk space for a file, where the system can."""
    if hasattr(os, "posix_fallocate"):
        with open(file, "ab") as handle:
            os.posix_fallocate(handle.fileno(), 0, size)


def versions() -> dict[str, str]:
    """What the data set is made with, for its card."""
    from PIL import features

    found = {name: version(name) for name in LIBRARIES}
    found["libjpeg"] = features.version("jpg") or "none"  # decodes the photos
    found["python"] = platform.python_version()
    return found


def write_durably(file: Path, content: bytes) -> None:
    """Write a file and have it on the disk."""
    file.write_bytes(content)
    sync(file)


def sync(file: Path) -> None:
    """Have a file's bytes on the disk."""
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())


def put_in_place(partial: Path, out: Path) -> None:
    """Rename the whole new directory to out, and only then delete an old one."""
    sync_folder(partial)
    old = out.parent / f".{out.name}.old-{os.getpid()}"
    if out.exists():
        out.rename(old)
    try:
        partial.rename(out)
    except BaseException:
        if old.exists():
            old.rename(out)
        raise
    sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
