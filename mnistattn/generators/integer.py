"""Integer mathematics that several generators need."""

from mnistattn.generators.jit import jit


@jit
def isqrt(n):
    """The integer square root, rounded down, of 0 <= n < 2^62."""
    bit = 1
    while bit <= n >> 2:
        bit <<= 2
    root = 0
    while bit > 0:
        if n >= root + bit:
            n -= root + bit
            root = (root >> 1) + bit
        else:
            root >>= 1
        bit >>= 2
    return root
