"""Where the processes of a restarted run meet: a part of the launcher's store in which nobody has written before.

torchrun keeps one store through all its restarts, and torch asks for no part of its own in it. A process that was
started again may thus read where one that is dead used to listen, and wait there. So the first process names a place
that no earlier meeting had, and tells it to those only who ask with a word that no earlier process had.
"""

from __future__ import annotations

import os
import secrets
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

from adapters import processes
from adapters.errors import RankError, message

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_LOOK = 0.02  # seconds between two looks of the first process at who has come
_PLACE = "adapters/meeting"


def lost(found: str) -> str:
    """What is said where a process does not find the others.

    Args:
        found: what came instead of them.
    """
    return message(
        "the processes of this run do not find each other",
        where=f"rank {processes.number()}",
        expected=f"{processes.count()} processes",
        found=found,
        remedy="Start all of them by one command: accelerate launch, torchrun; or unset WORLD_SIZE for a run of one.",
    )


def place(patience: timedelta) -> Store:
    """The part of the launcher's store that this meeting has to itself; all processes call this, and then meet in it.

    Args:
        patience: how long a process waits for the others.

    Raises:
        RankError: in the first process, which names those that did not come.
        RuntimeError: torch's own, in the others, where the first did not come; in all, where the store does not answer.
    """
    import torch.distributed as dist  # whose stores are public, and not exported for type checkers

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    stores: Any = dist
    store = stores.TCPStore(host, port, world_size=processes.count(), is_master=False, timeout=patience)
    name = _called(store, patience) if processes.number() == 0 else _asked(store, patience)
    return cast("Store", stores.PrefixStore(f"{_PLACE}/{name}", store))


def _asked(store: Store, patience: timedelta) -> str:
    """What the first process calls the place."""
    word = secrets.token_hex(8)
    store.set(_asks(processes.number()), word)
    store.wait([f"{_PLACE}/to/{word}"], patience)
    name = store.get(f"{_PLACE}/to/{word}").decode()
    store.set(_came(name, processes.number()), "")
    return name


def _called(store: Store, patience: timedelta) -> str:
    """Name the place, and tell it to all; a word of a process that is dead is answered too, and nobody comes of it."""
    name, until = secrets.token_hex(8), time.monotonic() + patience.total_seconds()
    answered: dict[int, bytes] = {}
    missing = set(range(1, processes.count()))
    while missing:
        for number in sorted(missing):
            if store.check([_came(name, number)]):
                missing.discard(number)
            elif store.check([_asks(number)]) and (word := store.get(_asks(number))) != answered.get(number):
                store.set(f"{_PLACE}/to/{word.decode()}", name)
                answered[number] = word
        if missing and time.monotonic() > until:
            raise RankError(lost(f"no sign of rank {', '.join(map(str, sorted(missing)))} after {patience}"))
        time.sleep(_LOOK if missing else 0)
    return name


def _asks(number: int) -> str:
    return f"{_PLACE}/from/{number}"


def _came(name: str, number: int) -> str:
    return f"{_PLACE}/{name}/came/{number}"
