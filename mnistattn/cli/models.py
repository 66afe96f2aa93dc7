"""`mnistattn models`: what there is."""

import click

from mnistattn.models.registry import MODELS


@click.command("models", epilog="Example: mnistattn models")
def command() -> None:
    """List the models: attention, where it stands in the network, parameters, paper."""
    from mnistattn.models.network import build

    click.echo(f"{'name':8}{'paper':8}{'attends':10}{'parameters':>11}  what it is")
    for name, row in MODELS.items():
        n = sum(p.numel() for p in build(name, 100, 10, 5).parameters())
        click.echo(f"{name:8}{row.paper_name:8}{row.placement:10}{n:>11,}  {row.summary}"
                   + ("" if row.paper == "-" else f" ({row.paper})"))  # fmt: skip
