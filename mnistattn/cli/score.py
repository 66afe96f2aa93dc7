"""`mnistattn score`: do a result's numbers follow from its samples?"""

import json

import click

from mnistattn.errors import InputError, MnistattnError


@click.command("score", epilog="Example: mnistattn score runs/mbg-ctx-fast-seed0")
@click.argument("results", metavar="RESULT...", nargs=-1)
@click.option("--schema", is_flag=True, help="Print the JSON Schema of a result instead.")
def command(results: tuple[str, ...], schema: bool) -> None:
    """Compute every score of a result (a result.json or a run directory) again from its per-sample
    file, and say which differ."""
    from mnistattn.evaluation import result as format

    if schema:
        click.echo(json.dumps(format.schema(), indent=1))
        return
    if not results:
        raise InputError("no result was named: give a result.json or a run directory.")
    from mnistattn.leaderboard.collect import faults

    problems = []
    for path in results:
        file, raw = format.read_result(path)
        samples = format.read_samples(file, raw)
        wrong = faults(raw, samples)
        for line in wrong:
            click.echo(f"{file}: {line}")
        if wrong:
            problems.append(f"{file}: {len(wrong)} numbers do not follow from the samples.")
        else:
            click.echo(f"{file}: all scores follow from its {len(samples['correct']):,} samples.")
    if problems:
        raise MnistattnError(" ".join(problems))
