"""Which mnistattn a process runs: all that work on one thing together must run the same."""

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path


@cache
def code_version() -> dict[str, str]:
    """Which mnistattn this is: its version, and 12 digits of SHA-256 over the generators' source.

    What is drawn depends on nothing else of the code."""
    folder, digest = Path(__file__).parents[1] / "generators", hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return {"mnistattn": version("mnistattn"), "generators": digest.hexdigest()[:12]}
