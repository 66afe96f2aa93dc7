"""From a request to arrays: the sources and the drawer of a data set, and any of its images.

`generate` writes what this draws; `verify` draws some again and compares.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from mnistattn.dataset.format import layout
from mnistattn.generators.backgrounds import open_background
from mnistattn.generators.digits import open_digits
from mnistattn.generators.random import stream_key
from mnistattn.generators.scene import SceneDrawer
from mnistattn.generators.variants import Spec


class Painter:
    """Paints the scenes of one split: a pure function of spec, seed, split, index and sources."""

    def __init__(self, spec: Spec, seed: int, split: str, pool, background):
        self._drawer = SceneDrawer(spec, pool)
        self._background, self._key, self._names = background, stream_key(seed, split), layout(spec)

    def paint(self, indices: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Scenes `indices` (n,) int64 as arrays by name, and (n, 2) tries and restarts."""
        arrays = self._drawer.empty(len(indices))
        self._background.fill(arrays["image"], self._key, indices)
        effort = self._drawer.draw(arrays, self._key, indices)
        return {name: arrays[name] for name in self._names}, effort


class Sources:
    """The digits and backgrounds of a data set, opened by name; `card` describes them."""

    def __init__(
        self, spec: Spec, seed: int, digits: str, digit_split: str, backgrounds: str,
        data_root: Path, say: Callable[[str], None] = print,
    ):  # fmt: skip
        self._spec, self._seed = spec, seed
        self._backgrounds, background_card = open_background(spec, backgrounds, data_root)
        self._pools, digit_card = open_digits(digits, data_root, digit_split, seed, say)
        self.card = {"digits": digit_card, "backgrounds": background_card}

    def note(self, split: str) -> None:
        """Note in the card what the background of a split consists of, without opening its digits;
        drawn backgrounds consist of nothing that had to be noted."""
        if "path" in self.card["backgrounds"]:
            photos = self._backgrounds(split, None)  # type: ignore[arg-type]  # of no use to them
            self.card["backgrounds"].setdefault("splits", {})[split] = photos.card

    def painter(self, split: str) -> Painter:
        """A painter of a split; notes in the card what its background consists of."""
        pool = self._pools(split)
        background = self._backgrounds(split, pool)
        if "sha256" in background.card:
            self.card["backgrounds"].setdefault("splits", {})[split] = background.card
        return Painter(self._spec, self._seed, split, pool, background)
