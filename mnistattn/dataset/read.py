"""Read a data set back: its card, and a split as arrays. Nothing is unpickled.

A split of shards reads as one: `open_split` gives something that is used like an HDF5 file.
"""

import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from mnistattn.dataset.format import (
    CARD,
    FORMAT_VERSION,
    ContentDigest,
    layout,
    shard_mark,
    shard_stem,
    split_file,
)
from mnistattn.errors import InputError
from mnistattn.generators.variants import COLORS, DIGITS, Spec, choose

OPEN_SHARDS = 64  # files kept open at a time
_AGAIN = "repair it with 'mnistattn verify --repair', or generate the data set again."


@dataclass(frozen=True)
class Card:
    """A data set's card: what it is made of. `raw` is the whole of dataset.json."""

    path: Path
    spec: Spec
    raw: dict

    @property
    def splits(self) -> dict[str, dict]:
        """The splits that exist, each with count and digest."""
        return self.raw["splits"]

    @property
    def query_names(self) -> tuple[str, ...]:
        """What a query may be, by index: the ten digits or the five colours."""
        return COLORS if self.spec.row.asks == "color" else DIGITS

    @property
    def answer_names(self) -> tuple[str, ...]:
        """What an answer may be, by index."""
        return DIGITS if self.spec.row.asks == "color" else COLORS

    def files(self, split: str) -> list[Path]:
        """The HDF5 files of a split, in the order of their images."""
        shards = self.splits[choose(f"split of {self.path}", split, self.splits)].get("shards")
        if shards is None:
            return [split_file(self.path, split)]
        return [self.path / f"{shard_stem(split, k, len(shards))}.h5" for k in range(len(shards))]

    def place(self, split: str) -> str:
        """Where a split lies, for messages."""
        return str(self.path / f"{split}-*.h5" if "shards" in self.splits[split]
                   else split_file(self.path, split))  # fmt: skip

    def digest(self, split: str) -> str:
        """A split's content digest, as the card has it."""
        return self.splits[choose(f"split of {self.path}", split, self.splits)]["digest"]


def read_card(path: str | Path) -> Card:
    """The card of the data set in `path`. InputError if there is none, or it is damaged."""
    path = Path(path)
    file = path / CARD
    if not file.is_file():
        raise InputError(
            f"{path} is no data set: it has no {CARD}. Make one with 'mnistattn generate'."
        )
    try:
        raw = json.loads(file.read_text())
        if raw["format"] != "mnistattn":
            raise KeyError("format")
        if raw["format_version"] != FORMAT_VERSION:
            raise InputError(
                f"{file} has format version {raw['format_version']}, and this mnistattn reads "
                f"{FORMAT_VERSION}: generate the data set again, or install the version it is of."
            )
        spec = Spec(**raw["spec"])
        for entry in raw["splits"].values():
            int(entry["count"]), str(entry["digest"])
            if "shards" in entry:
                str(raw["request"]["of"])
                if sum(int(shard["count"]) for shard in entry["shards"]) != entry["count"]:
                    raise ValueError("shards")
        int(raw["seed"]), dict(raw["sources"])
    except InputError as error:
        if str(file) in str(error):
            raise
        raise InputError(f"{file} is damaged: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError(
            f"{file} is damaged, or no card of mnistattn's: generate the data set again."
        ) from error
    return Card(path, spec, raw)


def open_split(card: Card, split: str) -> "h5py.File | Shards":
    """A split's arrays on disk, by name, as an HDF5 file has them: `open_split(...)["image"][rows]`
    is read from the disk, rows being a number or a slice. Checked for the arrays' names, shapes and
    dtypes, a shard when it is first read. InputError if a file is damaged, or of another data set.
    """
    choose(f"split of {card.path}", split, card.splits)
    if "shards" in card.splits[split]:
        return Shards(card, split)
    return _open_file(split_file(card.path, split), card.spec, card.splits[split]["count"])


def _open_file(file: Path, spec: Spec, n: int, mark: bytes | None = None) -> h5py.File:
    """An HDF5 file of n images; mark: what a shard has to say of itself."""
    again = "generate the data set again."
    try:
        h5 = h5py.File(file, "r")
    except FileNotFoundError as error:
        raise InputError(f"{file} is missing: {again}") from error
    except OSError as error:
        raise InputError(f"{file} is damaged or no HDF5 file: {again}") from error
    if mark is not None and not _has_mark(h5, mark):
        h5.close()
        raise InputError(
            f"{file} is not of this data set, but of another, or not the shard its name says: "
            f"{_AGAIN}"
        )
    for name, (shape, dtype) in layout(spec).items():
        try:
            fits = h5[name].shape == (n, *shape) and h5[name].dtype == dtype
        except (KeyError, AttributeError, OSError, RuntimeError, TypeError):
            fits = False
        if not fits:
            h5.close()
            raise InputError(
                f"{file} does not fit its card: '{name}' is not {dtype.name} {(n, *shape)}; {again}"
            )
    return h5


def _has_mark(h5: h5py.File, mark: bytes) -> bool:
    try:
        return bytes(h5.attrs["mnistattn"]) == mark
    except (KeyError, OSError, RuntimeError, TypeError, ValueError):
        return False


def is_foreign(file: Path, mark: bytes) -> bool:
    """True if a file says that it is another shard than the one with this mark."""
    try:
        with h5py.File(file, "r") as h5:
            return "mnistattn" in h5.attrs and not _has_mark(h5, mark)
    except (OSError, RuntimeError):
        return False


class Shards:
    """The files of a split as one, opened as they are needed and OPEN_SHARDS at a time."""

    def __init__(self, card: Card, split: str):
        self._card, self._split, self.filename = card, split, card.place(split)
        self._files = card.files(split)
        self._counts = [int(shard["count"]) for shard in card.splits[split]["shards"]]
        self.starts = np.cumsum([0, *self._counts], dtype=np.int64)
        self._open: OrderedDict[int, h5py.File] = OrderedDict()

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        while self._open:
            self._open.popitem()[1].close()

    def __getitem__(self, name: str) -> "Column":
        return Column(self, name, *layout(self._card.spec)[name])

    def file(self, number: int) -> h5py.File:
        """The number-th file, open."""
        if number in self._open:
            self._open.move_to_end(number)
        else:
            mark = shard_mark(
                self._card.raw["request"]["of"], self._split, int(self.starts[number])
            )
            self._open[number] = _open_file(
                self._files[number], self._card.spec, self._counts[number], mark
            )
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        return self._open[number]


class Column:
    """One array over all shards of a split, (N, *shape); read by a number, a slice, or ()."""

    def __init__(self, shards: Shards, name: str, shape: tuple[int, ...], dtype: np.dtype):
        self._shards, self._name, self._row = shards, name, shape
        self.shape, self.dtype = (int(shards.starts[-1]), *shape), dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: "int | slice | tuple[()]") -> np.ndarray:
        if isinstance(rows, (int, np.integer)):
            at = int(rows) + (len(self) if rows < 0 else 0)
            if not 0 <= at < len(self):
                raise IndexError(f"image {rows} of {len(self)}")
            return self._read(at, at + 1)[0]
        if isinstance(rows, tuple):
            rows = slice(None)
        first, end, step = rows.indices(len(self))
        return self._read(first, max(first, end)) if step == 1 else self._read(0, len(self))[rows]

    def _read(self, first: int, end: int) -> np.ndarray:
        values, at = np.empty((end - first, *self._row), self.dtype), first
        starts = self._shards.starts
        while at < end:
            number = int(np.searchsorted(starts, at, "right")) - 1
            start, stop = int(starts[number]), min(end, int(starts[number + 1]))
            h5 = self._shards.file(number)
            try:
                h5[self._name].read_direct(
                    values, np.s_[at - start : stop - start], np.s_[at - first : stop - first]
                )
            except OSError as error:
                raise InputError(f"{h5.filename} is damaged at '{self._name}': {_AGAIN}") from error
            at = stop
        return values


def read_split(card: Card, split: str, names=None, check: bool = False) -> dict[str, np.ndarray]:
    """Arrays of a split by name (all, or those named), in memory.

    check: compare the content digest with the card's. InputError if anything is damaged.
    """
    wanted = list(layout(card.spec)) if names is None or check else list(names)
    with open_split(card, split) as h5:
        arrays = {}
        for name in wanted:
            try:
                arrays[name] = h5[name][()]
            except OSError as error:
                raise InputError(
                    f"{h5.filename} is damaged at '{name}': generate the data set again."
                ) from error
    if check:
        damaged = damaged_arrays(card, split, arrays)
        if damaged:
            raise InputError(
                f"{card.place(split)} does not have the digest of its card "
                f"({', '.join(damaged)} differ): {_AGAIN}"
            )
    return arrays


def batches(
    card: Card, split: str, rows: int = 256, names=None
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """A split piece by piece, (number of the first image, arrays of at most `rows` images), in
    order: in memory lies one piece. names: which arrays (all). InputError if one is damaged."""
    wanted = list(layout(card.spec)) if names is None else list(names)
    with open_split(card, split) as h5:
        for first in range(0, card.splits[split]["count"], rows):
            piece = {}
            for name in wanted:
                try:
                    piece[name] = h5[name][first : first + rows]
                except OSError as error:
                    raise InputError(
                        f"{h5.filename} is damaged at '{name}': generate the data set again."
                    ) from error
            yield first, piece


def damaged_arrays(card: Card, split: str, arrays: dict[str, np.ndarray]) -> list[str]:
    """The names of the arrays whose content is not what the card's digest was taken of."""
    digest = ContentDigest(card.spec, card.splits[split]["count"])
    digest.update_all(arrays)
    return differing_arrays(card, split, digest)


def differing_arrays(card: Card, split: str, digest: ContentDigest) -> list[str]:
    """The names of the arrays whose hashes, after all rows were fed, are not those of the card."""
    if digest.hexdigest() == card.digest(split):
        return []
    noted = card.splits[split].get("arrays", {})
    return [name for name, h in digest.arrays().items() if noted.get(name) != h] or ["the card"]


def answer_masks(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The ground truth of each image, bool (N, H, W): the pixels of every object that answers.

    That is the target alone, but in mbg-multi all objects of the queried digit.
    """
    instances = arrays["instances"]
    if "answers" not in arrays:
        return instances == (arrays["target"] + 1)[:, None, None]
    asked = arrays["digit"] == arrays["query"][:, None].astype(np.int8)
    lookup = np.concatenate([np.zeros((len(asked), 1), bool), asked], 1)
    return np.take_along_axis(lookup, instances.reshape(len(asked), -1), 1).reshape(instances.shape)
