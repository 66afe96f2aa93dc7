"""The process settings: made once, before torch, and never against the user."""

import os
import subprocess
import sys

import pytest

from mnistattn.process import keep_freed_memory


def waiting(policy: str | None) -> str:
    """OMP_WAIT_POLICY in a process after the command line has run."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    if policy:
        environment["OMP_WAIT_POLICY"] = policy
    code = (
        "import os, sys; from mnistattn import cli; sys.argv = ['mnistattn', '--version']\n"
        "assert 'torch' not in sys.modules\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print(os.environ['OMP_WAIT_POLICY'])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True,
                          text=True, check=True)  # fmt: skip
    return done.stdout.split()[-1]


def test_openmp_sleeps_unless_the_user_says_otherwise():
    assert waiting(None) == "PASSIVE"
    assert waiting("ACTIVE") == "ACTIVE"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc, so Linux only")
def test_freed_memory_stays():
    """A large block that is freed and allocated again is not faulted in anew."""
    code = (
        "import resource, numpy as np\n"
        "from mnistattn.process import keep_freed_memory\n"
        "assert keep_freed_memory()\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    np.ones(1 << 25)\n"  # 256 MiB
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "first, second = faults(), faults()\n"
        "assert second < first / 10, (first, second)"
    )
    libc = os.confstr("CS_GNU_LIBC_VERSION") if hasattr(os, "confstr") else None
    if not libc:
        pytest.skip("no glibc here")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
