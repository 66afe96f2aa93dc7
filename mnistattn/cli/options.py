"""Options that several subcommands share."""

import json

import click

from mnistattn.errors import InputError, MnistattnError


def source_options(command):
    """Where digits and backgrounds come from, and how they are placed."""
    for option in reversed(_SOURCES):
        command = option(command)
    return command


def write_picture(picture, out: str) -> None:
    """Save a Pillow picture and print where; MnistattnError if it cannot be written."""
    try:
        picture.save(out)
    except (OSError, ValueError) as error:
        raise MnistattnError(
            f"cannot write {out}: {getattr(error, 'strerror', None) or error}."
        ) from error
    click.echo(out)


def parse_settings(settings: tuple[str, ...]) -> dict:
    """("hidden=32", "sigma=exp") -> {"hidden": 32, "sigma": "exp"}: numbers, true and false as in
    JSON, all else as text. InputError for a setting without a name or a value, or given twice."""
    parsed: dict = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not (name and equals and value):
            raise InputError(f"--set {setting} is no NAME=VALUE, as hidden=32.")
        if name in parsed:
            raise InputError(f"--set {name} is given twice: give it once.")
        try:
            parsed[name] = json.loads(value)
        except ValueError:
            parsed[name] = value
    return parsed


_SOURCES = (
    click.option("--digits", default="auto", show_default=True, metavar="auto|mnist|strokes",
                 help="MNIST, the built-in strokes, or MNIST where it can be had."),
    click.option("--backgrounds", default="textures", show_default=True,
                 metavar="textures|sun397|DIR",
                 help="What is under the digits of the mbg variants; DIR: a folder of photos."),
    click.option("--data-root", default="data", show_default=True,
                 help="Where MNIST/raw (and SUN397) lie or are downloaded to."),
    click.option("--distractors", default="patches", show_default=True,
                 metavar="patches|gaussian",
                 help="mdist: crops of digits (PAN) or Gaussian noise (AttentionRNN paper)."),
    click.option("--placement", default="paper", show_default=True, metavar="paper|balanced",
                 help="balanced: the scale that is asked for is uniform over its range."),
    click.option("--digit-split", default="separate", show_default=True,
                 metavar="separate|pooled",
                 help="pooled: the splits share one pool of digits, as the original code."),
    click.option("--workers", type=int, default=None,
                 help="Threads, or processes.  [default: one a core]"),
)  # fmt: skip
