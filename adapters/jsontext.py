"""JSON text read strictly: no key twice, no NaN, no number that overflows, no bottomless nesting."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

WIDEST = 1 << 63  # whole numbers at or beyond it fit no field of ours


def record(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys stand once; json would keep the last of two without a word.

    Raises:
        ValueError: naming the key.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        name = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {name!r} stands twice in one object")
    return made


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _real(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} overflows")
    return value


def _whole(text: str) -> int:
    value = int(text) if len(text) < 20 else WIDEST
    if not -WIDEST <= value < WIDEST:
        raise ValueError(f"the number {text[:20]} does not fit 64 bits")
    return value


def parse(content: bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: not utf-8, not JSON, or JSON that two readers could read in two ways.
    """
    text = content.decode("utf-8")
    try:
        found = json.loads(
            text, object_pairs_hook=record, parse_constant=_constant, parse_float=_real, parse_int=_whole
        )
    except RecursionError:
        raise ValueError("nested too deep") from None
    if "\\u" in text:  # half a surrogate pair is no character: such a text cannot be written again
        json.dumps(found, ensure_ascii=False).encode()
    return found
