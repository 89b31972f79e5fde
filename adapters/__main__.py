"""`python -m adapters` is the command `adapters`; an interrupt is heard from the first import on."""

from __future__ import annotations

import sys
from typing import NoReturn

from adapters import interrupts


def main() -> NoReturn:
    """Run the command line; see `cli.main`."""
    interrupts.unwind()
    try:
        from adapters.cli import main as command

        command()
    except KeyboardInterrupt:
        interrupts.last()
        print("adapters: interrupted; nothing was written", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
