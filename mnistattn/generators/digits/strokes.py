"""The digit source `strokes`: handwritten-looking digits drawn with a pen, with no download.

A class has several skeletons (ways to write it), each in several forms. A glyph mixes two forms
of one skeleton, jitters the control points, joins them with smooth curves, then bends, shears,
rotates and strokes the path, and centres the ink as MNIST does. The pixels come from exact
distances to the path's segments, in units of 1/256 pixel.

Random decisions and pixels are int64 arithmetic throughout (roots too: `isqrt`), so a glyph has
the same bytes on every processor and library version; a float sine or root would not promise that.
"""

import numpy as np

from mnistattn.generators.integer import isqrt
from mnistattn.generators.jit import jit
from mnistattn.generators.random import GLYPH, below, open_stream, stream_key

SIZE = 28

# Per class its skeletons: (weight, form, form, ...). A form lists points "x,y" on a grid of about
# 60 by 100 (y down): "!" marks a corner, "/" lifts the pen. The forms of one skeleton agree in
# number and kind of points, so that any two can be mixed.
_SKELETONS = (
    (  # 0: counterclockwise; clockwise with an entry stroke
        (
            6,
            "34,1 12,14 3,50 12,86 32,99 52,86 61,50 51,14 32,1",
            "30,2 14,18 8,50 14,84 30,98 45,84 50,50 45,17 30,3",
            "42,6 16,12 1,52 10,88 30,99 56,84 64,46 54,10 34,0",
            "46,10 22,6 4,44 6,84 28,98 52,80 62,42 50,8 26,4",
            "24,6 8,20 3,52 12,86 30,98 52,86 60,52 54,20 40,6",
            "38,1 10,10 -6,50 8,90 36,99 64,88 76,50 64,12 36,1",
            "36,1 4,12 -20,50 4,90 36,99 68,88 92,50 68,12 34,1",
            "44,16 28,4 8,30 0,66 20,98 50,88 64,52 56,16 20,2",
        ),
        (
            2,
            "10,30 28,4 52,14 60,50 50,86 28,98 8,82 4,50 14,18 36,2",
            "14,14 30,2 50,14 58,48 48,86 28,98 10,84 4,50 10,20 26,4",
        ),
    ),
    (  # 1: a stem; with a serif; with a base; with both
        (10, "30,0 30,50 30,100", "27,0 31,50 29,100", "32,0 29,50 31,100"),
        (3, "16,20 32,0! 32,50 32,100", "22,10 32,0! 33,50 31,100", "10,26 34,0! 33,50 33,100"),
        (1, "30,0 30,50 30,98 / 12,98 48,98", "31,0 30,50 29,98 / 6,99 56,97"),
        (
            2,
            "8,34 34,0! 34,50 34,98 / -2,98 70,98",
            "14,22 34,0! 34,50 34,98 / 10,98 58,98",
            "20,14 34,0! 33,50 33,98 / 16,99 52,97",
        ),
    ),
    (  # 2: a sharp foot; a loop at the foot; a wavy base
        (
            5,
            "6,22 28,2 54,18 44,52 4,96! 62,96",
            "6,24 30,2 50,20 36,56 2,92! 60,98",
            "16,24 30,0 44,20 36,60 20,96! 60,98",
            "2,14 26,0 50,22 42,60 6,98! 64,86",
            "10,30 34,4 58,24 40,58 6,90! 62,100",
        ),
        (
            5,
            "6,20 28,2 52,20 40,56 16,90 3,90 6,76 24,82 44,94 62,90",
            "4,26 24,2 54,14 46,56 22,92 4,96 4,80 22,78 42,92 66,92",
            "8,24 30,3 52,18 40,54 20,90 2,98 2,78 22,74 42,88 64,86",
            "2,16 26,0 52,20 44,58 22,88 4,92 0,76 18,72 44,90 70,98",
            "0,14 28,-2 64,16 56,50 30,88 4,90 2,66 26,62 56,84 84,92",
            "10,14 34,0 58,22 46,62 20,96 0,84 10,64 32,70 50,88 66,96",
        ),
        (
            3,
            "8,22 30,2 52,20 34,58 4,94! 32,90 62,96",
            "4,18 28,2 54,22 40,60 6,96! 34,86 66,90",
        ),
    ),
    (  # 3: round; a small loop at the waist; a flat top
        (
            6,
            "8,12 30,1 52,18 42,40 22,47! 50,56 58,78 34,99 4,88",
            "6,20 28,2 50,16 40,38 18,46! 46,52 58,74 36,98 0,92",
            "10,8 34,0 54,20 42,42 28,48! 48,54 54,76 30,99 6,84",
            "2,6 30,2 50,16 36,38 20,44! 52,52 62,76 32,99 2,96",
            "0,20 16,0 52,10 44,38 20,46! 50,50 60,80 28,99 -6,78",
        ),
        (
            3,
            "8,14 30,1 52,18 40,42 24,50 24,44 48,54 56,78 32,99 4,88",
            "4,8 32,2 54,16 40,44 18,52 20,42 46,52 58,76 34,98 0,94",
        ),
        (
            2,
            "6,2! 54,2! 26,40! 54,54 58,80 32,99 4,90",
            "4,6! 52,0! 30,38! 52,48 56,78 34,98 2,94",
        ),
    ),
    (  # 4: open, two strokes; open and round; closed; one stroke
        (
            4,
            "10,4 4,52! 56,50 / 50,0 48,50 46,100",
            "14,6 4,46! 60,46 / 46,14 44,56 42,100",
            "16,0 0,54! 62,52 / 52,10 46,54 40,100",
            "26,0 0,64! 60,66 / 46,38 40,70 36,100",
        ),
        (
            4,
            "8,2 4,44 26,56 52,46 / 54,2 52,50 46,100",
            "12,6 2,40 20,54 56,44 / 52,0 48,50 44,100",
            "6,10 6,40 28,48 60,38 / 50,4 48,50 50,100",
            "4,0 4,44 30,50 60,46 / 60,0 60,50 60,100",
        ),
        (
            2,
            "42,0 2,62! 64,62 / 44,0 42,50 42,100",
            "38,2 4,54! 62,54 / 42,4 42,50 40,100",
        ),
        (
            4,
            "8,4 4,42 20,56 50,40! 54,4! 48,52 46,100",
            "12,0 2,38 18,50 48,36! 54,8! 50,52 44,100",
            "10,8 6,46 26,54 50,44! 50,10! 48,56 48,100",
        ),
    ),
    (  # 5: one stroke; the top bar last; like an S
        (
            4,
            "54,2! 14,4! 8,44! 32,38 56,58 48,88 24,99 2,88",
            "58,0! 20,4! 12,40! 36,40 54,62 42,90 18,98 0,92",
            "50,4! 12,2! 10,46! 34,42 54,64 44,92 22,99 4,90",
        ),
        (
            4,
            "16,4 10,44! 34,40 56,60 46,90 22,99 2,90 / 16,4 58,2",
            "20,8 12,46! 36,46 52,66 40,92 18,98 0,90 / 18,10 64,2",
            "18,4 14,36! 40,42 52,66 38,92 16,98 -2,88 / 18,4 70,0",
        ),
        (
            3,
            "58,2 24,6 14,28 32,46 50,66 38,94 4,94",
            "66,4 28,8 14,32 32,50 44,70 30,94 2,96",
            "54,0 20,6 12,34 36,44 50,64 34,94 -2,90",
        ),
    ),
    (  # 6
        (
            5,
            "44,2 20,26 6,60 14,92 34,98 52,82 44,60 26,58 8,76",
            "30,0 12,32 4,68 14,96 32,98 46,80 38,62 22,62 8,78",
            "52,8 28,10 8,48 10,88 32,99 54,80 46,58 24,58 8,80",
            "36,0 16,26 2,62 14,94 40,98 58,84 48,66 26,70 12,84",
            "40,0 18,28 4,62 10,90 28,98 46,80 46,56 30,54 10,72",
            "20,0 8,30 6,64 20,96 44,98 64,82 56,62 32,60 12,80",
            "30,0 10,30 0,66 14,96 44,98 68,80 58,60 30,62 6,88",
            "24,0 8,40 4,78 22,98 48,90 54,68 38,54 16,64 6,84",
            "26,0 4,36 0,72 24,98 54,90 66,62 48,42 22,52 8,78",
            "36,0 8,30 0,70 20,98 50,92 64,66 46,48 22,62 12,86",
        ),
    ),
    (  # 7: plain; with a serif; with a bar; a wavy top; a round corner
        (
            4,
            "4,6! 58,4! 40,46 26,100",
            "2,10! 54,2! 42,48 36,100",
            "6,2! 60,8! 36,50 16,100",
        ),
        (
            3,
            "2,20! 4,4! 56,4! 38,50 24,100",
            "6,24! 4,8! 58,4! 42,50 32,100",
        ),
        (
            2,
            "4,6! 58,4! 38,50 22,100 / 16,52 54,48",
            "2,4! 58,8! 40,50 28,100 / 6,56 70,46",
            "6,8! 54,2! 38,52 28,100 / 18,58 58,48",
        ),
        (
            3,
            "2,20 10,6 32,8 56,4! 40,44 30,100",
            "0,16 14,4 36,10 58,2! 42,50 22,100",
        ),
        (
            3,
            "4,8 30,3 54,8 46,40 28,100",
            "0,10 28,6 52,6 46,46 36,100",
        ),
        (
            2,
            "2,26 8,8 30,3 52,10 46,44 30,100",
            "0,30 8,6 34,4 50,16 48,56 44,100",
        ),
    ),
    (  # 8: one stroke from the top; two circles; one stroke from the waist
        (
            6,
            "50,14 30,2 10,16 24,42 46,60 50,84 28,99 8,84 18,58 42,40 52,16",
            "54,10 32,2 14,18 26,42 44,62 42,86 22,98 6,84 20,58 46,36 56,12",
            "44,8 26,2 10,18 24,44 48,62 50,86 30,99 10,84 20,60 44,36 46,10",
            "58,8 32,4 12,20 24,46 40,66 34,90 16,98 4,84 22,60 48,36 60,16",
            "56,18 38,2 16,14 22,38 42,58 44,86 24,99 8,86 18,62 40,40 66,6",
            "46,22 32,6 14,14 22,38 42,58 44,86 24,99 8,86 18,62 40,40 64,10",
            "64,8 34,4 16,18 26,40 44,60 42,86 22,99 8,84 20,62 38,44 50,26",
            "70,14 40,0 12,14 22,38 48,58 46,86 24,99 4,86 18,60 44,42 72,0",
            "54,14 30,0 4,18 20,48 40,66 42,88 28,99 14,88 20,66 46,44 58,18",
            "46,6 26,0 10,14 20,32 48,52 58,80 30,99 4,82 16,56 40,32 48,10",
        ),
        (
            2,
            "30,2 12,12 12,34 30,46 46,34 46,12 28,2 / 30,46 8,60 6,86 30,99 54,86 52,60 28,46",
            "32,0 16,10 16,32 30,44 46,32 46,10 30,0 / 32,46 12,60 8,84 28,99 48,86 50,60 30,44",
        ),
        (
            2,
            "28,50 8,24 28,2 50,22 32,48 10,74 28,98 50,78 30,50",
            "30,48 12,22 32,2 52,20 32,50 8,76 24,98 46,80 28,46",
        ),
    ),
    (  # 9: a straight tail; a curved tail; one stroke without a corner
        (
            5,
            "50,20 32,2 10,14 6,36 24,48 46,34 50,12! 48,52 44,100",
            "52,12 28,4 8,18 6,38 22,46 44,34 54,10! 46,54 34,100",
            "46,16 28,2 10,16 8,38 24,46 42,32 48,8! 50,52 50,100",
            "54,22 30,0 2,24 10,58 36,60 52,46 58,14! 58,60 56,100",
            "46,4 18,4 0,24 6,42 24,46 44,34 56,8! 54,52 52,100",
            "40,10 28,0 14,8 12,24 24,32 36,24 44,8! 44,52 40,100",
            "70,4 30,0 0,14 4,32 22,36 46,28 62,10! 56,56 50,100",
        ),
        (
            3,
            "50,18 30,2 8,14 6,36 24,48 46,34 52,12! 54,54 42,92 8,94",
            "52,14 32,2 12,14 8,34 26,46 46,32 52,12! 52,58 34,94 2,90",
        ),
        (
            4,
            "48,12 26,3 6,20 16,44 38,38 50,10 50,36 44,68 38,100",
            "54,14 30,2 8,24 18,46 42,36 54,12 50,38 38,70 24,100",
            "60,16 30,0 0,22 6,54 38,52 60,12 60,44 56,74 54,100",
            "54,6 24,2 2,22 12,42 36,40 52,24 54,48 48,76 38,100",
        ),
    ),
)

_SMOOTH, _CORNER, _DOWN = 0, 1, 2  # kinds of points: _DOWN is where the pen comes down


def _tables():
    """_SKELETONS as two int64 arrays: points (n, 3): x, y, kind; skeletons (n, 5): class, weight,
    first point, number of forms, points per form."""
    points, skeletons = [], []
    for digit, ways in enumerate(_SKELETONS):
        for weight, *forms in ways:
            first, sizes = len(points), set()
            for form in forms:
                before = len(points)
                for stroke in form.split("/"):
                    for n, point in enumerate(stroke.split()):
                        x, y = point.rstrip("!").split(",")
                        kind = _DOWN if n == 0 else _CORNER if point.endswith("!") else _SMOOTH
                        points.append((int(x), int(y), kind))
                sizes.add(len(points) - before)
            (size,) = sizes
            skeletons.append((digit, weight, first, len(forms), size))
    return np.array(points, np.int64), np.array(skeletons, np.int64)


_POINTS, _WAYS = _tables()
_UNIT = 64  # path units per grid unit, while the path is shaped
_PIXEL = 256  # path units per pixel, once it is fitted
_STEPS = 6  # segments per pair of control points
_MAX_PATH = int(_WAYS[:, 4].max()) * _STEPS + 1


@jit
def _spread(state, reach):
    """A random number in -reach .. reach, the middle likelier (the mean of two uniform ones)."""
    return (below(state, 2 * reach + 1) + below(state, 2 * reach + 1)) // 2 - reach


@jit
def _control_points(state, digit, knots):
    """Write the control points (x, y, kind) of a random form of the class; return their number."""
    total = 0
    for w in range(_WAYS.shape[0]):
        if _WAYS[w, 0] == digit:
            total += _WAYS[w, 1]
    pick = below(state, total)
    way = 0
    for w in range(_WAYS.shape[0]):
        if _WAYS[w, 0] == digit:
            pick -= _WAYS[w, 1]
            if pick < 0:
                way = w
                break
    first, forms, size = _WAYS[way, 2], _WAYS[way, 3], _WAYS[way, 4]
    a = first + size * below(state, forms)
    b = first + size * below(state, forms)
    mix = below(state, 321) - 32  # in 1/256; beyond the ends too
    reach = _UNIT * (2 + below(state, 10))  # how sloppy this hand is
    stroke_x, stroke_y = 0, 0
    for n in range(size):
        kind = _POINTS[a + n, 2]
        if kind == _DOWN and n > 0:  # a second stroke misses its place a little
            stroke_x = _spread(state, 5 * _UNIT)
            stroke_y = _spread(state, 5 * _UNIT)
        for c in range(2):
            mixed = _POINTS[a + n, c] * 256 + (_POINTS[b + n, c] - _POINTS[a + n, c]) * mix
            knots[n, c] = mixed * _UNIT // 256 + _spread(state, reach)
        knots[n, 0] += stroke_x
        knots[n, 1] += stroke_y
        knots[n, 2] = kind
    return size


@jit
def _curve(knots, count, path, pen):
    """Join the control points with cubic (Catmull-Rom) spans; return the number of path points.

    pen[i] tells whether path point i is drawn to from point i - 1. A span between two corners or
    ends is straight.
    """
    n = 0
    cube = _STEPS * _STEPS * _STEPS
    for k in range(count):
        if knots[k, 2] == _DOWN:
            path[n, 0], path[n, 1], pen[n] = knots[k, 0], knots[k, 1], 0
            n += 1
            continue
        last = k == count - 1 or knots[k + 1, 2] == _DOWN
        for s in range(1, _STEPS + 1):
            # The Hermite basis at s / _STEPS, times _STEPS cubed.
            to = 3 * s * s * _STEPS - 2 * s * s * s
            leave = s * s * s - 2 * s * s * _STEPS + s * _STEPS * _STEPS
            arrive = s * s * s - s * s * _STEPS
            for c in range(2):
                p, q = knots[k - 1, c], knots[k, c]
                # Twice the tangents: of the chord at ends and corners, of the neighbours elsewhere.
                leaving = 2 * (q - p) if knots[k - 1, 2] != _SMOOTH else q - knots[k - 2, c]
                sharp = last or knots[k, 2] != _SMOOTH
                arriving = 2 * (q - p) if sharp else knots[k + 1, c] - p
                doubled = 2 * p * (cube - to) + 2 * q * to + leaving * leave + arriving * arrive
                path[n, c] = doubled // (2 * cube)
            pen[n] = 1
            n += 1
    return n


@jit
def _distort(state, path, count):
    """Bend, shear, stretch and rotate the path in place: this writer's hand."""
    width = 296 + _spread(state, 130)  # in 1/256
    slant = _spread(state, 150) + 25  # mostly to the right, as MNIST's
    bend = np.empty(6, np.int64)
    for n in range(6):
        bend[n] = _spread(state, 60)  # 1/256 of the height, at half a height off the middle
    sine = _spread(state, 15000)  # in 1/65536: up to 13 degrees
    cosine = isqrt((1 << 32) - sine * sine)
    half = 50 * _UNIT
    for n in range(count):
        x, y = path[n, 0] - 30 * _UNIT, path[n, 1] - half
        xx, xy, yy = x * x // half, x * y // half, y * y // half
        u = (x * width - y * slant + bend[0] * xx + bend[1] * xy + bend[2] * yy) >> 8
        v = (y * 256 + bend[3] * xx + bend[4] * xy + bend[5] * yy) >> 8
        path[n, 0] = (u * cosine - v * sine) >> 16
        path[n, 1] = (u * sine + v * cosine) >> 16


@jit
def _fit(path, pen, count, margin):
    """Scale the path to pixels and centre it as MNIST: the ink's larger side 20 pixels, then its
    centre of mass in the middle. margin is how far visible ink reaches beyond the path."""
    left, right, top, bottom = path[0, 0], path[0, 0], path[0, 1], path[0, 1]
    for n in range(1, count):
        left, right = min(left, path[n, 0]), max(right, path[n, 0])
        top, bottom = min(top, path[n, 1]), max(bottom, path[n, 1])
    side = max(right - left, bottom - top, 1)
    room = 20 * _PIXEL - 2 * margin
    for n in range(count):
        path[n, 0] = (path[n, 0] - left) * room // side
        path[n, 1] = (path[n, 1] - top) * room // side
    # The mass of a segment is its length: close to the ink's, and known before anything is drawn.
    mass, mass_x, mass_y = 1, 0, 0
    for n in range(1, count):
        if pen[n] == 1:
            dx, dy = path[n, 0] - path[n - 1, 0], path[n, 1] - path[n - 1, 1]
            length = isqrt(dx * dx + dy * dy)
            mass += length
            mass_x += length * (path[n, 0] + path[n - 1, 0])
            mass_y += length * (path[n, 1] + path[n - 1, 1])
    middle = SIZE * _PIXEL // 2 + _PIXEL // 2  # MNIST's middle is that of pixel 14
    end = SIZE * _PIXEL - margin
    shift_x = middle - mass_x // (2 * mass)
    shift_y = middle - mass_y // (2 * mass)
    shift_x = max(margin, min(shift_x, end - (right - left) * room // side))  # all ink inside
    shift_y = max(margin, min(shift_y, end - (bottom - top) * room // side))
    for n in range(count):
        path[n, 0] += shift_x
        path[n, 1] += shift_y


@jit
def _ink(path, pen, count, inner, outer, out):
    """Draw the path into out: full ink up to inner from it, none beyond outer."""
    far = outer * outer
    nearest = np.full((SIZE, SIZE), far, np.int64)  # squared distance of pixel centres to the path
    for n in range(1, count):
        if pen[n] == 0:
            continue
        ax, ay, bx, by = path[n - 1, 0], path[n - 1, 1], path[n, 0], path[n, 1]
        dx, dy = bx - ax, by - ay
        length = dx * dx + dy * dy
        x0 = max(0, (min(ax, bx) - outer) // _PIXEL)
        x1 = min(SIZE - 1, (max(ax, bx) + outer) // _PIXEL)
        y0 = max(0, (min(ay, by) - outer) // _PIXEL)
        y1 = min(SIZE - 1, (max(ay, by) + outer) // _PIXEL)
        for y in range(y0, y1 + 1):
            py = y * _PIXEL + _PIXEL // 2 - ay
            for x in range(x0, x1 + 1):
                px = x * _PIXEL + _PIXEL // 2 - ax
                along = px * dx + py * dy
                if along <= 0:
                    square = px * px + py * py
                elif along >= length:
                    square = (px - dx) * (px - dx) + (py - dy) * (py - dy)
                else:
                    across = px * dy - py * dx
                    square = across * across // length
                nearest[y, x] = min(nearest[y, x], square)
    soft = outer - inner
    for y in range(SIZE):
        for x in range(SIZE):
            if nearest[y, x] >= far:
                out[y, x] = 0
            else:
                distance = isqrt(nearest[y, x])
                out[y, x] = min(255, (outer - distance) * 255 // soft)


@jit
def draw_glyph(state, digit, out):
    """Draw a glyph of class digit with the stream state into out (28, 28) uint8, white on black."""
    knots = np.empty((_MAX_PATH, 3), np.int64)
    path = np.empty((_MAX_PATH, 2), np.int64)
    pen = np.empty(_MAX_PATH, np.int64)
    count = _curve(knots, _control_points(state, digit, knots), path, pen)
    _distort(state, path, count)
    width = 180 + below(state, 160) + below(state, 160)  # half the pen's width
    if below(state, 8) == 0:
        width += below(state, 180)  # a felt pen
    soft = 180 + below(state, 180)
    outer = width + soft // 2
    _fit(path, pen, count, width + soft // 4)
    _ink(path, pen, count, outer - soft, outer, out)


@jit
def _draw_glyphs(key, first, images, labels):
    for n in range(images.shape[0]):
        digit = (first + n) % 10
        labels[n] = digit
        draw_glyph(open_stream(key, GLYPH, 0, first + n), digit, images[n])


def stroke_glyphs(
    seed: int, split: str, count: int, first: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Glyphs first .. first + count - 1 of a split: images (count, 28, 28), labels (count,), uint8.

    Glyph i is of class i % 10 and depends on seed, split and i alone.
    """
    images = np.empty((count, SIZE, SIZE), np.uint8)
    labels = np.empty(count, np.uint8)
    _draw_glyphs(stream_key(seed, split), first, images, labels)
    return images, labels
