"""Keep freed memory in the process (glibc only).

glibc gives large blocks back to the system when they are freed, and a training step allocates the
same few hundred MB again each time, a generator's worker the same few: every page is faulted in
anew, which on a virtual machine can cost more than the arithmetic. malloc's settings cure it.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> bool:
    """Set malloc's thresholds, once, at the start; False where there is no glibc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_ARENA_MAX, 1),
                (_M_TOP_PAD, 256 << 20))  # fmt: skip
    return all([mallopt(option, value) for option, value in settings])
