"""`mnistattn retest`: a fresh test set for a trained model."""

import click

from mnistattn.cli import say


@click.command("retest", epilog="Example: mnistattn retest runs/mbg-ctx-fast-seed0 --test-seed 1")
@click.argument("result", metavar="RESULT")
@click.option("--test-seed", type=int, required=True, help="Not the data set's own.")
@click.option("--model", default=None, metavar="FILE.py:CLASS",
              help="Where a plugged model is.  [default: the result's name]")  # fmt: skip
@click.option("--data-root", default="data", show_default=True, help="Where MNIST/raw lies.")
@click.option("--backgrounds", default=None, metavar="DIR",
              help="The folder of photos, if it has moved since.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda",
              help="Where to compute.")  # fmt: skip
@click.option("--workers", type=int, default=None, help="Threads.  [default: one a core]")
def command(result: str, **options) -> None:
    """Draw a test split of another seed (same spec and sources, no image in common), score the
    checkpoint of RESULT on it, and write both beside it. The leaderboard shows it, and flags a
    model whose accuracy drops by more than chance."""
    from mnistattn.evaluation.retest import retest

    made = retest(result, say=say, **options)
    accuracy, p = made["scores"]["accuracy"], made["p"]
    word = "more than chance" if p <= 0.05 else "no more than chance"
    click.echo(
        f"{made['model']} on test seed {made['test_seed']}: {100 * accuracy['value']:.2f} % right "
        f"({100 * accuracy['low']:.2f} .. {100 * accuracy['high']:.2f}), {100 * made['drop']:+.2f} "
        f"points against the first test set: {word} (p {p:.3f})."
    )
    click.echo(made["file"])
