"""Backgrounds by name: `open_background` gives, for each split, what lies under its scenes.

A background has `fill(image, key, indices)`, which draws into image (n, S, S, 3) uint8, and `card`,
what the data set's card says of it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from mnistattn.errors import InputError
from mnistattn.generators.backgrounds.distractors import Clutter, Gaussian, Patches
from mnistattn.generators.backgrounds.photos import Photos, list_photos
from mnistattn.generators.digits.pool import DigitPool
from mnistattn.generators.variants import Spec, closest

SOURCES = ("textures", "sun397")  # or a folder of photos


class Background(Protocol):
    """What lies under the scenes of one split."""

    card: dict

    def fill(self, image: np.ndarray, key: np.ndarray, indices: np.ndarray) -> None:
        """Draw the backgrounds of scenes `indices` (n,) into image (n, S, S, 3) uint8."""


class Black:
    """Nothing under the digits."""

    card = {"source": "black"}

    def fill(self, image: np.ndarray, key: np.ndarray, indices: np.ndarray) -> None:
        """Set image to 0."""
        image[:] = 0


def open_background(
    spec: Spec, name: str, data_root: Path
) -> tuple[Callable[[str, DigitPool], Background], dict]:
    """A function (split, its digit pool) -> Background, and what the card says of the source.

    name matters for variants on photos only: `textures`, `sun397`, or a folder. Raises InputError.
    """
    if spec.background == "black":
        return lambda split, pool: Black(), dict(Black.card)
    if spec.background == "patches":
        return lambda split, pool: Patches(pool), dict(Patches.card)
    if spec.background == "gaussian":
        return lambda split, pool: Gaussian(), dict(Gaussian.card)
    opened, card = _open_photos(spec, name, data_root)
    if not spec.row.clutter:
        return opened, card
    return lambda split, pool: Clutter(opened(split, pool), pool), card


def _open_photos(spec: Spec, name: str, data_root: Path):
    """The same, of `name` alone."""
    if name == "textures":
        from mnistattn.generators.backgrounds.textures import Textures

        return lambda split, pool: Textures(), dict(Textures.card)
    if name == "sun397":
        from mnistattn.generators.backgrounds.sun397 import sun397_folder

        folder = sun397_folder(data_root)
    else:
        folder = Path(name)
        if not folder.is_dir():
            raise InputError(
                f"backgrounds '{name}' is neither a folder nor one of {', '.join(SOURCES)}."
                f"{closest(name, SOURCES)}"
            )
    shares = list_photos(folder)
    card = {"source": "sun397" if name == "sun397" else "folder", "path": str(name)}
    return lambda split, pool: Photos(shares[split], folder, spec.size), card
