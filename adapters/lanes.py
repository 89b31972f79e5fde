"""The rows of a stream dealt to the readers of a run, each row to one of them, and the place where each reader is.

A reader is one worker of one process. An epoch has as many lanes as it began with readers; a lane reads shards of its
own, or each n-th row of one where there are fewer shards, mixes them in a bounded buffer, and is prepared in blocks. It
is a function of seed, epoch and its number alone, so that a lane's place (blocks and rows behind, a digest of them) is
enough to go on, with as many readers or with others.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from adapters import exchange, inflow, processes, ranks, remarks
from adapters.contracts import Draw
from adapters.errors import AdaptersError, DataError, RequestError, message
from adapters.inflow import Inflow, content

BLOCK: Final = 128  # raw rows that are prepared at once
BUFFER: Final = 1000  # raw rows of each reader that are mixed, where nothing else is asked for
PLACE: Final = "place"  # of a prepared row: where its lane is behind it
REMARKS: Final = "remarks"  # of a block's first row: its number of raw rows, and what is to be said of them

Prepare = Callable[[list[Mapping[str, Any]]], tuple[Iterable[Mapping[str, Any]], list[str]]]


@final
@dataclass(frozen=True)
class Lane:
    """What is left of a lane.

    Attributes:
        number, count: which of how many lanes the epoch began with.
        first, every: the block that comes next, and each which one after it is this lane's.
        taken: prepared rows of that block that are behind us.
        proven, digest: the content of so many blocks of raw rows.
    """

    number: int
    count: int
    first: int = 0
    every: int = 1
    taken: int = 0
    proven: int = 0
    digest: str = ""

    def at(self, block: int, taken: int, digest: str) -> Lane:
        """The same lane, further on."""
        return dataclasses.replace(self, first=block, taken=taken, proven=block + 1, digest=digest)

    def part(self, index: int, parts: int) -> Lane:
        """One of several lanes that what is left is divided into, block by block."""
        first = self.first + index * self.every
        taken = self.taken if index == 0 else 0
        return dataclasses.replace(self, first=first, every=self.every * parts, taken=taken)


def among(lanes: Sequence[Lane], readers: int) -> list[Lane]:
    """Lanes for so many readers: each gets one or more, a lane is divided where they are too few."""
    if len(lanes) >= readers:
        return list(lanes)
    whole = len(lanes)
    return [lanes[n % whole].part(n // whole, len(range(n % whole, readers, whole))) for n in range(readers)]


@final
class Flow(IterableDataset[Any]):
    """The prepared rows of a stream, as training reads them.

    Args:
        source: of the rows.
        prepare: makes model inputs of a block of raw rows; None where the rows are model inputs.
        draw: whose seed and epoch the order follows.
        buffer: raw rows that a reader mixes; 0 leaves them in the order of the stream.

    Attributes:
        lanes: of the epoch at hand.
        resumed: the epoch goes on from a checkpoint; ended: it is over.
        some: prepared rows of the first block.
        remarks: on them.
    """

    def __init__(self, source: Inflow, prepare: Prepare | None, draw: Draw, buffer: int) -> None:
        self.source, self.draw, self.buffer = source, draw, buffer
        self._prepare = prepare
        self.lanes: list[Lane] = []
        self.resumed = self.ended = False
        self._generator = torch.Generator()
        self._turns: list[int] = []  # by process: the lane that its last batch came from
        self._collate: Callable[[list[Any]], dict[str, Any]] | None = None
        self._counted: list[list[str]] = []  # of each block its rows, and what is to be said of it
        first = source.first(BLOCK)
        raw = [row for _, row in first]
        rows, said = self._made(raw, [place for place, _ in first])
        self.remarks = [f"in the first {len(raw)} rows of the stream: {remark}" for remark in said]
        self.some = [dict(row) for row in rows]
        if not self.some:
            raise DataError(message("no row of the first block can be learnt from", where=source.name(0)))

    # ------------------------------------------------------------------ where we are

    def begin(self) -> None:
        """A new epoch."""
        self.lanes, self._turns = [], []
        self.resumed = self.ended = False

    def deal(self, workers: int) -> None:
        """Give every reader of the run what it reads of the rest of the epoch.

        Args:
            workers: of each process; 0 reads in the process itself.
        """
        world = processes.count()
        readers = world * max(1, workers)
        if len(self.lanes) != readers or len(self._turns) != world:
            self._turns = [-1] * world
        self.lanes = among(self.lanes, readers) if self.lanes else [Lane(n, readers) for n in range(readers)]
        mixed = random.Random(f"{self.draw.seed} {self.draw.epoch} {ranks.rank()}").getrandbits(63)
        self._generator.manual_seed(mixed)  # torch's own is that of the steps

    def position(self) -> dict[str, Any]:
        """Where the epoch is, as plain data; after its end the next begins."""
        return (
            {"lanes": [], "turns": []}
            if self.ended
            else {"lanes": [dataclasses.asdict(lane) for lane in self.lanes], "turns": self._turns}
        )

    def resume(self, position: Mapping[str, Any]) -> bool:
        """Go on from there; whether that is within an epoch, not between two."""
        self.lanes = [Lane(**lane) for lane in position["lanes"]]
        self._turns = list(position["turns"])
        self.resumed, self.ended = bool(self.lanes), False
        return self.resumed

    def said(self) -> list[str]:
        """What there is to say of all blocks that any process has read."""
        self._counted = [[str(sum(int(size) for size, *_ in self._counted)), *remarks.merged(self._counted)]]
        parts = ranks.gathered(self._counted[0])
        self._counted = []
        return [f"in the stream: {remark}" for remark in remarks.merged(parts)]

    def loader(self, rows: int, collate: Callable[[list[Any]], dict[str, Any]], workers: int) -> Any:
        """This process's batches of what is left of an epoch, in the processes of the run.

        Args:
            rows: of a batch.
            collate: makes a batch of prepared rows.
            workers: of each process.
        """
        self._collate = collate
        reader = _Reader(self, ranks.rank(), processes.count(), max(1, workers))
        how: dict[str, Any] = {"batch_size": rows, "num_workers": workers, "generator": self._generator}
        return DataLoader(reader, collate_fn=_Collated(collate), **how)

    def step(self, batches: Iterator[Any], wanted: int) -> tuple[list[Any], list[bool]]:
        """The batches of an optimizer step: none where no process has any left, else as many as wanted in all of them.

        What a process lacks is filled up with batches that count for nothing, so that all take the step together.

        Returns:
            The batches, and which of them are such.

        Raises:
            AdaptersError: the stream failed, in whichever process it did.
        """
        found: list[Any] = []
        fault: Exception | None = None
        try:
            found = list(itertools.islice(batches, wanted))
        except Exception as raised:
            fault = _of_worker(raised)
        places = [place for batch in found for place in batch.pop(PLACE)]
        self._counted += [block for batch in found for block in batch.pop(REMARKS)]
        exchange.stop_all(fault)
        said = ranks.gathered([len(found), places])
        for number, (_, there) in enumerate(said):
            for lane, block, taken, digest in there:
                self.lanes[lane] = self.lanes[lane].at(block, taken, digest)
                self._turns[number] = lane
        if not any(count for count, _ in said):
            return [], []
        assert self._collate is not None
        blanks = [number >= len(found) for number in range(wanted)]
        return found + [self._collate(self.some[:1]) for blank in blanks if blank], blanks

    # ------------------------------------------------------------------ rows

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """The rows of an epoch in one process, from its beginning."""
        for row in self.read(0, Lane(0, 1)):
            yield {name: value for name, value in row.items() if name not in (PLACE, REMARKS)}

    def read(self, index: int, lane: Lane) -> Iterator[dict[str, Any]]:
        """The prepared rows that are left of a lane, each with its place.

        Args:
            index: of the lane among those of the epoch.
            lane: where it is.

        Raises:
            RequestError: the rows behind us are not those that were read before.
            DataError: a row that cannot be prepared.
        """
        digest, block = "", -1
        for block, (places, rows) in enumerate(_blocks(self._mixed(lane))):
            digest = _chained(digest, rows)
            if block + 1 == lane.proven and digest != lane.digest:
                raise _others(lane)
            if block < lane.first or (block - lane.first) % lane.every:
                continue
            made, said = self._made(rows, places)
            note = [str(len(rows)), *said]
            for number, row in enumerate(made):
                if block > lane.first or number >= lane.taken:
                    placed = {**row, PLACE: (index, block, number + 1, digest), REMARKS: note}
                    if "row" in row:
                        placed["row"] = ((block << 20) + number) * lane.count + lane.number
                    yield placed
                    note = []
        if block + 1 < lane.proven:
            raise _others(lane)

    def _made(
        self, rows: list[Mapping[str, Any]], places: Sequence[str]
    ) -> tuple[Iterable[Mapping[str, Any]], list[str]]:
        if self._prepare is None:
            return rows, []
        try:
            return self._prepare(rows)
        except DataError as fault:
            said = inflow.placed(str(fault), places)
            if places and said == str(fault):
                said = f"{places[0]} and the rows read after it: {said}"
            raise DataError(said) from fault

    def _mixed(self, lane: Lane) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """A lane's raw rows, in an order that seed, epoch and lane alone decide; with their places for messages."""
        rows = self._raw(lane)
        if not self.buffer:
            yield from rows
            return
        chance = random.Random(f"{self.draw.seed} {self.draw.epoch} {lane.number} {lane.count}")
        held = list(itertools.islice(rows, self.buffer))
        for row in rows:
            pick = chance.randrange(len(held))
            out, held[pick] = held[pick], row
            yield out
        chance.shuffle(held)
        while held:
            yield held.pop()

    def _raw(self, lane: Lane) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The rows of a lane in the order of its shards: each of them whole, or every n-th row of one."""
        shards = list(range(self.source.shards))
        if self.buffer:
            random.Random(f"{self.draw.seed} {self.draw.epoch}").shuffle(shards)
        turn, turns = 0, 1
        if len(shards) < lane.count:
            turn, turns = lane.number // len(shards), len(range(lane.number % len(shards), lane.count, len(shards)))
            shards = [shards[lane.number % len(shards)]]
        else:
            shards = shards[lane.number :: lane.count]
        for shard in shards:
            name = self.source.name(shard)
            for number, row in enumerate(self.source.rows(shard, self.draw.epoch)):
                if number % turns == turn:
                    yield f"{name}, row {number}", row


@final
class _Reader(IterableDataset[Any]):
    """One process's readers: each worker reads its own lanes, by turns where it has several."""

    def __init__(self, flow: Flow, rank: int, world: int, workers: int) -> None:
        self.flow, self.rank, self.world, self.workers = flow, rank, world, workers

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker = info.id if info is not None else 0
        if info is not None:  # a source that divides itself among workers would lose rows: each lane reads it whole
            torch.utils.data._utils.worker._worker_info = None
        flow, readers = self.flow, self.world * self.workers
        last = flow._turns[self.rank]
        if last >= 0:  # the worker whose turn it is comes first
            worker = (worker + last // self.world + 1) % self.workers
        mine = [n for n in range(len(flow.lanes)) if n % readers == worker * self.world + self.rank]
        going = [flow.read(n, flow.lanes[n]) for n in mine]
        while going:
            for rows in list(going):
                row = next(rows, None)
                if row is None:
                    going.remove(rows)
                else:
                    yield row


@final
class _Collated:
    """Batches that say where their lanes are behind them."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self._collate = collate

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        places = {row[PLACE][0]: row.pop(PLACE) for row in rows}
        notes = [note for row in rows if (note := row.pop(REMARKS))]
        return {**self._collate(rows), PLACE: list(places.values()), REMARKS: notes}


def _blocks(rows: Iterator[tuple[str, Mapping[str, Any]]]) -> Iterator[tuple[list[str], list[Mapping[str, Any]]]]:
    while block := list(itertools.islice(rows, BLOCK)):
        yield [place for place, _ in block], [row for _, row in block]


def _chained(digest: str, rows: Sequence[Mapping[str, Any]]) -> str:
    import xxhash

    state = xxhash.xxh3_128(digest.encode())
    state.update(content(rows))
    return state.hexdigest()


def _of_worker(fault: Exception) -> Exception:
    """A fault as it was raised; torch puts the traceback of a worker before the words of its fault."""
    if not isinstance(fault, AdaptersError) or not str(fault).startswith("Caught "):
        return fault
    last = str(fault).rstrip().rpartition("\n")[2]
    return type(fault)(last.partition(": ")[2])


def _others(lane: Lane) -> RequestError:
    return RequestError(
        message(
            "the stream's rows are not those that the run has read",
            where=f"train_dataset, lane {lane.number} of {lane.count}",
            expected=f"{lane.proven} blocks of {BLOCK} rows with the digest {lane.digest}",
            remedy="Give the stream that the run began with, or load the checkpoint as an adapter and train a new run.",
        )
    )
