"""Put a damaged data set right: what `verify` finds is drawn anew, and nothing else.

Damaged blocks are drawn again and written over in place, but only if they then have the CRC-32 that
is kept of them; HDF5's own bytes come from an empty file of the same layout; a shard whose manifest
is lost, or a file that is missing or cut off, is made as a whole. Whatever stops a repair, what is
not right yet is still found by `verify`. In a card only a single flipped bit can be put right.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mnistattn.dataset.format import CARD, shard_mark
from mnistattn.dataset.lock import only_writer
from mnistattn.dataset.paint import Sources
from mnistattn.dataset.read import Card, read_card
from mnistattn.dataset.seal import (
    STRUCTURE,
    BlockSums,
    Damage,
    flip_back,
    gaps,
    is_sealed,
    row_bytes,
)
from mnistattn.dataset.shards import Plan, request_of, write_shard
from mnistattn.dataset.verify import (
    Part,
    Verdict,
    damage_of_card,
    damage_of_part,
    entry_of,
    is_kept,
    open_painter,
    open_sources,
    parts_of,
    verify,
)
from mnistattn.dataset.write import (
    sync,
    sync_folder,
    write_durably,
    write_file,
    write_skeleton,
)
from mnistattn.errors import InputError, MnistattnError

ROWS = 64  # images drawn at a time


def repair(
    path: str | Path, redraw: int = 32, data_root: str | Path = "data",
    backgrounds: str | None = None, say: Callable[[str], None] = lambda line: None,
) -> Verdict:  # fmt: skip
    """Put right what is damaged in the data set in `path`; `say` is told each thing.

    Arguments and what is returned are as of `verify`, which comes after it. Raises InputError if a
    source is missing or is not what it was, MnistattnError if what is drawn is not what was there;
    then what was damaged is as it was, or right.
    """
    path = Path(path)
    if not path.is_dir():
        read_card(path)  # says what is wrong
    try:
        with only_writer(Path(os.path.abspath(path)), say):
            _repair_card(path, say)
            _Repair(read_card(path), data_root, backgrounds, say).all()
    except OSError as error:
        raise MnistattnError(f"cannot repair {path}: {error.strerror or error}.") from error
    return verify(path, redraw, data_root, backgrounds, say)


def _repair_card(path: Path, say: Callable[[str], None]) -> None:
    file = path / CARD
    try:
        card = read_card(path)
        if not damage_of_card(card):
            return
    except InputError:
        if not file.is_file():
            raise
    data = file.read_bytes()
    right = flip_back(data)
    if right is None:
        raise MnistattnError(
            f"{file} is damaged beyond one flipped bit, and holds what all else is made of: "
            "restore it from a copy, or generate the data set again."
        )
    _replace(file, right)
    say(f"{CARD}: a flipped bit put right")


def _replace(file: Path, content: bytes) -> None:
    temporary = file.with_name(f".{file.name}.tmp-{os.getpid()}")
    try:
        write_durably(temporary, content)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(file.parent)


class _Repair:
    """The repair of one data set; sources are opened when something has to be drawn."""

    def __init__(self, card: Card, data_root, backgrounds, say: Callable[[str], None]):
        self._card, self._say = card, say
        self._data_root, self._backgrounds = data_root, backgrounds
        self._sources: Sources | None = None
        self._painters: dict = {}

    def all(self) -> None:
        """Check every file, and repair what is not right."""
        for split in self._card.splits:
            if is_kept(self._card, split):
                for part in parts_of(self._card, split):
                    if damage := damage_of_part(self._card, part):
                        self._part(part, damage)

    def _part(self, part: Part, damage: list[Damage]) -> None:
        told = damage
        if entry_of(self._card, part) is None and self._flipped_manifest(part):
            damage = damage_of_part(self._card, part)
            told = told + damage
        entry = entry_of(self._card, part)
        if entry is None or any(not d.array for d in damage):
            self._whole(part)
        else:
            for d in damage:
                if d.array == STRUCTURE:
                    self._structure(part, entry)
                else:
                    self._blocks(part, entry, d)
            sync(part.file)
        if left := damage_of_part(self._card, part):
            raise MnistattnError(f"{left[0]} It could not be put right.")
        for d in told:
            self._say(f"repaired: {d}")

    def _flipped_manifest(self, part: Part) -> bool:
        """Put a flipped bit of a manifest right; False if it is another damage."""
        try:
            data = part.manifest_file.read_bytes()
        except OSError:
            return False
        right = None if is_sealed(data) else flip_back(data)
        if right is not None:
            _replace(part.manifest_file, right)
        return right is not None

    def _painter(self, split: str):
        if self._sources is None:
            try:
                self._sources = open_sources(self._card, self._data_root, self._backgrounds)
            except InputError as error:
                raise InputError(f"{self._card.path} cannot be repaired: {error}") from error
        if split not in self._painters:
            self._painters = {split: open_painter(self._card, self._sources, split)}
        return self._painters[split]

    def _blocks(self, part: Part, entry: dict, damage: Damage) -> None:
        """Draw the damaged blocks of an array again, and write them over what is there."""
        shard, name = part.shard, damage.array
        row, block = row_bytes(self._card.spec)[name], entry["block"]
        first, end = damage.first - shard.first, damage.last + 1 - shard.first
        for start in range(first // block * block, end, block):
            stop = min(start + block, shard.count)
            sums = BlockSums(self._card.spec, shard.count, block)
            pieces = []
            for at in range(start, stop, ROWS):
                indices = np.arange(at, min(at + ROWS, stop), dtype=np.int64) + shard.first
                drawn = self._painter(shard.split).paint(indices)[0][name]
                sums.update_all({name: drawn})
                pieces.append(drawn)
            number = start // block
            if sums.hex()[name] != entry["blocks"][name][8 * number : 8 * number + 8]:
                raise MnistattnError(
                    f"{damage} What is drawn now is not what was there: it was made with "
                    f"{_versions(self._card)}, or other sources."
                )
            with open(part.file, "rb+") as file:
                file.seek(entry["offsets"][name] + start * row)
                for drawn in pieces:
                    little = drawn.astype(drawn.dtype.newbyteorder("<"), copy=False)
                    file.write(np.ascontiguousarray(little).data)

    def _structure(self, part: Part, entry: dict) -> None:
        """Copy HDF5's own bytes from an empty file of the same layout."""
        n, spec = part.shard.count, self._card.spec
        empty = part.file.with_name(f".{part.file.name}.tmp-{os.getpid()}")
        try:
            write_skeleton(empty, spec, n, self._mark(part))
            if empty.stat().st_size != entry["bytes"]:
                raise MnistattnError(
                    f"{part.file.name}: this HDF5 lays files out in another way than that of "
                    f"{_versions(self._card)}."
                )
            with open(empty, "rb") as source, open(part.file, "rb+") as file:
                for start, end in gaps(entry, spec, n):
                    source.seek(start)
                    file.seek(start)
                    file.write(source.read(end - start))
        finally:
            empty.unlink(missing_ok=True)

    def _whole(self, part: Part) -> None:
        """Make a file anew, and a shard's manifest; the old one goes when the new one is right."""
        shard, card = part.shard, self._card
        folder = card.path / f".repair-{os.getpid()}"
        try:
            folder.mkdir()
            made = folder / part.file.name
            painter, of = self._painter(shard.split), card.raw.get("request", {}).get("of", "")
            if part.manifest:
                plan = Plan(str(folder), request_of(card.raw), of, "", "")
                _, found = write_shard(plan, shard, folder, painter)
                wanted = part.manifest
            else:
                entry = write_file(made, card.spec, painter, 0, shard.count, None, lambda n: None)
                sync(made)
                found, wanted = entry["digest"], card.digest(shard.split)
            if found != wanted:
                raise MnistattnError(
                    f"{part.file.name} was made anew, and differs from what it was: it was made "
                    f"with {_versions(card)}, or other sources."
                )
            for file in folder.iterdir():
                os.replace(file, card.path / file.name)
            sync_folder(card.path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _mark(self, part: Part) -> bytes | None:
        if not part.manifest:
            return None
        return shard_mark(self._card.raw["request"]["of"], part.shard.split, part.shard.first)


def _versions(card: Card) -> str:
    made = card.raw.get("versions", {})
    return ", ".join(f"{name} {made.get(name, '?')}" for name in ("mnistattn", "h5py"))
