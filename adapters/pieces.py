"""The pieces of trained tensors that a process steps where DeepSpeed divides the optimizer, each with its own state.

DeepSpeed steps all of a group as one flat tensor, in a copy of it: a tensor that no loss reached would decay and move
on with its momentum, and what a callback writes to a weight would be undone. Here the optimizer steps on views of the
live weights, one for each parameter, and on those alone that a gradient has reached, as in one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adapters import ranks
from adapters.errors import RequestError, message

KINDS = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)  # step on each entry of a tensor by itself


@final
@dataclass(frozen=True)
class Piece:
    """What this process steps of a parameter.

    Attributes:
        parameter: of the model.
        live: where DeepSpeed keeps its values.
        tensor: the piece, a view of them; None where this process steps nothing of it.
        mine: which entries of this process' flat tensor it is.
        entries: which entries of the parameter.
    """

    parameter: nn.Parameter
    live: Tensor
    tensor: nn.Parameter | None
    mine: slice
    entries: slice


@final
class Pieces:
    """An optimizer whose groups hold pieces while a run goes on.

    Args:
        optimizer: with the parameters themselves.
        trained: what trains, by name.

    Raises:
        RequestError: it does not step on parts of tensors as on all of them, or holds what does not train.
    """

    def __init__(self, optimizer: Any, trained: Mapping[str, nn.Parameter]) -> None:
        self._optimizer = optimizer
        self._before = [(group, list(group["params"])) for group in optimizer.param_groups]
        self.groups: list[list[Piece]] = []  # as DeepSpeed counts them, which leaves out empty ones
        self._theirs: Any = None
        if type(optimizer) not in KINDS:
            raise RequestError(
                message(
                    "this optimizer does not step on the parts of divided tensors as on all of them",
                    where="optimizers, args: deepspeed",
                    expected=", ".join(kind.__name__ for kind in KINDS),
                    found=type(optimizer).__name__,
                )
            )
        known = {id(parameter) for parameter in trained.values()}
        strange = [p for _, parameters in self._before for p in parameters if id(p) not in known]
        if strange:
            raise RequestError(
                message(
                    "the optimizer holds tensors that do not train",
                    where="optimizers, args: deepspeed",
                    found=f"{len(strange)}, the first of shape {tuple(strange[0].shape)}",
                    remedy="Give it the parameters with requires_grad alone.",
                )
            )

    def take(self, theirs: Any) -> None:
        """Put pieces into the groups, in the place of DeepSpeed's flat tensors.

        Args:
            theirs: DeepSpeed's optimizer around this one.
        """
        self._theirs = theirs
        for number, parameters in enumerate(theirs.bit16_groups):
            flat = theirs.parallel_partitioned_bit16_groups[number][dist.get_rank()]
            theirs.single_partition_of_fp32_groups[number].data = flat.data
            self.groups.append([_piece(parameter, flat) for parameter in parameters])
        pieces = iter(self.groups)
        for group, parameters in self._before:
            held = [one.tensor for one in next(pieces) if one.tensor is not None] if parameters else []
            group["params"] = held or [nn.Parameter(torch.zeros(0))]  # DeepSpeed looks at a first one in every group
        self._optimizer.param_groups[:] = [group for group, _ in self._before]

    def gather_up(self) -> None:
        """Take over what was put in the place of a weight's values; what was written into them is there already."""
        with torch.no_grad():
            for piece in self._all():
                if piece.parameter.data_ptr() != piece.live.data_ptr():
                    piece.live.copy_(piece.parameter)
                    piece.parameter.data = piece.live

    def step(self, number: int, untouched: set[int]) -> None:
        """One group's step.

        Args:
            number: of the group, as DeepSpeed counts them; the gradient lies in its flat tensor.
            untouched: parameters that no loss reached, by id.
        """
        gradient = self._theirs.single_partition_of_fp32_groups[number].grad
        for piece in self.groups[number]:
            if piece.tensor is not None and id(piece.parameter) not in untouched:
                piece.tensor.grad = gradient[piece.mine]
        groups = self._optimizer.param_groups
        self._optimizer.param_groups = [[group for group, held in self._before if held][number]]
        try:
            self._optimizer.step()
        finally:
            self._optimizer.zero_grad()
            self._optimizer.param_groups = groups

    def close(self) -> None:
        """Let DeepSpeed find its own groups when it ends."""
        self._optimizer.param_groups[:] = [group for group, held in self._before if held]

    def restored(self) -> Any:
        """The optimizer with the parameters themselves, without moments."""
        for group, parameters in self._before:
            group["params"] = parameters
        self._optimizer.param_groups[:] = [group for group, _ in self._before]
        self._optimizer.state.clear()
        self.groups, self._theirs = [], None
        return self._optimizer

    def whole(self) -> list[dict[str, Any]]:
        """The groups with the parameters themselves."""
        return [{**group, "params": parameters} for group, parameters in self._before]

    def moments(self) -> dict[str, Any] | None:
        """The state with every tensor whole, on the CPU, in the first process; called by all."""
        state = self._optimizer.state
        mine = [
            [number, {name: None if value.dim() else float(value) for name, value in state[piece.tensor].items()}]
            for number, piece in enumerate(self._all())
            if piece.tensor is not None and piece.tensor in state
        ]
        known = {number: entry for said in ranks.gathered(mine) for number, entry in said}
        found: dict[int, dict[str, Any]] = {}
        for number, piece in enumerate(self._all()):
            entry = {}
            for name, value in sorted(known.get(number, {}).items()):
                held = state[piece.tensor][name] if value is None and piece.tensor is not None else None
                entry[name] = _together(piece, held) if value is None else torch.tensor(value)
            if entry and ranks.first():
                found[number] = entry
        count, groups = 0, []
        for group, parameters in self._before:
            groups.append({**_settings(group), "params": list(range(count, count + len(parameters)))})
            count += len(parameters)
        return {"state": found, "param_groups": groups} if ranks.first() else None

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the state that was saved whole, each process its part."""
        for (group, _), kept in zip(self._before, state["param_groups"], strict=True):
            group.update(_settings(kept))
        numbers = [number for kept in state["param_groups"] for number in kept["params"]]
        for piece, number in zip(self._all(), numbers, strict=True):
            entry = state["state"].get(number)
            if piece.tensor is None or not entry:
                continue
            place, steps = piece.tensor.device, self._optimizer.defaults
            own = place if steps.get("fused") or steps.get("capturable") else "cpu"
            self._optimizer.state[piece.tensor] = {
                name: value.flatten()[piece.entries].to(place, copy=True) if value.dim() else value.to(own, copy=True)
                for name, value in entry.items()
            }

    def _all(self) -> Iterator[Piece]:
        return (piece for group in self.groups for piece in group)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _piece(parameter: Any, flat: Tensor) -> Piece:
    mapping = parameter._hp_mapping
    if mapping is None:
        return Piece(parameter, parameter.data, None, slice(0), slice(0))
    ends = (mapping.hp_fragment_address, mapping.lp_fragment_address)
    mine, entries = (slice(int(end.start), int(end.start + end.numel)) for end in ends)
    mapping.hp_fragment = flat.detach()[mine]  # in the place of a copy's, which nothing keeps alive from here on
    return Piece(parameter, parameter.data, nn.Parameter(mapping.hp_fragment), mine, entries)


def _together(piece: Piece, held: Tensor | None) -> Tensor:
    """What the optimizer keeps of a parameter, of whose entries each process has some; on the CPU."""
    whole = torch.zeros(piece.parameter.numel(), dtype=piece.parameter.dtype, device=piece.parameter.device)
    if held is not None:
        whole[piece.entries] = held
    dist.all_reduce(whole)
    return whole.view(piece.parameter.shape).cpu()
