"""The processes of one run: which of them this is, and plain data told from one to the others.

What crosses from one process to another is JSON or tensors, never an object: a process takes nothing from another that
could run as code. Every function here is called by all processes or by none, and does nothing much where there is one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from adapters import errors
from adapters.errors import AdaptersError, RankError, message
from adapters.processes import count

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
RANK = "RANK"  # set by accelerate and torchrun


def rank() -> int:
    """The number of this process, from 0; 0 without a launcher."""
    said = os.environ.get(RANK, "0")
    return int(said) if said.isdigit() else 0


def first() -> bool:
    """Whether this is the process that writes, logs and speaks for the run."""
    return rank() == 0


def joined() -> bool:
    """Whether this process has entered the group of the run's processes."""
    import torch.distributed as dist

    return count() > 1 and dist.is_available() and dist.is_initialized()


def join() -> None:
    """Enter the group that the launcher prepared: NCCL where there are GPUs, else gloo; nothing in a run of one."""
    if count() > 1 and not joined():
        from accelerate import PartialState
        from torch import cuda

        cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") or not cuda.is_available()
        PartialState(cpu=cpu)


def wait() -> None:
    """Until all processes are here."""
    gathered(None)


def gathered(value: Any) -> list[Any]:
    """What each process says, by its number.

    Args:
        value: plain data, the same kind in all; tuples come back as lists.
    """
    if not joined():
        return [value]
    import torch
    import torch.distributed as dist

    said = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(_device())
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
    said = told([type(fault).__name__, str(fault)] if fault is not None else None)
    if fault is not None:
        raise fault
    if said is not None:
        raise _same(*said)
    return found


def together(fault: Exception | None) -> None:
    """Let what stopped one process stop all; each says how it fared, None for well.

    Raises:
        Exception: in a process that failed its own fault; in the others the first one's, by its class and words where
            it is an error of this library, and with the process that it was.
        RankError: in the others, where it was none.
    """
    said = gathered([type(fault).__name__, str(fault)] if fault is not None else None)
    if fault is not None:
        raise fault
    for number, one in enumerate(said):
        if one is not None:
            raise _same(*one, number)


def in_all(act: Callable[[], T]) -> T:
    """Let every process do the same; what stops one of them stops all.

    Raises:
        Exception: as `together` has it.
    """
    found: T | None = None
    fault: Exception | None = None
    try:
        found = act()
    except Exception as raised:
        if not joined():
            raise
        fault = raised
    together(fault)
    return found  # type: ignore[return-value]


def alike(facts: Mapping[str, Any], where: str, remedy: str = "") -> None:
    """Whether every process says the same.

    Args:
        facts: plain data by name.
        where: for the message.
        remedy: likewise.

    Raises:
        RequestError: naming what differs, and the processes that differ from the first.
    """
    said = gathered(dict(facts))
    names = sorted({name for one in said for name in one})
    faults = []
    for name in names:
        others = [number for number, one in enumerate(said) if one.get(name) != said[0].get(name)]
        if others:
            numbers = ", ".join(map(str, others))
            found = f"{_short(said[others[0]].get(name))} in process {numbers}"
            faults.append(
                message(
                    f"the processes of one run differ: {name}",
                    where=where,
                    expected=f"{_short(said[0].get(name))}, as in process 0",
                    found=found,
                    remedy=remedy,
                )
            )
    if faults:
        raise errors.RequestError(*faults)


def told_tensors(tensors: Sequence[Tensor]) -> None:
    """Give tensors, of the same shapes in all processes, the values that they have in the first."""
    if not joined():
        return
    import torch
    import torch.distributed as dist

    with torch.no_grad():
        for tensor in tensors:
            sent = tensor.detach().to(_device()).contiguous()
            dist.broadcast(sent, src=0)
            tensor.copy_(sent)


def arrays(found: Any) -> list[Any]:
    """Arrays with the rows first, as each process has them, by its number; of all but the rows the same rank.

    Where they are not equally wide, the narrower ones are filled up with -100.
    """
    import numpy as np

    if not joined():
        return [found]
    import torch
    import torch.distributed as dist

    shapes = gathered([list(found.shape), found.dtype.str])
    widest = [max(shape[axis] for shape, _ in shapes) for axis in range(found.ndim)]
    padded = np.full(widest, -100 if found.dtype.kind in "if" else 0, dtype=found.dtype)
    padded[tuple(slice(0, length) for length in found.shape)] = found
    sent = torch.frombuffer(bytearray(np.ascontiguousarray(padded).tobytes()) or bytearray(1), dtype=torch.uint8)
    sent = sent.to(_device())
    parts = [torch.empty_like(sent) for _ in shapes]
    dist.all_gather(parts, sent)
    whole = []
    for (shape, kind), part in zip(shapes, parts, strict=True):
        values = np.frombuffer(part.cpu().numpy().tobytes()[: padded.nbytes], dtype=np.dtype(kind)).reshape(widest)
        whole.append(values[: shape[0]])
    return whole


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


def _same(name: str, text: str, number: int = 0) -> AdaptersError:
    """Another process's fault, as this one raises it."""
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, AdaptersError):
        return kind(f"process {number}: {text}" if number else text)
    return RankError(message("a process of the run failed", where=f"rank {number}", found=f"{name}: {text}"))


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) > 60 else text


def _device() -> Any:
    """Where tensors must lie to cross: NCCL takes them from a GPU."""
    import torch
    import torch.distributed as dist

    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")


def _text(part: Tensor, length: int) -> str:
    return bytes(part[:length].cpu().tolist()).decode()
