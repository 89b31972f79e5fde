"""A comparison in a process of its own, so that two models leave this one's memory as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters import progress
from adapters.errors import AdaptersError, message


def answered(room: str, request: Mapping[str, Any], what: str, where: str) -> dict[str, Any]:
    """What a room's `main` prints as its last line when it reads the request, both JSON.

    Args:
        room: such as "fidelity".
        request: plain data.
        what: the comparison in a word, for the message.
        where: what is compared, for the message.

    Raises:
        AdaptersError: the process broke.
    """
    with progress.Job("comparing logits"):
        child = launched(room, json.dumps(request))
    if child.returncode != 0:
        raise AdaptersError(message(f"{what} broke", where=where, found=" ".join(child.stderr.split())[-500:]))
    found: dict[str, Any] = json.loads(child.stdout.strip().splitlines()[-1])
    return found


def launched(room: str, text: str) -> subprocess.CompletedProcess[str]:
    """A room's `main` given a text, in an interpreter of its own.

    Args:
        room: such as "fidelity".
        text: what it is given.
    """
    root = str(Path(__file__).resolve().parents[1])
    return subprocess.run(
        [sys.executable, "-c", f"import sys, adapters.{room} as room; room.main(sys.stdin.read())"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
    )
