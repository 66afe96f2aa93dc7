"""The pictures of the page: the test images with true masks, and each entry's maps on them."""

import base64
import io
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mnistattn.dataset.sheet import grey, outlined, tile
from mnistattn.evaluation.picture import TRUTH, heat
from mnistattn.leaderboard.board import Group
from mnistattn.leaderboard.text import one_line

TILE = 100  # pixels of a picture in the gallery, the size of most data sets' images
STRIP_BYTES = 40_000  # which base64 makes 53 KB of the page
GAP = 4  # transparent pixels between two of them


def gallery_of(group: Group) -> dict[str, Any] | None:
    """Strips of pictures: the images, and a strip an entry that has maps; None without images."""
    images, masks = group.images, group.masks
    if images is None or masks is None or not len(images):
        return None
    count = len(images)
    captions = [one_line(text).replace("->", "→") for text in group.captions]
    captions += [f"image {i + 1}" for i in range(len(captions), count)]
    rows = []
    for entry in group.entries:
        if entry.maps is None or len(entry.maps) != count:
            continue
        right = [] if entry.correct is None else [bool(c) for c in entry.correct[:count]]
        marks: list[bool | None] = [*right] or [None] * count
        answers = [one_line(a) for a in entry.answers[:count]]
        answers += [""] * (count - len(answers))
        overlays = (_overlay(*triple) for triple in zip(images, masks, entry.maps, strict=True))
        rows.append({
            "entry": entry,
            "src": _strip(overlays),
            "right": sum(right) if right else None,
            "answers": list(zip(answers, marks, strict=True)),
        })  # fmt: skip
    pairs = zip(images, masks, strict=True)
    true = (outlined(_tile(image), mask, TRUTH, thickness=1) for image, mask in pairs)
    return {
        "count": count,
        "captions": captions,
        "src": _strip(true),
        "rows": rows,
        "width": count * (_size(images[0])[0] + GAP),
        "height": _size(images[0])[1],
    }


def unmapped(group: Group, gallery: dict[str, Any] | None) -> list[str]:
    """The names of entries that the gallery does not show, for they have no maps."""
    shown = {row["entry"].name for row in gallery["rows"]} if gallery else set()
    return [entry.name for entry in group.entries if entry.name not in shown] if gallery else []


def _size(image: NDArray[np.uint8]) -> tuple[int, int]:
    """The width and height of a picture: the image's own, or near TILE where that is far off."""
    height, width = image.shape[:2]
    side = max(height, width)
    if side >= 1.5 * TILE:
        factor = 1 / round(side / TILE)
    else:
        factor = max(1, round(TILE / side))
    return max(1, round(width * factor)), max(1, round(height * factor))


def _tile(image: NDArray[np.uint8]) -> Image.Image:
    smaller = _size(image)[0] < image.shape[1]
    return tile(image, _size(image), Image.Resampling.BOX if smaller else Image.Resampling.NEAREST)


def _overlay(
    image: NDArray[np.uint8], mask: NDArray[np.bool_], map: NDArray[np.uint8]
) -> Image.Image:
    """The map's heat over the grey image and the mask's outline, as in `evaluation.picture`."""
    height, width = image.shape[:2]
    if map.shape != (height, width):
        picture = Image.fromarray(np.ascontiguousarray(map))
        map = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
    strength = map.astype(np.float64) / 255
    weight = 0.9 * np.sqrt(strength)[..., None]
    over = (1 - weight) * grey(image, 0.55) + weight * heat(strength)
    return outlined(_tile(over.astype(np.uint8)), mask, TRUTH, thickness=1, opacity=0.8)


def _strip(pictures: Iterable[Image.Image]) -> str:
    """The pictures beside each other as one WebP, in a data: URI."""
    tiles = list(pictures)
    width = tiles[0].width + GAP
    strip = Image.new("RGBA", (width * len(tiles), tiles[0].height), (0, 0, 0, 0))
    for i, picture in enumerate(tiles):
        strip.paste(picture.convert("RGBA"), (i * width + GAP // 2, 0))
    # Noise is worth no more bytes than a map that shows something.
    for quality in (72, 50, 20, 5):
        out = io.BytesIO()
        strip.save(out, "WEBP", quality=quality, method=4)
        if out.tell() <= STRIP_BYTES:
            break
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode("ascii")
