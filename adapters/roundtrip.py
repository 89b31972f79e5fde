"""The trip of a weight through 4 bits as an edit: of the whole weight, or of some rows after the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from adapters.edits import Edit, by_rows
from adapters.errors import RequestError
from adapters.quantize import BLOCK, NESTED, bitsandbytes


@final
@dataclass(frozen=True)
class RoundTrip:
    """The edit of a weight that was packed while the adapter trained: what 4 bits made of it, then the adapter's edit.

    The adapter was fitted to the packed weights, so they are the base on which the merged model answers the same.

    Attributes:
        kind: "nf4" or "fp4".
        dtype: of the weight when it was packed, e.g. "bfloat16".
        transposed: the backbone keeps this weight as (in, out).
        then: the adapter's edit, or None.
    """

    kind: str
    dtype: str
    transposed: bool
    then: Edit | None = None

    def __call__(self, old: Tensor | None) -> Tensor:
        if old is None:
            raise RequestError("a packed weight must be in the backbone")
        bnb = bitsandbytes()
        dense = old.T.contiguous() if self.transposed else old
        weight = bnb.nn.Params4bit(
            dense.to(getattr(torch, self.dtype)).clone(),
            requires_grad=False,
            compress_statistics=True,
            quant_type=self.kind,
        ).to("cpu")
        if weight.quant_state is None:
            weight = weight._quantize("cpu")
        back = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
        back = back.T.contiguous() if self.transposed else back
        return back if self.then is None else self.then(back)


@final
@dataclass(frozen=True, eq=False)
class RowsRoundTrip:
    """`RoundTrip` of some rows, by the scales that the blocks of the whole weight have.

    Attributes:
        kind, dtype: as there.
        scales: of these rows' blocks, float32, as they come back from 8 bits.
        then: the adapter's edit of these rows, or None.
    """

    kind: str
    dtype: str
    scales: Tensor
    then: Edit | None

    def __call__(self, old: Tensor | None) -> Tensor:
        if old is None:
            raise RequestError("a packed weight must be in the backbone")
        functional = bitsandbytes().functional
        data, state = functional.quantize_4bit(
            old.to(getattr(torch, self.dtype)), blocksize=BLOCK, quant_type=self.kind, quant_storage=torch.uint8
        )
        state.absmax = self.scales
        back = functional.dequantize_4bit(data, state).float()
        return back if self.then is None else self.then(back)


def round_trip_by_rows(
    edit: RoundTrip, shape: tuple[int, ...], read: Callable[[int, int], Tensor], at_once: int
) -> Callable[[int, int], Edit] | None:
    """The trip through 4 bits a few rows at a time; the weight is read once for the scales of its blocks.

    Args:
        edit: of the whole weight.
        shape: of the weight, (out, in).
        read: gives rows from the one to the other, as the checkpoint has them.
        at_once: rows that are read at a time.

    Returns:
        (start, stop) -> the edit of those rows; None where blocks reach over rows, the weight is kept the other way, or
        the adapter's edit needs all of it.
    """
    if edit.transposed or len(shape) != 2 or shape[1] % BLOCK:
        return None
    then = by_rows(edit.then, shape, shape) if edit.then is not None else None
    if edit.then is not None and then is None:
        return None
    functional = bitsandbytes().functional
    dtype = getattr(torch, edit.dtype)
    found = []
    for start in range(0, shape[0], at_once):
        rows = read(start, min(start + at_once, shape[0])).to(dtype)
        found.append(functional.quantize_4bit(rows, blocksize=BLOCK, quant_type=edit.kind)[1].absmax)
    exact = torch.cat(found)
    offset = exact.mean()  # from here on what bitsandbytes does with the scales of a weight that it has whole
    packed, inner = functional.quantize_blockwise(exact - offset, blocksize=NESTED)
    scales = functional.dequantize_blockwise(packed, inner) + offset
    blocks = shape[1] // BLOCK

    def rows_of(start: int, stop: int) -> Edit:
        part = scales[start * blocks : stop * blocks]
        return RowsRoundTrip(edit.kind, edit.dtype, part, then(start, stop) if then is not None else None)

    return rows_of
