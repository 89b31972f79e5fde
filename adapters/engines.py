"""What each of several processes holds, and what it sends: DDP with all whole, DeepSpeed's ZeRO, FSDP with all divided.

Sizes are those of tensors that were counted for one process (see `activations`); here stands where they lie once there
are N of them. Units are the ones that accelerate's FSDP2 makes: a block each, the embeddings, the norm and output layer
above the blocks, and what is left.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

from adapters.anatomy import block_lists
from adapters.errors import RequestError, message

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

DDP: Final = "ddp"
FSDP: Final = "fsdp"
ZERO: Final = "zero"  # stages 1 and 2; of the gradients all is counted, which stage 2 lets go as they are summed
ENGINES: Final = (DDP, ZERO, FSDP)
USUAL: Final = (DDP, FSDP)  # where no engine is named
BUCKET: Final = 500_000_000  # gradients in float32 that DeepSpeed lays out at once, at most
AHEAD: Final = 2  # units at once: the one that computes, and the buffer that the next one is gathered in
REDUCED: Final = 4  # bytes of a number in which FSDP sums gradients in mixed precision


def chosen(processes: Any, sharding: Any) -> tuple[str, ...]:
    """The engines that a plan looks at: none for one process, the one that is named, or the usual ones.

    Raises:
        RequestError: no number of processes, an unknown engine, one process and an engine.
    """
    if not isinstance(processes, int) or isinstance(processes, bool) or processes < 1:
        expected = "a number of processes, from 1"
        raise RequestError(message("a wrong value", where="processes", expected=expected, found=repr(processes)))
    if sharding is not None and sharding not in ENGINES:
        expected = f"one of {', '.join(ENGINES)}, or nothing for {' and '.join(USUAL)}"
        raise RequestError(message("unknown engine", where="sharding", expected=expected, found=repr(sharding)))
    if processes == 1:
        if sharding is not None:
            remedy = "Say processes as well: how many GPUs share the work."
            raise RequestError(message("one process divides nothing", where="sharding", remedy=remedy))
        return ()
    return USUAL if sharding is None else (sharding,)


@final
@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered at once. Sizes in bytes.

    Attributes:
        name: of its module, or what it is.
        shard: of each process; whole: of the gathered unit, as it is stored; gathered: as it is gathered.
        trained: of its trained parameters in a shard; learnt: of all of them.
        gradients: of their gradients, unsharded; reduced: of one process's part of them, as they are summed.
        kept: it stays gathered from forward to backward.
        again: backward needs it, after it has been let go.
        names: of its trained parameters.
    """

    name: str
    shard: int
    whole: int
    gathered: int
    trained: int
    learnt: int
    gradients: int
    reduced: int
    kept: bool
    again: bool
    names: tuple[str, ...] = ()


def units(
    model: PreTrainedModel, trained: Collection[str], processes: int, mixed: bool = False, reshard: bool = True
) -> list[Unit]:
    """The units of a model, bottom to top.

    Args:
        model: adapted and packed, on any device.
        trained: names of the parameters that train.
        processes: that share it.
        mixed: gathered in a 16-bit dtype, gradients summed in float32.
        reshard: blocks are let go after forward.
    """
    blocks = [path for found in block_lists(model) for path in found.names()]
    held: dict[str, dict[str, Tensor]] = {"embeddings": {}, **{path: {} for path in blocks}}
    held |= {"output": {}, "rest": {}}
    below, above = _around(model, blocks)
    for name, parameter in model.named_parameters():
        inside = next((path for path in blocks if name.startswith(f"{path}.")), None)
        where = "output" if name in above else "embeddings" if name in below else "rest"
        held[inside or where][name] = parameter
    there = [path for path, parameters in held.items() if parameters]
    learning = [place for place, path in enumerate(there) if any(name in trained for name in held[path])]
    lowest = min(learning, default=len(there))
    found = []
    for place, path in enumerate(there):
        kept = path in ("output", "rest") or not reshard
        again = place >= lowest - 1 and not kept  # backward asks for the unit below ahead, whether it needs it or not
        found.append(_unit(path, held[path], trained, processes, mixed, kept, again))
    return found


def _around(model: PreTrainedModel, blocks: Collection[str]) -> tuple[set[str], set[str]]:
    """Names of the parameters of the unit of the embeddings, and of the one that is gathered last.

    Tied embeddings belong to the last one (they are one tensor).
    """
    inputs = model.get_input_embeddings()
    outputs = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    top = {id(p) for p in outputs.parameters()} if outputs is not None else set()
    bottom = {id(p) for p in inputs.parameters()} - top if inputs is not None else set()
    base: Any = model.get_submodule(model.base_model_prefix) if model.base_model_prefix else model
    norms = [child for _, child in base.named_children() if "Norm" in type(child).__name__]
    if norms:
        top |= {id(p) for p in norms[-1].parameters()}
    named = dict(model.named_parameters())
    return {n for n, p in named.items() if id(p) in bottom}, {n for n, p in named.items() if id(p) in top}


def _unit(
    name: str,
    parameters: Mapping[str, Tensor],
    trained: Collection[str],
    processes: int,
    mixed: bool,
    kept: bool,
    again: bool,
) -> Unit:
    shard = whole = gathered = held = learnt = gradients = reduced = 0
    for own, tensor in parameters.items():
        size, part = tensor.element_size(), _part(tensor, processes)
        passed = 2 if mixed and tensor.is_floating_point() else size
        shard += part * size
        whole += tensor.numel() * size
        gathered += part * processes * passed
        if own in trained:
            held += part * size
            learnt += tensor.numel() * size
            gradients += tensor.numel() * passed
            reduced += part * (REDUCED if mixed else size)
    names = tuple(own for own in parameters if own in trained)
    return Unit(name, shard, whole, gathered, held, learnt, gradients, reduced, kept, again, names)


def _part(tensor: Tensor, processes: int) -> int:
    """Elements in a shard: rows of the first dimension, as many for each process as for the first one."""
    if not tensor.ndim or not tensor.numel():
        return tensor.numel()
    return -(-tensor.shape[0] // processes) * (tensor.numel() // tensor.shape[0])


@final
@dataclass(frozen=True)
class Phases:
    """The most bytes at once in the parts of an optimizer step.

    Attributes:
        passes: of forward and backward.
        forward: of forward up to the last block's end, where gradients are let go.
        learnt: of the trained tensors whose gradient is let go, in the order of their gradients: name, and the bytes
            since the one before, or since the last block's forward.
        update: of clipping and the optimizer's step.
    """

    passes: int
    forward: int
    learnt: tuple[tuple[str, int], ...]
    update: int


@final
@dataclass(frozen=True)
class Share:
    """Where the bytes of one process lie once there are several.

    Attributes:
        engine: "ddp", "zero", "fsdp", or "" for one process.
        processes: how many there are.
        whole: of the weights, what every process holds: buffers, scales, and under DDP everything.
        divided: the share of the trained tensors' gradients and copies that one holds.
        optimizer: the share of the optimizer.
        shards: bytes of its shards.
        buffers: bytes that a step needs beside all else, to gather and to sum up; read: to compute without learning.
        wire: bytes that it sends in an optimizer step.
        units: that are gathered, bottom to top.
        waiting: bytes of gradients that stay whole from batch to batch.
    """

    engine: str
    processes: int
    whole: int
    divided: float
    optimizer: float
    shards: int
    buffers: int
    read: int
    wire: int
    units: tuple[Unit, ...] = ()
    waiting: int = 0

    @property
    def weights(self) -> int:
        """Bytes of weights in each process."""
        return self.whole + self.shards

    def backward(self, learnt: Sequence[tuple[str, int]]) -> int:
        """The most bytes of a divided model's backward pass, beside its shards.

        While a unit computes it is gathered, and the one below beside it; its gradients are whole until all of them
        are there, and are then laid out once more to be summed, when the unit itself has been let go. Of the gradients
        above there are parts.

        Args:
            learnt: the trained tensors in the order of their gradients, and what computing each of them holds.
        """
        place = {name: number for number, unit in enumerate(self.units) for name in unit.names}
        left = [len(unit.names) for unit in self.units]
        staying = sum(unit.gathered for unit in self.units if unit.kept) + self.waiting
        whole = [0] * len(self.units)
        parts = most = 0
        for name, size in learnt:
            number = place[name]
            unit = self.units[number]
            ahead = next((below.gathered for below in reversed(self.units[:number]) if below.again), 0)
            now = size + staying + ahead + parts + whole[number]
            most = max(most, now + (0 if unit.kept else unit.gathered))
            left[number] -= 1
            whole[number] = unit.gradients * (len(unit.names) - left[number]) // len(unit.names)
            if not left[number]:
                most = max(most, now + unit.reduced * self.processes)
                parts += unit.trained
        return most


def alone(weights: int) -> Share:
    """One process, which holds everything and sends nothing."""
    return Share("", 1, weights, 1.0, 1.0, 0, 0, 0, 0)


def replicated(weights: int, gradients: int, processes: int) -> Share:
    """DDP: all is whole in each process; gradients are summed around a ring, in buckets of their size in all.

    Around a ring a process sends each byte of the gradients 2 (N - 1) / N times: N - 1 parts of N to be summed, and as
    many to be told the sums.
    """
    wire = 2 * gradients * (processes - 1) // processes
    return Share(DDP, processes, weights, 1.0, 1.0, 0, gradients, 0, wire)


def stepping(weights: int, gradients: int, processes: int) -> Share:
    """DeepSpeed's ZeRO: all is whole in each process but the optimizer.

    The gradients go around the ring as under DDP; then each process is sent the parts that the others have stepped.
    They are laid out and summed up in two buffers.
    """
    wire = 3 * gradients * (processes - 1) // processes
    return Share(ZERO, processes, weights, 1.0, 1 / processes, 0, 2 * min(gradients, 4 * BUCKET), 0, wire)


def divided(weights: int, parts: Collection[Unit], processes: int, accumulated: int = 1, passes: int = 1) -> Share:
    """FSDP: a process holds its part of each unit, and gathers a unit while that computes.

    Args:
        weights: of the model, whole.
        parts: its units.
        processes: that share it.
        accumulated: batches of one optimizer step: each gathers the units, the last one sums the gradients up, which
            stay whole until then.
        passes: how often backward gathers a unit: once, or once more where it computes the unit anew.
    """
    shards = sum(unit.shard for unit in parts)
    trained, learnt = sum(unit.trained for unit in parts), sum(unit.learnt for unit in parts)
    passing = max((unit.gathered for unit in parts if not unit.kept), default=0)
    staying = sum(unit.gathered for unit in parts if unit.kept)
    summed = max((unit.gradients + unit.reduced * processes for unit in parts), default=0)
    waiting = sum(unit.reduced for unit in parts) * processes if accumulated > 1 else 0
    gathers = accumulated * sum(unit.gathered * (1 + passes * unit.again) for unit in parts)
    wire = gathers * (processes - 1) // processes + sum(unit.reduced for unit in parts) * (processes - 1)
    share = trained / learnt if learnt else 1.0
    return Share(
        FSDP,
        processes,
        weights - sum(unit.whole for unit in parts),
        share,
        share,
        shards,
        AHEAD * passing + staying + summed + waiting,
        AHEAD * passing + staying,
        wire,
        tuple(parts),
        waiting,
    )
