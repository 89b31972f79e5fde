"""`adapters doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from adapters.console import Json, out


def doctor(
    online: Annotated[bool, typer.Option("--online", help="Ask the hub whether it answers, too.")] = False,
    as_json: Json = False,
) -> None:
    """What is wrong with this installation: versions, GPU, 4 bits, disk, caches, environment. Changes nothing."""
    from adapters.doctor import diagnose, exit_code, lines

    found = diagnose(online=online)
    if as_json:
        out({"ok": exit_code(found) == 0, "findings": [vars(finding) for finding in found]})
    else:
        print("\n".join(lines(found)))
    if exit_code(found):
        raise typer.Exit(exit_code(found))
