"""The processes of one run: which of them this is, and plain data told from one to the others.

What crosses from one process to another is JSON or tensors, never an object: a process takes nothing from another that
could run as code. Every function here is called by all processes or by none, and does nothing much where there is one.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from adapters import attendance, errors, meeting, processes
from adapters.attendance import joined as joined
from adapters.errors import AdaptersError, RankError, message
from adapters.processes import count

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

T = TypeVar("T")
_WAITED: list[None] = []  # for the first process so often; the same number in all
PATIENCE = 1800  # seconds; transformers' ddp_timeout


def rank() -> int:
    """The number of this process, from 0; 0 without a launcher."""
    return processes.number()


def first() -> bool:
    """Whether this is the process that writes, logs and speaks for the run."""
    return rank() == 0


def join(seconds: float | None = None) -> None:
    """Enter the group that the launcher prepared: NCCL where there are GPUs, else gloo; nothing in a run of one.

    Args:
        seconds: how long a process waits for the others in any exchange before it gives up; None for `PATIENCE`.

    Raises:
        RankError: the processes do not find each other.
    """
    if count() == 1 or joined():
        return
    from accelerate import PartialState
    from torch import cuda

    cpu = processes.yes(processes.CPU) or not cuda.is_available()
    if cpu:
        os.environ[processes.CPU] = "true"  # transformers asks again, and would take each process for a run
    found = ""
    patience = timedelta(seconds=seconds if isinstance(seconds, int | float) else PATIENCE)
    try:
        own = {"store": meeting.place(patience), "rank": rank(), "world_size": count()} if processes.outlived() else {}
        with processes.saying(processes.ZERO, None):  # the run asks for DeepSpeed, once there is a model
            PartialState(cpu=cpu, timeout=patience, **own)
    except RankError:
        raise
    except (ValueError, RuntimeError) as fault:  # torch.distributed's own errors are RuntimeErrors
        found = " ".join(str(fault).split())[:300]
    if found or not joined():
        raise RankError(meeting.lost(found or "no group of processes"))
    atexit.register(_leave)
    if first() and processes.forgetful():
        logger.warning(
            "a node that is lost and comes back may wait in vain: torch 2.13's torchrun says only once where all meet; "
            "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of every launcher"
        )


def _leave() -> None:
    """Leave the group of gloo before the process ends.

    Its threads, left to themselves, may outlive the interpreter and then end a finished process by abort (-6), which a
    launcher takes for a death and starts all again.
    """
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_backend() == dist.Backend.GLOO:
        dist.destroy_process_group()


def wait() -> None:
    """Until all processes are here."""
    gathered(None)


def gathered(value: Any) -> list[Any]:
    """What each process says, by its number.

    Args:
        value: plain data, the same kind in all; tuples come back as lists.

    Raises:
        RankError: another process failed, is gone, or did not come here in time.
    """
    return attendance.met(lambda: _gathered(value)) if joined() else [value]


def _gathered(value: Any) -> list[Any]:
    import torch
    import torch.distributed as dist

    said = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(attendance.device())
    lengths = [torch.zeros(1, dtype=torch.int64, device=said.device) for _ in range(count())]
    dist.all_gather(lengths, torch.tensor([len(said)], device=said.device))
    most = max(int(length) for length in lengths)
    padded = torch.zeros(most, dtype=torch.uint8, device=said.device)
    padded[: len(said)] = said
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return [json.loads(_text(part, int(length))) for part, length in zip(parts, lengths, strict=True)]


def told(value: Any) -> Any:
    """What the first process says, in all of them; plain data."""
    return gathered(value if first() else None)[0]


def by_first(act: Callable[[], T]) -> T | None:
    """Let the first process do what only one may do, while the others wait; what stops it there stops all.

    The others wait as long as it takes, beyond the time that the group gives any exchange: a download may be long.

    Returns:
        What `act` gave in the first process, None in the others.

    Raises:
        AdaptersError: in the first process what `act` raised, in the others the same fault by its class and words.
        RankError: in the others, where it was no error of this library.
    """
    if not joined():
        return act()
    found: T | None = None
    fault: BaseException | None = None
    if first():
        try:
            found = act()
        except BaseException as raised:
            fault = raised
    _until_first_is_here()
    said = told([type(fault).__name__, str(fault)] if fault is not None else None)
    if isinstance(fault, AdaptersError):
        fault.agreed = True
    if fault is not None:
        raise fault
    if said is not None:
        end_with(*said)
    return found


def _until_first_is_here() -> None:
    """Wait for the first process without an exchange, which would be given up after a while though it lives."""
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store()
    _WAITED.append(None)
    key = f"adapters/first/{len(_WAITED)}"
    if first():
        store.set(key, "here")
        return
    attendance.until(lambda: bool(store.check([key])), 0)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process holds a part, put together; any other as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def divided(tensor: Tensor) -> bool:
    """Whether each process holds a part of this tensor."""
    return getattr(tensor, "full_tensor", None) is not None


def part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, which may be nothing; any other tensor as it is."""
    local = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


def laid(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, known to every process, in the parts of another; as it is where that is no divided one."""
    if not divided(like) or divided(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    shape: Any = like
    placed = tensor.to(part(like).device)
    return distribute_tensor(placed, shape.device_mesh, shape.placements, src_data_rank=None)  # each takes its own


def end_with(name: str, text: str, number: int | None = None) -> NoReturn:
    """Raise here what another process failed with.

    Args:
        name: of the fault's class.
        text: its words.
        number: of the process; None for the first one, in what it does for all.

    Raises:
        AdaptersError: of that class, where it is one of this library's.
        RankError: where it is not.
    """
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, AdaptersError):
        fault: AdaptersError = kind(f"process {number}: {text}" if number else text)
    else:
        who = "the first process" if number is None else "a process"
        fault = RankError(message(f"{who} of the run failed", where=f"rank {number or 0}", found=f"{name}: {text}"))
    fault.agreed = True
    raise fault


def _text(part: Tensor, length: int) -> str:
    return bytes(part[:length].cpu().tolist()).decode()
