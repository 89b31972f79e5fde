"""The processes of a run at their common work: one that fails stops all, and one that is gone or late is named."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from adapters import presence, processes
from adapters.errors import AdaptersError, RankError, message

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_SELF: list[presence.Presence] = []  # the last is this process in the work that goes on


def joined() -> bool:
    """Whether this process has entered the group of the run's processes."""
    if processes.count() == 1:
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def device() -> torch.device:
    """Where tensors must lie to cross from process to process: NCCL takes them from a GPU."""
    import torch
    import torch.distributed as dist

    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")


@contextlib.contextmanager
def attending() -> Iterator[None]:
    """Common work, which all processes begin and end together.

    Raises:
        RankError: in the others, with the words of the one that failed, or with what was last heard of it.
    """
    if not joined():
        yield
        return
    outermost = not _SELF or not _SELF[-1].inside
    if outermost:
        _begin()
    own = _SELF[-1]
    own.enter()
    left: BaseException | None = None
    try:
        yield
        if outermost:
            _meet()  # none is gone while another is at work still
    except RuntimeError as fault:
        left = fault
        if not presence.is_loss(fault):
            raise
        left = RankError(own.explained(fault))
        raise left from fault
    except BaseException as fault:
        left = fault
        raise
    finally:
        agreed = isinstance(left, AdaptersError) and left.agreed  # all end with it by themselves
        own.leave(None if agreed else left)


def at(place: str) -> None:
    """Tell the others where this process is; nothing outside `attending`.

    Args:
        place: in words, "step 3".

    Raises:
        RankError: another process has failed.
    """
    if _SELF and _SELF[-1].inside:
        _SELF[-1].at(place)


def met(act: Callable[[], T]) -> T:
    """What a collective gives.

    Args:
        act: the collective, in all processes the same.

    Raises:
        RankError: another process failed, is gone, or did not come in time.
    """
    if not _SELF:
        _begin()
    own = _SELF[-1]
    try:
        own.arrive()
        return act()
    except RuntimeError as fault:
        if not presence.is_loss(fault):
            raise
        raise RankError(own.explained(fault)) from fault


def until(here: Callable[[], bool], number: int) -> None:
    """Wait for one process, however long it takes, while it lives.

    Args:
        here: whether it is there.
        number: the process.

    Raises:
        RankError: it has failed, or has given no sign of life for as long as an exchange may take.
    """
    if not _SELF:
        _begin()
    own = _SELF[-1]
    try:
        while not here():
            own.expect(number, _patience())
            time.sleep(0.02)
    except RuntimeError as fault:
        if not presence.is_loss(fault):
            raise
        raise RankError(own.explained(fault)) from fault


def _patience() -> float:
    """Seconds that an exchange may take."""
    import torch
    import torch.distributed as dist

    group: Any = dist.group.WORLD
    device = torch.device("cuda" if "nccl" in dist.get_backend() else "cpu")
    seconds: float = group._get_backend(device).options._timeout.total_seconds()
    return seconds


def entered(act: Callable[[], object]) -> None:
    """Let this process enter the group.

    Args:
        act: enters it.

    Raises:
        RankError: not all of them came.
    """
    try:
        act()
    except RuntimeError as fault:
        if not presence.is_loss(fault):
            raise
        raise _absent(fault) from fault


def _begin() -> None:
    """Make this process known to the others, under a word that no earlier work of theirs had."""
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    while _SELF:
        _SELF.pop().close()

    def meet() -> None:
        word = torch.frombuffer(bytearray(secrets.token_bytes(8)), dtype=torch.uint8).to(device())
        dist.broadcast(word, src=0)
        text = bytes(word.cpu().tolist()).hex()
        host = None if processes.outlived() else 0
        own = presence.Presence(_get_default_store(), text, dist.get_rank(), dist.get_world_size(), host)
        dist.barrier()
        own.begin()
        _SELF.append(own)

    entered(meet)


def _meet() -> None:
    import torch.distributed as dist

    met(dist.barrier)


def _absent(fault: BaseException) -> RankError:
    return RankError(
        message(
            "the processes of the run did not all meet",
            where=f"rank {processes.number()}",
            expected=f"{processes.count()} processes",
            found=" ".join(str(fault).split())[:200],
            remedy=presence.REMEDY,
        )
    )
