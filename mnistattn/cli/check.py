"""`mnistattn check`: does an attention module keep the contract?"""

import click

from mnistattn.cli.options import parse_settings
from mnistattn.errors import MnistattnError

_WORDS = {"ok": "ok  ", "note": "note", "fail": "FAIL"}


@click.command("check", epilog="Example: mnistattn check --model my_attention.py:MyAttention")
@click.option("--model", required=True, metavar="NAME|FILE.py:CLASS|MODULE:CLASS",
              help="What to try.")  # fmt: skip
@click.option("--set", "options", multiple=True, metavar="NAME=VALUE",
              help="An option of the attention, as hidden=32.")  # fmt: skip
def command(model: str, options: tuple[str, ...]) -> None:
    """Try an attention module (or a whole model) point by point: shapes, ranges, gradients, leaks
    across the batch, saving, 224 pixels, half precision. Says what failed and how to mend it."""
    from mnistattn.models.check import check
    from mnistattn.models.registry import find

    row = find(model)
    verdicts = check(row, parse_settings(options))
    width = max(len(v.point) for v in verdicts)
    for v in verdicts:
        click.echo(f"{_WORDS[v.state]}  {v.point:{width}}  {v.text}".rstrip())
    failed = [v.point for v in verdicts if v.state == "fail"]
    if failed:
        raise MnistattnError(f"{row.name} fails {len(failed)} of {len(verdicts)} points: "
                             f"{', '.join(failed)}.")  # fmt: skip
    click.echo(f"{row.name} keeps the contract: mnistattn evaluate --model {model} --data DIR")
