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
@click.option("--repair", is_flag=True, help="Draw again what is damaged, and nothing else.")
def command(data: str, redraw: int, data_root: str, backgrounds: str | None, repair: bool) -> None:
    """Compare every byte of every file with what was written, and random images with what the seed
    gives."""
    if repair:
        from mnistattn.dataset.repair import repair as check
    else:
        from mnistattn.dataset.verify import verify as check

    if redraw < 0:
        raise InputError(f"--redraw {redraw} is impossible: give 0 or more.")
    verdict = check(data, redraw, data_root, backgrounds, say)
    for line in verdict.checked:
        click.echo(f"ok    {line}")
    for line in verdict.notes:
        click.echo(f"note  {line}")
    if verdict.problems:
        raise MnistattnError(" ".join(verdict.problems))
