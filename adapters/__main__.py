"""`python -m adapters` is the command `adapters`."""

from adapters.cli import main

main()
