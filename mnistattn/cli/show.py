"""`mnistattn show`: a contact sheet of a data set."""

import click

from mnistattn.cli.options import write_picture
from mnistattn.errors import InputError


@click.command("show", epilog="Example: mnistattn show data/mbg --split test -n 16 --out sheet.png")
@click.argument("data", metavar="DIR")
@click.option("--split", default="test", show_default=True, help="train, val or test.")
@click.option("-n", "count", type=int, default=16, show_default=True, help="Images.")
@click.option("--out", default="sheet.png", show_default=True, help="The picture to write.")
def command(data: str, split: str, count: int, out: str) -> None:
    """Write a picture of the first images with their queries, answers and masks."""
    from mnistattn.dataset.sheet import sheet_of

    if not 1 <= count <= 1000:
        raise InputError(f"-n {count} is out of range: give 1 to 1000 images.")
    picture = sheet_of(data, split, count)
    write_picture(picture, out)
