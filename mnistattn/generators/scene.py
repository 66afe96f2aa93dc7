"""A scene: five to nine coloured digits of many sizes on a background, a query, its answer.

`draw_scenes` is a pure function of (spec, key of seed and split, index) and of the digit pool, all
in integers. What happens to one scene, in order, each step from its own random stream:

    PLAN       how many digits, which classes, which glyph of the pool for each
    PLACEMENT  per digit: scale and corner, redrawn together until its box is free of earlier
               strokes (PAN's code). A scene that gets stuck starts this step again (restart + 1).
    COLOR      per digit: one of five colours, and one N(0, 10) shift of all three channels
    QUERY      which of the digits is asked for
    drawing    each glyph, resized to its box, blended over the background
"""

import numpy as np

from mnistattn.errors import MnistattnError
from mnistattn.generators.jit import jit
from mnistattn.generators.random import (
    COLOR,
    PLACEMENT,
    PLAN,
    QUERY,
    below,
    next_u32,
    normal_table,
    open_stream,
)
from mnistattn.generators.resize import gray_scratch, resize_gray, resize_weights
from mnistattn.generators.variants import GLYPH_SIZE, MAX_RESTARTS, MAX_TRIES, PALETTE, Spec

COLOR_NOISE = 10  # standard deviation of a digit's colour shift, in 0 .. 255
_COLORS = len(PALETTE)


class SceneDrawer:
    """Draws the scenes of one spec from one digit pool; holds the tables that all of them share."""

    def __init__(self, spec: Spec, pool):
        self.spec, self.pool = spec, pool
        row = spec.row
        self._low, self._high = round(spec.min_scale * 1024), round(spec.max_scale * 1024)
        self._rules = np.array(
            [spec.size, self._low, self._high, spec.min_objects, spec.max_objects,
             row.asks == "color", row.repeats, spec.placement == "balanced"], np.int64
        )  # fmt: skip
        smallest = (GLYPH_SIZE * self._low) >> 10
        self._sizes = range(smallest, ((GLYPH_SIZE * self._high) >> 10) + 1)
        self._weights = _all_weights(self._sizes.start, self._sizes.stop)
        self._palette = np.array(PALETTE, np.int64)

    def empty(self, n: int) -> dict[str, np.ndarray]:
        """Arrays for n scenes, by name, as the data set stores them; `image` black."""
        size, objects = self.spec.size, self.spec.max_objects
        return {
            "image": np.zeros((n, size, size, 3), np.uint8),
            "instances": np.zeros((n, size, size), np.uint8),
            "digit": np.full((n, objects), -1, np.int8),
            "color": np.full((n, objects), -1, np.int8),
            "scale": np.full((n, objects), -1, np.float32),
            "box": np.full((n, objects, 4), -1, np.int16),
            "query": np.zeros(n, np.uint8),
            "answer": np.zeros(n, np.uint8),
            "target": np.zeros(n, np.uint8),
            "answers": np.zeros((n, _COLORS), np.bool_),
        }

    def draw(self, out: dict[str, np.ndarray], key: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Draw scenes `indices` (n,) int64 over the backgrounds already in out["image"].

        Returns int64 (n, 2): tries of placing a digit (all digits of a scene), restarts.
        """
        effort = np.zeros((len(indices), 2), np.int64)
        stuck = draw_scenes(
            indices, key, self._rules, self.pool.images, self.pool.order, self.pool.start,
            self._weights, self._palette, normal_table(COLOR_NOISE), out["image"],
            out["instances"], out["digit"], out["color"], out["scale"], out["box"], out["query"],
            out["answer"], out["target"], out["answers"], effort
        )  # fmt: skip
        if stuck >= 0:
            raise MnistattnError(
                f"scene {stuck} could not be placed in {MAX_RESTARTS} attempts: give fewer or "
                "smaller objects, or a larger size."
            )
        return effort


def _all_weights(start: int, stop: int):
    """(start, first, count, weights): resize tables from 28 pixels to start .. stop - 1."""
    tables = [resize_weights(GLYPH_SIZE, size) for size in range(start, stop)]
    taps = max(t[2].shape[1] for t in tables)
    first = np.zeros((len(tables), stop), np.int64)
    count = np.zeros((len(tables), stop), np.int64)
    weights = np.zeros((len(tables), stop, taps), np.int64)
    for i, (f, c, w) in enumerate(tables):
        first[i, : len(f)], count[i, : len(c)] = f, c
        weights[i, : w.shape[0], : w.shape[1]] = w
    return start, first, count, weights


@jit
def draw_scenes(
    indices, key, rules, glyphs, order, start, tables, palette, noise,
    image, instances, digit, color, scale, box, query, answer, target, answers, effort
):  # fmt: skip
    """Draw each scene of indices into the out arrays; -1, or the index of one that got stuck."""
    asks_color, balanced = rules[5], rules[7]
    smallest, first, count, weights = tables
    widest = first.shape[1]
    glyph = np.zeros(digit.shape[1], np.int64)
    shift = np.zeros(digit.shape[1], np.int64)
    scratch = gray_scratch(glyphs.shape[1], widest)
    patch = np.zeros((digit.shape[1], widest, widest), np.uint8)
    # Where strokes are, a bit a pixel, 32 to a word: a box is tested a row of words at a time.
    taken = np.zeros((rules[0], (rules[0] + 31) // 32), np.int64)
    for k in range(indices.shape[0]):
        index = indices[k]
        plan = open_stream(key, PLAN, 0, index)
        n, repeated = plan_objects(plan, rules, order, start, digit[k], glyph)
        # Balanced: the target's scale is drawn here, ahead of any rejection, and survives a
        # restart, so that no scale is rarer for being hard to place.
        forced = draw_scale(plan, rules) if balanced else np.int64(-1)

        restart = 0
        while True:
            stream = open_stream(key, PLACEMENT, restart, index)
            done = 0
            instances[k] = 0
            taken[:] = 0
            while done < n:
                fixed = forced if done == 0 else np.int64(-1)
                value, tries = place(stream, rules, fixed, taken, box[k, done])
                effort[k, 0] += tries
                if value < 0:
                    break
                # value / 2^42 is exact in float64: value has 45 bits at most.
                scale[k, done] = np.float32(value / 4398046511104.0)
                t = box[k, done, 2] - smallest
                z = box[k, done, 2]
                resize_gray(
                    glyphs[glyph[done]], z, first[t], count[t], weights[t], scratch, patch[done]
                )
                stamp(instances[k], taken, patch[done], box[k, done], done + 1)
                done += 1
            if done == n:
                break
            restart += 1
            if restart > MAX_RESTARTS:
                return index
        effort[k, 1] = restart

        stream = open_stream(key, COLOR, 0, index)
        if not choose_colors(stream, n, repeated, rules, noise, digit[k], color[k], shift):
            return index
        chosen = choose_target(
            open_stream(key, QUERY, 0, index), n, repeated, rules, digit[k], color[k]
        )
        target[k] = chosen
        query[k] = color[k, chosen] if asks_color else digit[k, chosen]
        answer[k] = digit[k, chosen] if asks_color else color[k, chosen]
        for j in range(n):
            if digit[k, j] == digit[k, chosen]:
                answers[k, color[k, j]] = True
            blend(image[k], patch[j], box[k, j], palette[color[k, j]], shift[j])
    return np.int64(-1)


@jit
def plan_objects(stream, rules, order, start, digit, glyph):
    """Choose classes and glyphs; returns (how many objects, the repeated class or -1)."""
    n = rules[3] + below(stream, rules[4] - rules[3] + 1)
    classes = np.arange(10)
    for j in range(10):
        other = j + below(stream, 10 - j)
        classes[j], classes[other] = classes[other], classes[j]
    repeated = np.int64(-1)
    if rules[6]:
        copies = 2 + below(stream, 3)
        repeated = classes[0]
        for j in range(n):
            digit[j] = repeated if j < copies else classes[j - copies + 1]
        # Whoever is placed first meets no rejection and so is larger: mix the order (balanced
        # keeps a repeated digit first, for that is its target).
        for j in range(1 if rules[7] else 0, n):
            other = j + below(stream, n - j)
            digit[j], digit[other] = digit[other], digit[j]
    else:
        for j in range(n):
            digit[j] = classes[j]
    for j in range(n):
        d = digit[j]
        glyph[j] = order[start[d] + below(stream, start[d + 1] - start[d])]
    return n, repeated


@jit
def draw_scale(stream, rules):
    """A uniform scale, times 2^42 (int64): 10 bits of the bounds' fraction, 32 of the draw."""
    return rules[1] * 4294967296 + (rules[2] - rules[1]) * next_u32(stream)


@jit
def place(stream, rules, fixed, taken, box):
    """Find a box free of earlier strokes; writes (top, left, height, width) into box (4,).

    fixed: a scale to keep, or -1 to draw one at each try. Returns (scale * 2^42, tries); the scale
    is -1 after MAX_TRIES.
    """
    size = rules[0]
    for tries in range(1, MAX_TRIES + 1):
        value = fixed if fixed >= 0 else draw_scale(stream, rules)
        z = (28 * value) >> 42
        room = size - z
        # round(U(0, room)): the two ends have half the weight of the others, as in PAN's code.
        left = (next_u32(stream) * room + 2147483648) >> 32
        top = (next_u32(stream) * room + 2147483648) >> 32
        if is_free(taken, top, left, z):
            box[0], box[1], box[2], box[3] = top, left, z, z
            return value, tries
    return np.int64(-1), MAX_TRIES


@jit
def is_free(taken, top, left, z):
    """True if no stroke pixel lies in the z x z box."""
    for word in range(left >> 5, ((left + z - 1) >> 5) + 1):
        low = max(left - 32 * word, 0)
        high = min(left + z - 32 * word, 32)
        mask = ((1 << (high - low)) - 1) << low
        for y in range(top, top + z):
            if taken[y, word] & mask != 0:
                return False
    return True


@jit
def stamp(instances, taken, patch, box, label):
    """Write label, and take the pixel, wherever the resized glyph has ink (v > 0)."""
    top, left = np.int64(box[0]), np.int64(box[1])
    for y in range(box[2]):
        for x in range(box[3]):
            if patch[y, x] > 0:
                instances[top + y, left + x] = label
                taken[top + y, (left + x) >> 5] |= 1 << ((left + x) & 31)


@jit
def choose_colors(stream, n, repeated, rules, noise, digit, color, shift):
    """Draw each digit's colour and shift; False if the rules could not be met (it never happens).

    Colours are independent, except: repeated digits have different ones; where the colour is the
    query, all are redrawn until one (balanced: the first digit's) occurs exactly once.
    """
    found = False
    for _ in range(MAX_RESTARTS):
        for j in range(n):
            color[j] = below(stream, _COLORS)
        if repeated >= 0:
            deck = np.arange(_COLORS)
            dealt = 0
            for j in range(n):
                if digit[j] == repeated:
                    other = dealt + below(stream, _COLORS - dealt)
                    deck[dealt], deck[other] = deck[other], deck[dealt]
                    color[j] = deck[dealt]
                    dealt += 1
        found = True
        if rules[5]:
            found = False
            for j in range(1 if rules[7] else n):
                found = found or occurs_once(color, n, j)
        if found:
            break
    for j in range(n):
        shift[j] = noise[next_u32(stream) >> 16]
    return found


@jit
def occurs_once(color, n, j):
    """True if no other of the first n objects has object j's colour."""
    for other in range(n):
        if other != j and color[other] == color[j]:
            return False
    return True


@jit
def choose_target(stream, n, repeated, rules, digit, color):
    """The zero-based object that is asked for: uniform among those that may be."""
    if rules[7]:
        return np.int64(0)
    allowed = np.zeros(n, np.int64)
    count = 0
    for j in range(n):
        if rules[5]:
            fits = occurs_once(color, n, j)
        else:
            fits = repeated < 0 or digit[j] == repeated
        if fits:
            allowed[count] = j
            count += 1
    return allowed[below(stream, count)]


@jit
def blend(image, patch, box, color, shift):
    """Paste the glyph: RGB = colour * v / 255, alpha = v (so an edge goes with (v / 255)^2)."""
    top, left = box[0], box[1]
    level = np.zeros(3, np.int64)
    for c in range(3):
        level[c] = min(255, max(0, color[c] + shift))
    for y in range(box[2]):
        for x in range(box[3]):
            v = np.int64(patch[y, x])
            if v > 0:
                for c in range(3):
                    ink = over_255(level[c] * v)
                    under = np.int64(image[top + y, left + x, c])
                    image[top + y, left + x, c] = over_255(ink * v + under * (255 - v) + 127)


@jit
def over_255(x):
    """x // 255 for 0 <= x < 65535, without a division."""
    return (x + 1 + (x >> 8)) >> 8
