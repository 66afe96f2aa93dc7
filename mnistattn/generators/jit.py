"""How the drawing code is compiled.

Everything under `generators` that touches a pixel or takes a random decision is integer or
fixed-point arithmetic in int64, decorated with `@jit`. No fast-math, no float accumulations, no
overflow that numpy and LLVM would treat differently: the same bytes on every processor, and with
the compiler off (NUMBA_DISABLE_JIT=1), which the tests check.
"""

from numba import njit

# nogil: the workers of the writer are threads, which share the decoded photos without a copy.
# cache: a second process starts without waiting for the compiler.
jit = njit(nogil=True, cache=True, fastmath=False, boundscheck=False, error_model="python")
