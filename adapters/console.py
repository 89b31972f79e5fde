"""What the commands share: how they speak, what they print, and how they read `key=value`."""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TextIO, final

import typer

from adapters.errors import RequestError, message
from adapters.yamltext import parse_yaml

# The keys of TASKS and STRATEGIES, whose modules a line of help is not worth importing; a test compares them.
TASK_NAMES = (
    "text-classification (unless another is named), token-classification, question-answering, next-sentence, "
    "image-classification, causal-lm, masked-lm, seq2seq, denoising"
)
STRATEGY_NAMES = (
    "lora (unless another is named), qlora, dora, rslora, pissa, full, freeze, probe, bitfit, "
    "ia3, oft, boft, loha, lokr, hra, peft"
)
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, progress on standard error.")]
Folder = Annotated[str, typer.Argument(help="An adapter folder, or the id of one on the hub.")]
Backbone = Annotated[
    str | None, typer.Option("--model", help="The backbone, where it is not the one that the adapter names.")
]
Picture = Annotated[str | None, typer.Option(help="A picture by block and kind of module: a .png or .svg.")]
Columns = Annotated[list[str] | None, typer.Option("--column", help="task column=data column.")]


COLUMNS = re.compile(r"columns=\{([^}]*)\}")  # as Python's callers write it


def spoken(text: str) -> str:
    """A message of the library in a command's words: `--column text=...` where Python says columns={"text": ...}."""

    def option(found: re.Match[str]) -> str:
        said = []
        for part in found[1].split(","):
            wanted, _, column = part.replace("'", "").replace('"', "").partition(":")
            task = wanted.strip().replace("...", "TASK_COLUMN")
            said.append(f"--column {task}={column.strip().replace('...', '') or 'YOUR_COLUMN'}")
        return " ".join(said)

    return COLUMNS.sub(option, text)


_SAID: set[str] = set()
_HUSHED: list[bool] = []
_HELD: list[list[str]] = []  # of a process that does not speak for its run: warnings, and nothing where it does


def say(line: str) -> None:
    """A line of progress; what was said already, when it was found, is not news when it is summed up."""
    if not _HUSHED and not _HELD:
        _print(line)


def _print(line: str) -> None:
    if _HELD:
        _HELD[0].append(line)
    elif line not in _SAID:
        _SAID.add(line)
        print(line, file=sys.stderr, flush=True)


def forget() -> None:
    """Another run begins: what the last one said may be news again."""
    _SAID.clear()


def said(line: str) -> bool:
    """Whether a line has been printed."""
    return line in _SAID


def hush() -> None:
    """From here on what goes well is not told; warnings and errors are."""
    _HUSHED.append(True)


def hold() -> None:
    """From here on this process prints nothing: another one speaks for the run. Warnings are kept for it."""
    _HELD.append([])
    warnings.showwarning = warned


def warned(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show a warning of Python's in one line, as `warnings.showwarning` would: once, whichever process gave it."""
    _print(f"{filename}:{lineno}: {category.__name__}: {' '.join(str(message).split())}")


def held() -> list[str]:
    """The warnings that were kept since the last call."""
    lines = list(dict.fromkeys(_HELD[0])) if _HELD else []
    for kept in _HELD:
        kept.clear()
    return lines


def pass_on(lines: Sequence[Sequence[str]]) -> None:
    """Print what other processes of the run have warned of, each line once, unless it was said here.

    Args:
        lines: of each process, by its number.
    """
    for rank, kept in enumerate(lines):
        for line in kept:
            if line not in _SAID:
                _SAID.add(line)
                print(f"rank {rank}: {line}", file=sys.stderr, flush=True)


@final
class Progress(logging.Handler):
    """What the library logs is progress, too."""

    def emit(self, record: logging.LogRecord) -> None:
        """Say it."""
        _print(self.format(record))


def out(document: Mapping[str, Any]) -> None:
    """One JSON document on standard output."""
    print(json.dumps(document, ensure_ascii=False))


def pairs(entries: list[str], option: str) -> dict[str, Any]:
    """`key=value` entries; values are read as YAML."""
    result = {}
    for entry in entries:
        key, sign, value = entry.partition("=")
        if not sign or not key:
            raise RequestError(message(f"{entry!r} is not key=value", where=option))
        result[key] = parse_yaml(value, f"{option} {key}") if value else ""
    return result


def renamed(columns: list[str] | None) -> dict[str, str]:
    """Task column -> data column, as `--column` gives them."""
    return {wanted: str(found) for wanted, found in pairs(columns or [], "--column").items()}
