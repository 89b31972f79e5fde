"""How exact a merge must be: the bounds, and the measurement, which runs in a process of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from adapters import aside
from adapters.errors import NumbersError, RequestError, message
from adapters.memory import free_memory

# How far merged logits may lie from adapted ones, as a share of the logits' spread, by the coarsest dtype at work.
BOUNDS = {"float32": 1e-4, "float64": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
# The same where weights are rounded to few bits, or take the place of such: another model, which should answer alike.
LOSSY = {"int8": 2e-1, "nf4": 5e-1, "fp4": 5e-1}
ROWS = 8  # rows of the check
AT_WORK = 16  # share of a mapped model that a pass needs memory for, at most: its widest layers


@final
@dataclass(frozen=True)
class Rounding:
    """What a merge rounds that the adapted model does not.

    Attributes:
        dtype: of the written tensors.
        packed: the form that weights are packed into, or None.
        moved: the form that the backbone was packed in while the adapter trained, where the merge is onto other
            weights than those; or None.
        again: weights that came out of 4 bits go back into them. They lie on the levels already, so that a small
            change of one is rounded away: most of what was trained is lost.
    """

    dtype: str
    packed: str | None = None
    moved: str | None = None
    again: bool = False

    def bound(self, dtype: str) -> tuple[float, str]:
        """The share of the logits' spread, and what it is for; `dtype` is the adapted model's."""
        lossy = [form for form in (self.packed, self.moved) if form is not None]
        if lossy:
            coarsest = max(lossy, key=lambda form: LOSSY[form])
            return LOSSY[coarsest], coarsest
        coarsest = min((self.dtype, dtype), key=lambda name: -BOUNDS.get(name, 1.0))
        return BOUNDS[coarsest], coarsest

    @property
    def lossy(self) -> bool:
        """Whether the merged model is another one than was trained."""
        return self.packed is not None or self.moved is not None

    @property
    def remedy(self) -> str:
        """What to do where it is too far."""
        if self.again:
            return (
                "Nothing was written. What came out of 4 bits is rounded back to where it was: merge onto='original' "
                "(--onto original), into dtype='bfloat16' (--dtype bfloat16) or quantization='int8', or go on with "
                "accept=True (--accept)."
            )
        if self.packed is not None:
            return (
                "Nothing was written. Go on with accept=True (--accept), or merge into 16 bits: dtype='bfloat16' "
                "(--dtype bfloat16)."
            )
        if self.moved is not None:
            return "Nothing was written. Go on with accept=True (--accept), or merge onto the training base."
        if self.dtype in ("float16", "bfloat16"):
            return "Nothing was written. Merge with dtype='float32', or go on with accept=True (--accept)."
        return "Nothing was written. Merge with dtype='float32'."


def refuse_blind(rounding: Rounding, why: str, *, accept: bool) -> None:
    """Refuse a merge that rounds and is not measured, unless that is accepted.

    Raises:
        RequestError: with the reason.
    """
    if rounding.lossy and not accept:
        raise RequestError(
            message(
                "a merge that is not exact, and is not measured",
                where=f"quantization={rounding.packed!r}" if rounding.packed else "onto='original'",
                expected="logits compared with the adapted model's",
                found=why,
                remedy="Nothing was written. Go on blindly with accept=True (--accept).",
            )
        )


def refuse_rows(rows: list[Any] | None) -> None:
    """The rows of the logits check go to another process as JSON.

    Raises:
        RequestError: they are no plain values.
    """
    try:
        json.dumps(rows)
    except TypeError as fault:
        raise RequestError(
            message(
                "rows of the logits check that are no plain values",
                where="rows",
                expected="texts, numbers, paths",
                found=fault,
                remedy="Give pictures by their files.",
            )
        ) from fault


def too_large(nbytes: int, mapped: int = 0) -> str:
    """Why two models of this size cannot be compared here; empty where they can.

    Args:
        nbytes: of a model.
        mapped: of these, what is opened as pages of its file, in the dtype that it lies there in. The system brings
            them and takes them back, so they need no room; some is left for what is at work.
    """
    free, need = free_memory(), 3 * (nbytes - mapped) + mapped // AT_WORK
    return f"the logits check needs about {need:,} bytes of memory, {free:,} are free" if need > free else ""


def measured(
    adapter: Path,
    merged: Path,
    base: Path,
    rows: list[Any] | None,
    output: str,
    dtype: str | None = None,
    *,
    few: bool = False,
) -> dict[str, Any]:
    """What `fidelity.compare` says of two folders, from a process of its own; the adapted model's dtype with it.

    Args:
        adapter, merged, base, rows, dtype, few: its arguments.
        output: for messages.

    Raises:
        AdaptersError: that process broke.
    """
    request = {"adapter": str(adapter), "merged": str(merged), "base": str(base), "rows": rows, "dtype": dtype} | {
        "few": few
    }
    return aside.answered("fidelity", request, "the logits check", output)


def refuse_far(
    found: Mapping[str, Any], rounding: Rounding, output: str, *, accept: bool, wanted: str = "the adapted one does"
) -> float:
    """The bound in logits, which the difference must keep.

    Args:
        found: of `measured`.
        rounding: what the merge rounds.
        output: for the message.
        accept: go on above the bound, where the merge rounds by request.
        wanted: what it must answer as, for the message.

    Raises:
        NumbersError: above the bound, or not a number.
    """
    share, why = rounding.bound(found["dtype"])
    bound: float = share * max(found["spread"], 1e-6)
    far = not found["max_difference"] <= bound  # so that a NaN is refused too
    ours = accept and math.isfinite(found["max_difference"]) and (rounding.lossy or why in ("float16", "bfloat16"))
    if far and not ours:
        raise NumbersError(
            message(
                f"the merged model does not answer as {wanted}",
                where=f"{output}, {ROWS} rows",
                expected=f"logits within {bound:.2e} ({share} of their spread, {why})",
                found=f"{found['max_difference']:.2e} apart, the same answer for {found['agreement']:.0%}",
                remedy=rounding.remedy,
            )
        )
    return bound
