"""`mnistattn evaluate`: train a model on a data set and score it."""

from pathlib import Path

import click

from mnistattn.cli import say
from mnistattn.cli.options import parse_settings, source_options
from mnistattn.generators.variants import COUNTS, VARIANTS


@click.command(
    "evaluate",
    epilog="Example: mnistattn evaluate --model ctx --variant mbg --recipe fast --out runs/ctx",
)
@click.option(
    "--model",
    required=True,
    metavar="NAME|FILE.py:CLASS|MODULE:CLASS",
    help="See 'mnistattn models'; or one of your own ('mnistattn new-attention').",
)
@click.option(
    "--set",
    "options",
    multiple=True,
    metavar="NAME=VALUE",
    help="An option of the attention, as hidden=32; see 'mnistattn models --options'.",
)
@click.option("--data", default=None, metavar="DIR", help="A data set that exists; or ...")
@click.option("--variant", default=None, metavar="|".join(VARIANTS),
              help="... data/VARIANT, which is made first where it is missing.")  # fmt: skip
@click.option("--recipe", default="fast", show_default=True, metavar="fast|paper",
              help="fast: AdamW, one cycle; paper: PAN's RMSprop, up to 300 epochs.")  # fmt: skip
@click.option("--epochs", type=int, default=None, help="Instead of the recipe's.")
@click.option("--batch-size", type=int, default=None, help="Instead of the recipe's.")
@click.option("--lr", type=float, default=None, help="Learning rate, instead of the recipe's.")
@click.option("--queries", default=None, metavar="one|fresh|all",
              help="One fixed query an image (papers), or fresh at each visit, or all."
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of weights and order.")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda",
              help="Where to compute; auto: the GPU if there is one.")  # fmt: skip
@click.option(
    "--out",
    default=None,
    metavar="DIR",
    help="Run directory.  [default: runs/VARIANT-MODEL-OPTIONS-RECIPE-seedS]",
)
@click.option("--checkpoint", default=None, metavar="FILE",
              help="A model.safetensors to score, without training.")  # fmt: skip
@click.option("--train", type=int, default=COUNTS["train"], show_default=True,
              help="With --variant: images, where it is made; likewise all below.")  # fmt: skip
@click.option("--val", type=int, default=COUNTS["val"], show_default=True, help="Images.")
@click.option("--test", type=int, default=COUNTS["test"], show_default=True, help="Images.")
@source_options
def command(model, data, variant, options, **rest) -> None:
    """Train a model (or load a checkpoint), score it on the test split, and write a run directory:
    result.json, model.safetensors, samples.h5, gallery.h5, curve.json, picture.png.

    A run that was interrupted goes on after its last whole epoch when started again. Several
    processes train together as 'torchrun --nproc-per-node 2 -m mnistattn evaluate ...'; the batch
    size is that of all of them.
    """
    from mnistattn.evaluation.report import table
    from mnistattn.evaluation.run import evaluate

    result = evaluate(model, data, variant, say=say, options=parse_settings(options), **rest)
    if not result:  # not the first of torchrun's processes
        return
    click.echo(table(result))
    click.echo(f"\n{result['run']}: result.json, samples.h5, picture.png, model.safetensors")
    click.echo(f"Beside others: mnistattn leaderboard {Path(result['run']).parent}")
