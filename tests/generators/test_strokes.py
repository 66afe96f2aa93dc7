"""The built-in digit source: reproducible to the byte, and shaped like MNIST."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from mnistattn.generators.digits import strokes
from mnistattn.generators.digits.strokes import draw_glyph, stroke_glyphs
from mnistattn.generators.random import GLYPH, open_stream, stream_key

# SHA-256 of stroke_glyphs(0, "train", 200). A change here changes every data set made of strokes.
GOLDEN = "a86ae2df0d23210646621a5fa226f83a30a4c8453e2e3395d8279767b04b0150"


def sha(images: np.ndarray) -> str:
    return hashlib.sha256(images.tobytes()).hexdigest()


@pytest.fixture(scope="module")
def glyphs():
    return stroke_glyphs(0, "train", 1000)


def test_golden(glyphs):
    images, labels = stroke_glyphs(0, "train", 200)
    assert images.shape == (200, 28, 28) and images.dtype == np.uint8
    assert labels.dtype == np.uint8 and labels.tolist() == [i % 10 for i in range(200)]
    assert sha(images) == GOLDEN
    assert np.array_equal(images, glyphs[0][:200])


def test_any_part_can_be_drawn_alone(glyphs):
    images, labels = stroke_glyphs(0, "train", 13, first=777)
    assert np.array_equal(images, glyphs[0][777:790])
    assert np.array_equal(labels, glyphs[1][777:790])
    alone = np.full((28, 28), 99, np.uint8)
    draw_glyph(open_stream(stream_key(0, "train"), GLYPH, 0, 778), 8, alone)
    assert np.array_equal(alone, images[1])
    assert stroke_glyphs(0, "train", 0)[0].shape == (0, 28, 28)


def test_seeds_splits_and_glyphs_differ(glyphs):
    images = glyphs[0][:100]
    for other in (stroke_glyphs(1, "train", 100)[0], stroke_glyphs(0, "val", 100)[0]):
        assert (images != other).any(axis=(1, 2)).all()
    assert len({image.tobytes() for image in glyphs[0]}) == 1000


def test_ink_is_centred_and_as_heavy_as_in_mnist(glyphs):
    images, labels = glyphs
    mass = images.astype(float)
    position = np.arange(28)
    x = (mass.sum(axis=1) @ position) / mass.sum(axis=(1, 2))
    y = (mass.sum(axis=2) @ position) / mass.sum(axis=(1, 2))
    for digit in range(10):
        of = labels == digit
        assert abs(x[of].mean() - 14) < 0.5 and abs(y[of].mean() - 14) < 0.5
    assert np.abs(x - 14).max() < 1.5 and np.abs(y - 14).max() < 1.5
    dark = images > 127
    area = dark.sum(axis=(1, 2))
    assert area.min() >= 20 and area.max() <= 300
    # The MNIST test set has 60 (ones) to 136 (zeros) dark pixels on average, and 33.8 of 255.
    means = [area[labels == digit].mean() for digit in range(10)]
    assert 45 < min(means) < 75 and 110 < max(means) < 150
    assert 28 < images.mean() < 40
    assert (images.max(axis=(1, 2)) > 200).all()
    rows, columns = dark.any(axis=2).sum(axis=1), dark.any(axis=1).sum(axis=1)
    side = np.maximum(rows, columns)
    assert side.min() >= 16 and side.max() <= 22


def test_the_same_without_the_compiler():
    code = (
        "import hashlib; from mnistattn.generators.digits.strokes import stroke_glyphs as s;"
        "print(hashlib.sha256(s(5, 'val', 4, first=2)[0].tobytes()).hexdigest())"
    )
    # Warnings are errors: an int64 overflow in numpy would be one.
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == sha(stroke_glyphs(5, "val", 4, first=2)[0])


def test_forms_of_a_skeleton_can_be_mixed():
    for _, _, first, forms, size in strokes._WAYS:
        kinds = strokes._POINTS[first : first + forms * size, 2].reshape(forms, size)
        assert (kinds == kinds[0]).all()
