"""A contact sheet of a data set: each image beside its mask, with query and answer below.

Made to be looked at before a data set is trusted: the right half of a cell shows the image grey
and dark but for the pixels of the mask, which keep their colours and get an outline, so that a
mask that is shifted, cut, or of another digit catches the eye. Numpy and Pillow only. The helpers
that draw tiles and text are shared with `mnistattn.evaluation.picture`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mnistattn.dataset.format import layout
from mnistattn.dataset.read import answer_masks, open_split, read_card

Colour = tuple[int, int, int]

PAGE: Colour = (246, 246, 248)
PANEL: Colour = (255, 255, 255)
BORDER: Colour = (222, 222, 228)
INK: Colour = (32, 33, 38)
MUTED: Colour = (104, 106, 116)
OUTLINE: Colour = (255, 0, 200)  # none of the digits' colours (red, green, blue, yellow, white)

MARGIN = 24
CELL = 200  # an image is enlarged by the integer that brings it closest to this many pixels


def contact_sheet(
    images: NDArray[np.uint8],
    masks: NDArray[np.bool_],
    captions: Sequence[str],
    columns: int = 4,
    title: str = "",
) -> Image.Image:
    """Draw `images` (n, H, W, 3) uint8 RGB with `masks` (n, H, W) bool as an RGB picture.

    `captions`: one line of text each, shortened to fit its cell. `columns`: cells in a row, at
    least 1; fewer images than columns make a narrower sheet. Raises ValueError if the shapes or
    lengths do not fit.
    """
    images, masks = checked(images, masks)
    if len(captions) != len(images):
        raise ValueError(f"There are {len(captions)} captions for {len(images)} images.")
    if columns < 1:
        raise ValueError(f"A sheet needs at least 1 column, not {columns}.")

    side = max(images.shape[1:3])
    factor = max(1, round(CELL / side))
    height, width = images.shape[1] * factor, images.shape[2] * factor
    pad, gap, text = 10, 6, 30
    cell_width, cell_height = 2 * width + gap + 2 * pad, height + pad + text
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    top = MARGIN + (40 if title else 0)
    sheet = Image.new(
        "RGB",
        (
            2 * MARGIN + columns * (cell_width + MARGIN // 2) - MARGIN // 2,
            top + MARGIN + rows * (cell_height + MARGIN // 2) - MARGIN // 2,
        ),
        PAGE,
    )
    draw = ImageDraw.Draw(sheet)
    if title:
        big = font(22)
        draw.text(
            (MARGIN, MARGIN - 4), fitted(title, sheet.width - 2 * MARGIN, big), font=big, fill=INK
        )

    for index in range(len(images)):
        row, column = divmod(index, columns)
        x = MARGIN + column * (cell_width + MARGIN // 2)
        y = top + row * (cell_height + MARGIN // 2)
        draw.rounded_rectangle(
            (x, y, x + cell_width - 1, y + cell_height - 1), 6, fill=PANEL, outline=BORDER
        )
        sheet.paste(tile(images[index], (width, height)), (x + pad, y + pad))
        marked = tile(spotlight(images[index], masks[index]), (width, height))
        marked = outlined(marked, masks[index])
        sheet.paste(marked, (x + pad + width + gap, y + pad))
        draw.text(
            (x + pad, y + pad + height + text // 2),
            fitted(captions[index], cell_width - 2 * pad, font(15)),
            font=font(15),
            fill=INK,
            anchor="lm",
        )
    return sheet


def checked(
    images: NDArray[np.uint8], masks: NDArray[np.bool_]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """`images` and `masks` as arrays, or ValueError if they are not n > 0 RGB images and masks."""
    images, masks = np.asarray(images), np.asarray(masks)
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or not images.size:
        raise ValueError(
            f"images must be (n, H, W, 3) uint8 with n > 0, not {images.shape} {images.dtype}."
        )
    if masks.shape != images.shape[:3] or masks.dtype != np.bool_:
        raise ValueError(
            f"masks must be {images.shape[:3]} bool like the images, "
            f"not {masks.shape} {masks.dtype}."
        )
    return images, masks


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, so that no font has to be installed."""
    return ImageFont.load_default(size=size)


def fitted(text: str, width: int, face: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """`text`, cut and ended with "..." if it is wider than `width` pixels."""
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def tile(
    pixels: NDArray[np.uint8],
    size: tuple[int, int],
    resample: Image.Resampling = Image.Resampling.NEAREST,
) -> Image.Image:
    """`pixels` (h, w, 3) uint8 as a picture of `size` = (width, height)."""
    return Image.fromarray(np.ascontiguousarray(pixels), "RGB").resize(size, resample)


def grey(image: NDArray[np.uint8], brightness: float) -> NDArray[np.float32]:
    """The luma (ITU-R BT.601) of an (H, W, 3) image in all three channels, times `brightness`."""
    luma = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.repeat(luma[..., None] * np.float32(brightness), 3, axis=2)


def spotlight(image: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The image, grey and dark outside the mask."""
    return np.where(mask[..., None], image, grey(image, 0.4).astype(np.uint8))


def outlined(
    picture: Image.Image,
    mask: NDArray[np.bool_],
    colour: Colour = OUTLINE,
    thickness: int = 2,
    opacity: float = 1.0,
) -> Image.Image:
    """`picture` with a line around the mask, outside it, so that no pixel of the digit is hidden.

    `mask` (h, w) is enlarged to the picture, so the line is thin however large its pixels are.
    """
    inside = np.asarray(Image.fromarray(mask).resize(picture.size, Image.Resampling.NEAREST))
    grown = inside
    for _ in range(thickness):
        wide = np.pad(grown, 1)
        grown = wide[1:-1, 1:-1] | wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2]
        grown = grown | wide[1:-1, 2:]
    pixels = np.array(picture)
    line = grown & ~inside
    pixels[line] = opacity * np.array(colour) + (1 - opacity) * pixels[line]
    return Image.fromarray(pixels)


def sheet_of(path: str | Path, split: str, count: int) -> Image.Image:
    """The contact sheet of the first `count` images of a split of the data set in `path`."""
    card = read_card(path)
    with open_split(card, split) as h5:
        arrays = {name: h5[name][:count] for name in layout(card.spec)}
    scale = arrays["scale"][np.arange(len(arrays["query"])), arrays["target"]]
    names = card.answer_names
    captions = []
    for i in range(len(scale)):
        right = [int(arrays["answer"][i])]
        if "answers" in arrays:
            right = list(np.flatnonzero(arrays["answers"][i]))
        answer = " or ".join(names[a] for a in right)
        query = card.query_names[arrays["query"][i]]
        captions.append(f"{query} -> {answer}  (scale {scale[i]:.2f})")
    title = f"{card.raw['paper_name']}, {split}"
    return contact_sheet(arrays["image"], answer_masks(arrays), captions, title=title)
