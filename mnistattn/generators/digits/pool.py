"""A digit pool: the glyphs that one split's scenes may use."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class DigitPool:
    """Glyphs of one split, found by class.

    images: uint8 (n, 28, 28), ink on black. Glyphs of class d are
    images[order[start[d]:start[d + 1]]]; order (n,) and start (11,) are int64.
    """

    images: np.ndarray
    order: np.ndarray
    start: np.ndarray

    @classmethod
    def from_labels(cls, images: np.ndarray, labels: np.ndarray) -> "DigitPool":
        """Group images by their labels, uint8 (n,) in 0 .. 9, every class present."""
        start = np.searchsorted(np.sort(labels), np.arange(11)).astype(np.int64)
        order = np.argsort(labels, kind="stable").astype(np.int64)
        # A copy: numba compiles the drawing once more for arrays that are read-only.
        return cls(np.array(images, order="C"), order, start)
