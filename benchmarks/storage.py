"""How a data set should lie on disk: HDF5 layouts compared by size, and by writing and reading.

    python benchmarks/storage.py --data data/mbg

Takes the first --images of the train split, and writes `image` and `instances` in each layout:
contiguous (what mnistattn writes), in chunks of 1 or 64 images, and, in chunks of 1, packed by
LZF, gzip 1, and gzip 1 after HDF5's shuffle. Per array and layout, interleaved --repeat times:

    MB          the file's size
    write       in the writer's batches, with close and fsync
    whole       the whole array read at once, with opening the file
    single      --single images in random order, one read each, with opening the file

The files were just written, so reading is from the page cache: this is unpacking and the library's
overhead, not the disk.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
from common import machine, machine_line, spread, summary, table, write_json

from mnistattn.dataset.read import open_split, read_card
from mnistattn.dataset.write import BATCH_BYTES
from mnistattn.errors import MnistattnError

ARRAYS = ("image", "instances")
LAYOUTS = {  # name: images in a chunk (0: contiguous), options of create_dataset
    "contiguous": (0, {}),
    "chunk 1": (1, {}),
    "chunk 64": (64, {}),
    "chunk 1, lzf": (1, {"compression": "lzf"}),
    "chunk 1, gzip 1": (1, {"compression": "gzip", "compression_opts": 1}),
    "chunk 1, shuffle, gzip 1": (
        1, {"compression": "gzip", "compression_opts": 1, "shuffle": True}
    ),
}  # fmt: skip


def write(file: Path, values: np.ndarray, chunk: int, options: dict, step: int) -> float:
    """Seconds for writing values in a layout, step images at a time, with fsync."""
    os.sync()
    start = time.perf_counter()
    with h5py.File(file, "w", libver="v110") as h5:
        chunks = (min(chunk, len(values)), *values.shape[1:]) if chunk else None
        data = h5.create_dataset("data", values.shape, values.dtype, chunks=chunks, **options)
        for first in range(0, len(values), step):
            data[first : first + step] = values[first : first + step]
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())
    return time.perf_counter() - start


def read_whole(file: Path) -> tuple[float, np.ndarray]:
    """Seconds for opening the file and reading it all, and what was read."""
    start = time.perf_counter()
    with h5py.File(file, "r") as h5:
        values = h5["data"][()]
    return time.perf_counter() - start, values


def read_single(file: Path, order: np.ndarray) -> float:
    """Seconds for opening the file and reading images one by one."""
    start = time.perf_counter()
    with h5py.File(file, "r") as h5:
        data = h5["data"]
        for i in order.tolist():
            data[i]
    return time.perf_counter() - start


def measure(values: np.ndarray, args, step: int, work: Path) -> dict:
    """Every layout of one array, interleaved; by layout, each measure's summary."""
    found = {name: {"MB": [], "write": [], "whole": [], "single": []} for name in LAYOUTS}
    rng = np.random.default_rng(0)
    file = work / "layout.h5"
    for _ in range(args.repeat):
        order = rng.integers(0, len(values), args.single)
        for name, (chunk, options) in LAYOUTS.items():
            file.unlink(missing_ok=True)
            row = found[name]
            row["write"].append(values.nbytes / 1e6 / write(file, values, chunk, options, step))
            row["MB"].append(file.stat().st_size / 1e6)
            seconds, back = read_whole(file)
            if not np.array_equal(back, values):
                raise SystemExit(f"error: '{name}' does not give back what was written")
            row["whole"].append(len(values) / seconds)
            row["single"].append(len(order) / read_single(file, order))
    file.unlink(missing_ok=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True, metavar="DIR", help="a generated data set")
    parser.add_argument("--split", default="train")
    parser.add_argument("--images", type=int, default=4000, help="how many to write (4000)")
    parser.add_argument("--single", type=int, default=1000, help="single reads (1000)")
    parser.add_argument("--repeat", type=int, default=3, metavar="R")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: a temporary folder "
                        "here, which is removed)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    args = parser.parse_args()
    if min(args.images, args.single, args.repeat) < 1:
        parser.error("give --images, --single and --repeat of at least 1")
    try:
        card = read_card(args.data)
        with open_split(card, args.split) as h5:
            arrays = {name: h5[name][: args.images] for name in ARRAYS}
    except MnistattnError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code

    about = machine()
    print(machine_line(about))
    result = {
        "benchmark": "storage", "machine": about, "variant": card.raw["variant"],
        "images": len(arrays["image"]), "single": args.single, "arrays": {},
    }  # fmt: skip
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    head = ["", "MB", "write MB/s", "whole images/s", "single images/s"]
    step = max(1, BATCH_BYTES // (card.spec.size * card.spec.size * 4))
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=args.out or ".") as work:
        for array, values in arrays.items():
            found = measure(values, args, step, Path(work))
            result["arrays"][array] = {
                name: {what: summary(numbers) for what, numbers in row.items()}
                for name, row in found.items()
            }
            rows = [
                [name, f"{row['MB'][0]:,.1f}", *(spread(row[k], 0) for k in ("write", "whole",
                 "single"))]
                for name, row in found.items()
            ]  # fmt: skip
            print(f"\n{array}, {len(values):,} of {card.raw['variant']}: median (min .. max); "
                  "MB/s of unpacked bytes")  # fmt: skip
            print(table(head, rows))
    write_json(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
