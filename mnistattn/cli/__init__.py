"""The command line: parses, calls one function of the library, prints. One file a subcommand.

Every error is one sentence on standard error and an exit code: 2 for a request that cannot be
right, 1 for a failure while running, 130 after Ctrl-C.
"""

import os
import sys
import time
import warnings
from importlib import import_module

import click

from mnistattn.errors import MnistattnError, MnistattnWarning
from mnistattn.process import sleep_between_parallel_regions

LAST_WORD = 2.0  # seconds
COMMANDS = (
    "generate", "info", "show", "verify", "export", "evaluate", "sweep", "reproduce", "layers",
    "models", "new-attention", "check", "score", "retest", "compare", "leaderboard",
)  # fmt: skip


class _Lazy(click.Group):
    """Imports a subcommand's file only when it is called, so that --help answers at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return import_module(f"mnistattn.cli.{name.replace('-', '_')}").command

    def resolve_command(self, ctx, args):
        name = args[0] if args else ""
        if name not in COMMANDS:
            from mnistattn.generators.variants import closest

            ctx.fail(f"unknown command '{name}': it is one of {', '.join(COMMANDS)}."
                     f"{closest(name, COMMANDS)}")  # fmt: skip
        return super().resolve_command(ctx, args)


@click.group(cls=_Lazy, epilog="Example: mnistattn generate --variant mbg --out data/mbg",
             context_settings={"help_option_names": ["-h", "--help"]})  # fmt: skip
@click.version_option(package_name="mnistattn")
def cli() -> None:
    """Controlled benchmarks for visual attention: make the data, train a model, score where it
    looks."""


def main() -> None:
    """The console script."""
    sleep_between_parallel_regions()
    _one_line_a_warning()
    try:
        code = cli.main(sys.argv[1:] or ["--help"], standalone_mode=False)
        sys.stdout.flush()
    except MnistattnError as error:
        code = _fail(str(error), error.exit_code)
    except click.exceptions.Abort:
        code = _fail("interrupted.", 130)
    except click.ClickException as error:
        code = _fail(error.format_message(), 2)
    except KeyboardInterrupt:
        code = _fail("interrupted.", 130)
    except (BrokenPipeError, SystemExit):  # the reader, `head` say, has gone (click exits then)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (OSError, MemoryError, FloatingPointError) as error:
        code = _fail(str(error) or "out of memory.", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _one_line_a_warning() -> None:
    """Our own warnings without the place in the code; all others as Python shows them."""
    usual = warnings.showwarning

    def show(message, category, *rest, **named) -> None:
        if issubclass(category, MnistattnWarning):
            say(f"mnistattn: {message}")
        else:
            usual(message, category, *rest, **named)

    warnings.showwarning = show


def _fail(message: str, code: int) -> int:
    if os.environ.get("RANK", "0") != "0":
        # One of torchrun's processes: if the first has the same to say, torchrun ends all others.
        time.sleep(LAST_WORD)
    print(f"mnistattn: {' '.join(message.split())}", file=sys.stderr)
    return code


def say(line: str) -> None:
    """A line for the user that is no result: on standard error, so results can be piped."""
    print(line, file=sys.stderr)
