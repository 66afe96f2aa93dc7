"""Resizing in integers: what Pillow's BILINEAR gives, with weights that sum exactly."""

import numpy as np
import pytest
from PIL import Image

from mnistattn.generators.digits.strokes import stroke_glyphs
from mnistattn.generators.resize import gray_scratch, resize_gray, resize_rgb, resize_weights


def gray(source: np.ndarray, size: int) -> np.ndarray:
    first, count, weights = resize_weights(len(source), size)
    scratch = gray_scratch(len(source), size + 5)
    for array in scratch:
        array[:] = 77  # what an earlier glyph has left there
    out = np.full((size + 3, size + 2), 99, np.uint8)
    resize_gray(source, size, first, count, weights, scratch, out)
    assert (out[size:] == 99).all() and (out[:, size:] == 99).all()
    return out[:size, :size]


def pillow(source: np.ndarray, height: int, width: int) -> np.ndarray:
    # In two steps, since the order of the passes is seen in the rounding, and Pillow takes the
    # vertical one first where that is cheaper.
    picture = Image.fromarray(source).resize((width, len(source)), Image.Resampling.BILINEAR)
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


def differences(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == np.uint8
    return np.abs(ours.astype(int) - theirs.astype(int)).ravel()


@pytest.mark.parametrize("n", [1, 2, 3, 5, 28, 61])
def test_gray_is_pillows(n):
    random = np.random.default_rng(n)
    source = random.integers(0, 256, (n, n), dtype=np.uint8)
    off = np.concatenate(
        [
            differences(gray(source, size), pillow(source, size, size))
            for size in (1, 2, 3, 7, 13, 14, 27, 28, 29, 42, 55, 84, 101)
        ]
    )
    assert off.max() <= 1
    assert (off == 0).mean() > 0.999


def test_glyphs_at_every_size_have_pillows_ink():
    # v > 0 is the mask: there a difference of one level between 0 and 1 would show.
    images = stroke_glyphs(3, "test", 4)[0]
    for size in range(14, 85):
        glyph = images[size % 4]
        ours, theirs = gray(glyph, size), pillow(glyph, size, size)
        assert differences(ours, theirs).max() <= 1
        assert np.array_equal(ours > 0, theirs > 0)


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 5), (4, 1), (2, 3), (31, 47), (64, 48), (100, 133), (9, 200)]
)
def test_rgb_is_pillows(shape):
    random = np.random.default_rng(shape[0])
    source = random.integers(0, 256, (*shape, 3), dtype=np.uint8)
    off = np.concatenate(
        [
            differences(resize_rgb(source, height, width), pillow(source, height, width))
            for height, width in ((1, 1), (3, 2), (17, 90), (28, 28), (75, 100), (134, 134), (7, 1))
        ]
    )
    assert off.max() <= 1
    assert (off == 0).mean() > 0.999


def test_the_same_size_is_a_copy():
    source = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    assert np.array_equal(gray(source, 28), source)
    color = np.stack([source, source.T, 255 - source], 2)
    assert np.array_equal(resize_rgb(color, 28, 28), color)


def test_weights_sum_exactly_and_stay_inside():
    for size_in in (1, 2, 3, 5, 28, 99, 640):
        for size_out in (1, 2, 3, 14, 27, 28, 29, 84, 200):
            first, count, weights = resize_weights(size_in, size_out)
            assert len(first) == len(count) == len(weights) == size_out
            assert (weights.sum(1) == 1 << 22).all()
            assert (weights >= 0).all() and (count >= 1).all()
            assert (first >= 0).all() and (first + count <= size_in).all()
            unused = np.arange(weights.shape[1]) >= count[:, None]
            assert (weights[unused] == 0).all()


@pytest.mark.parametrize("level", [0, 1, 127, 254, 255])
def test_a_constant_stays_constant(level):
    for size in (1, 5, 14, 28, 53, 84):
        assert (gray(np.full((28, 28), level, np.uint8), size) == level).all()
        assert (resize_rgb(np.full((13, 40, 3), level, np.uint8), size, 2 * size) == level).all()


def test_channels_and_axes_are_not_mixed():
    source = np.zeros((6, 9, 3), np.uint8)
    source[:, :3, 0], source[:2, :, 1], source[:, :, 2] = 200, 100, 50
    out = resize_rgb(source, 60, 90)
    assert (out[:, :15, 0] == 200).all() and (out[:, 45:, 0] == 0).all()
    assert (out[:10, :, 1] == 100).all() and (out[30:, :, 1] == 0).all()
    assert (out[..., 2] == 50).all()
