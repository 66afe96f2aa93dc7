"""Settings of the process that training and drawing want; each is made once, at the start.

`keep_freed_memory` (glibc only): glibc gives large blocks back to the system when they are freed,
and a training step allocates the same few hundred MB again each time, a generator's worker the same
few: every page is faulted in anew, which on a virtual machine can cost more than the arithmetic.
malloc's settings cure it.

`sleep_between_parallel_regions`: OpenMP's threads, which compute torch's convolutions, spin for
some milliseconds after each one, on the cores that the recurrence's own threads then want (a tenth
of a training step of AttentionRNN on two cores).
"""

import ctypes
import os
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


def sleep_between_parallel_regions() -> None:
    """Have OpenMP's threads sleep rather than spin. Of use only before torch is first imported;
    what the user has set in the environment stays."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
