"""What a user is told when something is wrong: errors, each one sentence and an exit code on the
command line, and warnings, one line each."""


class MnistattnError(Exception):
    """Something failed while running (exit code 1): the disk is full, a file is damaged, ..."""

    exit_code = 1


class InputError(MnistattnError, ValueError):
    """The request cannot be right (exit code 2): an unknown name, an impossible size, ..."""

    exit_code = 2


class MnistattnWarning(UserWarning):
    """It works, but not as well as it might: the GPU is too old for the fast path, ..."""
