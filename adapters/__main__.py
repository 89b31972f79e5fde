"""`python -m adapters` is the command `adapters`; an interrupt is heard from the first import on."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line; see `cli.main`."""
    try:
        from adapters import interrupts

        interrupts.unwind()
        from adapters.cli import main as command
    except (KeyboardInterrupt, SystemExit) as fault:
        _interrupted(fault)
    try:
        command()
    except KeyboardInterrupt as fault:  # before the command began, or after it had ended
        _interrupted(fault)


def _interrupted(fault: KeyboardInterrupt | SystemExit) -> NoReturn:
    from adapters import interrupts

    interrupts.last()
    print("adapters: interrupted; nothing was written", file=sys.stderr)
    raise SystemExit(fault.code if isinstance(fault, SystemExit) else 130) from None


if __name__ == "__main__":
    main()
