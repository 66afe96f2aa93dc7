"""`python -m mnistattn` is the command line."""

from mnistattn.cli import main

main()
