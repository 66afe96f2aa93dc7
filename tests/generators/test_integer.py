import math

from mnistattn.generators.integer import isqrt


def test_isqrt_against_python():
    edges = [k * k + d for k in (1, 2, 255, 4096, 123_457, 2**30, 2**31 - 1) for d in (-1, 0, 1)]
    for n in [*range(1000), *edges, 2**62 - 1]:
        assert isqrt(n) == math.isqrt(n)
