"""What the table has measured so far: runs, what each came to, and which of them still say something."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import ROOT

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Run:
    """One measurement; all of it together is the key in the results file.

    Attributes:
        row: of the table.
        case: what is measured, where a row has several: a set, a size.
        side: who.
        seed: of the training; a round where nothing is random.
        size: how much: rows, epochs, gigabytes ...
        threads: that torch may use.
        made: rows or a backbone made here stand in the place of real ones.
        code: of the side, by its bytes.
        installed: versions of what it stands on.
    """

    row: str
    case: str
    side: str
    seed: int
    size: Mapping[str, Any]
    threads: int
    made: bool = False
    code: str = ""
    installed: str = ""

    @property
    def terms(self) -> Run:
        """What must be equal for two results to be one measurement, repeated."""
        return replace(self, seed=0)

    def __str__(self) -> str:
        return ", ".join(part for part in (self.row, self.case, self.side, f"seed {self.seed}") if part)


@dataclass(frozen=True)
class Measured:
    """What a run came to; what a row does not measure is None."""

    run: Run
    seconds: float
    cpu_seconds: float | None = None
    others_cores: float | None = None  # cores that everything else kept busy meanwhile
    accuracy: float | None = None  # over the test rows
    peak_bytes: float | None = None
    machine: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)
    whole_seconds: float = 0.0  # with the process's start and the test
    whole_cpu_seconds: float = 0.0  # of all processes of the run

    @classmethod
    def parse(cls, plain: Mapping[str, Any]) -> Measured:
        """A result from plain data."""
        return cls(**{**plain, "run": Run(**plain["run"])})


# ---------------------------------------------------------------------- keys


def installed() -> str:
    """The packages that a time depends on, without importing them."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def code(*parts: str) -> str:
    """A digest of the sources below some folders or files of the checkout."""
    digest = hashlib.sha256()
    for part in parts:
        place = ROOT / part
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


# ---------------------------------------------------------------------- the file


def known(file: Path) -> list[Measured]:
    """Everything in the file, oldest first."""
    return harness.read(file, Measured.parse)


def keep(result: Measured, file: Path) -> None:
    """Add a result, on disk when this returns."""
    harness.append(asdict(result), file)


def drop(rows: Iterable[str], file: Path) -> None:
    """Forget these rows; the file is replaced as a whole."""
    gone = set(rows)
    if file.is_file():
        rest = [result for result in known(file) if result.run.row not in gone]
        stage = file.with_suffix(".part")
        stage.write_text("".join(f"{json.dumps(asdict(result))}\n" for result in rest), encoding="utf-8")
        stage.replace(file)


def newest(results: Sequence[Measured], row: str) -> list[Measured]:
    """A row's results under the newest terms of each case and side; all sides at the case's newest size."""
    mine = [result for result in results if result.run.row == row]
    last: dict[tuple[str, str], Measured] = {(r.run.case, r.run.side): r for r in mine}
    shared: dict[str, Measured] = {r.run.case: r for r in mine}

    def stands(result: Measured) -> bool:
        run, case = result.run, shared[result.run.case].run
        alike = (run.size, run.threads, run.made) == (case.size, case.threads, case.made)
        return alike and last[run.case, run.side].run.terms == run.terms

    return [result for result in mine if stands(result)]
