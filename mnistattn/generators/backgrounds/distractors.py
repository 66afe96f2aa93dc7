"""Backgrounds of MDIST: PAN's patches of digits, or the AttentionRNN paper's Gaussian noise; and
the same patches over another background, for mbg-hard."""

import numpy as np

from mnistattn.generators.digits.pool import DigitPool
from mnistattn.generators.jit import jit
from mnistattn.generators.random import DISTRACTORS, below, next_u32, normal_table, open_stream
from mnistattn.generators.resize import gray_scratch, resize_gray, resize_weights
from mnistattn.generators.scene import COLOR_NOISE, over_255
from mnistattn.generators.variants import PALETTE

PATCHES = 17
CROP = 5
NOISE_SIGMA = 32  # the paper gives no number; per pixel and channel, over black, so half is cut off


class Patches:
    """17 random 5 x 5 crops of random digits, coloured like digits, scaled by U(0.5, 3), added.

    As PAN's code: the addition is uint8 and wraps where patches overlap.
    """

    card = {"source": "patches", "count": PATCHES, "crop": CROP}

    def __init__(self, pool):
        self._pool = pool

    def fill(self, image: np.ndarray, key: np.ndarray, indices: np.ndarray) -> None:
        """Draw into image (n, H, W, 3) uint8 what lies under scenes `indices`."""
        image[:] = 0
        palette = np.array(PALETTE, np.int64)
        _patches(indices, key, self._pool.images, palette, normal_table(COLOR_NOISE), False, image)


class Clutter:
    """Another background with `Patches`' crops over it, blended as digits are."""

    def __init__(self, under, pool: DigitPool):
        self._under, self._pool = under, pool
        self.card = under.card

    def fill(self, image: np.ndarray, key: np.ndarray, indices: np.ndarray) -> None:
        """Draw into image (n, H, W, 3) uint8 what lies under scenes `indices`."""
        self._under.fill(image, key, indices)
        palette = np.array(PALETTE, np.int64)
        _patches(indices, key, self._pool.images, palette, normal_table(COLOR_NOISE), True, image)


class Gaussian:
    """Gaussian noise on black: N(0, 32) in each pixel and channel, clipped to 0 .. 255."""

    card = {"source": "gaussian", "sigma": NOISE_SIGMA}

    def fill(self, image: np.ndarray, key: np.ndarray, indices: np.ndarray) -> None:
        """Draw into image (n, H, W, 3) uint8 what lies under scenes `indices`."""
        _gaussian(indices, key, normal_table(NOISE_SIGMA), image)


@jit
def _patches(indices, key, glyphs, palette, noise, over, image):
    size = image.shape[1]
    side = glyphs.shape[1]
    crop = np.zeros((CROP, CROP), np.uint8)
    scratch = gray_scratch(CROP, 3 * CROP)
    out = np.zeros((3 * CROP, 3 * CROP), np.uint8)
    for k in range(indices.shape[0]):
        stream = open_stream(key, DISTRACTORS, 0, indices[k])
        for _ in range(PATCHES):
            glyph = below(stream, glyphs.shape[0])
            top, left = below(stream, side - CROP + 1), below(stream, side - CROP + 1)
            crop[:] = glyphs[glyph, top : top + CROP, left : left + CROP]
            color = below(stream, palette.shape[0])
            shift = noise[next_u32(stream) >> 16]
            # int(5 s), s ~ U(0.5, 3), in units of 2^-33: s = (2^32 + 5 u) / 2^33.
            z = (CROP * (4294967296 + 5 * next_u32(stream))) >> 33
            first, count, weights = resize_weights(CROP, z)
            resize_gray(crop, z, first, count, weights, scratch, out)
            x0 = (next_u32(stream) * (size - z) + 2147483648) >> 32
            y0 = (next_u32(stream) * (size - z) + 2147483648) >> 32
            for y in range(z):
                for x in range(z):
                    v = np.int64(out[y, x])
                    for c in range(3):
                        ink = min(255, max(0, palette[color, c] + shift)) * v // 255
                        under = np.int64(image[k, y0 + y, x0 + x, c])
                        if over:
                            value = over_255(ink * v + under * (255 - v) + 127)
                        else:
                            value = (under + ink) & 255
                        image[k, y0 + y, x0 + x, c] = value


@jit
def _gaussian(indices, key, noise, image):
    flat = image.reshape(image.shape[0], -1)
    for k in range(indices.shape[0]):
        stream = open_stream(key, DISTRACTORS, 0, indices[k])
        pixels = flat[k]
        for p in range(0, pixels.shape[0], 2):  # a 32-bit draw serves two values
            draw = next_u32(stream)
            pixels[p] = min(255, max(0, np.int64(noise[draw >> 16])))
            if p + 1 < pixels.shape[0]:
                pixels[p + 1] = min(255, max(0, np.int64(noise[draw & 0xFFFF])))
