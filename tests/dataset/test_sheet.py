"""The contact sheet of a data set."""

import numpy as np
import pytest
from PIL import Image

from mnistattn.dataset.sheet import OUTLINE, contact_sheet, fitted, font, outlined


def scene(count=5, height=100, width=100):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    masks = np.zeros((count, height, width), bool)
    masks[:, 20:40, 30:50] = True
    return images, masks, [f"{i} -> green  (scale 0.8{i})" for i in range(count)]


def colours(picture):
    return {colour for _, colour in picture.getcolors(1 << 24)}


def test_a_sheet_shows_every_image_unchanged_and_its_mask():
    images, masks, captions = scene()
    sheet = contact_sheet(images, masks, captions, columns=2, title="MBG, test")
    assert isinstance(sheet, Image.Image) and sheet.mode == "RGB"
    pixels = np.asarray(sheet)
    assert OUTLINE in colours(sheet)
    doubled = images.repeat(2, axis=1).repeat(2, axis=2)
    corners = pixels[:-199, :-199]
    for image in doubled:
        found = np.argwhere((corners == image[0, 0]).all(-1))
        assert any((pixels[y : y + 200, x : x + 200] == image).all() for y, x in found)


def test_the_mask_decides_what_is_outlined():
    images, masks, captions = scene()
    full = contact_sheet(images, masks, captions)
    assert OUTLINE not in colours(contact_sheet(images, np.zeros_like(masks), captions))
    moved = contact_sheet(images, np.roll(masks, 5, axis=2), captions)
    assert full.size == moved.size and full.tobytes() != moved.tobytes()


def test_the_outline_hides_no_pixel_of_the_mask():
    mask = np.zeros((10, 10), bool)
    mask[0:4, 3:6] = True
    picture = np.asarray(outlined(Image.new("RGB", (40, 40)), mask))
    inside = mask.repeat(4, 0).repeat(4, 1)
    assert (picture[inside] == 0).all()
    line = (picture == OUTLINE).all(-1)
    assert line[16, 12:24].all() and line[17, 12:24].all() and not line[18].any()
    assert line[0:16, [10, 11, 24, 25]].all() and not line[0:16, [9, 26]].any()


@pytest.mark.parametrize(("side", "shown"), [(28, 196), (100, 200), (224, 224), (480, 480)])
def test_images_are_enlarged_by_whole_numbers_to_about_200_pixels(side, shown):
    images, masks, captions = scene(1, side, side)
    sheet = contact_sheet(images, masks, captions)
    assert 2 * shown < sheet.width < 2 * shown + 100
    assert shown < sheet.height < shown + 120


def test_columns_titles_and_shapes_change_the_size():
    images, masks, captions = scene()
    narrow = contact_sheet(images, masks, captions, columns=1)
    wide = contact_sheet(images, masks, captions, columns=5)
    assert narrow.width < wide.width and narrow.height > wide.height
    assert contact_sheet(images, masks, captions, columns=9).size == wide.size
    assert contact_sheet(images, masks, captions, 5, "title").height > wide.height
    flat = contact_sheet(*scene(5, 50, 100), columns=5)
    assert flat.width == wide.width and flat.height == wide.height - 100


def test_long_captions_are_cut():
    face = font(15)
    short = fitted("a long caption " * 20, 200, face)
    assert short.endswith("...") and 150 < face.getlength(short) <= 200
    assert fitted("7 -> green", 200, face) == "7 -> green"


def test_the_arguments_are_left_alone():
    images, masks, captions = scene()
    before = images.copy(), masks.copy()
    contact_sheet(images, masks, captions)
    assert (images == before[0]).all() and (masks == before[1]).all()


def test_what_does_not_fit_is_refused():
    images, masks, captions = scene()
    for wrong, message in (
        ((images, masks, captions[1:]), "4 captions for 5 images"),
        ((images, masks[1:], captions), r"\(4, 100, 100\)"),
        ((images, masks.astype(np.uint8), captions), "uint8"),
        ((images / 255, masks, captions), "float64"),
        ((images[0], masks, captions), r"\(100, 100, 3\)"),
        ((images[:0], masks[:0], []), "n > 0"),
        ((images, masks, captions, 0), "not 0"),
    ):
        with pytest.raises(ValueError, match=message):
            contact_sheet(*wrong)
