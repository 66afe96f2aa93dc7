"""`mnistattn info`: what a data set is made of."""

import click


@click.command("info", epilog="Example: mnistattn info data/mbg")
@click.argument("data", metavar="DIR")
def command(data: str) -> None:
    """Print a data set's card, counts, and histograms of digits, colours and scales."""
    from mnistattn.dataset.describe import describe

    click.echo(describe(data))
