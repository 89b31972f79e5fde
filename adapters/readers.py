"""Programs that read adapters: what an export to one of them is asked for, what it finds, what it reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

from adapters.errors import RequestError, message

REWRITTEN, REFUSED, NOTED = "rewritten", "refused", "noted"


@final
@dataclass(frozen=True)
class Finding:
    """Something in an adapter that a reader does not take as it is.

    Attributes:
        what: it is.
        where: tensors, modules or options.
        done: "rewritten" in the export, "refused", or "noted" where it stays and somebody has to know.
        why: what the reader would make of it.
        remedy: what to do, where it is refused.
    """

    what: str
    where: str
    done: str
    why: str
    remedy: str = ""

    def __str__(self) -> str:
        return message(f"{self.what}, {self.done}: {self.why}", where=self.where, remedy=self.remedy)


@final
@dataclass(frozen=True)
class ExportOptions:
    """What an export is asked for beside its target.

    Attributes:
        base: the backbone's folder, where it is not the one that the adapter names.
        rank: cut every update to this rank, at an error that is measured; None leaves out nothing.
        max_rank: the highest rank that the server is started for.
        dtype: of the written tensors: "float32", "float16", "bfloat16"; None for the target's own choice.
        heads: the server takes an output layer called classifier or score beside the factors (newer vLLM).
        rows: raw rows of the task on which answers are compared; None makes inputs at random.
        check: compare the answers of what was written with the adapted model's.
        accept: go on where a lossy target changes more answers than its bound allows.
    """

    base: str | Path | None = None
    rank: int | None = None
    max_rank: int = 16
    dtype: str | None = None
    heads: bool = False
    rows: Sequence[Any] | None = None
    check: bool = True
    accept: bool = False


@final
@dataclass(frozen=True)
class ExportReport:
    """What an export wrote, and how far what its reader makes of it lies from the adapted model.

    Attributes:
        target: the reader; output: the written folder; files: in it, name -> bytes.
        findings: what was rewritten or has to be known.
        rank: of the written updates, 0 where there are none.
        weight_error: Frobenius norm of what a rank left out, as a share of all changes' norm.
        max_weight_difference: largest difference, over all changed entries, between what the reader computes from the
            written file and what was to be written.
        max_difference, mean_difference, agreement, spread: of the reader's answers and the adapted model's: absolute,
            share of equal best answers, standard deviation of the adapted model's.
        compared: the logits were compared; else `skipped` says why not.
        next: the line with which the reader opens it.
        facts: whatever else was measured, as plain data.
    """

    target: str
    output: str
    files: Mapping[str, int]
    findings: tuple[Finding, ...] = ()
    rank: int = 0
    weight_error: float = 0.0
    max_weight_difference: float | None = None
    max_difference: float | None = None
    mean_difference: float | None = None
    agreement: float | None = None
    spread: float | None = None
    compared: bool = False
    skipped: str = ""
    next: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(self.files.values())

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "bytes": self.bytes}


Exporter = Callable[[Path, Path, ExportOptions], ExportReport]


def refuse(findings: Sequence[Finding], target: str) -> None:
    """Refuse what a reader cannot take, all of it at once.

    Raises:
        RequestError: a line for every refused finding.
    """
    refused = [finding for finding in findings if finding.done == REFUSED]
    if refused:
        raise RequestError(
            *(message(f"{target} cannot take {f.what}: {f.why}", where=f.where, remedy=f.remedy) for f in refused)
        )


def sizes(folder: Path) -> dict[str, int]:
    """The files of a folder and their bytes."""
    return {
        file.relative_to(folder).as_posix(): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()
    }
