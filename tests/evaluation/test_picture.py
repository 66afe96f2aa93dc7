"""The picture of a model's attention maps."""

import numpy as np
import pytest
from PIL import Image

from mnistattn.evaluation.picture import RIGHT, WRONG, attention_picture, heat


def scene(count=16, layers=4, side=100):
    rng = np.random.default_rng(0)
    masks = np.zeros((count, side, side), bool)
    masks[:, 20:40, 30:50] = True
    return {
        "images": rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8),
        "masks": masks,
        "layer_maps": [
            rng.random((count, s, s)).astype(np.float32) for s in (50, 25, 13, 7, 7)[:layers]
        ],
        "product": rng.random((count, side, side)) * 1e-9,
        "captions": [f"query {i % 10}: green, predicted red" for i in range(count)],
        "correct": [i % 2 == 0 for i in range(count)],
        "title": "ctx on MBG",
    }


def colours(picture):
    return {colour for _, colour in picture.getcolors(1 << 24)}


def contains(picture, piece):
    pixels = np.asarray(picture)
    height, width = piece.shape[:2]
    found = np.argwhere((pixels[: 1 - height, : 1 - width] == piece[0, 0]).all(-1))
    return any((pixels[y : y + height, x : x + width] == piece).all() for y, x in found)


@pytest.mark.parametrize("layers", range(6))
def test_any_number_of_layers(layers):
    data = scene(layers=layers)
    picture = attention_picture(**data)
    assert isinstance(picture, Image.Image) and picture.mode == "RGB"
    assert picture.width > 2 * (3 + layers) * 100 and picture.height > 8 * 100
    assert len(colours(picture)) > 1000
    assert all(contains(picture, image) for image in data["images"][[0, 15]])


def test_the_true_mask_is_shown():
    data = scene(count=1)
    white = np.repeat(data["masks"][0, ..., None], 3, axis=2).astype(np.uint8) * 235
    assert contains(attention_picture(**data), white)
    # ... and outlined on the combined map: an empty one changes more than its own tile.
    empty = dict(data, masks=np.zeros_like(data["masks"]))
    before, after = (np.asarray(attention_picture(**d)).astype(int) for d in (data, empty))
    changed = np.flatnonzero((before != after).any(axis=(0, 2)))
    assert (np.diff(changed) > 300).any()


def test_maps_are_shown_as_made_each_over_its_own_maximum():
    data = scene(count=1, layers=1)
    layer = data["layer_maps"][0]
    piece = heat(layer[0] / layer[0].max()).repeat(2, 0).repeat(2, 1)
    assert contains(attention_picture(**data), piece)
    weaker = dict(data, layer_maps=[layer / 64], product=data["product"] * 1024)
    assert attention_picture(**weaker).tobytes() == attention_picture(**data).tobytes()


@pytest.mark.parametrize("right", [True, False])
def test_captions_are_green_or_red(right):
    data = scene(count=3)
    picture = attention_picture(**dict(data, correct=[right] * 3))
    assert (RIGHT in colours(picture)) == right
    assert (WRONG in colours(picture)) != right


def test_more_than_eight_samples_stand_in_two_blocks():
    eight, nine = attention_picture(**scene(8)), attention_picture(**scene(9))
    assert nine.width > 1.8 * eight.width and nine.height < 0.8 * eight.height


@pytest.mark.parametrize(("side", "shown"), [(28, 112), (100, 100), (160, 160), (224, 112)])
def test_tiles_are_about_112_pixels(side, shown):
    picture = attention_picture(**scene(2, layers=2, side=side))
    assert 5 * shown < picture.width < 5 * shown + 120


def test_maps_of_zeros_and_no_title():
    data = scene(count=2, layers=2)
    data["layer_maps"][0][:] = 0
    data["product"][:] = 0
    untitled = attention_picture(**dict(data, title=""))
    assert untitled.height < attention_picture(**data).height


def test_heat_gets_brighter_from_black_to_yellow():
    ramp = heat(np.linspace(0, 1, 256)).astype(float)
    assert (np.diff(ramp @ [0.299, 0.587, 0.114]) >= -0.6).all()  # but for rounding
    assert ramp[0].max() < 10 and ramp[-1].min() > 150
    assert heat(np.zeros((3, 4))).shape == (3, 4, 3)


def test_what_does_not_fit_is_refused():
    data = scene(count=2)
    for change, message in (
        ({"captions": ["one"]}, "1 captions for 2"),
        ({"correct": [True] * 3}, "3 values in correct for 2"),
        ({"product": data["product"][:, :50]}, r"\(2, 50, 100\)"),
        ({"layer_maps": [np.ones((3, 4, 4))]}, r"layer 1 must be .*\(3, 4, 4\)"),
        ({"layer_maps": [-np.ones((2, 4, 4))]}, "layer 1 must hold finite values"),
        ({"product": data["product"] * np.nan}, "product must hold finite values"),
        ({"masks": data["masks"][:1]}, r"\(1, 100, 100\)"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_picture(**dict(data, **change))
