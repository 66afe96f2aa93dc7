"""Options of an attention, checked: one clear sentence for each that is impossible."""

import math
from collections.abc import Iterable

from mnistattn.errors import InputError


def whole(**values: object) -> None:
    """InputError unless each is a whole number from 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} {value} is impossible: give a whole number from 1.")


def number(least: float, **values: object) -> None:
    """InputError unless each is a finite number from `least` up."""
    for name, value in values.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not least <= value < math.inf
        ):
            raise InputError(f"{name} {value} is impossible: give a number from {least:g}.")


def truth(**values: object) -> None:
    """InputError unless each is True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise InputError(f"{name} {value} is impossible: give true or false.")


def one_of(name: str, value: str, known: Iterable[str]) -> None:
    """InputError unless value is known."""
    if value not in tuple(known):
        raise InputError(f"unknown {name} '{value}': it is one of {', '.join(known)}.")
