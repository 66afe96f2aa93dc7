"""The built-in backgrounds, `textures`: drawn dead-leaves pictures that stand in for photos.

A dead-leaves picture (Lee, Mumford and Huang, IJCV 2001, "Occlusion models for natural images") is
a pile of occluding shapes with sizes of density r^-3. It shares with photos what makes them hard
backgrounds: a power spectrum near f^-2, sharp edges at every scale, heavy-tailed gradients, smooth
areas beside cluttered ones. To it are added what photos show of surfaces and light: colours from a
palette that an image keeps, vivid objects, 1/f and regular patterns, shading, shadows, rows of
equal things, blurred edges, uneven light. `benchmarks/textures_vs_photos.py` compares the two.

The pile is drawn front to back, each leaf filling what is still open of a pixel, so that drawing
stops when the picture is full. Sizes are fractions of the shorter side: a larger picture shows the
same things larger, with more fine detail.

Every decision and pixel is int64 fixed point, so a seed gives the same bytes everywhere. Lengths
are in 1/256 pixel, directions in 1/4096, coverage in 1/1024, noise and factors in 1/256.
"""

import numpy as np

from mnistattn.generators.integer import isqrt
from mnistattn.generators.jit import jit
from mnistattn.generators.random import TEXTURE, below, next_u32, open_stream, stream_key

# Tints: factors (1/256) on a grey level that keep its luma. Named materials, roughly.
_TINTS = np.array(
    [
        (256, 256, 256),  # grey
        (275, 255, 213),  # concrete, sand
        (320, 245, 150),  # wood, earth
        (240, 280, 170),  # dry grass
        (205, 308, 120),  # leaves
        (205, 265, 355),  # haze
        (165, 262, 465),  # sky
        (390, 225, 70),  # orange light, brick
        (440, 180, 150),  # red
        (190, 290, 275),  # water
    ],
    np.int64,
)
# Vivid objects, as photos contain and as digits are coloured.
_VIVID = np.array(
    [
        (205, 30, 35),
        (220, 90, 25),
        (235, 205, 40),
        (35, 140, 55),
        (30, 65, 180),
        (40, 160, 190),
        (190, 60, 130),
        (245, 245, 240),
        (245, 245, 240),
        (18, 17, 20),
    ],
    np.int64,
)

# What a leaf is drawn from: indices into its int64 parameters.
_KIND, _X, _Y, _COS, _SIN, _A, _B, _BEND, _ROUGH, _SOFT, _OPACITY = range(11)
_SHADE_U, _SHADE_V, _NOISE, _SCALE_U, _SCALE_V, _OFFSET_U, _OFFSET_V = range(11, 18)
_PATTERN, _PITCH_U, _PITCH_V, _DUTY, _SHARP, _RELIEF = range(18, 24)
_COLOR, _OTHER, _SIZE = 24, 27, 30
_ELLIPSE, _BOX = 0, 1
_PLAIN, _STRIPES, _GRID = 0, 1, 2

_FULL = 1024  # coverage of a filled pixel
_COLORS = 6  # base colours of a palette


@jit
def _clip(value, low, high):
    """Value, kept within low .. high."""
    return max(low, min(high, value))


@jit
def _bell(state, deviation):
    """A bell-shaped number of mean 0 and about this standard deviation: four bytes summed."""
    n = next_u32(state)
    total = (n & 255) + (n >> 8 & 255) + (n >> 16 & 255) + (n >> 24) - 510
    return (total * deviation * 443) >> 16  # 443 / 65536 = 1 / 147.8, the sum's own deviation


@jit
def _between(state, low, high):
    """Uniform in low .. high."""
    return low + below(state, high - low + 1)


@jit
def _noise_tile(state, n):
    """A periodic (n, n) field of 1/f noise, n a power of two, deviation about 128.

    From 4 x 4 on, each level doubles the last by interpolation and adds a finer octave.
    """
    field = np.zeros((2, 2), np.int64)
    amplitude = 330
    side = 2
    while side < n:
        finer = np.empty((2 * side, 2 * side), np.int64)
        number = 0
        left = 0
        for y in range(2 * side):
            y0 = y >> 1
            y1 = (y0 - 1 + 2 * (y & 1)) & (side - 1)
            for x in range(2 * side):
                x0 = x >> 1
                x1 = (x0 - 1 + 2 * (x & 1)) & (side - 1)
                value = 9 * field[y0, x0] + 3 * (field[y0, x1] + field[y1, x0]) + field[y1, x1]
                if left == 0:
                    number = next_u32(state)
                    left = 4
                finer[y, x] = (value + 8 >> 4) + (((number & 255) - 128) * amplitude >> 8)
                number >>= 8
                left -= 1
        field = finer
        side *= 2
        # Pure 1/f noise would keep the amplitude; surfaces are smoother than that, as most of the
        # fine scales' power comes from edges.
        amplitude = amplitude * 215 >> 8
    return field


@jit
def _sample(tile, x, y):
    """The tile at (x, y), 1/256 of its cells, interpolated."""
    last = tile.shape[0] - 1
    x0, y0 = (x >> 8) & last, (y >> 8) & last
    x1, y1 = (x0 + 1) & last, (y0 + 1) & last
    fx, fy = x & 255, y & 255
    top = (tile[y0, x0] << 8) + (tile[y0, x1] - tile[y0, x0]) * fx
    bottom = (tile[y1, x0] << 8) + (tile[y1, x1] - tile[y1, x0]) * fx
    return ((top << 8) + (bottom - top) * fy) >> 16


@jit
def _stripe(position, pitch, duty, sharp):
    """A wave of -256 .. 256 along a position; pitch is phase (1024 a period) per 16 pixels."""
    phase = (position * pitch >> 12) & 1023
    return _clip((abs(phase - 512) - duty) * sharp >> 8, -256, 256)


@jit
def _paint(leaf, tile, picture, open_):
    """Lay a leaf behind what is drawn: picture (h, w, 3), open_ (h, w). Returns pixels filled."""
    height, width = open_.shape
    kind, cx, cy, cos, sin = leaf[_KIND], leaf[_X], leaf[_Y], leaf[_COS], leaf[_SIN]
    a, b, bend, rough, soft = leaf[_A], leaf[_B], leaf[_BEND], leaf[_ROUGH], leaf[_SOFT]
    opacity, noise, relief = leaf[_OPACITY], leaf[_NOISE], leaf[_RELIEF]
    shade_u, shade_v, pattern = leaf[_SHADE_U], leaf[_SHADE_V], leaf[_PATTERN]
    scale_u, scale_v = leaf[_SCALE_U], leaf[_SCALE_V]
    offset_u, offset_v = leaf[_OFFSET_U], leaf[_OFFSET_V]
    red, green, blue = leaf[_COLOR], leaf[_COLOR + 1], leaf[_COLOR + 2]
    red_d, green_d, blue_d = leaf[_OTHER], leaf[_OTHER + 1], leaf[_OTHER + 2]

    margin = soft + 2 * rough
    sag = ((a * a >> 8) * abs(bend)) >> 12
    reach_u, reach_v = a + margin, b + sag + margin
    reach_x = (abs(cos) * reach_u + abs(sin) * reach_v >> 12) + 256
    reach_y = (abs(sin) * reach_u + abs(cos) * reach_v >> 12) + 256
    first_x, last_x = max(0, cx - reach_x >> 8), min(width - 1, cx + reach_x >> 8)
    first_y, last_y = max(0, cy - reach_y >> 8), min(height - 1, cy + reach_y >> 8)
    inverse_a, inverse_b = (1 << 32) // a, (1 << 32) // b
    ramp = (_FULL << 15) // soft
    filled = 0
    for y in range(first_y, last_y + 1):
        dy = (y << 8) + 128 - cy
        for x in range(first_x, last_x + 1):
            left = open_[y, x]
            if left == 0:
                continue
            dx = (x << 8) + 128 - cx
            u = dx * cos + dy * sin >> 12
            v = dy * cos - dx * sin >> 12
            if bend != 0:
                v -= (u * u >> 8) * bend >> 12
            if abs(u) > reach_u or abs(v) > b + margin:
                continue
            # The depth inside the outline, in length; for an ellipse nearly so, near its edge.
            if kind == _BOX:
                depth = min(a - abs(u), b - abs(v))
            else:
                nu, nv = u * inverse_a >> 20, v * inverse_b >> 20
                depth = ((1 << 24) - nu * nu - nv * nv) * b >> 25
            if depth < -margin:
                continue
            grain = _sample(tile, (u * scale_u >> 8) + offset_u, (v * scale_v >> 8) + offset_v)
            if rough != 0:
                depth += _clip(grain, -512, 512) * rough >> 8
            cover = _FULL // 2 + (depth * ramp >> 16)
            if cover <= 0:
                continue
            weight = left * (min(cover, _FULL) * opacity >> 10) >> 10
            if left - weight < 24:  # too little left open to be seen
                weight = left
                filled += 1
            mix = grain * noise >> 8
            if pattern != _PLAIN:
                wave = _stripe(u, leaf[_PITCH_U], leaf[_DUTY], leaf[_SHARP])
                if pattern == _GRID:
                    wave = max(wave, _stripe(v, leaf[_PITCH_V], leaf[_DUTY], leaf[_SHARP]))
                mix += wave * relief >> 8
            mix = _clip(mix, -320, 320)
            light = _clip(256 + (u * shade_u + v * shade_v >> 16), 64, 448) * weight
            picture[y, x, 0] += _clip(red + (red_d * mix >> 8), 0, 300) * light >> 8
            picture[y, x, 1] += _clip(green + (green_d * mix >> 8), 0, 300) * light >> 8
            picture[y, x, 2] += _clip(blue + (blue_d * mix >> 8), 0, 300) * light >> 8
            open_[y, x] = left - weight
    return filled


@jit
def _turn(state, leaf, upright):
    """A direction for the leaf; with chance upright / 256 near an axis, as built things stand."""
    if below(state, 256) < upright:
        p, q = 4096, _bell(state, 90)
        if below(state, 2) == 0:
            p, q = q, p
    else:
        p, q = _between(state, -4096, 4096), _between(state, -4096, 4096)
    length = max(1, isqrt(p * p + q * q))
    leaf[_COS], leaf[_SIN] = (p << 12) // length, (q << 12) // length
    if p == 0 and q == 0:
        leaf[_COS] = 4096


@jit
def _palette(state):
    """An image's base colours, (_COLORS, 3): two or three materials in several brightnesses."""
    colors = np.empty((_COLORS, 3), np.int64)
    vividness = 70 + (below(state, 256) * below(state, 360) >> 8)
    if below(state, 24) == 0:
        vividness = 0  # a photo without colour
    brightness = 132 + _bell(state, 14)
    contrast = _between(state, 26, 84)
    main, second = below(state, 10), below(state, 10)
    for i in range(_COLORS):
        pick = below(state, 8)
        tint = main
        if pick >= 6:
            tint = below(state, 10)
        elif pick >= 3:
            tint = second
        gray = _clip(brightness + _bell(state, contrast), 12, 250)
        saturation = min(vividness * _between(state, 96, 380) >> 8, 330)
        for c in range(3):
            colors[i, c] = gray * (256 + ((_TINTS[tint, c] - 256) * saturation >> 8)) >> 8
    return colors


@jit
def _color(state, leaf, colors, vivid, region):
    """The leaf's colour, and the difference that its noise and pattern mix in.

    Region is a smooth field's value where the leaf lies: neighbours share material and light.
    """
    if below(state, 256) < vivid:
        pick = below(state, 10)
        gain = _between(state, 130, 280)
        for c in range(3):
            leaf[_COLOR + c] = _VIVID[pick, c] * gain >> 8
    else:
        pick = below(state, _COLORS)
        if below(state, 8) < 5:
            pick = _clip((region + 256) * _COLORS >> 9, 0, _COLORS - 1)
        gain = _clip(256 + _bell(state, 50) + (region >> 2), 96, 420)
        warm, reddish = _bell(state, 9), _bell(state, 3)
        leaf[_COLOR] = (colors[pick, 0] * gain >> 8) + warm + reddish
        leaf[_COLOR + 1] = (colors[pick, 1] * gain >> 8) - reddish
        leaf[_COLOR + 2] = (colors[pick, 2] * gain >> 8) - warm
    if below(state, 6) == 0:  # two materials mixed: leaves before sky, stains, prints
        pick = below(state, _COLORS)
        for c in range(3):
            leaf[_OTHER + c] = (colors[pick, c] - leaf[_COLOR + c]) >> 1
    else:
        for c in range(3):
            leaf[_OTHER + c] = leaf[_COLOR + c]


@jit
def _surface(state, leaf, side, cell, size, coarse):
    """The leaf's noise, pattern and shading. Side is the picture's, cell tile cells per pixel."""
    roughness = below(state, 256)
    leaf[_NOISE] = 3 + (roughness * roughness * coarse >> 16)
    stretch = _between(state, 96, 256)
    leaf[_SCALE_U] = cell * stretch >> 8
    leaf[_SCALE_V] = leaf[_SCALE_U]
    if below(state, 4) == 0:  # grain, waves: finer across than along
        leaf[_SCALE_U] = leaf[_SCALE_U] * _between(state, 24, 160) >> 8
    leaf[_OFFSET_U], leaf[_OFFSET_V] = below(state, 1 << 17), below(state, 1 << 17)
    leaf[_PATTERN] = _PLAIN
    kind = below(state, 16)
    if kind < 3:
        leaf[_PATTERN] = _GRID if kind == 0 else _STRIPES
        shortest = max(side >> 5, 800)  # at least three pixels a period, or it would alias
        period = shortest + (below(state, 256) * below(state, 256) * (side >> 3) >> 16)
        leaf[_PITCH_U] = (1 << 22) // period
        leaf[_PITCH_V] = (leaf[_PITCH_U] * _between(state, 128, 256)) >> 8
        leaf[_DUTY] = _between(state, 160, 420)
        leaf[_SHARP] = _between(state, 128, 128 + (period >> 2))
        leaf[_RELIEF] = _between(state, -150, 150)
    # Shading is a factor that changes by up to a third over the leaf, less over its width.
    leaf[_SHADE_U] = (_bell(state, 40) << 16) // max(size, side >> 6)
    leaf[_SHADE_V] = (_bell(state, 40) << 16) // max(size, side >> 6)


@jit
def _outline(state, leaf, size, blur):
    """The leaf's shape at a size: disc, ellipse, box, thin bar or bent stroke."""
    kind = below(state, 16)
    leaf[_KIND] = _BOX
    leaf[_BEND] = 0
    leaf[_ROUGH] = 0
    a, b = size, size
    if kind < 5:
        leaf[_KIND] = _ELLIPSE
        b = size * _between(state, 80, 256) >> 8
    elif kind < 12:
        b = size * _between(state, 64, 256) >> 8
    else:  # bars and strokes, of about the same area
        a = size * _between(state, 400, 900) >> 8
        b = size * _between(state, 20, 70) >> 8
    if below(state, 3) == 0:
        leaf[_BEND] = _bell(state, 60) * 4096 // max(a, 256)
    if below(state, 5) < 2:
        leaf[_ROUGH] = min(a, b) * _between(state, 20, 160) >> 8
    leaf[_A], leaf[_B] = max(a, 160), max(b, 110)
    leaf[_SOFT] = blur
    if below(state, 6) == 0:  # out of focus
        leaf[_SOFT] += leaf[_B] * below(state, 128) >> 8


@jit
def draw_texture(state, out):
    """Fill out (height, width, 3) uint8 with a picture drawn from a stream's numbers."""
    height, width = out.shape[0], out.shape[1]
    short = min(height, width)
    side = short << 8
    cells = 16
    while cells < 512 and cells * 181 < short * 128:  # the power of two nearest to the side
        cells *= 2
    cell = (cells << 8) // short
    tile = _noise_tile(state, cells)
    picture = np.zeros((height, width, 3), np.int64)
    open_ = np.full((height, width), _FULL, np.int64)
    leaf = np.zeros(_SIZE, np.int64)

    colors = _palette(state)
    blur = 146 + (below(state, 256) * below(state, 256) * (side >> 6) >> 16)
    upright = 256 - (below(state, 256) * below(state, 256) >> 8)
    vivid = 4 + (below(state, 256) * below(state, 256) >> 11)
    coarse = 30 + (below(state, 256) * below(state, 256) * 400 >> 16)
    clutter = _between(state, 0, 170)
    clutter_x, clutter_y = below(state, 1 << 17), below(state, 1 << 17)
    smallest = side * _between(state, 11, 32) >> 10
    largest = side * _between(state, 260, 520) >> 10
    ratio = (smallest << 15) // largest
    spread = (1 << 30) - ratio * ratio
    bare = 2 + (below(state, 256) * below(state, 180) >> 8)
    enough = height * width * bare >> 8  # pixels left to the backdrop

    remaining = height * width
    for _ in range(900):
        if remaining <= enough:
            break
        # p(r) ~ r^-3 between smallest and largest: r = smallest / sqrt(1 - spread * uniform).
        rest = (1 << 30) - ((next_u32(state) >> 2) * spread >> 30)
        size = (smallest << 15) // isqrt(rest)
        x = _between(state, -size, (width << 8) + size)
        y = _between(state, -size, (height << 8) + size)
        # Small things gather: where a smooth field is low, only large leaves lie.
        where = _sample(tile, (x * cell >> 9) + clutter_x, (y * cell >> 9) + clutter_y)
        region = _sample(tile, (x * cell >> 9) + clutter_y, (y * cell >> 9) + clutter_x)
        if size < side >> 3 and below(state, 256) > clutter + (where * 3 >> 1):
            continue
        leaf[_X], leaf[_Y] = x, y
        leaf[_OPACITY] = _FULL
        _turn(state, leaf, upright)
        _outline(state, leaf, size, blur)
        _color(state, leaf, colors, vivid, region)
        _surface(state, leaf, side, cell, size, coarse)
        copies, step_u, step_v = 1, 0, 0
        if below(state, 12) == 0:  # a row of equal things: windows, chairs, posts, books
            copies = _between(state, 3, 7)
            step_v = leaf[_B] * _between(state, 560, 1100) >> 8
            step_u = step_v * _bell(state, 40) >> 8
        shadow = leaf[_SOFT] == blur and below(state, 4) == 0
        for _copy in range(copies):
            remaining -= _paint(leaf, tile, picture, open_)
            leaf[_X] += step_u * leaf[_COS] - step_v * leaf[_SIN] >> 12
            leaf[_Y] += step_u * leaf[_SIN] + step_v * leaf[_COS] >> 12
        if shadow and copies == 1:
            fall = leaf[_B] >> 2
            leaf[_X] += _bell(state, fall)
            leaf[_Y] += fall
            leaf[_SOFT] += fall
            leaf[_OPACITY] = _between(state, 200, 700)
            leaf[_COLOR:_SIZE] = 0
            remaining -= _paint(leaf, tile, picture, open_)

    # The backdrop: a few half-planes (floor, wall, hills), then one that covers everything.
    leaf[_KIND], leaf[_BEND] = _BOX, 0
    for layer in range(_between(state, 2, 5), -1, -1):
        leaf[_A], leaf[_B] = 8 * side, 4 * side
        leaf[_OPACITY] = _FULL
        _turn(state, leaf, upright)
        _color(state, leaf, colors, 4, _bell(state, 160))
        _surface(state, leaf, side, cell, side, coarse)
        leaf[_SOFT] = blur
        leaf[_ROUGH] = below(state, 2) * (side * below(state, 40) >> 9)
        # A point of its straight edge; the last layer lies over the picture's middle instead.
        along = 0 if layer == 0 else leaf[_B]
        leaf[_X] = (width << 7) + (-leaf[_SIN] * along >> 12)
        leaf[_Y] = (height << 7) + (leaf[_COS] * along >> 12)
        if layer == 0:
            leaf[_A], leaf[_B] = 16 * (width + height << 8), 16 * (width + height << 8)
            leaf[_ROUGH] = 0
        else:
            leaf[_X] += _between(state, -side >> 1, side >> 1)
            leaf[_Y] += _between(state, -side >> 1, side >> 1)
        _paint(leaf, tile, picture, open_)

    # Light: brighter above more often than below, and uneven.
    light_x = (_bell(state, 40) << 8) // short
    light_y = ((_bell(state, 45) - 25) << 8) // short
    uneven = 30 + below(state, 70)
    light_u, light_v = below(state, 1 << 17), below(state, 1 << 17)
    for y in range(height):
        for x in range(width):
            field = _sample(tile, (x * cell >> 2) + light_u, (y * cell >> 2) + light_v)
            light = 256 + ((2 * x - width) * light_x + (2 * y - height) * light_y >> 8)
            light = _clip(light + (field * uneven >> 8), 60, 480)
            for c in range(3):
                out[y, x, c] = min(255, picture[y, x, c] * light >> 18)


def texture(seed: int, split: str, index: int, height: int, width: int) -> np.ndarray:
    """The texture (height, width, 3) uint8 that a seed, split, index and size name."""
    out = np.empty((height, width, 3), np.uint8)
    draw_texture(open_stream(stream_key(seed, split), TEXTURE, 0, index), out)
    return out


class Textures:
    """Textures as backgrounds: one of its own for each image, so there is no end of them."""

    card = {"source": "textures"}

    def fill(self, image: np.ndarray, key: np.ndarray, indices: np.ndarray) -> None:
        """Draw into image (n, H, W, 3) uint8 what lies under scenes `indices`."""
        for k, index in enumerate(indices):
            draw_texture(open_stream(key, TEXTURE, 0, int(index)), image[k])
