"""`mnistattn layers`: where several models look, layer by layer, in one picture."""

import click

from mnistattn.cli.options import write_picture


@click.command(
    "layers",
    epilog="Example: mnistattn layers runs/mbg-inv-ctx-fast-seed0 runs/mbg-inv-arnn-fast-seed0",
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("-n", "images", type=int, default=8, show_default=True, help="Images, 1 to 16.")
@click.option("--model", "models", multiple=True, metavar="FILE.py:CLASS",
              help="Where a plugged model is. Repeatable.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda",
              help="Where to compute.")  # fmt: skip
@click.option("--out", default="layers.png", show_default=True, help="The picture to write.")
def command(runs, images, models, device, out) -> None:
    """Write a picture of the attention maps of all layers of some RUNs (run directories on one test
    set) side by side, on the first test images, as in Figure 6b of the AttentionRNN paper."""
    from mnistattn.evaluation.layers import layers_of_runs

    picture = layers_of_runs(runs, images=images, models=models, device=device)
    write_picture(picture, out)
