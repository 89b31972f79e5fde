"""Bars of other libraries, which become jobs of ours: the hub's downloads, the tensors of a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sized
from typing import Any, final

from adapters import interrupts
from adapters.progress import Job, at_hand


@contextlib.contextmanager
def downloading(name: str) -> Iterator[None]:
    """Within it the hub's files come: a `Bar` counts their bytes, and an interrupt says that they stay in its cache."""
    line = f"whole files that were downloaded of {name} stay in the hub's cache; the same command fetches the rest"
    with Job(f"loading {name}", None, "bytes"), interrupts.leaving(lambda: line):
        yield


@final
class Bar:
    """What other libraries take in place of tqdm. Within a job that counts bytes it counts for that job.

    Args:
        iterable, desc, total, initial, unit: as tqdm takes them.
        **_others: what tqdm takes besides.
    """

    def __init__(
        self,
        iterable: Iterable[Any] | None = None,
        desc: str | None = None,
        total: float | None = None,
        initial: float = 0,
        unit: str = "it",
        **_others: Any,
    ) -> None:
        self.format_dict: dict[str, Any] = {"rate": None}
        self._iterable, self._total, self._done = iterable, 0.0, 0.0
        around = at_hand()
        # The hub has one bar for what comes over the network and one for what is written: the second is the file.
        counts = around is not None and around.unit == "bytes" and unit == "B" and desc != "Downloading bytes"
        self._job = around if counts else None
        self.total = total
        self.update(initial)

    @property
    def total(self) -> float | None:
        """How much there is."""
        return self._total

    @total.setter
    def total(self, total: float | None) -> None:
        if self._job is not None:
            self._job.grow((total or 0) - self._total)
        self._total = total or 0

    @property
    def n(self) -> float:
        """How much is done."""
        return self._done

    def update(self, n: float | None = 1) -> None:
        """So much more is done."""
        self._done += n or 0
        if self._job is not None:
            self._job.advance(n or 0)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._iterable or ())

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_fault: object) -> None:
        """Nothing is open."""

    def close(self, *_args: Any, **_kwargs: Any) -> None:
        """The job that it counts for ends by itself."""

    # What else is called on a bar says what the job says itself.
    refresh = set_description = set_description_str = set_postfix_str = set_postfix = close


def tensors(_factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[Any]:
    """Hook for transformers' own bar over the tensors of a checkpoint: a job of ours."""
    items = args[0] if args else kwargs.get("iterable")
    return () if items is None else _each(items, str(kwargs.get("desc") or "working").lower())


def _each(items: Iterable[Any], what: str) -> Iterator[Any]:
    with Job(what, len(items) if isinstance(items, Sized) else None, "tensors") as job:
        for item in items:
            yield item
            job.advance()
