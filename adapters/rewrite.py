"""A checkpoint written anew by its plan: in several threads, checked against the fingerprint, read back.

Each thread takes one tensor and passes it on a few rows at a time: read, hashed, edited in float32 twice, cast,
written. The hash of the source must be the fingerprint's. When the tensor is whole its bytes are read again from the
new file and must hash as the second edit does. They come from the page cache: what is tested is that the right bytes
lie in the right places; that they reach the disk is fsync's word.

Memory holds a few rows a thread, and of the edits that need a whole tensor one at a time, whatever the model.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from adapters import crew, shards
from adapters.edits import Edit, by_rows
from adapters.errors import NumbersError, RequestError, message
from adapters.progress import Job
from adapters.shards import INDEX, WEIGHTS, Slot
from adapters.stored import Stored
from adapters.stream import Step, expect, refuse_other

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 512 << 10  # bytes of the source at a time: with their edit, they stay in a core's own cache
LARGE = 64 << 20  # bytes; tensors above go first, lest one thread ends long after the others
UNFLUSHED = 64 << 20  # bytes written to a file before a thread asks the disk for them while the others go on


@final
@dataclass
class _File:
    """A file under way: its slots as its own header tells them, and how many bytes the disk has not been asked for."""

    handle: int
    slots: Mapping[str, Slot]
    waiting: int = 0
    flushing: threading.Lock = field(default_factory=threading.Lock)

    def wrote(self, count: int) -> None:
        """So many more; from time to time on to the disk, one thread at a time."""
        self.waiting += count  # a count lost to another thread only delays
        if self.waiting >= UNFLUSHED and self.flushing.acquire(blocking=False):
            try:
                self.waiting = 0
                os.fsync(self.handle)
            finally:
                self.flushing.release()


@contextlib.contextmanager
def single_threaded() -> Iterator[int]:
    """Torch computes in the thread that asks, of which a rewrite has several; gives how many it took before.

    Its own threads wait for each other after every small tensor, spinning, which on a busy machine takes longer than
    the work.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def rewrite(stage: Path, steps: list[Step], source: Path, document: Mapping[str, Any], threads: int = 1) -> int:
    """Write the weights in the shards of the source, flushed to the disk.

    Args:
        stage: the folder to write into.
        steps: the plan.
        source: the backbone's folder.
        document: the adapter's manifest.
        threads: of torch, for edits that need a whole tensor; call this where torch is `single_threaded`.

    Returns:
        Edited tensors whose bytes read back are those of a second edit.

    Raises:
        BackboneError: a tensor is not the fingerprint's.
        NumbersError: an edited tensor is not finite, or bytes read back otherwise.
        RequestError: too little room on the disk.
    """
    need = sum(step.nbytes for step in steps)
    _refuse_full(stage, need)
    by_file: dict[str, list[Step]] = {}
    last = next((step.source.file.name for step in reversed(steps) if step.source is not None), WEIGHTS)
    for step in steps:
        by_file.setdefault(step.source.file.name if step.source is not None else last, []).append(step)
    prints = document["backbone"]["fingerprint"]["tensors"]
    with contextlib.ExitStack() as stack:
        job = stack.enter_context(Job("merging", need, "bytes"))
        files = {name: stack.enter_context(_begun(stage / name, part)) for name, part in by_file.items()}
        work = crew.Crew(crew.size())
        alone = threading.Lock()
        tasks = [
            (step.nbytes, _Passage(step, files[name], prints, work.check, alone, threads, job).run)
            for name, part in by_file.items()
            for step in part
        ]
        work.run(task for _, task in sorted(tasks, key=lambda each: -max(each[0], LARGE)))
        with Job("waiting for the disk"):
            for file in files.values():
                os.fsync(file.handle)
    if (source / INDEX).exists():
        weight_map = {step.name: file for file, part in by_file.items() for step in part}
        index = {"metadata": {"total_size": need}, "weight_map": dict(sorted(weight_map.items()))}
        shards.write_text(stage / INDEX, json.dumps(index, indent=2) + "\n")
    return sum(step.edit is not None for step in steps)


def _refuse_full(stage: Path, need: int) -> None:
    room = os.statvfs(stage)
    if room.f_bavail * room.f_frsize < need:
        raise RequestError(
            message(
                "the disk is too full for the merged model",
                where=str(stage.parent),
                expected=f"{need:,} bytes",
                found=f"{room.f_bavail * room.f_frsize:,} bytes free",
            )
        )


@contextlib.contextmanager
def _begun(file: Path, part: list[Step]) -> Iterator[_File]:
    """A new file of its full size with its header, which is read back: places are what readers will see."""
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        header = shards.header_bytes(
            {step.name: (step.dtype, step.shape, step.nbytes) for step in part}, {"format": "pt"}
        )
        shards.write_at(handle, memoryview(header), 0)
        os.ftruncate(handle, len(header) + sum(step.nbytes for step in part))
        yield _File(handle, shards.read_header(file)[0])
    finally:
        os.close(handle)


# ---------------------------------------------------------------------- one tensor


@final
@dataclass(frozen=True)
class _Piece:
    """A part of a tensor: its bytes in the source (none where it is made), their shape, what happens to them."""

    start: int
    nbytes: int
    shape: tuple[int, ...]
    edit: Edit | None


@final
@dataclass(frozen=True)
class _Passage:
    """One tensor on its way.

    Attributes:
        step: what is to be done.
        file: the file that it goes to.
        prints: the fingerprint.
        check: raises where the crew is ending.
        alone: held by the one edit that has a whole tensor in memory.
        threads: of torch, for that one.
        job: told of every piece that is written.
    """

    step: Step
    file: _File
    prints: Mapping[str, Any]
    check: Callable[[], None]
    alone: threading.Lock
    threads: int
    job: Job

    def run(self) -> None:
        """Read, compare, edit, write, read back.

        Raises:
            BackboneError: the source is not the fingerprint's.
            NumbersError: the result is not finite, or reads back otherwise.
        """
        import torch

        torch.set_num_threads(1)  # counts for this thread alone
        step = self.step
        if step.source is None:
            written = self._whole(None)
        else:
            refuse_other(step, self.prints)
            parts = list(_pieces(step))
            with step.source.file.open("rb", buffering=0) as stream:
                if step.edit is None and step.dtype == step.source.dtype:
                    written = self._copied(stream.fileno(), parts)
                elif parts:
                    written = self._edited(stream.fileno(), parts)
                else:
                    written = self._whole(step.source)
        self._read_back(written)

    def _copied(self, source: int, parts: list[_Piece]) -> str:
        """Bytes as they are; gives their hash."""
        import xxhash

        assert self.step.source is not None
        digest = xxhash.xxh3_128()
        view = memoryview(bytearray(max((part.nbytes for part in parts), default=0)))
        for part in parts:
            self.check()
            content = view[: part.nbytes]
            shards.read_at(source, content, self.step.source.start + part.start, self.step.source.file)
            digest.update(content)
            self._write(content, part.start)
        expect(self.step, self.prints, digest.hexdigest())
        return digest.hexdigest()

    def _edited(self, source: int, parts: list[_Piece]) -> str:
        """Piece by piece; gives the hash of the second edits."""
        import torch
        import xxhash

        step = self.step
        assert step.source is not None
        before, again = xxhash.xxh3_128(), xxhash.xxh3_128()
        finite = True
        position = 0
        raw = torch.empty(max(part.nbytes for part in parts), dtype=torch.uint8)
        view = memoryview(raw.numpy().data)
        dtype: torch.dtype = getattr(torch, step.source.dtype)
        for part in parts:
            self.check()
            content = view[: part.nbytes]
            shards.read_at(source, content, step.source.start + part.start, step.source.file)
            before.update(content)
            old = raw[: part.nbytes].view(dtype).reshape(part.shape)
            new, good = _result(old, part.edit, step.dtype)
            finite = finite and good
            self._write(new, position)
            position += len(new)
            del new
            again.update(_result(old, part.edit, step.dtype)[0])
        expect(step, self.prints, before.hexdigest())
        if not finite:
            raise _not_finite(step)
        return again.hexdigest()

    def _whole(self, source: Slot | None) -> str:
        """An edit that needs all of the tensor: one such at a time, with all of torch's threads."""
        import torch
        import xxhash

        step = self.step
        with self.alone:
            self.check()
            torch.set_num_threads(self.threads)
            try:
                old = shards.read_tensor(source) if source is not None else None
                if old is not None:
                    expect(step, self.prints, xxhash.xxh3_128_hexdigest(shards.tensor_bytes(old)))
                new, finite = _result(old, step.edit, step.dtype)
                if not finite:
                    raise _not_finite(step)
                self._write(new, 0)
                del new
                self.check()
                return xxhash.xxh3_128_hexdigest(_result(old, step.edit, step.dtype)[0])
            finally:
                torch.set_num_threads(1)

    def _write(self, content: memoryview, position: int) -> None:
        slot = self.file.slots[self.step.name]
        if position + len(content) > slot.nbytes:
            raise NumbersError(
                message(
                    "an edit makes another tensor than was planned",
                    where=self.step.name,
                    expected=f"{slot.nbytes:,} bytes",
                    found=f"{position + len(content):,} or more",
                )
            )
        shards.write_at(self.file.handle, content, slot.start + position)
        self.file.wrote(len(content))
        self.job.advance(len(content))

    def _read_back(self, expected: str) -> None:
        """The bytes in the new file, where its header says that the tensor is, are the expected ones."""
        import xxhash

        slot = self.file.slots[self.step.name]
        view = memoryview(bytearray(min(PIECE, slot.nbytes)))
        digest = xxhash.xxh3_128()
        for start in range(0, slot.nbytes, PIECE):
            self.check()
            content = view[: min(PIECE, slot.nbytes - start)]
            shards.read_at(self.file.handle, content, slot.start + start, slot.file)
            digest.update(content)
        if digest.hexdigest() != expected:
            raise NumbersError(message("a written tensor reads back otherwise", where=self.step.name))


def _pieces(step: Step) -> Iterator[_Piece]:
    """The parts of a tensor that may pass one after the other; none where its edit needs it whole."""
    assert step.source is not None
    width = step.source.nbytes // max(1, math.prod(step.source.shape))
    if step.edit is None:
        for start in range(0, max(1, step.source.nbytes), PIECE):  # values are as wide as a power of 2: none is split
            nbytes = min(PIECE, step.source.nbytes - start)
            yield _Piece(start, nbytes, (nbytes // width if width else 0,), None)
        return
    count, entry = (step.source.shape or (0,))[0], step.source.shape[1:]
    long = math.prod(entry) * width  # bytes of a row
    at_once = max(1, PIECE // max(1, long))
    rows = _by_rows(step, at_once)
    if rows is None:
        return
    for start in range(0, step.shape[0], at_once):
        stop = min(start + at_once, step.shape[0])
        here = max(0, min(stop, count) - start)  # rows that the source has: a tensor may grow
        yield _Piece(min(start, count) * long, here * long, (here, *entry), rows(start, stop))


def _by_rows(step: Step, at_once: int) -> Callable[[int, int], Edit] | None:
    """A step's edit a few rows at a time; None where it needs all of the tensor."""
    assert step.source is not None
    assert step.edit is not None
    rows = by_rows(step.edit, step.source.shape, step.shape)
    if rows is not None or step.source.shape != step.shape:
        return rows
    from adapters.arithmetic import Fused
    from adapters.roundtrip import RoundTrip, round_trip_by_rows

    if isinstance(step.edit, Fused):
        return step.edit.by_entries(step.shape)
    if not isinstance(step.edit, RoundTrip):
        return None
    return round_trip_by_rows(step.edit, step.shape, Stored(step.source).part, at_once)


def _result(old: Tensor | None, edit: Edit | None, dtype: str) -> tuple[memoryview, bool]:
    """The bytes of an edited or cast tensor, and whether its values are finite."""
    import torch

    if edit is not None:
        new = edit(old)
    else:
        assert old is not None
        new = old
    cast = new.to(getattr(torch, dtype))
    # A sum is finite only if every value is, and costs a fraction of looking at each. Only float16 ends so low that a
    # finite value may be cast to an infinite one.
    seen = cast if dtype == "float16" else new
    finite = math.isfinite(seen.sum(dtype=torch.float32).item()) or bool(torch.isfinite(seen).all())
    return shards.tensor_bytes(cast), finite


def _not_finite(step: Step) -> NumbersError:
    return NumbersError(message("the merged tensor is not finite", where=step.name, found=f"in {step.dtype}"))
