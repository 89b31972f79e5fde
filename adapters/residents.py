"""Adapters of one live backbone by name: their tensors in memory under a bound of bytes, the rest on disk.

An adapter is verified whole when it comes in. What was used longest ago goes out of memory first; it comes back from
its folder, whose weights must have the size and the digest that they had.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from adapters import mixing, shards
from adapters.backbones import plan_padding
from adapters.changes import Changes, edits_of
from adapters.devices import size
from adapters.edits import MergeLayer
from adapters.errors import FolderError, RequestError, message, nearest
from adapters.facts import processor_files
from adapters.manifest import WEIGHTS, read_tensors
from adapters.storage import saved_processor, task_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from adapters.contracts import Task
    from adapters.inserts import Change
    from adapters.trunks import Trunk

logger = logging.getLogger(__name__)


@final
class Resident:
    """One adapter.

    Args:
        name: its name here.
        changes: what its folder says.
        trunk: that it belongs to.
        processor: tokenizer or image processor.

    Attributes:
        changed: the names of the backbone's tensors that it changes, head included.
        held: its changes by module; None while they are on disk alone.
        merged: the paths of weights that a peft method is merged into, because it has no form by rows; held whole.
        apart: why its rows cannot share a pass with others'; None where that is not known, empty where they can.
        gone: it was unloaded.
    """

    def __init__(self, name: str, changes: Changes, trunk: Trunk, processor: Any) -> None:
        where = str(changes.folder)
        self.name, self.folder, self.trunk, self.processor = name, changes.folder, trunk, processor
        kept = {key: value for key, value in changes.document.items() if key != "backbone"}
        self.document: Mapping[str, Any] = kept
        self.backbone: str = changes.document["backbone"]["name"] or ""
        self.task: Task = task_of(changes.document, where)
        self.changed = frozenset(changes.edits)
        self.held: dict[str, Change] | None = trunk.changed(changes.edits, where)
        self.paths = tuple(self.held)
        self.shape = trunk.shape(self.held)
        self.merged = tuple(
            path
            for path, change in self.held.items()
            if "weight" in change.whole and isinstance(changes.edits.get(f"{path}.weight"), MergeLayer)
        )
        self.nbytes = sum(change.nbytes for change in self.held.values())
        self.apart: str | None = None
        self.gone = False
        self.view: weakref.ref[Any] | None = None

    def stands_apart(self, inputs: Mapping[str, Any]) -> bool:
        """Whether its rows cannot share a pass with others'; where that is not known yet, tried with one row."""
        if self.apart is None:
            fits = self.trunk.by_rows(self.paths, inputs)
            self.apart = "" if fits else "all rows of a pass use a tensor of its own"
        return bool(self.apart)

    def read(self) -> dict[str, Change]:
        """Its changes from its folder again.

        Raises:
            FolderError: the weights are not those that were loaded.
        """
        file, entry = self.folder / WEIGHTS, self.document["files"][WEIGHTS]
        found = file.stat().st_size if file.is_file() else None
        if found != entry["size"] or shards.sha256(file) != entry["sha256"]:
            raise FolderError(
                message(
                    "an adapter's weights have changed since it was loaded",
                    where=f"{self.name}: {file}",
                    expected=f"{entry['size']} bytes, sha256 {entry['sha256'][:16]}...",
                    found="no file" if found is None else f"{found} bytes",
                    remedy="Unload it, and load the new one.",
                )
            )
        edits = edits_of(self.document, read_tensors(self.folder, self.document), str(self.folder))
        return self.trunk.changed(edits, str(self.folder))


@final
class Residents:
    """All adapters of a live backbone.

    Args:
        memory: what their tensors take in memory at most, such as "200 MB"; None for no bound.

    Attributes:
        reads: how often an adapter came back from disk.
    """

    def __init__(self, memory: str | float | None) -> None:
        self.limit = None if memory is None else size(memory)
        self.known: dict[str, Resident] = {}  # what was used last stands last
        self.reads = 0
        self._processors: dict[Any, Any] = {}
        self._pinned: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> Resident:
        """The adapter of a name.

        Raises:
            RequestError: there is none.
        """
        if not isinstance(name, str) or name not in self.known:
            known = nearest(str(name), self.known) if self.known else "None is loaded."
            raise RequestError(message(f"unknown adapter {name!r}", where="adapter", remedy=known))
        return self.known[name]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are in memory."""
        return sum(each.nbytes for each in self.known.values() if each.held is not None)

    @property
    def inside(self) -> tuple[str, ...]:
        """The adapters whose tensors are in memory, those used longest ago first."""
        return tuple(name for name, each in self.known.items() if each.held is not None)

    def refuse(self, name: str) -> None:
        """Whether a name can be given.

        Raises:
            RequestError: no name, or one that is taken.
        """
        if not isinstance(name, str) or not name:
            raise RequestError(message("no name", where="name", expected="a text", found=repr(name)))
        if name in self.known:
            raise RequestError(
                message(
                    "the name is taken",
                    where=f"name={name!r}",
                    found=str(self.known[name].folder),
                    remedy=f"Take another one, or unload({name!r}) first.",
                )
            )

    def add(self, resident: Resident) -> None:
        """Take an adapter in.

        Raises:
            RequestError: it alone is larger than memory may be.
        """
        if self.limit is not None and resident.nbytes > self.limit:
            raise RequestError(
                message(
                    "one adapter is larger than all may be",
                    where=f"{resident.name}: {resident.folder}",
                    expected=f"at most {self.limit} bytes, as memory says",
                    found=f"{resident.nbytes}",
                    remedy="Give more memory, or None for no bound.",
                )
            )
        held = resident.held or {}
        resident.held = None
        self.known[resident.name] = resident
        self._take_in(resident, held)

    def drop(self, name: str) -> None:
        """Let an adapter go."""
        resident = self[name]
        self._out(resident)
        resident.gone = True
        del self.known[name]

    @contextmanager
    def needed(self, names: Collection[str]) -> Iterator[None]:
        """Within it these adapters are in memory, whatever else goes out."""
        before = self._pinned
        self._pinned = before | frozenset(names)
        try:
            for name in names:
                resident = self.known[name]
                if resident.held is None:
                    held = resident.read()
                    self.reads += 1
                    self._take_in(resident, held)
                self.known[name] = self.known.pop(name)
            yield
        finally:
            self._pinned = before

    def portions(self, names: Iterable[str]) -> list[list[str]]:
        """Names in portions that memory holds at once, those in memory first."""
        inside = set(self.inside)
        ordered = sorted(dict.fromkeys(names), key=lambda name: name not in inside)
        found: list[list[str]] = []
        room = 0
        for name in ordered:
            need = self.known[name].nbytes
            if not found or (self.limit is not None and need > room):
                found.append([])
                room = self.limit or 0
            found[-1].append(name)
            room -= need
        return found

    def _take_in(self, resident: Resident, held: dict[str, Change]) -> None:
        if self.limit is not None:
            for name in [name for name in self.inside if name not in self._pinned and name != resident.name]:
                if self.nbytes + resident.nbytes <= self.limit:
                    break
                self._out(self.known[name])
        resident.held = held
        mixing.put(resident.trunk.mixed, resident.trunk.choice, resident.name, held)

    def _out(self, resident: Resident) -> None:
        mixing.take_out(resident.trunk.mixed, resident.name, resident.paths)
        resident.held = None

    def processor(self, changes: Changes, net: PreTrainedModel, given: Any = None) -> Any:
        """An adapter's tokenizer or image processor; adapters with the same files share one.

        Args:
            changes: the adapter.
            net: the model, whose padding a tokenizer without a padding token takes.
            given: the one that is open already.
        """
        key = _files(changes.document)
        if key not in self._processors:
            if given is None:
                given = saved_processor(
                    changes.folder, changes.document, task_of(changes.document, str(changes.folder))
                )
            padding = plan_padding(net, given)
            if padding is not None:
                padding.settle(net, given)
            self._processors[key] = given
        return self._processors[key]


def _files(document: Mapping[str, Any]) -> tuple[Any, ...]:
    """The digests of a processor's files."""
    own: Sequence[tuple[str, str]] = sorted(
        (name, document["files"][name]["sha256"]) for name in processor_files(document) if Path(name).suffix != ".md"
    )
    return (document["task"]["name"], *own)
