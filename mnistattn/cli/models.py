"""`mnistattn models`: what there is."""

import click

from mnistattn.models.registry import find, known_models


@click.command("models", epilog="Example: mnistattn models --options")
@click.option("--options", is_flag=True, help="Also what '--set' can change, with its value.")
def command(options: bool) -> None:
    """List the models, the package's and those that are plugged in: where the attention stands,
    parameters and MFLOP of an image (100 pixels), origin, paper."""
    from mnistattn.errors import MnistattnError
    from mnistattn.models.cost import flops_per_image
    from mnistattn.models.network import build

    models = known_models()
    width = max(map(len, models)) + 2
    click.echo(
        f"{'name':{width}}{'attends':9}{'parameters':>11}{'MFLOP':>7}  {'origin':11}what it is"
    )
    for name, row in models.items():
        try:
            row = row or find(name)
            network = build(row, 100, 10, 5)
            n = sum(p.numel() for p in network.parameters())
            mflop = flops_per_image(network, 100) / 1e6
        except MnistattnError as error:
            click.echo(f"{name:{width}}cannot be used: {error}")
            continue
        place = row.placement if isinstance(row.placement, str) else _sizes(row.placement)
        click.echo(f"{name:{width}}{place:9}{n:>11,}{mflop:>7.0f}  {row.origin:9}  {row.summary}"
                   + ("" if row.paper == "-" else f" ({row.paper})"))  # fmt: skip
        if options and row.defaults():
            values = ", ".join(f"{k}={_text(v)}" for k, v in row.defaults().items())
            click.echo(f"{'':{width}}{values}")


def _sizes(placement: tuple[int, ...]) -> str:
    return ",".join(map(str, placement))


def _text(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
