"""`mnistattn new-attention`: a file to start from."""

import keyword
import re
from importlib.resources import files
from pathlib import Path

import click

from mnistattn.errors import InputError, MnistattnError


@click.command("new-attention", epilog="Example: mnistattn new-attention my_attention.py")
@click.argument("file", metavar="FILE.py")
def command(file: str) -> None:
    """Write a commented attention module that trains as it is, to make your own of."""
    path = Path(file)
    if path.suffix != ".py" or not path.stem.isidentifier() or keyword.iskeyword(path.stem):
        raise InputError(f"{file} cannot be imported: give a name as my_attention.py.")
    if path.exists():
        raise InputError(f"{file} exists: give another name.")
    name = "".join(part[:1].upper() + part[1:] for part in path.stem.split("_"))
    text = (files("mnistattn.models") / "template.py").read_text()
    text = text.replace("my_attention.py", path.name)
    text = re.sub(r"\bMyAttention\b", name, text)
    try:
        with open(path, "x") as handle:
            handle.write(text)
    except OSError as error:
        raise MnistattnError(f"cannot write {file}: {error.strerror or error}.") from error
    click.echo(f"{file}: class {name}. Next: mnistattn check --model {file}:{name}")
