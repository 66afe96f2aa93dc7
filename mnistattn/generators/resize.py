"""Image resizing in integers: a separable triangle filter, widened when shrinking (antialiasing).

The same definition as Pillow's BILINEAR (22-bit weights, 8 bits kept between the two passes), with
the weights normalised in exact integer arithmetic instead of doubles; the tests hold it against
Pillow.
"""

import numpy as np

from mnistattn.generators.jit import jit

_BITS = 22


@jit
def resize_weights(size_in, size_out):
    """Per output position: first input position, count, and 22-bit weights that sum to 2^22.

    Returns first (size_out,), count (size_out,), weights (size_out, taps), all int64.
    """
    wide = max(size_in, size_out)  # half the filter's support, in units of 1 / (2 * size_out)
    taps = 2 * ((wide + size_out - 1) // size_out) + 1
    first = np.zeros(size_out, np.int64)
    count = np.zeros(size_out, np.int64)
    weights = np.zeros((size_out, taps), np.int64)
    for o in range(size_out):
        # Input pixel x is centred at x + 1/2; output pixel o at (o + 1/2) * size_in / size_out.
        # Both times 2 * size_out: (2x + 1) * size_out and (2o + 1) * size_in.
        center = (2 * o + 1) * size_in
        total = 0
        n = 0
        lowest = max(0, (center - 2 * wide) // (2 * size_out))
        for x in range(lowest, size_in):
            w = 2 * wide - abs((2 * x + 1) * size_out - center)
            if w <= 0:
                if n > 0:
                    break
                continue
            if n == 0:
                first[o] = x
            weights[o, n] = w
            total += w
            n += 1
        count[o] = n
        left = 1 << _BITS
        best = 0
        for t in range(n):
            weights[o, t] = (weights[o, t] * (1 << _BITS) + total // 2) // total
            left -= weights[o, t]
            if weights[o, t] > weights[o, best]:
                best = t
        weights[o, best] += left  # the largest weight takes the rounding, so the sum is exact
    return first, count, weights


@jit
def resize_gray(source, size, first, count, weights, rows, out):
    """Resize a square (n, n) uint8 to out[:size, :size]; rows is scratch (n, >= size) uint8."""
    n = source.shape[0]
    half = 1 << (_BITS - 1)
    for y in range(n):
        for x in range(size):
            total = half
            for t in range(count[x]):
                total += weights[x, t] * source[y, first[x] + t]
            rows[y, x] = total >> _BITS
    for y in range(size):
        for x in range(size):
            total = half
            for t in range(count[y]):
                total += weights[y, t] * rows[first[y] + t, x]
            out[y, x] = total >> _BITS


@jit
def resize_rgb(source, height, width):
    """Resize (h, w, 3) uint8 to a new (height, width, 3) uint8."""
    h, w = source.shape[0], source.shape[1]
    half = 1 << (_BITS - 1)
    first, count, weights = resize_weights(w, width)
    rows = np.empty((h, width, 3), np.uint8)
    for y in range(h):
        for x in range(width):
            for c in range(3):
                total = half
                for t in range(count[x]):
                    total += weights[x, t] * source[y, first[x] + t, c]
                rows[y, x, c] = total >> _BITS
    first, count, weights = resize_weights(h, height)
    out = np.empty((height, width, 3), np.uint8)
    line = np.empty((width, 3), np.int64)
    for y in range(height):
        line[:] = half
        for t in range(count[y]):
            weight = weights[y, t]
            for x in range(width):
                for c in range(3):
                    line[x, c] += weight * rows[first[y] + t, x, c]
        for x in range(width):
            for c in range(3):
                out[y, x, c] = line[x, c] >> _BITS
    return out
