"""The data set on disk, which is the contract between generators and everything after them.

A directory: `train.h5`, `val.h5`, `test.h5` and the card `dataset.json`. In each file every HDF5
data set has the same first dimension N and a plain dtype:

    image      (N, H, W, 3) uint8   RGB
    instances  (N, H, W)    uint8   0 background, k the k-th object (its strokes' pixels)
    digit      (N, O) int8          per object, -1 where there is none
    color      (N, O) int8          index into the palette, -1 where there is none
    scale      (N, O) float32       relative to 28 pixels, -1 where there is none
    box        (N, O, 4) int16      top, left, height, width; -1 where there is none
    query      (N,) uint8           a digit or, in mbg-inv, a colour
    answer     (N,) uint8           a colour or, in mbg-inv, a digit
    target     (N,) uint8           zero-based object that is asked for
    answers    (N, 5) bool          mbg-multi only: every right colour

A data set of shards has, in place of each of these files, `train-00000-of-00064.h5` and so on, each
with its share of the images in order, and beside each its manifest, `train-00000-of-00064.json`
(see seal.py for what that holds, shards.py for how they come about). A shard's file names the data
set that it is of in its attribute "mnistattn"; the content digests are those of the unsharded one.

Contiguous and uncompressed: one image is one read at a computed place, and nothing has to be
unpacked (benchmarks/storage.py measures it against chunks, LZF and gzip).
"""

import hashlib
from pathlib import Path

import numpy as np

from mnistattn.generators.variants import COLORS, Spec

FORMAT_VERSION = 1
CARD = "dataset.json"


def layout(spec: Spec) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Each array's shape beyond N and its dtype, in canonical order."""
    size, objects = spec.size, spec.max_objects
    arrays: dict[str, tuple[tuple[int, ...], type]] = {
        "image": ((size, size, 3), np.uint8),
        "instances": ((size, size), np.uint8),
        "digit": ((objects,), np.int8),
        "color": ((objects,), np.int8),
        "scale": ((objects,), np.float32),
        "box": ((objects, 4), np.int16),
        "query": ((), np.uint8),
        "answer": ((), np.uint8),
        "target": ((), np.uint8),
    }
    if spec.row.repeats:
        arrays["answers"] = ((len(COLORS),), np.bool_)
    return {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in arrays.items()}


def split_file(path: Path, split: str) -> Path:
    """Where a split of the data set in `path` lies."""
    return Path(path) / f"{split}.h5"


def shard_stem(split: str, number: int, shards: int) -> str:
    """The name of a shard's file (.h5) and manifest (.json), without the ending."""
    return f"{split}-{number:05d}-of-{shards:05d}"


def shard_mark(of: str, split: str, first: int) -> bytes:
    """What a shard's file says of itself: the data set (`of`, see shards.py), split, and place."""
    return f"{of} {split} {first}".encode()


class ContentDigest:
    """SHA-256 of a split's content, fed in the order of the images.

    Over each array's bytes (little-endian, row-major) one hash; the digest is the hash of the lines
    "name dtype shape hash" in canonical order. So chunking, compression and machine play no part,
    and a difference can be traced to an array.
    """

    def __init__(self, spec: Spec, n: int):
        self._layout, self._n = layout(spec), n
        self._hashes = {name: hashlib.sha256() for name in self._layout}

    def update(self, name: str, values: np.ndarray) -> None:
        """Feed the next rows of an array."""
        little = values.astype(values.dtype.newbyteorder("<"), copy=False)
        self._hashes[name].update(np.ascontiguousarray(little).data)

    def update_all(self, arrays: dict[str, np.ndarray]) -> None:
        """Feed the next rows of every array."""
        for name, values in arrays.items():
            self.update(name, values)

    def arrays(self) -> dict[str, str]:
        """Each array's own hash."""
        return {name: h.hexdigest() for name, h in self._hashes.items()}

    def hexdigest(self) -> str:
        """The split's digest."""
        return self.of_arrays(self.arrays())

    def of_arrays(self, hashes: dict[str, str]) -> str:
        """The split's digest, if these are its arrays' hashes."""
        lines = [
            f"{name} {dtype.name} {(self._n, *shape)} {hashes[name]}\n"
            for name, (shape, dtype) in self._layout.items()
        ]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
