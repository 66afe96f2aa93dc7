"""`mnistattn leaderboard`: all results that may be compared, ranked."""

from collections.abc import Sequence
from pathlib import Path

import click

from mnistattn.cli import say
from mnistattn.errors import InputError, MnistattnError


@click.command("leaderboard", epilog="Example: mnistattn leaderboard --html board.html")
@click.argument("results", metavar="[DIR]...", nargs=-1)
@click.option("--sort", default="accuracy", show_default=True, metavar="COLUMN",
              help="accuracy, correctness, parameters, flops, train-cost, inference-cost, name."
)  # fmt: skip
@click.option("--variant", default=None, help="Only this data set, as mbg.")
@click.option("--format", "format", default="text", show_default=True,
              metavar="text|markdown|csv|json", help="Of the table.")  # fmt: skip
@click.option("--out", default=None, metavar="FILE", help="Write the table there, not here.")
@click.option("--html", default=None, metavar="FILE", help="Also write one self-contained page.")
@click.option("--check", is_flag=True,
              help="Hold the results against the rules of admission to a public board; exit code 1 "
              "if one may not stand there.")  # fmt: skip
@click.option(
    "--photos", is_flag=True, help="With --check and --add: photos of one's own are fine."
)
@click.option("--add", "runs", multiple=True, metavar="RUN",
              help="First copy this run's result into DIR (the board), if it may stand there."
)  # fmt: skip
def command(results, sort, variant, format, out, html, check, photos, runs) -> None:
    """Rank all results under DIR (default: those that come with the package, and runs).

    Only what is comparable is ranked together: same data set, by digest, and same recipe. An entry
    is a model over its seeds. Models that are not significantly apart share a rank.
    """
    from mnistattn.generators.variants import VARIANTS, choose
    from mnistattn.leaderboard.build import build
    from mnistattn.leaderboard.text import FORMATS, SORTS, render

    choose("format", format, FORMATS)
    choose("column to sort by", sort, SORTS)
    if variant is not None:
        choose("variant", variant, VARIANTS)
    if runs:
        from mnistattn.leaderboard.collect import add

        if len(results) != 1:
            raise InputError("--add needs one DIR, the board that the run is added to.")
        for run in runs:
            say(f"added {add(run, results[0], photos)}")
    submissions, problems = gather(results, public=check and not photos)
    if not submissions and len(problems) == 1 and not check:
        raise InputError(problems[0])
    if variant is not None:
        submissions = [s for s in submissions if s.result["dataset"]["variant"] == variant]
    if check:
        for line in problems:
            click.echo(f"left out: {line}")
        if problems:
            raise MnistattnError(f"{len(problems)} of the results may not stand on the board.")
        click.echo(f"{len(submissions)} results, all of them admissible.")
        return
    for line in problems:
        say(f"left out: {line}")
    if not submissions:
        raise InputError("there are no results to show: 'mnistattn evaluate' makes some.")
    board = build(submissions, problems)
    if html:
        from mnistattn.leaderboard.page import page

        _write(html, page(board))
        say(f"{html}: the page")
    text = render(board, format, sort)
    if out:
        _write(out, text if text.endswith("\n") else text + "\n")
        say(f"{out}: the table")
    else:
        click.echo(text, nl=not text.endswith("\n"))


def gather(results: Sequence[str], public: bool = False):
    """All admissible results under the folders, or by default those that come with the package and
    those in runs; and a sentence for each that was left out."""
    from mnistattn.leaderboard.collect import collect, published

    folders = [Path(r) for r in results]
    if not folders:
        own = published()
        folders = [f for f in (own, Path("runs")) if f and f.exists()]
        if not folders:
            raise InputError("there are no results here: 'mnistattn evaluate' makes some in runs.")
    return collect(folders, public)


def _write(file: str, text: str) -> None:
    partial = Path(f"{file}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        raise MnistattnError(f"cannot write {file}: {error.strerror or error}.") from error
    finally:
        partial.unlink(missing_ok=True)
