"""The picture of a model's attention maps."""

import numpy as np
import pytest
from PIL import Image

from mnistattn.dataset.sheet import MARGIN, PAGE
from mnistattn.evaluation.picture import (
    RIGHT,
    WRONG,
    Looks,
    attention_picture,
    heat,
    layers_picture,
    samples_picture,
)


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


def legend(picture):
    """Its pixels, from its first to its last column."""
    pixels = np.asarray(picture)[-MARGIN - 10 :]
    columns = np.flatnonzero((pixels != PAGE).any(axis=(0, 2)))
    return pixels[:, columns[0] : columns[-1] + 1], columns[-1]


@pytest.mark.parametrize("count", [1, 8, 9])
def test_the_legend_is_whole(count):
    """However narrow the picture: of a model without maps, say."""
    wide, _ = legend(attention_picture(**scene(2)))
    narrow = attention_picture(**dict(scene(count, layers=0), title=""))
    found, last = legend(narrow)
    assert found.shape == wide.shape and (found == wide).all()
    assert last < narrow.width - MARGIN
    data = scene(2, side=80)
    one = samples_picture(data["images"], data["masks"], data["product"][:, None], ["a"] * 2,
                          [["b"]] * 2, [[True]] * 2)  # fmt: skip
    assert legend(one)[1] < one.width - MARGIN


# ------------------------------------------------------------------------------- several models


def looks(count=3, layers=(4, 1), side=100):
    rng = np.random.default_rng(1)
    return [
        Looks(f"model {n}", [rng.random((count, side, side)) for _ in range(n)],
              [f"said {i}" for i in range(count)], [i % 2 == 0 for i in range(count)])
        for n in layers
    ]  # fmt: skip


def together(count=3, side=100, **more):
    data = scene(count, side=side)
    given = {"images": data["images"], "masks": np.zeros_like(data["masks"]),
             "captions": ["red -> 5"] * count, "models": looks(count, side=side)}  # fmt: skip
    return given | more


def over(image, values):
    """A map over an image, without a mask, pixel by pixel."""
    luma = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    values = values / values.max()
    weight = 0.9 * np.sqrt(values)[..., None]
    return ((1 - weight) * np.float32(0.55) * luma[..., None] + weight * heat(values)).astype(int)


def test_images_and_all_maps_stand_in_their_row_side_by_side():
    given = together()
    pixels = np.asarray(layers_picture(**given)).astype(int)
    lefts = [24 + 12]
    for model in given["models"]:
        lefts += [lefts[-1] + 100 + 12 + 6 + 12]
        lefts += [lefts[-1] + 106 * k for k in range(1, len(model.maps))]
    maps = [layer for model in given["models"] for layer in model.maps]
    for i in range(3):
        top = 24 + 12 + 26 + 24 + i * (100 + 24 + 8)
        row = [pixels[top : top + 100, x : x + 100] for x in lefts]
        assert (row[0] == given["images"][i]).all()
        for found, layer in zip(row[1:], maps, strict=True):
            assert abs(found - over(given["images"][i], layer[i])).max() <= 1
    assert pixels.shape[1] == lefts[-1] + 100 + 12 + 24


def test_each_map_is_over_its_own_maximum_and_the_mask_is_outlined():
    given = together()
    one = layers_picture(**given)
    fainter = [m._replace(maps=[layer * 1e-6 for layer in m.maps]) for m in given["models"]]
    assert layers_picture(**(given | {"models": fainter})).tobytes() == one.tobytes()
    masks = scene(3)["masks"]
    outlined = np.asarray(layers_picture(**(given | {"masks": masks})))
    changed = (outlined != np.asarray(one)).any(2)
    assert changed[:, :124].sum() == 0  # the image itself stays as it is
    found = np.diff(np.flatnonzero(changed.any(0)), prepend=0)
    assert (found > 50).sum() == 5  # on each of five maps


def test_a_name_above_a_narrow_panel_is_whole_if_not_too_long():
    def width(name, layers=1):
        return layers_picture(
            **together(models=[looks(layers=(layers,))[0]._replace(name=name), *looks()])
        ).width

    assert width("SAN") == width("") < width("GAUSSIAN-GLIMPSE") < width("W" * 20)
    assert width("W" * 20) == width("W" * 99)
    assert width("GAUSSIAN-GLIMPSE", 3) == width("", 3)  # there is room for it anyhow


@pytest.mark.parametrize("right", [True, False])
def test_answers_are_green_or_red(right):
    models = [m._replace(correct=[right] * 3) for m in looks()]
    found = colours(layers_picture(**together(models=models)))
    assert (RIGHT in found, WRONG in found) == (right, not right)


def test_one_small_map_has_a_whole_legend_and_a_title():
    given = together(count=1, side=28, models=looks(1, layers=(1,), side=28))
    picture = layers_picture(**given)
    assert legend(picture)[1] < picture.width - MARGIN
    assert layers_picture(**given, title="What is seen").height > picture.height


def test_looks_that_do_not_fit_are_refused():
    given = together()
    first = given["models"][0]
    for change, message in (
        ({"models": []}, "There must be a model"),
        ({"captions": ["one"]}, "3 captions"),
        ({"models": [first._replace(said=["1"])]}, "3 captions and answers"),
        ({"models": [first._replace(maps=[])]}, "of model 4 must be one or more"),
        ({"models": [first._replace(maps=[np.ones((3, 4, 4))])]}, r"of \(3, 100, 100\)"),
        ({"models": [first._replace(maps=[-first.maps[0]])]}, "model 4, layer 1 must hold finite"),
    ):
        with pytest.raises(ValueError, match=message):
            layers_picture(**(given | change))
