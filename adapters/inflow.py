"""A stream of rows as shards: how many can be read apart, the rows of one, and what tells one stream from another."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from adapters.errors import DataError, RequestError, message

ROWS: Final = 64  # that tell one stream from another, beside its files
ENDS: Final = 16 << 10  # bytes at both ends of a file that tell it from another of its name and size
# What `datasets` makes of a stream that gives the same rows whether its shards are read apart or one after another. Any
# other (take, skip, repeat, interleave) counts rows across shards: those are read as one.
_APART: Final = frozenset(
    f"{name}ExamplesIterable"
    for name in (
        "",
        "Arrow",
        "RebatchedArrow",
        "Mapped",
        "Filtered",
        "Formatted",
        "InterleavedShards",
        "BufferShuffled",
    )
) | {"SelectColumnsIterable"}


@final
@dataclass(frozen=True)
class Inflow:
    """A stream.

    Attributes:
        source: what gives the rows; read again in each epoch.
        shards: how many parts of it can be read apart from each other.
        files: the names of the files that it is made of; empty where they are not known.
        features: as `datasets` knows them; None where they are not known.
        columns: task column -> column of these rows, where the rows that they are evaluated on have other names.
    """

    source: Any
    shards: int
    files: tuple[str, ...]
    features: Any
    columns: Mapping[str, str] | None = None

    def rows(self, shard: int, epoch: int) -> Iterator[Mapping[str, Any]]:
        """The rows of one shard in an epoch, as they come.

        Raises:
            DataError: what comes is no record.
        """
        part = self.source if self.shards == 1 else self.source.shard(num_shards=self.shards, index=shard)
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
        for number, row in enumerate(part):
            if not isinstance(row, Mapping):
                where = f"{self.name(shard)}, row {number}"
                raise DataError(
                    message(
                        "a row that is no record", where=where, expected="names and values", found=type(row).__name__
                    )
                )
            yield row

    def name(self, shard: int) -> str:
        """A shard, for a message."""
        if self.shards > 1 and len(self.files) == self.shards:
            return self.files[shard]
        return f"the stream, shard {shard}" if self.shards > 1 else "the stream"

    def first(self, rows: int, each: int | None = None) -> list[tuple[str, Mapping[str, Any]]]:
        """The first rows of the first shards that have any, with their places; so many of each at most."""
        found: list[tuple[str, Mapping[str, Any]]] = []
        for shard in range(self.shards):
            left = rows - len(found)
            if left <= 0:
                break
            part = itertools.islice(self.rows(shard, 0), left if each is None else min(left, each))
            found += [(f"{self.name(shard)}, row {number}", row) for number, row in enumerate(part)]
        return found

    def fingerprint(self) -> dict[str, Any]:
        """The identity of the stream: a sha256 over its shards and its first rows.

        Of a file that lies here its name, size and both ends count; of any other what it is called by (on the hub that
        holds the revision). What neither changes is told by the digest of the rows that were read (see `lanes`).

        Raises:
            DataError: the stream is empty.
        """
        digest = hashlib.sha256(f"{self.shards}\n".encode())
        for file in self.files:
            digest.update(_file(file) + b"\n")
        rows = [row for _, row in self.first(ROWS)]
        if not rows:
            raise DataError(message("the data is empty", where="train_dataset", found="0 rows"))
        digest.update(content(rows))
        return {"rows": None, "columns": list(rows[0]), "sha256": digest.hexdigest()}


def opened(source: Any) -> Inflow:
    """A stream as shards.

    Args:
        source: a `datasets.IterableDataset`, or any other of torch's; what is opened already stays as it is.

    Raises:
        RequestError: it was divided among processes already.
    """
    if isinstance(source, Inflow):
        return source
    if getattr(source, "_distributed", None) is not None:
        raise RequestError(
            message(
                "a stream that was divided among processes already",
                where="train_dataset",
                found="split_dataset_by_node",
                remedy="Give the whole stream to every process: the trainer deals its rows.",
            )
        )
    kinds, innermost = [], getattr(source, "_ex_iterable", None)
    while innermost is not None:
        kinds.append(innermost)
        innermost = getattr(innermost, "ex_iterable", None)
    apart = bool(kinds) and all(type(kind).__name__ in _APART and not _counting(kind) for kind in kinds)
    given = getattr(kinds[-1], "kwargs", {}) if kinds else {}
    files = given.get("original_files", given.get("base_files", given.get("files", ())))
    named = tuple(files) if isinstance(files, Sequence) and all(isinstance(file, str) for file in files) else ()
    return Inflow(source, int(source.num_shards) if apart else 1, named, getattr(source, "features", None))


def unheard(steps: Any, weights: Any, head: Any) -> dict[str, str]:
    """What a run over a stream cannot do as it is asked to: name of the setting -> the fault.

    Args:
        steps: `max_steps`; above 0 where somebody has said it.
        weights: `class_weights`.
        head: `warm_head`.
    """
    found = {}
    if not isinstance(steps, int) or steps <= 0:
        found["max_steps"] = message(
            "nobody knows how many rows a stream has",
            where="args: max_steps",
            expected="the number of steps; a stream that ends before begins anew",
            remedy="Say max_steps: rows x epochs / rows of a step.",
        )
    if weights == "balanced":
        found["class_weights"] = message(
            "balanced class weights are counted over all rows, which nobody knows of a stream",
            where="class_weights",
            remedy="Give a weight a label, or the rows as a set.",
        )
    if head:
        found["warm_head"] = message(
            "a head is solved on all rows, which nobody knows of a stream",
            where="args: warm_head",
            remedy="Leave it out, or give the rows as a set.",
        )
    return found


# "row 3" and "rows 3, 7": rows by their numbers among some; those of a part that is named are that part's own.
_NUMBERED = re.compile(r"(?:list of rows, )?(?<!validation )(?<!test )\brows? (\d+(?:, \d+)*)\b")


def placed(text: str, places: Sequence[str]) -> str:
    """A fault of some rows with the place of each row that it names by its number among them.

    Args:
        text: the fault; one that names no row stays as it is.
        places: of the rows.
    """

    def own(found: re.Match[str]) -> str:
        numbers = [int(number) for number in found[1].split(",")]
        known = all(number < len(places) for number in numbers)
        return ", ".join(places[number] for number in numbers) if known else found[0]

    return _NUMBERED.sub(own, text)


def _counting(kind: Any) -> bool:
    """Whether it numbers the rows: the numbers of a shard read apart would be others."""
    return bool(getattr(kind, "with_indices", False))


def _file(name: str) -> bytes:
    path = Path(name)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            ends = file.read(ENDS)
            file.seek(max(0, size - ENDS))
            ends += file.read(ENDS)
    except OSError:  # an address, or a file inside of an archive
        return name.encode()
    return f"{path.name} {size} {hashlib.sha256(ends).hexdigest()}".encode()


def content(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """What rows hold, as bytes that are the same for the same values."""
    return b"\n".join(json.dumps(row, sort_keys=True, default=_plain, ensure_ascii=False).encode() for row in rows)


def _plain(value: Any) -> Any:
    """A value that JSON does not know."""
    if hasattr(value, "tolist"):  # tensors and arrays
        return value.tolist()
    raw = value if isinstance(value, bytes) else value.tobytes() if hasattr(value, "tobytes") else None
    if raw is not None:  # pictures, opened or not
        return [getattr(value, "mode", ""), getattr(value, "size", len(raw)), hashlib.sha256(raw).hexdigest()]
    return str(value)
