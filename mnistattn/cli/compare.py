"""`mnistattn compare`: is one model better than another?"""

from pathlib import Path

import click

from mnistattn.errors import InputError


@click.command("compare", epilog="Example: mnistattn compare ctx noctx --variant mref")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--results", multiple=True, metavar="DIR",
              help="Where results are looked for by name.  [default: those that come with the "
              "package, and runs]")  # fmt: skip
@click.option("--variant", default=None, help="Only on this data set, as mbg.")
def command(a: str, b: str, results: tuple[str, ...], variant: str | None) -> None:
    """Compare two models over the same test images, in total and per scale: McNemar's test and a
    paired bootstrap, or over several seeds, and a sentence that says what it means.

    A and B are run directories, result files, or names on the board (then all their seeds count).
    """
    from mnistattn.leaderboard.build import by_name, title
    from mnistattn.leaderboard.collect import read_submission
    from mnistattn.leaderboard.compare import compare, table

    if Path(a).exists() or Path(b).exists():
        click.echo(table(compare([read_submission(a)], [read_submission(b)])))
        return
    from mnistattn.cli.leaderboard import gather
    from mnistattn.generators.variants import VARIANTS, choose, closest

    if variant is not None:
        choose("variant", variant, VARIANTS)
    submissions, _ = gather(results)
    groups: dict[str, list] = {}
    for s in submissions:
        if variant in (None, s.result["dataset"]["variant"]):
            groups.setdefault(s.group, []).append(s)
    names = {s.name for members in groups.values() for s in members}
    for name in (a, b):
        if name not in names:
            known = f"there are {', '.join(sorted(names))}" if names else "there are no results"
            raise InputError(f"no result and no model on the board is '{name}': {known}."
                             f"{closest(name, names)}")  # fmt: skip
    shown = 0
    for members in groups.values():
        entries = by_name(members)
        if a in entries and b in entries:
            others = [e for name, e in entries.items() if name not in (a, b)]
            seeds = f"{len(entries[a])} and {len(entries[b])} seeds"
            click.echo(("\n" if shown else "") + f"{title(members[0].result)} ({seeds})\n")
            click.echo(table(compare(entries[a], entries[b], others)))
            shown += 1
    if not shown:
        raise InputError(f"'{a}' and '{b}' have no data set and recipe in common: no fair test.")
