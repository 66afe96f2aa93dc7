"""`mnistattn generate`: make a data set."""

import click

from mnistattn.cli import say
from mnistattn.cli.options import source_options
from mnistattn.generators.variants import COUNTS, VARIANTS


@click.command(
    "generate", epilog="Example: mnistattn generate --variant mbg --out data/mbg --seed 0"
)
@click.option("--variant", required=True, metavar="|".join(VARIANTS), help="Which data set.")
@click.option("--out", default=None, metavar="DIR", help="Where to.  [default: data/VARIANT]")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed, same bytes.")
@click.option("--train", type=int, default=COUNTS["train"], show_default=True, help="Images.")
@click.option("--val", type=int, default=COUNTS["val"], show_default=True, help="Images.")
@click.option("--test", type=int, default=COUNTS["test"], show_default=True, help="Images.")
@source_options
@click.option("--shards", type=int, default=None, metavar="N",
              help="Files of the largest split; continued if stopped.  [default: one, not "
              "continued]")  # fmt: skip
@click.option("--engine", default=None, metavar="local|dask",
              help="What makes the shards.  [default: processes of this machine]")  # fmt: skip
@click.option("--scheduler", default=None, metavar="tcp://HOST:PORT",
              help="A Dask scheduler that runs already.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a data set that is already there.")
def command(**options) -> None:
    """Make a data set: train.h5, val.h5, test.h5 and the card dataset.json in one directory; with
    --shards, train-00000-of-00064.h5 and so on."""
    from mnistattn.dataset.write import generate

    path = generate(**options, say=say)
    click.echo(f"{path}: done. See it with: mnistattn show {path}")
