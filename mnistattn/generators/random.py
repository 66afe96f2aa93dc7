"""Counter-based random streams: Philox 4x32-10 (Salmon et al., SC 2011, "Parallel random numbers:
as easy as 1, 2, 3"; the known answers of its Random123 library are in the tests).

A stream is named by a key (from seed and split) and by (purpose, restart, index); its n-th number
depends on nothing else. So any image can be drawn alone, in any order, by any worker.

A stream's state is an int64 array of 11 (every entry holds 32 bits, so int64 never overflows):
key 0, 1 | counter 0 .. 3 | the four outputs of the current block | outputs used.
"""

import hashlib
from functools import cache
from statistics import NormalDist

import numpy as np

from mnistattn.generators.jit import jit

# Purposes: what a stream is for. Separate streams keep one decision from shifting another, so that
# the same seed places the same digits in MREF, MDIST and MBG: the sets differ in background alone.
PLAN, COLOR, QUERY, BACKGROUND, DISTRACTORS, GLYPH, TEXTURE, PLACEMENT = 0, 1, 2, 3, 4, 5, 6, 7


def stream_key(seed: int, split: str) -> np.ndarray:
    """The Philox key, int64 (2,), of a data set's split: 64 bits of SHA-256 over seed and name."""
    digest = hashlib.sha256(f"mnistattn/1 seed={seed} split={split}".encode()).digest()
    return np.frombuffer(digest[:8], "<u4").astype(np.int64)


@jit
def philox4x32(counter, key, out):
    """Write Philox 4x32-10 of counter (4,) and key (2,), four 32-bit outputs, into out (4,)."""
    c0, c1, c2, c3 = counter[0], counter[1], counter[2], counter[3]
    k0, k1 = key[0], key[1]
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * np.uint64(c0)
        p1 = np.uint64(0xCD9E8D57) * np.uint64(c2)
        n0 = np.int64(p1 >> np.uint64(32)) ^ c1 ^ k0
        n2 = np.int64(p0 >> np.uint64(32)) ^ c3 ^ k1
        c1 = np.int64(p1 & np.uint64(0xFFFFFFFF))
        c3 = np.int64(p0 & np.uint64(0xFFFFFFFF))
        c0, c2 = n0, n2
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    out[0], out[1], out[2], out[3] = c0, c1, c2, c3


@jit
def open_stream(key, purpose, restart, index):
    """A fresh stream: key (2,) int64, purpose below 256, restart below 2^24, 64-bit index."""
    state = np.zeros(11, np.int64)
    state[0], state[1] = key[0], key[1]
    state[3] = purpose | (restart << 8)
    state[4] = index & 0xFFFFFFFF
    state[5] = (index >> 32) & 0xFFFFFFFF
    state[10] = 4
    return state


@jit
def next_u32(state):
    """The stream's next number, uniform in 0 .. 2^32 - 1 (int64)."""
    if state[10] == 4:
        philox4x32(state[2:6], state[0:2], state[6:10])
        state[2] += 1  # 2^32 blocks of a stream are never used up: a scene takes a few thousand
        state[10] = 0
    value = state[6 + state[10]]
    state[10] += 1
    return value


@jit
def below(state, n):
    """Uniform in 0 .. n - 1 for n < 2^31: the high part of a product (bias under n / 2^32)."""
    return (next_u32(state) * n) >> 32


@cache
def normal_table(sigma: int) -> np.ndarray:
    """N(0, sigma) rounded to integers, as 65,536 equally likely int16 values (its quantiles)."""
    quantile = NormalDist(0, sigma).inv_cdf
    upper = [round(quantile((k + 0.5) / 65536)) for k in range(32768, 65536)]
    return np.array([-q for q in reversed(upper)] + upper, np.int16)
