"""What the processes of a run agree on in every step: its loss, its gradients, and whether anything ends the run.

A pass through the model holds no exchange: each process takes its own, in as many parts as its memory asks for, and a
fault in one leaves no other waiting. When all passes of a step are done, one small message says how each process fared,
and only then are the gradients averaged, through accelerate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from adapters import exchange, ranks, throughput
from adapters.errors import NumbersError
from adapters.processes import count

BUCKET = 64 << 20  # bytes of gradients that are sent at once


@final
class Accord:
    """One optimizer step of several processes.

    Args:
        accelerator: of the run.
        parameters: what trains, the same in every process.
        divided: an engine averages the gradients itself.
        apart: no process waits in vain for another within a pass (DeepSpeed's send whatever becomes of theirs).
    """

    def __init__(self, accelerator: Any, parameters: Mapping[str, Tensor], *, divided: bool, apart: bool) -> None:
        self._accelerator, self._apart = accelerator, apart
        self._parameters = list(parameters.values())
        self._divided = divided
        self._loss = 0.0
        self._fault: Exception | None = None  # what this process failed with in the step at hand

    def reached(self, signal: int, check: Callable[[], None]) -> tuple[float, int]:
        """The end of a step: its loss over all processes, and the signal that any of them was sent; 0 for none.

        From here on the gradients are those of the whole step.

        Args:
            signal: that this process was sent.
            check: looks at the gradients, of which each process of a divided model has a part: all do so together.

        Raises:
            AdaptersError: a process failed; all of them stop, with its fault.
        """
        processes, rank = count(), ranks.rank()
        tally = torch.zeros(1 + 2 * processes + len(self._parameters), dtype=torch.float64)
        tally[0], self._loss = self._loss, 0.0
        tally[1 + rank] = signal
        tally[1 + processes + rank] = float(self._fault is not None)
        for place, parameter in enumerate(self._parameters, 1 + 2 * processes):
            tally[place] = float(parameter.grad is not None)
        summed: list[float] = self._summed(tally).tolist()
        if any(summed[1 + processes : 1 + 2 * processes]):
            fault, self._fault = self._fault, None
            exchange.stop_all(fault)
        if not self._divided:
            self._average([used > 0 for used in summed[1 + 2 * processes :]])
        else:
            check()
        return summed[0] / processes, int(max(summed[1 : 1 + processes]))

    def batches(
        self,
        read: Iterable[Any],
        items: Callable[[Any], int],
        blank: Callable[[int], bool],
        speed: throughput.Throughput,
    ) -> tuple[list[Any], list[bool], int | None]:
        """The micro-batches of a step that are this process' own.

        Args:
            read: the batches, as they come.
            items: how many loss items labels have.
            blank: whether the batch of that number counts for nothing.
            speed: of the run, to which the tokens of all processes are added.

        Returns:
            The batches, which of them are blank, and the loss items of all processes; None where there are no labels.

        Raises:
            AdaptersError: a process could not read them, or had another number of them.
        """
        found: list[Any] = []
        fault: Exception | None = None
        try:
            found.extend(read)
        except Exception as raised:
            fault = raised
        blanks = [blank(number) for number in range(len(found))]
        real = [batch for batch, empty in zip(found, blanks, strict=True) if not empty]
        mine = sum(items(batch["labels"]) for batch in real if "labels" in batch)
        own = throughput.taken(real)
        tally = [mine, len(found), fault is not None, own.tokens, own.places]
        summed = self._summed(torch.tensor(tally, dtype=torch.float64)).tolist()
        if summed[2] or summed[1] != len(found) * count():
            exchange.stop_all(fault)
            exchange.alike({"batches": len(found)}, "the step at hand")
        throughput.taken(found)
        speed.add(throughput.Tally(int(summed[3]), int(summed[4])))
        return found, blanks, max(1, int(summed[0])) if found and "labels" in found[0] else None

    def taken(self, passed: Callable[[], float], check: Callable[[], None], *, blank: bool, last: bool) -> None:
        """One micro-batch of this process. What it fails with it keeps until all have come to the end of the step.

        Where the others wait for it within the pass, what breaks that off ends it at once, and they are told; a number
        that is not finite is found afterwards, and kept.

        Args:
            passed: takes the micro-batch through the model and back; gives its share in the loss of the step.
            check: looks at the gradients of the whole step.
            blank: there is no row of this process in it.
            last: it is the last one of the step.
        """
        if self._fault is not None:
            return
        try:
            if not blank:
                self._loss += passed()
            if last and not self._divided:
                check()
        except Exception as fault:
            if not self._apart and not isinstance(fault, NumbersError):
                raise
            self._fault = fault

    def _summed(self, tally: Tensor) -> Tensor:
        device = self._accelerator.device
        tally = tally.to(device) if device.type != "mps" else tally.float().to(device)
        total: Tensor = self._accelerator.reduce(tally, reduction="sum")
        return total

    def _average(self, used: Sequence[bool]) -> None:
        """Every gradient that any process has becomes the mean over all; what no loss reached stays without one."""
        bucket: list[Tensor] = []
        for parameter, reached in zip(self._parameters, used, strict=True):
            if not reached:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if bucket and (not _alike(bucket[0], parameter.grad) or sum(map(_size, bucket)) >= BUCKET):
                self._send(bucket)
                bucket = []
            bucket.append(parameter.grad)
        if bucket:
            self._send(bucket)

    def _send(self, gradients: Sequence[Tensor]) -> None:
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        flat = self._accelerator.reduce(flat, reduction="mean")
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
