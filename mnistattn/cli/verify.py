"""`mnistattn verify`: is a data set what its card and seed say?"""

import click

from mnistattn.cli import say
from mnistattn.errors import InputError, MnistattnError


@click.command("verify", epilog="Example: mnistattn verify data/mbg")
@click.argument("data", metavar="DIR")
@click.option("--redraw", type=int, default=32, show_default=True,
              help="Random images of each split to draw anew from the seed.")  # fmt: skip
@click.option("--data-root", default="data", show_default=True, help="Where MNIST/raw lies.")
@click.option("--backgrounds", default=None, metavar="DIR",
              help="The folder of photos, if it has moved since.")  # fmt: skip
def command(data: str, redraw: int, data_root: str, backgrounds: str | None) -> None:
    """Compare all arrays with their digests, and random images with what the seed gives."""
    from mnistattn.dataset.verify import verify

    if redraw < 0:
        raise InputError(f"--redraw {redraw} is impossible: give 0 or more.")
    verdict = verify(data, redraw, data_root, backgrounds, say)
    for line in verdict.checked:
        click.echo(f"ok    {line}")
    for line in verdict.notes:
        click.echo(f"note  {line}")
    if verdict.problems:
        raise MnistattnError(" ".join(verdict.problems))
