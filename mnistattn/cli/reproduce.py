"""`mnistattn reproduce`: the paper's tables, each number beside ours."""

from pathlib import Path

import click

from mnistattn.cli import say
from mnistattn.cli.sweep import parse_seeds
from mnistattn.errors import InputError, MnistattnError
from mnistattn.generators.variants import COUNTS


@click.command(
    "reproduce", epilog="Example: mnistattn reproduce table1 --quick --seeds 0",
)  # fmt: skip
@click.argument("tables", nargs=-1, required=True, metavar="TABLE...")
@click.option("--dry-run", is_flag=True, help="Say how long it will take; make nothing.")
@click.option("--quick", is_flag=True,
              help="Two short epochs, on data sets where they keep the models' order.")  # fmt: skip
@click.option("--report-only", is_flag=True, help="The tables from what is there; train nothing.")
@click.option("--seeds", default="0-2", show_default=True, metavar="0-2|0,3,7",
              help="Of weights and order.")  # fmt: skip
@click.option("--recipe", default=None, metavar="fast|paper",
              help="fast: AdamW, one cycle; paper: PAN's RMSprop, to 300 epochs.  [default: fast]"
)  # fmt: skip
@click.option("--epochs", type=int, default=None, help="Instead of the recipe's.")
@click.option("--batch-size", type=int, default=None, help="Instead of the recipe's.")
@click.option("--lr", type=float, default=None, help="Instead of the recipe's.")
@click.option("--data", default="data/reproduce", show_default=True, metavar="DIR",
              help="Where the data sets are, or are made.")  # fmt: skip
@click.option("--data-seed", type=int, default=0, show_default=True,
              help="Of the data sets that are made; one that is there has to have it, too."
)  # fmt: skip
@click.option("--out", default="runs/reproduce", show_default=True, metavar="DIR",
              help="Where runs, reproduction.md and pictures go.")  # fmt: skip
@click.option("--results", multiple=True, metavar="DIR",
              help="More results for the tables. Repeatable.")  # fmt: skip
@click.option("--digits", default="auto", show_default=True, metavar="auto|mnist|strokes",
              help="As of generate; likewise the next two.")  # fmt: skip
@click.option("--backgrounds", default="textures", show_default=True,
              metavar="textures|sun397|DIR", help="The paper has photos of SUN.")  # fmt: skip
@click.option("--data-root", default="data", show_default=True, help="Where MNIST/raw lies.")
@click.option("--train", type=int, default=COUNTS["train"], show_default=True,
              help="Images of each data set that is made; likewise the next two.")  # fmt: skip
@click.option("--val", type=int, default=COUNTS["val"], show_default=True, help="Images.")
@click.option("--test", type=int, default=COUNTS["test"], show_default=True, help="Images.")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda",
              help="As of sweep; likewise all below.")  # fmt: skip
@click.option("--per-gpu", type=int, default=1, show_default=True, help="Runs that share a GPU.")
@click.option("--engine", default="local", show_default=True, metavar="local|dask",
              help="Where runs run: processes of this machine, or Dask.")  # fmt: skip
@click.option("--scheduler", default=None, metavar="tcp://HOST:PORT",
              help="A Dask scheduler that runs already.")  # fmt: skip
@click.option("--workers", type=int, default=None,
              help="Processes, which share the cores.  [default: one a core]")  # fmt: skip
def command(
    tables, dry_run, quick, report_only, seeds, recipe, data, out, results, device, train, val,
    test, digits, backgrounds, data_root, data_seed, epochs, batch_size, lr, **engine,
) -> None:  # fmt: skip
    """Make the paper's data sets, train its models, and print its tables with ours beside them.

    TABLE is table1, table2, table3, inverse, multi (the paper's), readings (of the training set),
    hard (ours, on mbg-hard), or all. What is there is kept: an interrupted command goes on when it
    is given again. The tables are written to OUT/reproduction.md, with learning curves if
    matplotlib is there, and with the layers' maps of the inverse task's models side by side
    (Figure 6b).
    """
    from mnistattn.evaluation.sweep import SweepError
    from mnistattn.reproduction.plan import (
        Request,
        cells,
        check,
        expect,
        in_words,
        make_data,
        run,
    )
    from mnistattn.reproduction.tables import chosen

    if quick and recipe not in (None, "fast"):
        raise InputError("--quick has a recipe of its own, of the fast kind: leave --recipe out.")
    if dry_run and report_only:
        raise InputError("--dry-run and --report-only each leave out the work: give one of them.")
    request = Request(
        chosen(tables), Path(data), Path(out), parse_seeds(seeds), recipe or "fast",
        {"epochs": epochs, "batch_size": batch_size, "lr": lr}, quick, (train, val, test),
        {"digits": digits, "backgrounds": backgrounds, "data_root": data_root},
        data_seed,
    )  # fmt: skip
    stops = any(request.recipe_of(row).patience for row in request.rows())
    if not report_only:
        check(request, device, **engine)
    if dry_run:
        click.echo(in_words(expect(request, device), stops))
        return
    failure = None
    if not report_only:
        make_data(request, say, progress=True)
        todo = cells(request)
        if any(cell.state != "done" for cell in todo):
            say(in_words(expect(request, device, todo), stops))
        try:
            run(todo, device=device, say=say, **engine)
        except SweepError as error:  # some runs failed: show the others
            if not any(error.results):
                raise
            failure = error
    _report(request, results, device)
    if failure:
        raise failure


def _report(request, results, device) -> None:
    """Print the tables, and write them, with all others that there are results for."""
    from mnistattn.leaderboard.collect import collect
    from mnistattn.reproduction.layers import layers
    from mnistattn.reproduction.report import report, rows_of
    from mnistattn.reproduction.tables import DATA, TABLES

    folders = [request.out] * any(request.out.rglob("result.json")) + [*map(Path, results)]
    submissions, problems = collect(folders)
    for line in problems:
        say(f"left out: {line}")
    if not submissions:
        raise InputError("there are no results yet: leave --report-only out, or give --results.")
    rows = rows_of(submissions)
    asked = request.shown()
    names = {table.name for table in asked}
    more = [t for t in TABLES.values() if t.name not in names and any(rows[n] for n in t.data)]
    tables = [*asked, *more]
    text, files = report(tables, submissions), dict[str, bytes]()
    try:
        from mnistattn.reproduction.curves import curves

        for name in dict.fromkeys(n for table in tables for n in table.data):
            drawn = curves(f"{name}, {DATA[name].words}", rows[name])
            if drawn:
                files[f"curves-{name}.png"] = drawn
                text += f"\n![Learning curves on {name}](curves-{name}.png)\n"
    except ImportError:
        say("no learning curves: pip install 'mnistattn[board]'")
    for name in dict.fromkeys(n for table in tables if table.layers for n in table.data):
        try:
            made = layers(name, rows[name], device)
        except MnistattnError as error:  # of a damaged run, say: the tables do not need it
            say(f"no picture of layers: {error}")
            continue
        files |= made
        text += "".join(f"\n![Maps of all layers on {name}]({file})\n" for file in made)
    files["reproduction.md"] = text.encode()
    try:
        request.out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            partial = request.out / f".{name}.partial"
            partial.write_bytes(content)
            partial.replace(request.out / name)
    except OSError as error:
        raise MnistattnError(f"cannot write {request.out}: {error.strerror or error}.") from error
    click.echo(report(asked, submissions))
    say(f"written: {', '.join(str(request.out / name) for name in files)}")
