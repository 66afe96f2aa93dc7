"""What a model looked at: pictures of its attention maps, a row for each image.

`attention_picture`: the image, the true mask, the map of each layer as the model made it, and the
combined map over the image with the true mask's outline (cyan). `samples_picture`: the image, and
several samples' combined maps over it, each with what it answered. `layers_picture`: the image, and
the maps of several models' layers over it. As in the figures of Khandelwal and Sigal (ICCV 2019),
each map is divided by its own maximum, so colours compare places within a map, not maps. Numpy and
Pillow only.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mnistattn.dataset.sheet import (
    BORDER,
    INK,
    MARGIN,
    MUTED,
    PAGE,
    PANEL,
    Colour,
    checked,
    fitted,
    font,
    grey,
    outlined,
    tile,
)

RIGHT: Colour = (20, 122, 62)
WRONG: Colour = (196, 34, 34)
TRUTH: Colour = (0, 229, 255)  # the outline over the heat map, which has no blue-green in it

TILE = 112  # images are shown at the integer enlargement or reduction closest to this many pixels
GAP = 6
HEADING = 24
CAPTION = 24
PAD = 12  # of a panel
NAME = 26  # of a panel's title
BAR = 120  # of the legend's scale

# Brightness rises evenly from black to pale yellow (after matplotlib's "inferno", by S. van der
# Walt and N. Smith, CC0), so that the order of values survives a grey print and colour blindness.
_ANCHORS = np.array(
    [
        (0, 0, 4),
        (33, 12, 74),
        (87, 16, 110),
        (138, 34, 106),
        (188, 55, 84),
        (228, 90, 49),
        (249, 142, 9),
        (249, 203, 53),
        (252, 255, 164),
    ],
    dtype=np.float64,
)


def attention_picture(
    images: NDArray[np.uint8],
    masks: NDArray[np.bool_],
    layer_maps: Sequence[NDArray[np.floating]],
    product: NDArray[np.floating],
    captions: Sequence[str],
    correct: Sequence[bool],
    title: str = "",
) -> Image.Image:
    """Draw n samples as an RGB picture; more than 8 come in two blocks side by side.

    `images` (n, H, W, 3) uint8; `masks` (n, H, W) bool; `layer_maps` one (n, h, w) float array >= 0
    a layer, sizes may differ, the list may be empty; `product` (n, H, W) float >= 0, the combined
    map; `captions` one line each (query, answer, prediction), green with a tick where `correct`,
    else red with a cross. Raises ValueError if shapes, lengths or values do not fit.
    """
    images, masks = checked(images, masks)
    count = len(images)
    maps = [_map(f"layer {i + 1}", layer, count) for i, layer in enumerate(layer_maps)]
    product = _map("product", product, count)
    if product.shape != masks.shape:
        raise ValueError(f"product must be {masks.shape} like the masks, not {product.shape}.")
    for name, values in (("captions", captions), ("values in correct", correct)):
        if len(values) != count:
            raise ValueError(f"There are {len(values)} {name} for {count} images.")

    width, height = _tile_size(images.shape[2], images.shape[1])
    headings = ["image", "true mask", *(f"layer {i + 1}" for i in range(len(maps))), "combined"]
    blocks = 2 if count > 8 else 1
    rows = -(-count // blocks)
    block_width = _panel_width(len(headings), width)
    if blocks == 1:
        block_width = max(block_width, _legend_width("true mask"))
    row_height = height + CAPTION + 8
    block_height = PAD + HEADING + rows * row_height
    page_width = blocks * (block_width + MARGIN // 2) - MARGIN // 2
    picture, draw, top = _page(page_width, block_height, title)

    for block in range(blocks):
        left = MARGIN + block * (block_width + MARGIN // 2)
        _panel(draw, (left, top), (block_width, block_height), headings, width)
        for row, index in enumerate(range(block * rows, min((block + 1) * rows, count))):
            y = top + PAD + HEADING + row * row_height
            tiles = _tiles(
                images[index],
                masks[index],
                [layer[index] for layer in maps],
                product[index],
                (width, height),
            )
            for column, piece in enumerate(tiles):
                picture.paste(piece, (left + PAD + column * (width + GAP), y))
            _caption(
                draw,
                (left + PAD, y + height + CAPTION // 2),
                captions[index],
                bool(correct[index]),
                block_width - 2 * PAD,
            )
    _legend(picture, top + block_height + MARGIN // 2 + 4, "true mask")
    return picture


def samples_picture(
    images: NDArray[np.uint8],
    masks: NDArray[np.bool_],
    maps: NDArray[np.floating],
    captions: Sequence[str],
    answers: Sequence[Sequence[str]],
    correct: Sequence[Sequence[bool]],
    shown: int = 6,
    title: str = "",
) -> Image.Image:
    """Draw n images as an RGB picture: each one's first `shown` samples, and the mean of all.

    In the manner of Figure 6a of Khandelwal and Sigal (ICCV 2019). `images` (n, H, W, 3) uint8;
    `masks` (n, H, W) bool, all digits that are right, outlined on every map; `maps` (n, K, H, W)
    float >= 0, the combined maps of K samples; `captions` n lines, each above its row; `answers`
    and `correct` n times K, below the maps, green with a tick or red with a cross. The mean is of
    the maps as distributions, each divided by its sum. K = 1, of a deterministic model, has no mean
    column. Raises ValueError if shapes, lengths or values do not fit.
    """
    images, masks = checked(images, masks)
    count, side = len(images), images.shape[1:3]
    maps = np.asarray(maps)
    if maps.ndim != 4 or maps.shape != (count, maps.shape[1], *side) or not maps.size or shown < 1:
        raise ValueError(f"maps must be {(count, 'K', *side)} with K and shown > 0, "
                         f"not {maps.shape} and {shown}.")  # fmt: skip
    samples = maps.shape[1]
    for name, values in (("captions", captions), ("answers", answers), ("correct", correct)):
        if len(values) != count:
            raise ValueError(f"There are {len(values)} {name} for {count} images.")
    if any(len(row) != samples for row in (*answers, *correct)):
        raise ValueError(f"answers and correct must have {samples} values an image.")
    peaked = _map("a sample", maps.reshape(-1, *side), count * samples).reshape(maps.shape)
    total = peaked.sum((2, 3), keepdims=True)
    mean = _map("the mean", (peaked / np.where(total > 0, total, 1)).mean(1), count)

    shown = min(shown, samples)
    headings = ["image", *(f"sample {k + 1}" for k in range(shown)), f"mean of {samples}"]
    if samples == 1:
        headings = ["image", "attention"]
    width, height = _tile_size(side[1], side[0])
    block_width = max(_panel_width(len(headings), width), _legend_width("right digits"))
    row_height = 2 * CAPTION + height + 8
    block_height = PAD + HEADING + count * row_height
    picture, draw, top = _page(block_width, block_height, title)
    _panel(draw, (MARGIN, top), (block_width, block_height), headings, width)
    for i in range(count):
        y = top + PAD + HEADING + i * row_height
        line = fitted(captions[i], block_width - 2 * PAD, font(14))
        draw.text((MARGIN + PAD, y + CAPTION // 2), line, font=font(14), fill=INK, anchor="lm")
        places = [(MARGIN + PAD + c * (width + GAP), y + CAPTION) for c in range(len(headings))]
        picture.paste(tile(images[i], (width, height), _resample(side[1], width)), places[0])
        for values, (x, y) in zip([*peaked[i, :shown], mean[i]], places[1:], strict=False):
            picture.paste(_over(images[i], masks[i], values, (width, height)), (x, y))
        y += height + CAPTION // 2
        for k in range(shown):
            _caption(draw, (places[1 + k][0], y), answers[i][k], bool(correct[i][k]), width)
        if samples > 1:
            line = fitted(f"{sum(map(bool, correct[i]))} of {samples} right", width, font(14))
            draw.text((places[-1][0], y), line, font=font(14), fill=MUTED, anchor="lm")
    _legend(picture, top + block_height + MARGIN // 2 + 4, "right digits")
    return picture


class Looks(NamedTuple):
    """What a model makes of n images. maps: of each layer, (n, H, W) float >= 0, finite, upsampled
    to the images; said: its answers, n of them, and whether each is correct."""

    name: str
    maps: Sequence[NDArray[np.floating]]
    said: Sequence[str]
    correct: Sequence[bool]


def layers_picture(
    images: NDArray[np.uint8],
    masks: NDArray[np.bool_],
    captions: Sequence[str],
    models: Sequence[Looks],
    title: str = "",
) -> Image.Image:
    """Draw n images as an RGB picture, one a row: the image, then a panel for each model with the
    maps of all its layers over the image.

    In the manner of Figure 6b of Khandelwal and Sigal (ICCV 2019). `images` (n, H, W, 3) uint8;
    `masks` (n, H, W) bool, outlined on every map; `captions` n lines, query and answer, below the
    images; what a model said is below its maps, green with a tick or red with a cross. Raises
    ValueError if shapes, lengths or values do not fit.
    """
    images, masks = checked(images, masks)
    count, (rows, columns) = len(images), images.shape[1:3]
    drawn = []
    for model in models:
        maps = [_map(f"{model.name}, layer {k}", m, count) for k, m in enumerate(model.maps, 1)]
        if not maps or any(m.shape != masks.shape for m in maps):
            raise ValueError(f"The maps of {model.name} must be one or more of {masks.shape}, "
                             f"not {[m.shape for m in maps]}.")  # fmt: skip
        drawn.append(maps)
    told = (captions, *(words for model in models for words in (model.said, model.correct)))
    if not drawn or any(len(words) != count for words in told):
        raise ValueError(f"There must be a model, and {count} captions and answers of each.")

    size = width, height = _tile_size(columns, rows)
    names = ("", *(model.name for model in models))
    panels = [
        max(_panel_width(max(1, len(maps)), width), min(_name_width(name), _panel_width(2, width)))
        for name, maps in zip(names, ([], *drawn), strict=True)
    ]
    page_width = max(sum(panels) + GAP * len(drawn), _legend_width("true mask"))
    row_height = height + CAPTION + 8
    head = PAD + NAME + HEADING
    picture, draw, top = _page(page_width, head + count * row_height, title)
    left, places, rooms = MARGIN, [], [panel - 2 * PAD for panel in panels]
    for panel, name, maps in zip(panels, names, ([], *drawn), strict=True):
        headings = [f"layer {k + 1}" for k in range(len(maps))] or ["image"]
        _panel(draw, (left, top), (panel, head + count * row_height), headings, width, NAME)
        line = fitted(name, panel - 2 * PAD, font(16))
        draw.text((left + PAD, top + PAD + NAME // 2 - 4), line, font=font(16), fill=INK,
                  anchor="lm")  # fmt: skip
        places.append(left + PAD)
        left += panel + GAP
    for i in range(count):
        y = top + head + i * row_height
        words = y + height + CAPTION // 2
        picture.paste(tile(images[i], size, _resample(columns, width)), (places[0], y))
        line = fitted(captions[i], width, font(14))
        draw.text((places[0], words), line, font=font(14), fill=INK, anchor="lm")
        for x, room, model, maps in zip(places[1:], rooms[1:], models, drawn, strict=True):
            for k, layer in enumerate(maps):
                shown = _over(images[i], masks[i], layer[i], size)
                picture.paste(shown, (x + k * (width + GAP), y))
            _caption(draw, (x, words), model.said[i], bool(model.correct[i]), room)
    _legend(picture, top + head + count * row_height + MARGIN // 2 + 4, "true mask")
    return picture


def heat(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Colours (..., 3) uint8 for `values` in [0, 1]: black, purple, orange, pale yellow."""
    places = np.linspace(0, 1, len(_ANCHORS))
    channels = [np.interp(values, places, _ANCHORS[:, c]) for c in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def _page(width: int, height: int, title: str) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    """A page for panels of this size in all, with its title, and where the panels begin."""
    top = MARGIN + (40 if title else 0)
    picture = Image.new("RGB", (2 * MARGIN + width, top + height + MARGIN + 20), PAGE)
    draw = ImageDraw.Draw(picture)
    if title:
        draw.text((MARGIN, MARGIN - 4), fitted(title, width, font(22)), font=font(22), fill=INK)
    return picture, draw, top


def _panel(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    size: tuple[int, int],
    headings: Sequence[str],
    width: int,
    above: int = 0,
) -> None:
    """A panel with a heading above each column of tiles of this width, and room above those."""
    left, top = place
    box = (left, top, left + size[0] - 1, top + size[1] - 1)
    draw.rounded_rectangle(box, 6, fill=PANEL, outline=BORDER)
    for column, heading in enumerate(headings):
        middle = left + PAD + column * (width + GAP) + width // 2
        at = (middle, top + PAD + above + HEADING // 2 - 4)
        draw.text(at, heading, font=font(14), fill=MUTED, anchor="mm")


def _panel_width(columns: int, width: int) -> int:
    """Of a panel with so many columns of tiles of this width."""
    return columns * (width + GAP) - GAP + 2 * PAD


def _name_width(name: str) -> int:
    """Of a panel that shows the whole of a name above it."""
    return math.ceil(font(16).getlength(name)) + 2 * PAD


def _map(name: str, values: NDArray[np.floating], count: int) -> NDArray[np.float64]:
    """Checked, and each sample divided by its maximum; zero stays zero."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 3 or len(values) != count or not values.size:
        raise ValueError(f"The map of {name} must be ({count}, h, w), not {values.shape}.")
    if not (np.isfinite(values).all() and values.min() >= 0):
        raise ValueError(f"The map of {name} must hold finite values >= 0.")
    peak = values.max(axis=(1, 2), keepdims=True)
    return values / np.where(peak > 0, peak, 1)


def _tile_size(width: int, height: int) -> tuple[int, int]:
    side = max(width, height)
    if side >= 1.5 * TILE:
        return width // round(side / TILE), height // round(side / TILE)
    return width * max(1, round(TILE / side)), height * max(1, round(TILE / side))


def _tiles(
    image: NDArray[np.uint8],
    mask: NDArray[np.bool_],
    maps: Sequence[NDArray[np.float64]],
    product: NDArray[np.float64],
    size: tuple[int, int],
) -> list[Image.Image]:
    resample = _resample(image.shape[1], size[0])
    white = np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * 235
    return [
        tile(image, size, resample),
        tile(white, size, resample),
        *(tile(heat(values), size) for values in maps),
        _over(image, mask, product, size),
    ]


def _over(
    image: NDArray[np.uint8],
    mask: NDArray[np.bool_],
    values: NDArray[np.float64],
    size: tuple[int, int],
) -> Image.Image:
    """A map in [0, 1] over the grey image, with the mask's outline."""
    # The weight's square root keeps faint attention visible on the grey image.
    weight = 0.9 * np.sqrt(values)[..., None]
    over = (1 - weight) * grey(image, 0.55) + weight * heat(values)
    overlay = tile(over.astype(np.uint8), size, _resample(image.shape[1], size[0]))
    return outlined(overlay, mask, TRUTH, thickness=1, opacity=0.6)  # the heat shines through


def _resample(width: int, shown: int) -> Image.Resampling:
    # A box filter averages when shrinking; when enlarging, square pixels are what the model saw.
    return Image.Resampling.BOX if shown < width else Image.Resampling.NEAREST


def _caption(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, right: bool, width: int
) -> None:
    """A tick or a cross, drawn as lines (red and green look alike to some), and the text."""
    x, y = place
    colour = RIGHT if right else WRONG
    if right:
        draw.line([(x + 1, y), (x + 4, y + 4), (x + 10, y - 5)], colour, 2, joint="curve")
    else:
        draw.line([(x + 1, y - 4), (x + 9, y + 4)], colour, 2)
        draw.line([(x + 1, y + 4), (x + 9, y - 4)], colour, 2)
    line = fitted(text, width - 18, font(14))
    draw.text((x + 18, y), line, font=font(14), fill=colour, anchor="lm")


def _legend(picture: Image.Image, y: int, outline: str) -> None:
    """What colours mean, and the outline; it ends at MARGIN + _legend_width(outline)."""
    draw = ImageDraw.Draw(picture)
    x = MARGIN
    for piece, width in _legend_pieces(outline):
        if piece == "bar":
            picture.paste(tile(heat(np.linspace(0, 1, BAR)[None]), (BAR, 12)), (x, y - 6))
        elif piece == "outline":
            draw.rectangle((x + 12, y - 6, x + 24, y + 5), fill=MUTED, outline=TRUTH, width=2)
        else:
            draw.text((x, y), piece, font=font(13), fill=MUTED, anchor="lm")
        x += width + 8


def _legend_width(outline: str) -> int:
    """Pixels that the legend takes."""
    pieces = _legend_pieces(outline)
    return sum(width for _, width in pieces) + 8 * (len(pieces) - 1)


def _legend_pieces(outline: str) -> list[tuple[str, int]]:
    """The legend from left to right, each piece with its width in pixels."""
    drawn = {"bar": BAR, "outline": 25}
    small = font(13)
    return [(piece, drawn.get(piece) or math.ceil(small.getlength(piece)))
            for piece in ("0", "bar", "each map's own maximum", "outline", outline)]  # fmt: skip
