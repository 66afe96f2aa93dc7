"""`mnistattn sweep`: train and score many models, data sets and seeds."""

import click

from mnistattn.cli import say
from mnistattn.cli.options import parse_settings
from mnistattn.errors import InputError


@click.command(
    "sweep",
    epilog="Example: mnistattn sweep --models 'ctx,arnn[hidden=32]' --data data/mref --seeds 0-2",
)
@click.option("--models", "--model", multiple=True, required=True, metavar="NAME,NAME[OPTIONS],..",
              help="As of evaluate; options in brackets: 'arnn[hidden=32,block=2]'. Repeatable."
)  # fmt: skip
@click.option("--data", multiple=True, required=True, metavar="DIR",
              help="A data set that exists. Repeatable.")  # fmt: skip
@click.option("--seeds", default="0", show_default=True, metavar="0-2|0,3,7",
              help="Of weights and order.")  # fmt: skip
@click.option("--recipe", default="fast", show_default=True, metavar="fast|paper",
              help="As of evaluate; likewise the next four.")  # fmt: skip
@click.option("--epochs", type=int, default=None, help="Instead of the recipe's.")
@click.option("--batch-size", type=int, default=None, help="Instead of the recipe's.")
@click.option("--lr", type=float, default=None, help="Learning rate, instead of the recipe's.")
@click.option("--queries", default=None, metavar="one|fresh|all", help="Instead of the recipe's.")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda",
              help="Where to compute; auto: the GPUs if there are any.")  # fmt: skip
@click.option("--per-gpu", type=int, default=1, show_default=True, help="Runs that share a GPU.")
@click.option("--out", default="runs", show_default=True, metavar="DIR",
              help="Where the run directories go.")  # fmt: skip
@click.option("--engine", default="local", show_default=True, metavar="local|dask",
              help="Where runs run: processes of this machine, or Dask.")  # fmt: skip
@click.option("--scheduler", default=None, metavar="tcp://HOST:PORT",
              help="A Dask scheduler that runs already.")  # fmt: skip
@click.option("--workers", type=int, default=None,
              help="Processes, which share the cores.  [default: one a core]")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Check and list the runs; start none.")
def command(models, data, seeds, dry_run, **options) -> None:
    """Train and score each model on each data set with each seed, several at a time: a run
    directory each, as evaluate makes it.

    All is checked before the first run starts. Runs that are there are kept, interrupted ones go on
    after their last whole epoch: give the same line again. A run that fails stops no other.
    """
    from mnistattn.evaluation.sweep import SweepError, plan, summary, sweep

    request = parse_models(models), data, parse_seeds(seeds)
    if dry_run:
        for name in ("device", "per_gpu", "engine", "scheduler", "workers"):
            del options[name]
        cells = plan(*request, **options)
        for cell in cells:
            click.echo(f"{cell.state:6}{cell.run}")
        done = sum(cell.state == "done" for cell in cells)
        click.echo(f"{len(cells)} runs, {done} of them done")
        return
    try:
        results, failure = sweep(*request, say=say, **options), None
    except SweepError as error:
        results, failure = [result for result in error.results if result], error
    if results:
        click.echo(summary(results))
        click.echo(f"\nCompare: mnistattn leaderboard {options['out']}")
    if failure:
        raise failure


def parse_models(texts: tuple[str, ...]) -> list[tuple[str, dict]]:
    """("ctx,arnn[hidden=32,block=2]",) -> [("ctx", {}), ("arnn", {"hidden": 32, "block": 2})].
    Brackets, as a colon stands before the class of a plugged model. InputError."""
    models = []
    for part in (part for text in texts for part in _split(text)):
        name, bracket, settings = part.partition("[")
        if not name or (bracket and not settings.endswith("]")):
            raise InputError(f"--models '{part}' is no model: give NAME, or NAME[hidden=32].")
        try:
            models.append((name, parse_settings(tuple(_split(settings[:-1]))) if bracket else {}))
        except InputError as error:
            sentence = str(error).removeprefix("--set ")
            raise InputError(f"--models '{part}': {sentence}") from error
    return models


def parse_seeds(text: str) -> list[int]:
    """From "0-2,7" to [0, 1, 2, 7]. InputError if it is not such a list."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise InputError(f"--seeds {text} is no list of seeds: give 0-2, or 0,3,7.")
        ends = int(first), int(last if dash else first)
        if not ends[0] <= ends[1] < 1 << 32:
            raise InputError(f"--seeds {part} is impossible: give 0 to 2^32 - 1, as 0-2.")
        seeds += range(ends[0], ends[1] + 1)
    return seeds


def _split(text: str) -> list[str]:
    """At commas that are in no brackets: options, and lists in options, have commas too."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
