"""`mnistattn export`: a data set in a format that other tools read."""

import click

from mnistattn.cli import say


@click.command("export", epilog="Example: mnistattn export data/mbg --to coco --out data/mbg-coco")
@click.argument("data", metavar="DIR")
@click.option("--to", required=True, metavar="webdataset|coco|croissant|parquet",
              help="Which format.")  # fmt: skip
@click.option("--out", default=None, metavar="DIR",
              help="Where to.  [default: DATA-FORMAT, beside DATA]")  # fmt: skip
@click.option("--split", "splits", multiple=True, metavar="SPLIT",
              help="train, val or test; may be given again.  [default: all]")  # fmt: skip
@click.option("--shard-images", type=int, default=10_000, show_default=True,
              help="Most images in one tar or parquet file.")  # fmt: skip
@click.option("--overwrite", is_flag=True,
              help="Replace an export that is already there; other files stay.")  # fmt: skip
def command(data: str, splits: tuple[str, ...], **options) -> None:
    """Write a data set as tars for webdataset, COCO annotations, a Croissant card, or Parquet.

    Every array is in each of them; the digests are compared on the way."""
    from mnistattn.dataset.export import FORMATS, export
    from mnistattn.dataset.read import read_card

    out = export(data, splits=splits or None, say=say, **options)
    split = next(iter(splits or read_card(data).splits))
    line = FORMATS[options["to"]].read.format(out=out, split=split)
    click.echo(f"{out}: done. Read it with: {line}")
