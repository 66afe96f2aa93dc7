"""The random streams: Random123's known answers, independence of the streams, fair draws."""

import hashlib
from itertools import product

import numpy as np
import pytest

from mnistattn.generators.random import (
    below,
    next_u32,
    normal_table,
    open_stream,
    philox4x32,
    stream_key,
)

KEY = stream_key(0, "train")
ONES = 0xFFFFFFFF
# SHA-256 of the table's little-endian bytes. A change here changes every data set.
GOLDEN_NORMAL = "e6f6806ea851ad7702773971966b02520cd2ed7fa47a676a69be0fa84d0d2afa"


def draws(stream: np.ndarray, n: int) -> list[int]:
    return [int(next_u32(stream)) for _ in range(n)]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers_of_random123(counter, key, expected):
    out = np.zeros(4, np.int64)
    philox4x32(np.array(counter, np.int64), np.array(key, np.int64), out)
    assert out.tolist() == expected


def test_a_stream_is_philox_at_the_counter_of_its_name():
    purpose, restart, index = 3, 70_000, (5 << 32) + 9
    expected = []
    for block in range(3):
        out = np.zeros(4, np.int64)
        philox4x32(np.array([block, purpose | restart << 8, 9, 5]), KEY, out)
        expected += out.tolist()
    assert draws(open_stream(KEY, purpose, restart, index), 12) == expected


def test_every_part_of_the_name_makes_another_stream():
    names = list(product(range(8), (0, 1, 256, 1000), (0, 1, 2, 1 << 32, 1 << 40, (1 << 32) + 1)))
    streams = [tuple(draws(open_stream(KEY, *name), 4)) for name in names]
    assert len(set(streams)) == len(names)
    # Not one stream shifted against another, either: no value is found in two of them.
    assert len(set(np.ravel(streams).tolist())) == 4 * len(names)


def test_seeds_and_splits_make_other_keys():
    seeds = (0, 1, 2, 10, 11, 1 << 32, (1 << 63) - 1)
    keys = {tuple(stream_key(s, split)) for s in seeds for split in ("train", "val", "test")}
    assert len(keys) == 3 * len(seeds)
    assert all(0 <= word <= ONES for key in keys for word in key)
    digest = hashlib.sha256(b"mnistattn/1 seed=7 split=val").digest()
    assert stream_key(7, "val").tolist() == [
        int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
    ]  # fmt: skip
    assert draws(open_stream(stream_key(0, "val"), 0, 0, 0), 4) != draws(
        open_stream(KEY, 0, 0, 0), 4
    )


def test_one_streams_use_does_not_move_another():
    alone = draws(open_stream(KEY, 1, 0, 5), 9)
    first, second = open_stream(KEY, 1, 0, 5), open_stream(KEY, 2, 0, 5)
    mixed = []
    for _ in range(9):
        mixed.append(int(next_u32(first)))
        next_u32(second)
    assert mixed == alone


@pytest.mark.parametrize("n", [1, 2, 3, 5, 10, 17, 100])
def test_below_is_uniform(n):
    total = 20_000
    stream = open_stream(KEY, 200, 0, n)
    counts = np.bincount([below(stream, n) for _ in range(total)], minlength=n)
    assert len(counts) == n
    chi2 = ((counts - total / n) ** 2 / (total / n)).sum()
    # Chi square with n - 1 degrees of freedom: mean n - 1, variance 2 (n - 1).
    assert chi2 <= (n - 1) + 5 * np.sqrt(2 * (n - 1))
    assert n < 5 or chi2 >= (n - 1) - 4 * np.sqrt(2 * (n - 1))  # nor too even to be random


def test_bits_are_fair_and_independent():
    values = np.array(draws(open_stream(KEY, 201, 0, 0), 20_000))
    bits = (values[:, None] >> np.arange(32)) & 1
    assert abs(bits.mean(0) - 0.5).max() < 5 * 0.5 / np.sqrt(len(bits))
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 5 / np.sqrt(len(values))


def test_below_takes_the_high_part():
    value = draws(open_stream(KEY, 9, 0, 0), 1)[0]
    for n in (1, 7, 1000, 2**31 - 1):
        assert below(open_stream(KEY, 9, 0, 0), n) == value * n >> 32


def test_normal_table():
    table = normal_table(10)
    assert table.shape == (65536,) and table.dtype == np.int16
    assert table.astype(int).sum() == 0
    assert np.array_equal(table, -table[::-1])
    assert (np.diff(table.astype(int)) >= 0).all()
    assert table.astype(float).std() == pytest.approx(10, rel=0.01)
    assert (np.abs(table) <= 10).mean() == pytest.approx(0.7063, abs=0.001)  # P(|x| < 10.5)
    assert hashlib.sha256(table.astype("<i2").tobytes()).hexdigest() == GOLDEN_NORMAL
