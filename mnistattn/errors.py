"""The errors a user meets; the command line makes each one sentence and an exit code."""


class MnistattnError(Exception):
    """Something failed while running (exit code 1): the disk is full, a file is damaged, ..."""

    exit_code = 1


class InputError(MnistattnError, ValueError):
    """The request cannot be right (exit code 2): an unknown name, an impossible size, ..."""

    exit_code = 2
