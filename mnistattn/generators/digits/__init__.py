"""Digit sources by name: `open_digits` gives a pool of glyphs for each split."""

from collections.abc import Callable
from pathlib import Path

from mnistattn.errors import InputError
from mnistattn.generators.digits.mnist import download_mnist, read_mnist, split_mnist
from mnistattn.generators.digits.pool import DigitPool
from mnistattn.generators.variants import DIGIT_SPLITS, SPLITS, choose

SOURCES = ("auto", "mnist", "strokes")
STROKES_COUNT = {"train": 50_000, "val": 10_000, "test": 10_000}  # as many as MNIST has


def open_digits(
    name: str, data_root: Path, digit_split: str, seed: int, say: Callable[[str], None] = print
) -> tuple[Callable[[str], DigitPool], dict]:
    """A function split -> DigitPool, and what the card says of the source.

    name: `mnist`, `strokes` (drawn from the seed), or `auto`: MNIST where it is in data_root or
    can be downloaded, else strokes; `say` is told which. Raises InputError.
    """
    choose("digit source", name, SOURCES)
    choose("digit split", digit_split, DIGIT_SPLITS)
    if name == "strokes":
        return _strokes(digit_split, seed)
    data_root = Path(data_root)
    try:
        parts, checksum = read_mnist(data_root)
    except FileNotFoundError:
        say(f"MNIST is not in {data_root}: downloading it")
        try:
            download_mnist(data_root)
        except InputError:
            if name == "mnist":
                raise
            say(f"digits: strokes (built in), for MNIST cannot be downloaded to {data_root} here")
            return _strokes(digit_split, seed)
        parts, checksum = read_mnist(data_root)
    if name == "auto":
        say(f"digits: MNIST, from {data_root}")
    card = {"source": "mnist", "split": digit_split, "sha256": checksum}
    return lambda split: DigitPool.from_labels(*split_mnist(parts, split, digit_split)), card


def _strokes(digit_split, seed):
    from mnistattn.generators.digits.strokes import stroke_glyphs

    def pool(split: str) -> DigitPool:
        shared = SPLITS[0] if digit_split == "pooled" else split
        return DigitPool.from_labels(*stroke_glyphs(seed, shared, STROKES_COUNT[shared]))

    return pool, {"source": "strokes", "split": digit_split, "seed": seed, "count": STROKES_COUNT}
