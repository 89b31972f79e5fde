"""A stream of rows as shards: how many can be read apart, the rows of one, and what tells one stream from another."""

from __future__ import annotations

import hashlib
import itertools
import json
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
    """

    source: Any
    shards: int
    files: tuple[str, ...]
    features: Any

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

    def first(self, rows: int) -> list[Mapping[str, Any]]:
        """The first rows of the first shards that have any."""
        parts = (self.rows(shard, 0) for shard in range(self.shards))
        return list(itertools.islice(itertools.chain.from_iterable(parts), rows))

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
        rows = self.first(ROWS)
        if not rows:
            raise DataError(message("the data is empty", where="train_dataset", found="0 rows"))
        digest.update(content(rows))
        return {"rows": None, "columns": list(rows[0]), "sha256": digest.hexdigest()}


def opened(source: Any) -> Inflow:
    """A stream as shards.

    Args:
        source: a `datasets.IterableDataset`, or any other of torch's.

    Raises:
        RequestError: it was divided among processes already.
    """
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
