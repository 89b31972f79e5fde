"""What the processes of a run exchange beside plain data: faults that stop all of them, facts held against each other,
tensors and arrays.

As in `ranks`, every function is called by all processes or by none, and nothing that crosses could run as code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from adapters.attendance import device
from adapters.errors import AdaptersError, RequestError, message
from adapters.ranks import end_with, gathered, joined

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def stop_all(fault: Exception | None) -> None:
    """Let what stopped one process stop all; each says how it fared, None for well.

    Raises:
        Exception: in a process that failed its own fault; in the others the first one's, by its class and words where
            it is an error of this library, and with the process that it was.
        RankError: in the others, where it was none.
    """
    mine = [type(fault).__name__, str(fault)] if fault is not None else None
    said = gathered(mine)
    if isinstance(fault, AdaptersError):
        fault.agreed = said[0] in (None, mine)  # the first says the same, or what it is told here
    if fault is not None:
        raise fault
    for number, one in enumerate(said):
        if one is not None:
            name, text = one
            end_with(name, text, number)


def in_all(act: Callable[[], T]) -> T:
    """Let every process do the same; what stops one of them stops all.

    Raises:
        Exception: as `stop_all` has it.
    """
    with agreeing():
        found = act()
    return found


@contextlib.contextmanager
def agreeing() -> Iterator[None]:
    """Within it every process does the same by itself; what stops one of them stops all, as `stop_all` has it."""
    fault: Exception | None = None
    try:
        yield
    except Exception as raised:
        if not joined():
            raise
        fault = raised
    stop_all(fault)


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
            found = f"{short(said[others[0]].get(name))} in process {numbers}"
            faults.append(
                message(
                    f"the processes of one run differ: {name}",
                    where=where,
                    expected=f"{short(said[0].get(name))}, as in process 0",
                    found=found,
                    remedy=remedy,
                )
            )
    if faults:
        fault = RequestError(*faults)
        fault.agreed = True
        raise fault


def told_tensors(tensors: Sequence[Tensor]) -> None:
    """Give tensors, of the same shapes in all processes, the values that they have in the first."""
    if not joined():
        return
    import torch
    import torch.distributed as dist

    with torch.no_grad():
        for tensor in tensors:
            sent = tensor.detach().to(device()).contiguous()
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
    sent = sent.to(device())
    parts = [torch.empty_like(sent) for _ in shapes]
    dist.all_gather(parts, sent)
    whole = []
    for (shape, kind), part in zip(shapes, parts, strict=True):
        values = np.frombuffer(part.cpu().numpy().tobytes()[: padded.nbytes], dtype=np.dtype(kind)).reshape(widest)
        whole.append(values[: shape[0]])
    return whole


def short(value: Any) -> str:
    """A value as a message shows it: a digest by its beginning."""
    text = str(value)
    return f"{text[:12]}..." if len(text) > 60 else text
