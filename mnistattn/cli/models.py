"""`mnistattn models`: what there is."""

import click

from mnistattn.models.registry import MODELS


@click.command("models", epilog="Example: mnistattn models --options")
@click.option("--options", is_flag=True, help="Also what '--set' can change, with its value.")
def command(options: bool) -> None:
    """List the models: attention, where it stands in the network, parameters, paper."""
    from mnistattn.models.network import build

    width = max(map(len, MODELS)) + 2
    click.echo(f"{'name':{width}}{'paper':10}{'attends':9}{'parameters':>11}  what it is")
    for name, row in MODELS.items():
        n = sum(p.numel() for p in build(name, 100, 10, 5).parameters())
        click.echo(f"{name:{width}}{row.paper_name:10}{row.placement:9}{n:>11,}  {row.summary}"
                   + ("" if row.paper == "-" else f" ({row.paper})"))  # fmt: skip
        if options and row.attention:
            values = ", ".join(f"{k}={_text(v)}" for k, v in row.defaults().items())
            click.echo(f"{'':{width}}{values}")


def _text(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
