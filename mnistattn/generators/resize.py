"""Image resizing in integers: a separable triangle filter, widened when shrinking (antialiasing).

The same definition as Pillow's BILINEAR (22-bit weights, 8 bits kept between the two passes), with
the weights normalised in exact integer arithmetic instead of doubles, and always across first, then
down (Pillow takes the cheaper order); the tests hold it against Pillow.
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
def _resize_rows(source, size, first, count, weights, line, out):
    """Resize (n, m) uint8 along its first axis to out[:size, :m]; line is scratch, int32 (>= m).

    A row at a time in int32 (255 * 2^22 fits), which the compiler turns into vector instructions.
    """
    m = source.shape[1]
    for o in range(size):
        for i in range(m):
            line[i] = 1 << (_BITS - 1)
        for t in range(count[o]):
            weight = np.int32(weights[o, t])
            row = source[first[o] + t]
            for i in range(m):
                line[i] += weight * np.int32(row[i])
        for i in range(m):
            out[o, i] = line[i] >> _BITS


@jit
def _transpose(source, rows, columns, out):
    """out[c, r] = source[r, c] for a (rows, columns) part."""
    for r in range(rows):
        for c in range(columns):
            out[c, r] = source[r, c]


@jit
def resize_gray(source, size, first, count, weights, scratch, out):
    """Resize a square (n, n) uint8 to out[:size, :size]; scratch as `gray_scratch` makes it.

    Across first, then down, with rounding to 8 bits in between: the order matters to the bytes.
    """
    n = source.shape[0]
    turned, wide, across, line = scratch
    _transpose(source, n, n, turned)
    _resize_rows(turned[:, :n], size, first, count, weights, line, wide)
    _transpose(wide, size, n, across)
    _resize_rows(across[:, :size], size, first, count, weights, line, out)


@jit
def gray_scratch(n, size):
    """Scratch arrays of `resize_gray` for sources of n and results of up to `size` pixels."""
    return (
        np.zeros((n, n), np.uint8),
        np.zeros((size, n), np.uint8),
        np.zeros((n, size), np.uint8),
        np.zeros(max(n, size), np.int32),
    )


@jit
def turn_rgb(source):
    """(h, w, 3) -> (w, h * 3): what `resize_turned_rgb` reads."""
    h, w = source.shape[0], source.shape[1]
    turned = np.empty((w, h * 3), np.uint8)
    for y in range(h):
        for x in range(w):
            for c in range(3):
                turned[x, 3 * y + c] = source[y, x, c]
    return turned


@jit
def resize_turned_rgb(turned, height, width):
    """Resize an image given as `turn_rgb` of it to (height, width, 3) uint8; across, then down."""
    w, h = turned.shape[0], turned.shape[1] // 3
    first, count, weights = resize_weights(w, width)
    wide = np.empty((width, 3 * h), np.uint8)
    line = np.empty(3 * max(h, width), np.int32)
    _resize_rows(turned, width, first, count, weights, line, wide)
    across = np.empty((h, 3 * width), np.uint8)
    for x in range(width):
        for y in range(h):
            for c in range(3):
                across[y, 3 * x + c] = wide[x, 3 * y + c]
    first, count, weights = resize_weights(h, height)
    out = np.empty((height, 3 * width), np.uint8)
    _resize_rows(across, height, first, count, weights, line, out)
    return out.reshape(height, width, 3)


@jit
def resize_rgb(source, height, width):
    """Resize (h, w, 3) uint8 to a new (height, width, 3) uint8."""
    return resize_turned_rgb(turn_rgb(source), height, width)
