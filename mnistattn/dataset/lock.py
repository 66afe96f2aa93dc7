"""One writer at a time: a lock on the place where a data set is made, and what dead ones left.

The lock is the operating system's, on a file beside the data set, so that it ends with the process
that held it, however that ended; the file that is then left means nothing, and is used again.
"""

import errno
import glob
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mnistattn.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt

# Errors of a file system that has no locks, as Lustre mounted without `flock`.
_NO_LOCKS = {
    getattr(errno, name, None) for name in ("ENOLCK", "ENOSYS", "EOPNOTSUPP", "ENOTSUP", "EINVAL")
}


@contextmanager
def only_writer(out: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold the right to write `out`, whose parent directory must exist.

    InputError if another process holds it; the sentence names that process. OSError if the place
    cannot be written. On a file system without locks, `say` is told that nothing protects it.
    """
    file = out.parent / f".{out.name}.lock"
    descriptor = _acquire(file, out, say)
    try:
        _clear(out)
        yield
    finally:
        # While the lock is held: whoever comes now makes a new file, and sees that its own is gone.
        with suppress(OSError):
            file.unlink()
        os.close(descriptor)
        if fcntl is None:  # Windows removes no open file
            with suppress(OSError):
                file.unlink()


def _acquire(file: Path, out: Path, say: Callable[[str], None]) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _lock(descriptor):
                raise InputError(
                    f"{out} is being written by {_holder(file)}: wait for it, or give another "
                    "--out."
                )
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            say(f"{out.parent} is on a file system without locks: let one process write at a time")
        except BaseException:
            os.close(descriptor)
            raise
        if _is(file, descriptor):
            break
        os.close(descriptor)  # another process has just removed it
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def _lock(descriptor: int) -> bool:
    """Take the system's lock; False if another process has it."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            # One byte far behind the text, which others have to be able to read.
            os.lseek(descriptor, 1 << 30, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _is(file: Path, descriptor: int) -> bool:
    """True if `file` is what the descriptor has open."""
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(file: Path) -> str:
    try:
        return file.read_text().strip() or "another process"
    except OSError:
        return "another process"


def _clear(out: Path) -> None:
    """Put away what writers of `out` left that died: nobody else writes, for we hold the lock."""
    for old in sorted(out.parent.glob(f".{glob.escape(out.name)}.old-*")):
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:  # it died between two renames: this is the data set
            old.rename(out)
    for partial in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
        if partial != work_folder(out):
            shutil.rmtree(partial, ignore_errors=True)
    for partial in out.glob(".*.partial-*"):  # a file of a run directory
        with suppress(OSError):
            partial.unlink()


def work_folder(out: Path) -> Path:
    """Where the shards of `out` wait until all are there; it outlives a process that dies."""
    return out.parent / f".{out.name}.partial-shards"
