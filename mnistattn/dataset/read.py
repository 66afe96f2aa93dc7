"""Read a data set back: its card, and a split as arrays. Nothing is unpickled."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from mnistattn.dataset.format import CARD, FORMAT_VERSION, ContentDigest, layout, split_file
from mnistattn.errors import InputError
from mnistattn.generators.variants import COLORS, DIGITS, Spec, choose


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


def open_split(card: Card, split: str) -> h5py.File:
    """The HDF5 file of a split, checked for its arrays' names, shapes and dtypes."""
    choose(f"split of {card.path}", split, card.splits)
    file, n = split_file(card.path, split), card.splits[split]["count"]
    again = "generate the data set again."
    try:
        h5 = h5py.File(file, "r")
    except FileNotFoundError as error:
        raise InputError(f"{file} is missing: {again}") from error
    except OSError as error:
        raise InputError(f"{file} is damaged or no HDF5 file: {again}") from error
    for name, (shape, dtype) in layout(card.spec).items():
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
                f"{split_file(card.path, split)} does not have the digest of its card "
                f"({', '.join(damaged)} differ): generate the data set again."
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
