"""Generate a data set into a directory: drawn by threads, written in order, renamed when whole."""

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
from mnistattn.dataset.paint import Sources
from mnistattn.errors import InputError, MnistattnError
from mnistattn.generators.variants import COLORS, COUNTS, DIGITS, PALETTE, SPLITS, Spec
from mnistattn.process import keep_freed_memory

BATCH_BYTES = 8 << 20  # of images that a worker draws at a time
LIBRARIES = ("mnistattn", "numpy", "numba", "h5py", "pillow")


def generate(
    variant: str = "mbg", out: str | Path | None = None, *, seed: int = 0,
    train: int = COUNTS["train"], val: int = COUNTS["val"], test: int = COUNTS["test"],
    digits: str = "auto", backgrounds: str = "textures", data_root: str | Path = "data",
    distractors: str = "patches", placement: str = "paper", digit_split: str = "separate",
    workers: int | None = None, overwrite: bool = False, progress: bool = True,
    say: Callable[[str], None] = print, **spec_options,
) -> Path:  # fmt: skip
    """Make the data set of a variant and return its directory (default: data/VARIANT).

    train, val, test: images in each split, 0 for none. workers: threads, default one a core; the
    bytes do not depend on them. spec_options: size, min_scale, max_scale, min_objects, max_objects
    (see Spec). progress shows a bar, `say` is told which sources were used. Raises InputError for a
    request that cannot be met, MnistattnError where the disk fails; then nothing is left behind.
    """
    spec = Spec(variant, distractors=distractors, placement=placement, **spec_options)
    counts = {"train": train, "val": val, "test": test}
    for split, n in counts.items():
        if not 0 <= n <= 1 << 40:
            raise InputError(f"{n} images in {split} is impossible: give 0 or more.")
    if not any(counts.values()):
        raise InputError("no images were asked for: give at least one split a count above 0.")
    if not 0 <= seed < 1 << 63:
        raise InputError(f"seed {seed} is out of range: give a whole number from 0 to 2^63 - 1.")
    workers = workers or os.cpu_count() or 1
    if workers < 1:
        raise InputError(f"{workers} workers are impossible: give 1 or more.")
    out = Path(out if out is not None else Path("data") / variant)
    _check_target(out, overwrite)
    keep_freed_memory()
    sources = Sources(spec, seed, digits, digit_split, backgrounds, Path(data_root), say)

    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    parent_is_new = not out.parent.exists()
    try:
        partial.mkdir(parents=True)
        splits, synced = {}, []
        with tqdm(total=sum(counts.values()), unit="image", desc=f"generate {variant}",
                  disable=None if progress else True, leave=False) as bar, \
             ThreadPoolExecutor(1) as syncer:  # fmt: skip
            for split in SPLITS:
                if counts[split]:
                    painter = sources.painter(split)
                    file = split_file(partial, split)
                    splits[split] = _write_split(file, spec, painter, counts[split], workers, bar)
                    synced.append(syncer.submit(_sync, file))  # while the next one is drawn
        for done in synced:
            done.result()
        card = {
            "format": "mnistattn", "format_version": FORMAT_VERSION, "variant": variant,
            "paper_name": spec.row.paper_name, "spec": spec.as_dict(), "seed": seed,
            "palette": PALETTE, "colors": COLORS, "digits": DIGITS, "sources": sources.card,
            "splits": splits, "versions": _versions(),
        }  # fmt: skip
        _write_durably(partial / CARD, json.dumps(card, indent=2) + "\n")
        _put_in_place(partial, out)
    except OSError as error:
        raise MnistattnError(f"cannot write {out}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if parent_is_new:
            with suppress(OSError):  # it holds the data set, unless that failed
                out.parent.rmdir()
    return out


def _check_target(out: Path, overwrite: bool) -> None:
    """Refuse to touch what is already there, unless it is a data set and may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise InputError(f"{out} exists: give another --out, or --overwrite to replace it.")
    if not (out / CARD).is_file():
        raise InputError(f"{out} exists and is no data set, so it is not overwritten: move it.")


def _write_split(file: Path, spec: Spec, painter, n: int, workers: int, bar) -> dict:
    """Write one split; returns its entry in the card."""
    digest = ContentDigest(spec, n)
    step = max(1, BATCH_BYTES // (spec.size * spec.size * 4))
    tries = restarts = most = 0
    # The space is claimed before HDF5 writes: a disk that fills under an open HDF5 file cannot be
    # closed cleanly (closing may even crash the process).
    _reserve(file, sum(n * math.prod(shape) * d.itemsize for shape, d in layout(spec).values()))
    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with h5py.File(file, "w", libver="v110") as h5:
        for name, (shape, dtype) in layout(spec).items():
            h5.create_dataset(name, (n, *shape), dtype, dcpl=early)
    _reserve(file, file.stat().st_size)
    with (
        h5py.File(file, "r+", libver="v110") as h5,
        ThreadPoolExecutor(workers) as pool,
        ThreadPoolExecutor(1) as hasher,  # beside the writer, in the same order
    ):
        starts = iter(range(0, n, step))
        pending: deque = deque()

        def submit():
            first = next(starts, None)
            if first is not None:
                indices = np.arange(first, min(first + step, n))
                pending.append((first, pool.submit(painter.paint, indices)))

        try:
            for _ in range(workers + 2):  # drawn ahead of the writer, and no further
                submit()
            while pending:
                first, future = pending.popleft()
                arrays, effort = future.result()
                submit()
                hashed = hasher.submit(digest.update_all, arrays)
                for name, values in arrays.items():
                    h5[name][first : first + len(values)] = values
                hashed.result()
                tries, restarts = (
                    tries + int(effort[:, 0].sum()),
                    restarts + int(effort[:, 1].sum()),
                )
                most = max(most, int(effort[:, 0].max()))
                bar.update(len(effort))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return {
        "count": n, "digest": digest.hexdigest(), "arrays": digest.arrays(),
        "placement": {"tries": tries, "most_tries_of_a_scene": most, "restarts": restarts},
    }  # fmt: skip


def _reserve(file: Path, size: int) -> None:
    """Claim disk space for a file, where the system can."""
    if hasattr(os, "posix_fallocate"):
        with open(file, "ab") as handle:
            os.posix_fallocate(handle.fileno(), 0, size)


def _versions() -> dict[str, str]:
    from PIL import features

    versions = {name: version(name) for name in LIBRARIES}
    versions["libjpeg"] = features.version("jpg") or "none"  # decodes the photos
    versions["python"] = platform.python_version()
    return versions


def _write_durably(file: Path, text: str) -> None:
    file.write_text(text)
    _sync(file)


def _sync(file: Path) -> None:
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())


def _put_in_place(partial: Path, out: Path) -> None:
    """Rename the whole new directory to out, and only then delete an old one."""
    old = out.parent / f".{out.name}.old-{os.getpid()}"
    if out.exists():
        out.rename(old)
    try:
        partial.rename(out)
    except BaseException:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
