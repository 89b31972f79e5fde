"""Tensors by the content key of their row: in memory, and behind it a folder of memory-mapped safetensors parts.

A part holds the tensors of many rows one after another, their keys, their lengths and a digest of each. It is written
under another name and renamed, never changed afterwards, and every row of it is checked before the first is used. So
nothing waits for the disk: a part that a crash has torn is found out, set aside and computed again.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

from adapters import locks, processes, shards
from adapters.errors import FolderError, message
from adapters.memory import free_memory
from adapters.places import cache_folder as cache_folder

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

PART: Final = 256 << 20  # bytes of states that one part holds
LOCK: Final = ".lock"  # in a folder: shared by those who use it; above the folders: held while one writes
MOST: Final = 10 * 10**9  # bytes on disk where nothing else is asked for, and at most a tenth of what is free
HALF: Final = 2  # of the free memory, what waits to be written may take one part in so many


def room_for(folder: Path, gigabytes: float | None) -> int:
    """Bytes that kept states may take on disk, beside all that lies next to `folder`.

    Args:
        folder: of the states.
        gigabytes: what was asked for (10^9 bytes); None for the smaller of 10 GB and a tenth of the free disk.
    """
    if gigabytes is not None:
        return int(gigabytes * 10**9)
    there = next(place for place in (folder, *folder.parents) if place.exists())
    return min(MOST, shutil.disk_usage(there).free // 10)


@final
@dataclass
class _Part:
    """One file of a folder; its states are mapped once every row of it was found whole."""

    file: Path
    slots: Mapping[str, shards.Slot]
    rows: dict[bytes, tuple[int, int, bytes]]  # key -> first place, places, digest
    states: Tensor | None = None
    used: bool = False


@final
class States:
    """Tensors by the content key of their row.

    What is added waits in memory, and goes to the folder in parts of 256 MB or when `flush` is called; from then on it
    is read through a memory map, whose pages the system keeps in memory as long as there is room. Without a folder, or
    where the disk refuses (which is said once), it stays in memory, up to half of what is free.

    Args:
        folder: of these states alone, beside others of its kind; None for memory only.
        budget: bytes on disk that it and the folders beside it may take; 0 for memory only.
        memory: bytes that may wait in memory; None for this process's share of half of what is free.
        say: takes what is to be said, once each.
    """

    def __init__(
        self,
        folder: Path | None,
        budget: int,
        *,
        memory: int | None = None,
        say: Callable[[str], None] = logger.warning,
    ) -> None:
        self.folder = folder if budget > 0 else None
        self.budget = budget
        self.memory = free_memory() // HALF // processes.here() if memory is None else memory
        self._say, self._said = say, set[str]()
        self._waiting: dict[bytes, Tensor] = {}
        self._bytes = 0  # of what is waiting
        self._written: dict[bytes, _Part] = {}
        self._parts: list[_Part] = []
        if self.folder is not None:
            try:
                handle = locks.joined(self.folder / LOCK)
                weakref.finalize(self, os.close, handle)
                os.utime(self.folder / LOCK)  # the folder was used now
                self._read(sorted(self.folder.glob("*.safetensors")))
            except OSError as fault:
                self._refused(fault)

    # ------------------------------------------------------------------ rows

    def __len__(self) -> int:
        return len(self._waiting) + len(self._written)

    def __contains__(self, key: bytes) -> bool:
        return key in self._waiting or self._part(key) is not None

    def get(self, key: bytes) -> Tensor | None:
        """A row's tensor, to be read and not written to; None where it is not kept."""
        found = self._waiting.get(key)
        if found is not None:
            return found
        part = self._part(key)
        if part is None or part.states is None:
            return None
        first, places, _ = part.rows[key]
        return part.states[first : first + places]

    def add(self, key: bytes, tensor: Tensor) -> bool:
        """Keep a row's tensor, of one dimension or more; False where there is no room for it."""
        if key in self:
            return True
        self._make_room(tensor.nbytes)
        if self._bytes + tensor.nbytes > self.memory:
            full = f"{self._bytes / 1e9:.1f} GB of them are in memory, as much as half of what was free"
            self._once(f"no more rows are kept: {full}", "memory")
            return False
        self._waiting[key] = tensor.detach().to("cpu", copy=True).contiguous()
        self._bytes += tensor.nbytes
        return True

    def flush(self) -> None:
        """Write what is waiting to the folder."""
        if self.folder is None or not self._waiting:
            return
        try:
            for rows in _groups(self._waiting):
                if not self._write(rows):
                    return
        except OSError as fault:
            self._refused(fault)

    def look_again(self) -> None:
        """Take up what other processes have written into the folder meanwhile."""
        if self.folder is not None:
            known = {part.file for part in self._parts}
            try:
                self._read(file for file in sorted(self.folder.glob("*.safetensors")) if file not in known)
            except OSError as fault:
                self._refused(fault)

    def left(self) -> str:
        """After an interrupt: what is waiting goes to the folder, where the next run finds it; a line that says so."""
        self.flush()
        if self.folder is None or not len(self):
            return ""
        return f"what was computed of {len(self)} rows is kept; the same command begins anew and takes it up"

    def forget(self) -> None:
        """Drop what waits in memory."""
        self._waiting.clear()
        self._bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that are kept, in memory and on disk."""
        return self._bytes + sum(part.slots["states"].nbytes for part in self._parts)

    def digest(self, keys: Iterable[bytes]) -> str:
        """One digest over the content of these rows; it takes no reading of what is on disk."""
        import xxhash

        state = xxhash.xxh3_128()
        for key in sorted(set(keys)):
            waiting, part = self._waiting.get(key), self._part(key)
            state.update(key)
            if waiting is not None:
                state.update(_digest(key, waiting))
            elif part is not None:
                state.update(part.rows[key][2])
        return state.hexdigest()

    # ------------------------------------------------------------------ parts

    def _part(self, key: bytes) -> _Part | None:
        """The part that holds a row, mapped and checked."""
        part = self._written.get(key)
        if part is None or part.used:
            return part
        try:
            _open(part)
        except (OSError, FolderError) as fault:
            if not isinstance(fault, FileNotFoundError):  # made room for another, by another process
                self._set_aside(part.file, fault)
            self._drop(part)
            return None
        part.used = True
        with contextlib.suppress(OSError):
            os.utime(part.file)
        return part

    def _read(self, files: Iterable[Path]) -> None:
        """Take up parts: their keys, not yet their states."""
        for file in files:
            try:
                part = _headed(file)
            except FileNotFoundError:  # made room for another, by another process
                continue
            except (OSError, FolderError) as fault:
                self._set_aside(file, fault)
                continue
            self._parts.append(part)
            for key in part.rows:
                self._written.setdefault(key, part)

    def _set_aside(self, file: Path, fault: Exception) -> None:
        with contextlib.suppress(OSError):
            file.rename(file.with_suffix(".damaged"))
        where = str(file.parent)
        self._once(f"{where}: kept states were damaged; they are set aside and computed again ({fault})", where)

    def _drop(self, part: _Part) -> None:
        self._parts.remove(part)
        self._written = {key: other for key, other in self._written.items() if other is not part}

    def _write(self, rows: Mapping[bytes, Tensor]) -> bool:
        """Write a part and go on with its map; False where the budget has no room for it."""
        assert self.folder is not None
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        size = sum(tensor.nbytes for tensor in rows.values())
        with locks.alone(self.folder.parent / LOCK, wait=True):
            if not self._fits(size):
                taken = f"{self.budget / 1e9:.2f} GB"
                self._once(f"kept states stay in memory: {taken} on disk (prefix_cache_gb) have no room for them")
                self.folder = None
                return False
            name = secrets.token_hex(8)
            stage, file = self.folder / f".{name}.staging", self.folder / f"{name}.safetensors"
            try:
                _save(stage, rows)
                stage.rename(file)
            except BaseException:
                with contextlib.suppress(OSError):
                    shards.remove(stage)
                raise
        self._read([file])
        self._bytes -= size
        for key in rows:
            del self._waiting[key]
        return True

    def _make_room(self, size: int) -> None:
        if self._bytes + size > min(self.memory, PART):
            self.flush()

    def _fits(self, size: int) -> bool:
        """Whether the budget has room for so many bytes; folders used longest ago make it, then our own old parts."""
        assert self.folder is not None
        root = self.folder.parent
        for stray in (*root.glob("*/.*.staging"), *root.glob(".*.gone")):  # a process died; we hold the lock
            shards.remove(stray)
        taken = {entry: _size(entry) for entry in root.iterdir() if entry.is_dir() and not entry.is_symlink()}
        need = sum(taken.values()) + size - self.budget
        if need > 0:
            for aside in root.glob("*/*.damaged"):
                need -= aside.stat().st_size
                aside.unlink()
        others = [entry for entry in taken if entry != self.folder]
        for entry in sorted(others, key=_last_used):
            if need <= 0:
                break
            need -= taken[entry] if _removed(entry) else 0
        for part in sorted((part for part in self._parts if not part.used), key=lambda part: _last_used(part.file)):
            if need <= 0 or size > self.budget:
                break
            need -= _size(part.file)
            part.file.unlink(missing_ok=True)  # who has mapped it keeps it
            self._drop(part)
        return need <= 0

    def _refused(self, fault: OSError) -> None:
        """The disk does not take what is kept: go on in memory."""
        where = self.folder
        self.folder = None
        self._once(f"{where}: kept states stay in memory, the disk refuses: {fault.strerror or fault}")

    def _once(self, remark: str, about: str = "") -> None:
        if (about or remark) not in self._said:
            self._said.add(about or remark)
            self._say(remark)


# ---------------------------------------------------------------------- files


def _groups(rows: Mapping[bytes, Tensor]) -> Iterator[dict[bytes, Tensor]]:
    """Rows that one part can hold: of one dtype, alike but for their first dimension, so many bytes of them."""
    kinds: dict[object, list[bytes]] = {}
    for key, tensor in rows.items():
        if tensor.ndim == 0:
            raise ValueError("a state of no dimension")
        kinds.setdefault((tensor.dtype, tensor.shape[1:], len(key)), []).append(key)
    for keys in kinds.values():
        group: dict[bytes, Tensor] = {}
        size = 0
        for key in keys:
            if group and size + rows[key].nbytes > PART:
                yield group
                group, size = {}, 0
            group[key] = rows[key]
            size += rows[key].nbytes
        yield group


def _digest(key: bytes, tensor: Tensor) -> bytes:
    import xxhash

    state = xxhash.xxh3_128(key)
    state.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    state.update(shards.tensor_bytes(tensor))
    return state.digest()


def _save(file: Path, rows: Mapping[bytes, Tensor]) -> None:
    """A new part; the states are written row by row, without a copy of all of them."""
    import torch

    first = next(iter(rows.values()))
    keys = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(len(rows), -1)
    digests = bytearray(b"".join(_digest(key, tensor) for key, tensor in rows.items()))
    lengths = torch.tensor([len(tensor) for tensor in rows.values()], dtype=torch.int64)
    small = {"keys": keys, "digests": torch.frombuffer(digests, dtype=torch.uint8).view(len(rows), -1)}
    small["lengths"] = lengths
    dtype = str(first.dtype).removeprefix("torch.")
    shape = (int(lengths.sum()), *first.shape[1:])
    # The states come last but for what pads the keys and digests to whole words: alignment is what a map needs.
    entries = {"lengths": ("int64", (len(rows),), 8 * len(rows)), "states": (dtype, shape, shards.nbytes(dtype, shape))}
    entries |= {name: ("uint8", tuple(small[name].shape), small[name].numel()) for name in ("keys", "digests")}
    with file.open("xb") as stream:
        os.fchmod(stream.fileno(), 0o600)  # states tell much of the rows that they were computed from
        stream.write(shards.header_bytes(entries, {}))
        stream.write(shards.tensor_bytes(lengths))
        for tensor in rows.values():
            stream.write(shards.tensor_bytes(tensor))
        stream.write(shards.tensor_bytes(keys))
        stream.write(shards.tensor_bytes(small["digests"]))


def _headed(file: Path) -> _Part:
    """A part's keys, lengths and digests.

    Raises:
        FolderError: not a part.
    """
    slots, _ = shards.read_header(file)
    if set(slots) != {"states", "keys", "lengths", "digests"} or not slots["states"].shape:
        raise FolderError(message("not a file of kept states", where=str(file)))
    keys, digests, lengths = (shards.read_tensor(slots[name]) for name in ("keys", "digests", "lengths"))
    counts: list[int] = lengths.reshape(-1).tolist()
    fits = keys.ndim == digests.ndim == 2 and len(keys) == len(digests) == len(counts)
    if not fits or min(counts, default=0) < 0 or sum(counts) != slots["states"].shape[0]:
        raise FolderError(message("kept states whose lengths do not add up", where=str(file)))
    rows: dict[bytes, tuple[int, int, bytes]] = {}
    place = 0
    for key, digest, count in zip(keys.numpy(), digests.numpy(), counts, strict=True):
        rows[key.tobytes()] = (place, count, digest.tobytes())
        place += count
    return _Part(file, slots, rows)


def _open(part: _Part) -> None:
    """Map a part's states, and check every row.

    Raises:
        FolderError: a row that is not what was written.
    """
    import numpy as np
    import torch

    slot = part.slots["states"]
    # Copy on write: nothing that is done to a view reaches the file.
    mapped = np.memmap(part.file, dtype=np.uint8, mode="c", offset=0)
    raw = torch.from_numpy(mapped)[slot.start : slot.start + slot.nbytes]
    dtype: torch.dtype = getattr(torch, slot.dtype)
    states = raw.view(dtype).view(slot.shape)
    for key, (first, places, digest) in part.rows.items():
        if _digest(key, states[first : first + places]) != digest:
            raise FolderError(message("a row's digest differs", where=str(part.file)))
    part.states = states


def _size(entry: Path) -> int:
    """Bytes of a file, or of the files in a folder; what goes away meanwhile counts nothing."""
    total = 0
    for file in [entry] if not entry.is_dir() else entry.iterdir():
        with contextlib.suppress(OSError):
            total += file.lstat().st_size
    return total


def _last_used(entry: Path) -> float:
    try:
        return (entry / LOCK if entry.is_dir() else entry).stat().st_mtime
    except OSError:
        return -math.inf


def _removed(entry: Path) -> bool:
    """Delete a folder of states that nobody uses; False where somebody does."""
    with locks.alone(entry / LOCK, wait=False) as ours:
        if not ours:
            return False
        gone = entry.with_name(f".{entry.name}.gone")
        entry.rename(gone)
        shards.remove(gone)
        return True
