"""What a model looked at: a picture of its attention maps, a row for each sample.

Columns: the image, the true mask, the map of each layer as the model made it, and the combined map
over the image with the true mask's outline (cyan). As in the figures of Khandelwal and Sigal (ICCV
2019), each map is divided by its own maximum, so colours compare places within a map, not maps.
Numpy and Pillow only.
"""

from collections.abc import Sequence

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
    pad = 12
    block_width = len(headings) * (width + GAP) - GAP + 2 * pad
    row_height = height + CAPTION + 8
    block_height = pad + HEADING + rows * row_height
    top = MARGIN + (40 if title else 0)
    picture = Image.new(
        "RGB",
        (
            2 * MARGIN + blocks * (block_width + MARGIN // 2) - MARGIN // 2,
            top + block_height + MARGIN + 20,
        ),
        PAGE,
    )
    draw = ImageDraw.Draw(picture)
    if title:
        line = fitted(title, picture.width - 2 * MARGIN, font(22))
        draw.text((MARGIN, MARGIN - 4), line, font=font(22), fill=INK)

    for block in range(blocks):
        left = MARGIN + block * (block_width + MARGIN // 2)
        box = (left, top, left + block_width - 1, top + block_height - 1)
        draw.rounded_rectangle(box, 6, fill=PANEL, outline=BORDER)
        for column, heading in enumerate(headings):
            middle = left + pad + column * (width + GAP) + width // 2
            place = (middle, top + pad + HEADING // 2 - 4)
            draw.text(place, heading, font=font(14), fill=MUTED, anchor="mm")
        for row, index in enumerate(range(block * rows, min((block + 1) * rows, count))):
            y = top + pad + HEADING + row * row_height
            tiles = _tiles(
                images[index],
                masks[index],
                [layer[index] for layer in maps],
                product[index],
                (width, height),
            )
            for column, piece in enumerate(tiles):
                picture.paste(piece, (left + pad + column * (width + GAP), y))
            _caption(
                draw,
                (left + pad, y + height + CAPTION // 2),
                captions[index],
                bool(correct[index]),
                block_width - 2 * pad,
            )
    _legend(picture, top + block_height + MARGIN // 2 + 4)
    return picture


def heat(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Colours (..., 3) uint8 for `values` in [0, 1]: black, purple, orange, pale yellow."""
    places = np.linspace(0, 1, len(_ANCHORS))
    channels = [np.interp(values, places, _ANCHORS[:, c]) for c in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


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
    smaller = size[0] < image.shape[1]
    # A box filter averages when shrinking; when enlarging, square pixels are what the model saw.
    resample = Image.Resampling.BOX if smaller else Image.Resampling.NEAREST
    white = np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * 235
    # The weight's square root keeps faint attention visible on the grey image.
    weight = 0.9 * np.sqrt(product)[..., None]
    over = (1 - weight) * grey(image, 0.55) + weight * heat(product)
    overlay = tile(over.astype(np.uint8), size, resample)
    return [
        tile(image, size, resample),
        tile(white, size, resample),
        *(tile(heat(values), size) for values in maps),
        outlined(overlay, mask, TRUTH, thickness=1, opacity=0.6),  # the heat shines through
    ]


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


def _legend(picture: Image.Image, y: int) -> None:
    draw = ImageDraw.Draw(picture)
    bar = tile(heat(np.linspace(0, 1, 120)[None]), (120, 12))
    small = font(13)
    x = MARGIN
    for piece in ("0", bar, "each map's own maximum", "outline", "true mask"):
        if isinstance(piece, Image.Image):
            picture.paste(piece, (x, y - 6))
            x += piece.width + 8
        elif piece == "outline":
            x += 20
            draw.rectangle((x, y - 6, x + 12, y + 5), fill=MUTED, outline=TRUTH, width=2)
            x += 20
        else:
            draw.text((x, y), piece, font=small, fill=MUTED, anchor="lm")
            x += round(small.getlength(piece)) + 8
