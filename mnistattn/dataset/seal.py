"""What is kept beside a data set's arrays, so that any damaged byte is found, in any file.

Of each HDF5 file, an entry of JSON (in the card, or in the manifest of a shard):

    arrays      SHA-256 of each array's bytes        together they cover every byte of the file,
    structure   SHA-256 of all bytes between them    the padding included
    bytes       the file's size
    offsets     where each array begins in the file
    block       images in a block: 256, or more where a file would have more than 512 blocks
    blocks      CRC-32 of each block of each array, eight hexadecimal digits a block

The SHA-256 say whether, the CRC-32 only say where. So a file is read and verified without HDF5, in
one pass: a flip in HDF5's own bytes is damage like any other, not an error of some other kind.
Hashing the arrays is what the content digest needs anyway; the blocks cost half as much again.

A card and a manifest end with a seal: the SHA-256 of all bytes of the JSON file, with the seal's
own digits left out.
"""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from mnistattn.dataset.format import layout
from mnistattn.generators.variants import Spec

BLOCK = 256  # images, at the least
MOST_BLOCKS = 512
READ_BYTES = 4 << 20
SEARCHED_BYTES = 96 << 10  # of a card or manifest, in search of a flipped bit
STRUCTURE = "structure"
_SEAL = re.compile(rb'"seal": "([0-9a-f]{64})"\n}\n\Z')


def block_images(n: int) -> int:
    """Images in a block of a file of n images."""
    block = BLOCK
    while n > block * MOST_BLOCKS:
        block *= 2
    return block


class BlockSums:
    """CRC-32 of each block of each array of a file of n images, fed in the order of the images.

    block: images in a block, if not those of a new file."""

    def __init__(self, spec: Spec, n: int, block: int | None = None):
        self.block = block or block_images(n)
        self._rows = dict.fromkeys(layout(spec), 0)
        self._sums: dict[str, list[int]] = {name: [] for name in self._rows}

    def update_all(self, arrays: dict[str, np.ndarray]) -> None:
        """Feed the next rows of every array."""
        for name, values in arrays.items():
            little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
            at, sums = self._rows[name], self._sums[name]
            self._rows[name] = at + len(little)
            start = 0
            while start < len(little):
                room = self.block - (at + start) % self.block
                if room == self.block:
                    sums.append(0)
                sums[-1] = zlib.crc32(little[start : start + room].data, sums[-1])
                start += room

    def hex(self) -> dict[str, str]:
        """The sums by array, eight digits each, one after another."""
        return {name: "".join(f"{s:08x}" for s in sums) for name, sums in self._sums.items()}


def describe_file(file: Path, spec: Spec, n: int, sums: BlockSums) -> dict:
    """The entry of a file that is written and closed, but for `arrays`."""
    with h5py.File(file, "r") as h5:
        offsets = {name: int(h5[name].id.get_offset()) for name in layout(spec)}
    entry = {"bytes": file.stat().st_size, "block": sums.block, "offsets": offsets}
    digest = hashlib.sha256()
    with open(file, "rb", buffering=0) as handle:
        for start, end in gaps(entry, spec, n):
            for piece in _pieces(handle, start, end):
                digest.update(piece)
    return entry | {STRUCTURE: digest.hexdigest(), "blocks": sums.hex()}


def row_bytes(spec: Spec) -> dict[str, int]:
    """Bytes of an image in each array."""
    return {
        name: int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        for name, (shape, dtype) in layout(spec).items()
    }


def gaps(entry: dict, spec: Spec, n: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each run of a file's bytes that is in no array."""
    at = 0
    for name, size in sorted(row_bytes(spec).items(), key=lambda row: entry["offsets"][row[0]]):
        offset = entry["offsets"][name]
        if at < offset:
            yield at, offset
        at = offset + n * size
    if at < entry["bytes"]:
        yield at, entry["bytes"]


def _pieces(handle, start: int, end: int) -> Iterator[memoryview]:
    """The bytes start .. end of a file, in pieces; shorter if the file is."""
    buffer = memoryview(bytearray(min(READ_BYTES, max(end - start, 0))))
    handle.seek(start)
    while start < end:
        got = handle.readinto(buffer[: min(len(buffer), end - start)])
        if not got:
            return
        yield buffer[:got]
        start += got


# ---------------------------------------------------------------- is a file what it was?


@dataclass(frozen=True)
class Damage:
    """What is wrong in a file: an array in images first .. last (of the split), or, with array "",
    `what` in words; array STRUCTURE is HDF5's own bytes and the padding."""

    file: Path
    array: str = ""
    first: int = 0
    last: int = 0
    what: str = ""

    def __str__(self) -> str:
        if self.array == STRUCTURE:
            return f"{self.file.name} is damaged in HDF5's own bytes or the padding."
        if self.array:
            images = f"images {self.first} to {self.last}"
            if self.first == self.last:
                images = f"image {self.first}"
            return f"{self.file.name} is damaged: '{self.array}' of {images}."
        return f"{self.file.name} {self.what}."


def damage_of(
    file: Path, entry: dict, spec: Spec, n: int, first: int = 0,
    feed: Callable[[str, memoryview], None] | None = None, quick: bool = False,
) -> list[Damage]:  # fmt: skip
    """Compare a file with its entry; empty if every byte is what it was.

    n: its images; first: the number of its first one in the split. feed(name, bytes) is given all
    arrays' bytes on the way, each array's in order. quick: arrays by their CRC-32 alone, which a
    flipped bit never passes. The memory is that of a few MB.
    """
    try:
        with open(file, "rb", buffering=0) as handle:
            size = os.fstat(handle.fileno()).st_size
            if size != entry["bytes"]:
                return [Damage(file, what=f"has {size:,} bytes, not {entry['bytes']:,}")]
            found, digest = [], hashlib.sha256()
            for start, end in gaps(entry, spec, n):
                for piece in _pieces(handle, start, end):
                    digest.update(piece)
            if digest.hexdigest() != entry[STRUCTURE]:
                found.append(Damage(file, STRUCTURE))
            for name, row in row_bytes(spec).items():
                found += _damage_of_array(handle, file, entry, name, row, n, first, feed, quick)
            return found
    except FileNotFoundError:
        return [Damage(file, what="is missing")]
    except OSError as error:
        return [Damage(file, what=f"cannot be read ({error.strerror or error})")]


def _damage_of_array(
    handle, file: Path, entry: dict, name: str, row: int, n: int, first: int, feed, quick: bool
) -> list[Damage]:
    digest, block, offset = hashlib.sha256(), entry["block"], entry["offsets"][name]
    bad: list[tuple[int, int]] = []
    for number, start in enumerate(range(0, n, block)):
        total, end = 0, min(start + block, n)
        for piece in _pieces(handle, offset + start * row, offset + end * row):
            if not quick:
                digest.update(piece)
            total = zlib.crc32(piece, total)
            if feed is not None:
                feed(name, piece)
        if f"{total:08x}" != entry["blocks"][name][8 * number : 8 * number + 8]:
            bad.append((start, end))
    if not bad and not quick and digest.hexdigest() != entry["arrays"][name]:
        bad = [(0, n)]  # CRC-32 missed it, as it does once in 4 billion
    runs: list[list[int]] = []
    for start, end in bad:
        if runs and runs[-1][1] == start:
            runs[-1][1] = end
        else:
            runs.append([start, end])
    return [Damage(file, name, first + start, first + end - 1) for start, end in runs]


# ---------------------------------------------------------------- sealed JSON


def sealed(content: dict) -> bytes:
    """The file of a card or manifest: JSON, its seal at the end."""
    text = json.dumps(content | {"seal": ""}, indent=2).encode() + b"\n"
    head, tail = text[: -len(b'"\n}\n')], text[-len(b'"\n}\n') :]
    return head + hashlib.sha256(text).hexdigest().encode() + tail


def is_sealed(data: bytes) -> bool | None:
    """True if a sealed file's bytes are what they were; None if there is no seal."""
    seal = _SEAL.search(data)
    if seal is None:
        return None
    blank = data[: seal.start(1)] + data[seal.end(1) :]
    return hashlib.sha256(blank).hexdigest().encode() == seal[1]


def flip_back(data: bytes) -> bytes | None:
    """The sealed file that one flipped bit made `data` of; None if there is none.

    Tries every bit, so a large file is not tried at all. That is all that can be done for a card:
    what it says of seed and counts is written nowhere else.
    """
    if len(data) > SEARCHED_BYTES:
        return None
    tail = len('"seal": "' + 64 * "0" + '"\n}\n')
    seal_at = len(data) - tail
    # In the last line, which holds the seal: try each bit, and look.
    for at in range(max(seal_at, 0), len(data)):
        for bit in range(8):
            candidate = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
            if is_sealed(candidate):
                return candidate
    seal = _SEAL.search(data)
    if seal is None:
        return None
    # Before it: hash all that comes before a byte once, and only the rest anew for each bit.
    before, rest = hashlib.sha256(), data[: seal.start(1)] + data[seal.end(1) :]
    wanted, view = bytes.fromhex(seal[1].decode()), memoryview(rest)
    for at in range(seal.start(1)):
        for bit in range(8):
            digest = before.copy()
            digest.update(bytes([rest[at] ^ 1 << bit]))
            digest.update(view[at + 1 :])
            if digest.digest() == wanted:
                return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
        before.update(view[at : at + 1])
    return None
