"""The textures: the same bytes always, everywhere and in full, and natural in their statistics."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from mnistattn.generators.backgrounds.textures import _noise_tile, draw_texture, texture
from mnistattn.generators.random import TEXTURE, open_stream, stream_key

GOLDEN = "090eec33ef8d015f1a58c1e9ffd95657f08867d497b032607bffb9260fff8a12"


def sha256(image: np.ndarray) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


def test_bytes_are_pinned():
    # A change here changes every data set with textures: it needs a new version of the format.
    assert sha256(texture(0, "train", 0, 134, 134)) == GOLDEN


def test_same_name_same_picture():
    first = texture(1, "train", 7, 60, 60)
    texture(2, "test", 8, 31, 40)
    assert np.array_equal(first, texture(1, "train", 7, 60, 60))


def test_seed_split_index_and_size_all_count():
    pictures = [
        texture(0, "train", 0, 48, 48),
        texture(1, "train", 0, 48, 48),
        texture(0, "test", 0, 48, 48),
        texture(0, "train", 1, 48, 48),
        texture(0, "train", 1 << 32, 48, 48),
    ]
    assert len({sha256(p) for p in pictures}) == len(pictures)


def test_same_bytes_without_the_compiler():
    code = (
        "import hashlib\n"
        "from mnistattn.generators.backgrounds.textures import texture\n"
        "for index in range(2):\n"
        "    print(hashlib.sha256(texture(5, 'val', index, 24, 27).tobytes()).hexdigest())\n"
    )
    plain = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],  # numpy warns of an overflow
        env={**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert plain.stdout.split() == [sha256(texture(5, "val", i, 24, 27)) for i in range(2)]


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (2, 3), (17, 17), (33, 90), (134, 101), (61, 7), (40, 700)]
)
def test_every_pixel_is_written_at_any_size(height, width):
    key = stream_key(3, "train")
    black = np.zeros((height, width, 3), np.uint8)
    white = np.full((height, width, 3), 255, np.uint8)
    for index in range(3):
        draw_texture(open_stream(key, TEXTURE, 0, index), black)
        draw_texture(open_stream(key, TEXTURE, 0, index), white)
        assert np.array_equal(black, white)
        assert np.array_equal(black, texture(3, "train", index, height, width))


def test_large_picture_shows_the_same_sizes():
    """Scale invariance: halved, a picture of twice the size is about as cluttered."""
    small, large = [], []
    for index in range(12):
        a = texture(4, "train", index, 100, 100).astype(float).mean(axis=2)
        b = texture(4, "train", index + 100, 200, 200).astype(float).mean(axis=2)
        b = b.reshape(100, 2, 100, 2).mean(axis=(1, 3))
        small.append(np.abs(np.diff(a)).mean())
        large.append(np.abs(np.diff(b)).mean())
    assert 0.6 < np.mean(large) / np.mean(small) < 1.6


def test_noise_has_its_deviation_and_repeats():
    tile = _noise_tile(open_stream(stream_key(0, "train"), TEXTURE, 0, 0), 128)
    assert tile.shape == (128, 128)
    assert 80 < tile.std() < 190
    seam = np.abs(tile[0] - tile[-1]).mean()  # periodic: the seam is as smooth as the inside
    assert seam < 2 * np.abs(np.diff(tile, axis=0)).mean()


def test_statistics_are_natural():
    slopes, kurtosis, deviation = [], [], []
    n = 134
    window = np.hanning(n)[:, None] * np.hanning(n)[None, :]
    f = np.fft.fftfreq(n) * n
    radius = np.hypot(f[:, None], f[None, :]).ravel()
    edges = np.geomspace(3, n / 3, 10)
    for index in range(20):
        luma = texture(0, "train", index, n, n) @ np.array([0.299, 0.587, 0.114])
        power = np.abs(np.fft.fft2((luma - luma.mean()) * window)).ravel() ** 2
        band = np.digitize(radius, edges)
        mean = [power[band == b].mean() for b in range(1, len(edges))]
        slopes.append(np.polyfit(np.log(np.sqrt(edges[1:] * edges[:-1])), np.log(mean), 1)[0])
        d = np.diff(luma)
        kurtosis.append((d**4).mean() / (d**2).mean() ** 2)
        deviation.append(luma.std())
    assert -3.1 < np.mean(slopes) < -2.0  # photos of scenes: -2.6
    assert np.median(kurtosis) > 6  # photos: 13; a bell curve: 3
    assert 35 < np.mean(deviation) < 70  # photos: 53
