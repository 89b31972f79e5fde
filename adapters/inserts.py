"""What one adapter puts beside a module's own tensors: a low-rank term, scales, small blocks, or whole tensors.

Applied to a linear map y = W x + b for one row: its inputs are turned (T), the frozen product is taken, its outputs are
scaled (g), a low-rank or Kronecker term and a shift (h) come on top: g * (W T(x) + b) + (x A^T) B^T + h. Of these each
row of a batch may have its own, while W is multiplied once for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True)
class Pair:
    """A low-rank term of a linear map; the adapter's scale is in `up`.

    Attributes:
        down: (rank, in).
        up: (rank, out), the layout in which a batched product of few tokens a row reads it fastest.
    """

    down: Tensor
    up: Tensor

    def term(self, inputs: Tensor) -> Tensor:
        """The term that is added for inputs of shape (..., in)."""
        return inputs.to(self.down.dtype) @ self.down.T @ self.up

    def to(self, place: torch.device | torch.dtype) -> Pair:
        """The same on a device, or in a dtype."""
        return Pair(self.down.to(place), self.up.to(place))


def _moved(tensor: Tensor | None, place: torch.device | torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(place)


@final
@dataclass(frozen=True)
class Kron:
    """The product of inputs with a Kronecker product of two small matrices.

    Attributes:
        left: (a, c); right: (b, d); their product maps c * d inputs to a * b outputs. The adapter's scale is in `left`.
    """

    left: Tensor
    right: Tensor

    @property
    def shapes(self) -> tuple[torch.Size, torch.Size]:
        """Of both."""
        return self.left.shape, self.right.shape

    def term(self, inputs: Tensor) -> Tensor:
        """The term that is added for inputs of shape (..., in)."""
        flat = inputs.reshape(1, -1, inputs.shape[-1]).to(self.left.dtype)
        return by_both(flat, self.left[None], self.right[None]).view(*inputs.shape[:-1], -1)

    def to(self, place: torch.device | torch.dtype) -> Kron:
        """The same on a device, or in a dtype."""
        return Kron(self.left.to(place), self.right.to(place))


def by_both(inputs: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Inputs of shape (rows, places, in) by each row's own two matrices, (rows, a, c) and (rows, b, d)."""
    parts = inputs.view(*inputs.shape[:2], left.shape[2], right.shape[2])
    return torch.einsum("rac,rtcd,rbd->rtab", left, parts, right).flatten(2)


@final
@dataclass(frozen=True)
class Turn:
    """What happens to the inputs of a linear map before its frozen product; one of the three.

    Attributes:
        scale: (in,), what each input is multiplied by.
        blocks: (in / size, size, size), by which the parts of the inputs are multiplied from the right; or (1, size,
            size), where one block stands for all.
        pair: from in to in, added to the inputs.
    """

    scale: Tensor | None = None
    blocks: Tensor | None = None
    pair: Pair | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        """The inputs, (..., in), turned."""
        made = inputs
        if self.scale is not None:
            made = made * self.scale
        if self.blocks is not None:
            flat = made.reshape(-1, made.shape[-1]).to(self.blocks.dtype)
            made = in_blocks(flat, self.blocks).view(made.shape)
        if self.pair is not None:
            made = made + self.pair.term(inputs)
        return made.to(inputs.dtype)

    def tensors(self) -> Iterator[Tensor]:
        """Its own."""
        pair = () if self.pair is None else (self.pair.down, self.pair.up)
        yield from (tensor for tensor in (self.scale, self.blocks, *pair) if tensor is not None)

    def to(self, place: torch.device | torch.dtype) -> Turn:
        """The same on a device, or in a dtype."""
        return Turn(_moved(self.scale, place), _moved(self.blocks, place), self.pair and self.pair.to(place))


def in_blocks(inputs: Tensor, blocks: Tensor) -> Tensor:
    """Inputs of shape (..., places, in), their parts by blocks of shape (..., in / size, size, size) from the right.

    One block in the place of in / size stands for all.
    """
    size = blocks.shape[-1]
    parts = inputs.reshape(*inputs.shape[:-1], -1, size).transpose(-3, -2)  # (..., in / size, places, size)
    return torch.matmul(parts, blocks).transpose(-3, -2).flatten(-2)


@final
@dataclass(frozen=True)
class Change:
    """What one adapter changes of one module.

    Attributes:
        pair: a low-rank term, of the inputs as they come.
        whole: tensors in the place of the module's own, by name.
        turn: what happens to the inputs.
        gain: (out,), what each output is multiplied by; shift: (out,), what is added then.
        kron: a Kronecker term, of the inputs as they come.
    """

    pair: Pair | None = None
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    turn: Turn | None = None
    gain: Tensor | None = None
    shift: Tensor | None = None
    kron: Kron | None = None

    @property
    def by_rows(self) -> bool:
        """Whether there is anything beside the whole tensors."""
        return any(part is not None for part in (self.pair, self.turn, self.gain, self.shift, self.kron))

    def to(self, place: torch.device | torch.dtype) -> Change:
        """The same on a device, or in a dtype."""
        pair, turn = self.pair and self.pair.to(place), self.turn and self.turn.to(place)
        whole = {name: tensor.to(place) for name, tensor in self.whole.items()}
        kron = self.kron and self.kron.to(place)
        return Change(pair, whole, turn, _moved(self.gain, place), _moved(self.shift, place), kron)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        pair = () if self.pair is None else (self.pair.down, self.pair.up)
        turn = () if self.turn is None else tuple(self.turn.tensors())
        kron = () if self.kron is None else (self.kron.left, self.kron.right)
        own = [*pair, *turn, *kron, self.gain, self.shift, *self.whole.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in own if tensor is not None)
