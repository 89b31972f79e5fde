"""bitsandbytes, which peft imports with itself and with every layer it makes, left alone until something is packed.

Its import takes a second or more, most of it torch's compiler, and what is not packed needs none of it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any, final

NAME = "bitsandbytes"


@final
class _Later:
    """What stands for the module where peft keeps it under a name of its own."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(NAME), name)


@contextlib.contextmanager
def unpacked() -> Iterator[None]:
    """While it lasts, peft takes bitsandbytes for not installed; nothing happens where it is imported already.

    A model with packed layers cannot be there before bitsandbytes is. Another thread that imports it for the first
    time at this very moment is told that it is missing.
    """
    if NAME in sys.modules:
        yield
        return
    fresh = "peft.helpers" not in sys.modules
    _forget()
    sys.modules[NAME] = None  # type: ignore[assignment]  # the language's own way to say that there is none
    try:
        yield
    finally:
        del sys.modules[NAME]
        _forget()
        helpers: Any = sys.modules.get("peft.helpers")
        if fresh and helpers is not None and importlib.util.find_spec(NAME) is not None:
            helpers.bnb = _Later()


def import_peft() -> None:
    """Import peft without bitsandbytes."""
    with unpacked():
        importlib.import_module("peft")


def _forget() -> None:
    """peft asks once whether there is bitsandbytes, and remembers."""
    found: Any = sys.modules.get("peft.import_utils")
    if found is not None:
        found.is_bnb_available.cache_clear()
        found.is_bnb_4bit_available.cache_clear()
