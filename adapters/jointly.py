"""Rows prepared by the processes of a run together: each does its part, and all read the whole from their node's disk.

Model inputs go to arrow files, which are mapped and never held. Whose disk is whose is found out: each process leaves a
file in the cache folder and looks whose files it sees; those that see each other share the work, as a node does. So a
folder on a network serves all nodes, a folder of each node serves that node, and where nothing can be written each
process prepares all rows for itself.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, final, runtime_checkable

from adapters import exchange, identity, locks, neighbours, processes, ranks, remarks, shards
from adapters.places import cache_folder

if TYPE_CHECKING:
    from datasets import Dataset

    from adapters.contracts import Adapted

logger = logging.getLogger(__name__)

PART: Final = 10_000  # raw rows that are prepared at once, in one process too
LOCK: Final = ".lock"

Prepare = Callable[["Dataset"], tuple["Dataset", list[str]]]


@runtime_checkable
class Dividing(Protocol):
    """A task that prepares some rows apart from the others as it prepares them among them."""

    def divides(self, rows: Dataset) -> bool:
        """Whether each of these raw rows becomes one prepared row that no other has a part in."""
        ...


def prepared(rows: Dataset, adapted: Adapted, data: Mapping[str, Any] | None = None) -> tuple[Dataset, list[str]]:
    """Model inputs and labels of all rows, as one process would have them, and what is to be said of them.

    Args:
        rows: raw, the same in every process.
        adapted: whose task prepares them.
        data: their fingerprint, where it has been taken.

    Raises:
        RequestError: the processes have other rows, or another task.
        AdaptersError: rows that cannot be prepared; in all processes.
    """
    ranks.join()
    task = adapted.task
    if ranks.joined():
        facts = {**(data or identity.fingerprint(rows)), "task": task.name}
        exchange.alike(facts, "rows that are prepared", "Start every process with the same rows and settings.")

    def prepare(some: Dataset) -> tuple[Dataset, list[str]]:
        return task.prepare(some, adapted.processor, adapted.model, labelled=True)

    parts = isinstance(task, Dividing) and task.divides(rows)
    if not ranks.joined() and (len(rows) <= PART or not parts):
        return prepare(rows)
    folder = _Folder()
    if folder.path is None:
        return exchange.in_all(lambda: prepare(rows))
    size = min(PART, -(-len(rows) // len(folder.group))) if parts else len(rows)
    begins = range(0, len(rows), size)
    mine = begins[folder.turn :: len(folder.group)]
    try:
        said = _written(rows, mine, size, prepare, folder.path)
        fault = ""
    except Exception as raised:  # told by the whole, whose rows are numbered as they stand
        said, fault = [], f"{type(raised).__name__}: {raised}"
    heard = ranks.gathered([folder.token, fault, said])
    faults = [wrong for _, wrong, _ in heard if wrong]
    kinds = {kind for _, _, all_said in heard for _, kind, _ in all_said}
    if faults or len(kinds) > 1:
        why = faults[0] if faults else "parts of different columns"
        logger.info("the rows are prepared by each process for itself (%s)", why)
        return exchange.in_all(lambda: prepare(rows))
    notes = {int(begin): note for token, _, all_said in heard if token == folder.token for begin, _, note in all_said}
    files = [folder.path / f"{begin}.arrow" for begin in begins]
    whole = exchange.in_all(lambda: _joined(files))
    return whole, remarks.merged(notes[begin] for begin in begins)


def _written(
    rows: Dataset, begins: Sequence[int], size: int, prepare: Prepare, folder: Path
) -> list[tuple[int, str, list[str]]]:
    """Prepare parts of the rows into files; of each where it begins, its columns, and its rows and remarks."""
    import pyarrow

    said = []
    for begin in begins:
        part = rows.select(range(begin, min(begin + size, len(rows))))
        made, notes = prepare(part)
        if made._indices is not None:
            made = made.flatten_indices()
        made = made.select_columns([name for name in made.column_names if name != "row"] + ["row"])
        with pyarrow.OSFile(str(folder / f"{begin}.arrow"), "wb") as file:
            table = made.data.table
            with pyarrow.ipc.new_stream(file, made.features.arrow_schema) as stream:
                stream.write_table(table.cast(made.features.arrow_schema), max_chunksize=1000)
        said.append((begin, str(made.features), [str(len(part)), *notes]))
    return said


def _joined(files: Sequence[Path]) -> Dataset:
    """The parts as one set, mapped, its rows numbered through."""
    import numpy as np
    from datasets import Dataset, concatenate_datasets

    parts = [Dataset.from_file(str(file)) for file in files]
    if len(parts) == 1:
        return parts[0]
    whole = concatenate_datasets(parts).remove_columns("row")
    return whole.add_column("row", np.arange(len(whole)))


@final
class _Folder:
    """A folder of prepared rows that some of the processes share, for as long as they live.

    Attributes:
        path: the folder; None where a process cannot write one.
        token: what its files of this set are called by; the same for those who share it.
        group: the numbers of the processes that share it.
        turn: the place of this one among them.
    """

    def __init__(self) -> None:
        name: str = ranks.told(secrets.token_hex(8))
        root = cache_folder() / "holdfast" / "prepared"
        folder: Path | None = root / name
        try:
            if ranks.first():
                _clean(root)
            self._handle = locks.joined(root / name / LOCK)
        except (OSError, RuntimeError) as fault:
            logger.info("prepared rows stay in memory: no cache folder (%s)", fault)
            folder = None
        self.group = neighbours.sharing(folder)
        self.path = folder if all(ranks.gathered(folder is not None)) else None
        self.turn = self.group.index(ranks.rank())
        self.token = f"{name}-{self.group[0]}"
        if self.turn == 0 and self.path is not None:
            atexit.register(_remove, self.path, os.getpid())
            if len(self.group) < processes.count():
                some = f"{len(self.group)} of {processes.count()} processes share a disk"
                logger.info("%s: each such group prepares all rows for itself", some)


def _remove(folder: Path, process: int) -> None:
    """Take a folder away at the end of the process that began it, not of one that was forked from it."""
    if os.getpid() == process:
        with contextlib.suppress(OSError):
            shards.remove(folder)


def _clean(root: Path) -> None:
    """Take away what processes that were killed have left."""
    for stray in root.iterdir() if root.is_dir() else ():
        with contextlib.suppress(OSError), locks.alone(stray / LOCK, wait=False) as ours:
            if ours:
                shards.remove(stray)
