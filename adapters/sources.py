"""Which files a source of rows names, and the part of the data that each of them is of."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from adapters.errors import DataError, RequestError, message, nearest

SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
PARTS = ("train", "validation", "test")
SUFFIXES = ("csv", "tsv", "json", "jsonl", "parquet", "txt", "conll", "iob", "bio")
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")  # how the hub names the files of one part
KINDS = "csv, tsv, json, jsonl, parquet, txt, conll, iob or bio; .gz too"


def split_name(name: str) -> str:
    """The part that a name stands for: "dev" is "validation".

    Raises:
        RequestError: a name that stands for none.
    """
    if name not in SPLIT_NAMES:
        raise RequestError(message(f"unknown split {name!r}", where="data", remedy=nearest(name, SPLIT_NAMES)))
    return SPLIT_NAMES[name]


def names_files(source: Any) -> bool:
    """Whether a source is a list of files, or of patterns of them; any other list is one of rows."""
    listed = isinstance(source, Sequence) and not isinstance(source, str) and len(source) > 0
    return listed and all(isinstance(entry, str | Path) and suffix(Path(entry)) in SUFFIXES for entry in source)


def files_of(source: Any) -> dict[str, list[Path]]:
    """The files of each part of a source: of a file, a list or a pattern of files, or a folder of them.

    Args:
        source: as `read` takes it.

    Returns:
        Empty where the source is something else: a folder of pictures, a hub id.

    Raises:
        RequestError: a file that is not there, a pattern that fits none, two files for one part of a folder.
    """
    if isinstance(source, Sequence) and not isinstance(source, str) and not names_files(source):
        found = ", ".join(map(repr, source[:3])) or "nothing"
        raise RequestError(message("not a list of files", where="data", expected=f"files ({KINDS})", found=found))
    if names_files(source):
        return {"train": [file for entry in source for file in _matching(entry)]}
    path = Path(source).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.is_file() or _is_pattern(source):
        return {"train": _matching(source)}
    if isinstance(source, Path) or not looks_like_id(str(source)):
        raise _absent(source)
    return {}


def _is_pattern(source: str | Path) -> bool:
    return any(mark in str(source) for mark in "*?[")


def _matching(entry: str | Path) -> list[Path]:
    """A file, or all files that a pattern fits, by name."""
    path = Path(entry).expanduser()
    if path.is_file():
        return [path]
    if not _is_pattern(entry):
        raise _absent(entry)
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    files = [file for file in found if file.is_file()]
    if not files:
        raise RequestError(message("no file fits the pattern", where=str(entry), expected=f"files ({KINDS})"))
    return files


def _absent(source: str | Path) -> RequestError:
    remedy = f"Give a file ({KINDS}), a folder of them or of pictures, or a hub id."
    return RequestError(message("there is no such file or folder", where=str(source), remedy=remedy))


def _in_folder(path: Path) -> dict[str, list[Path]]:
    """The files of each part of a folder; empty where it holds pictures.

    Raises:
        RequestError: two files for one part.
        DataError: a shard that is missing.
    """
    found: dict[str, Path] = {}
    shards: dict[str, list[Path]] = {}
    for file in sorted(path.iterdir()):
        stem = file.name.split(".")[0]
        shard = SHARD.fullmatch(stem)
        stem = shard[1] if shard else stem
        part = next((SPLIT_NAMES[word] for word in reversed(stem.split("_")) if word in SPLIT_NAMES), None)
        if part is not None and file.is_file() and suffix(file) in SUFFIXES:
            if shard and (part not in found or part in shards):
                found.setdefault(part, file)
                shards.setdefault(part, []).append(file)
                continue
            if part in found:
                raise RequestError(
                    message(
                        f"two files for the split {part!r}",
                        where=str(path),
                        found=f"{found[part].name} and {file.name}",
                        remedy="Give one file, or a mapping of splits to files.",
                    )
                )
            found[part] = file
    for files in shards.values():
        _refuse_partial(files)
    if found and "train" not in found:
        refuse_untrained(path)
    return {part: shards.get(part, [file]) for part, file in found.items()}


def refuse_untrained(path: Path) -> NoReturn:
    """Refuse a folder that holds nothing to train on.

    Raises:
        RequestError: with what is in it.
    """
    raise RequestError(
        message(
            "no training file in the folder",
            where=str(path),
            expected="train.csv, train.jsonl, train.parquet ..., or folders of pictures named by class",
            found=", ".join(sorted(f.name for f in path.iterdir())[:8]) or "an empty folder",
        )
    )


def refuse_columns(file: Path, first: Path, found: object, expected: object) -> NoReturn:
    """Refuse a file of several whose columns are others than those of the first.

    Raises:
        DataError: with both.
    """
    raise DataError(
        message(
            "files of one part with different columns",
            where=str(file),
            expected=f"as in {first.name}: {expected}",
            found=found,
        )
    )


def looks_like_id(text: str) -> bool:
    """A hub id, not a path that is missing: a local path never becomes a look-up."""
    return (
        text.count("/") <= 1
        and not text.startswith((".", "/", "~"))
        and not text.endswith("/")
        and ("." not in text.rpartition("/")[2] or Path(text).suffix.lower().strip(".") not in {*SUFFIXES, "gz"})
    )


def suffix(path: Path) -> str:
    """What a file's name ends in, packed or not: "jsonl" of "a.jsonl.gz"."""
    return path.name.lower().removesuffix(".gz").rpartition(".")[2]


def _refuse_partial(files: list[Path]) -> None:
    """Refuse the files of one part (train-00000-of-00002.parquet ...) where one is missing or one is too many.

    Raises:
        DataError: naming it.
    """
    count = int(files[0].name.split(".")[0].rpartition("-")[2])
    names = [file.name for file in files]
    stem, ending = files[0].name.split("-00000-of-")[0], files[0].name.partition(".")[2]
    wanted = [f"{stem}-{number:05d}-of-{count:05d}.{ending}" for number in range(count)]
    odd = [name for name in wanted if name not in names] or [name for name in names if name not in wanted]
    if odd:
        raise DataError(
            message(
                "the files of a part are not whole",
                where=str(files[0].parent),
                expected=f"{wanted[0]} to {wanted[-1]}",
                found=f"{', '.join(names[:4])}; {odd[0]} is {'missing' if odd[0] in wanted else 'one too many'}",
            )
        )
