"""The exceptions of the library: one tree, each message says what, where, expected, found, and what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

PLAIN = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[tT]rue|[fF]alse|null")  # what is no text without quotes


class AdaptersError(Exception):
    """The root of every error that this library raises on purpose."""

    exit_code = 2
    agreed = False  # it has stopped all processes of a run, and what the first of them says of it is enough

    @property
    def faults(self) -> tuple[str, ...]:
        """The message of each fault, where several are told at once."""
        return tuple(map(str, self.args))


class RequestError(AdaptersError, ValueError):
    """What was asked for cannot be: an unknown name, a wrong option, a backbone that does not fit.

    Of several faults, each is one argument; as text they stand one after the other.
    """

    def __str__(self) -> str:
        return "; ".join(self.faults).replace(".; ", ". ")


class DataError(AdaptersError, ValueError):
    """The data is wrong: a missing column, a row that is not text, a label that nobody knows."""

    exit_code = 3


class FolderError(AdaptersError, ValueError):
    """A folder or file does not hold what it should: truncated, edited, foreign, or not ours to replace."""


class DiskError(AdaptersError, OSError):
    """The disk refuses what is to be written: full, read-only, no permission; nothing half-written is left."""


class BackboneError(AdaptersError, ValueError):
    """The adapter belongs to another backbone than the one at hand."""


class NumbersError(AdaptersError, RuntimeError):
    """A loss, gradient or weight is not finite, or a check of the numbers failed."""

    exit_code = 4


class ContractError(AdaptersError, RuntimeError):
    """A run did not keep its contract: a tensor that should have moved stood, or the other way round."""

    exit_code = 4


class RankError(AdaptersError, RuntimeError):
    """Another process of the same run failed, is gone, or does not answer."""


class SpentError(AdaptersError, RuntimeError):
    """An `Adapted` whose model was merged cannot be saved, trained or merged again."""


class MissingPackageError(AdaptersError, ImportError):
    """An optional package is needed for what was asked."""


def message(what: str, *, where: str = "", expected: object = "", found: object = "", remedy: str = "") -> str:
    """One line in the form that every error of the library takes.

    Args:
        what: the fault, in a few words.
        where: file, row, column, tensor or option at fault.
        expected: what should have been there.
        found: what was there.
        remedy: what the reader can do about it.
    """
    parts = [f"{what} ({where})" if where else what]
    if expected != "":
        parts.append(f"expected {expected}")
    if found != "":
        parts.append(f"found {found}")
    text = "; ".join(parts)
    return _line(f"{text}. {remedy}" if remedy else text)


def _line(text: str) -> str:
    """One line of printable characters: names of files and tensors come from strangers, and a terminal obeys some."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text)


def unquoted(value: object) -> str:
    """The remedy for a number, true or false that came as text: quotes make a text of it; empty for any other value."""
    if not isinstance(value, str) or not PLAIN.fullmatch(value.strip()):
        return ""
    return f"It is a text here: write {value.strip()} without quotes."


SHOWN = 20  # names that a message lists at most


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean ...?` for a misspelt name, and the list of the known ones (the nearest of a long list)."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=SHOWN, cutoff=0.4)
    hint = (
        f"Did you mean {close[0]!r}? " if close and difflib.SequenceMatcher(None, name, close[0]).ratio() >= 0.6 else ""
    )
    if len(names) <= SHOWN:
        return f"{hint}Known: {', '.join(names)}."
    near = list(dict.fromkeys([*close, *names]))[:SHOWN]
    return f"{hint}Known: {', '.join(near)} and {len(names) - SHOWN} more."
