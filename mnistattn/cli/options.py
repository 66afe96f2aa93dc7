"""Options that several subcommands share."""

import click


def source_options(command):
    """Where digits and backgrounds come from, and how they are placed."""
    for option in reversed(_SOURCES):
        command = option(command)
    return command


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
    click.option("--workers", type=int, default=None, help="Threads.  [default: one a core]"),
)  # fmt: skip
